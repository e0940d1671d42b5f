"""EAGLE3 on a real GPU (`make test-gpu`), with SGLang's own kernels, CUDA graphs and overlapped batches.

The counterpart of tests/server/test_speculative.py, in bf16. It has not been run yet: it takes a card and SGLang on one
machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_mminfer import settings


def why_not() -> str:
    """Why these tests cannot run; empty if they can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    try:
        import sglang.srt.server_args  # noqa: F401
    except Exception as error:  # a tree without its dependencies fails in many ways
        return f"SGLang cannot be imported: {type(error).__name__}: {error}"
    return ""


REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "runs")

LAYERS, NEW_TOKENS = 2, 48
ROUNDED = 0.25
"""The most that a log-probability may differ: batches of other shapes take other kernels, and round in bf16."""


@pytest.mark.parametrize("more", [(), ("--disable-overlap-schedule",), ("--speculative-adaptive",)], ids=" ".join)
def test_answers_are_those_without_drafts(tmp_path: Path, more: tuple[str, ...]) -> None:
    from families import eagle3
    from serving import DENSE_BELOW, VOCABULARY, Served, ran_sparse, text, user, video, write_sparse_config
    from sglang_mminfer.testing.oracle import compare
    from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
    from sglang_mminfer.tools.media import make_video
    from sglang_mminfer.tools.server import Server

    # The draft's head dim is four times that of the target, and kernels have one of 256.
    model = make_tiny_qwen2_5_vl(tmp_path / "model", layers=LAYERS, heads=2, kv_heads=1, head_dim=64)
    film = make_video(tmp_path / "film.mp4", 16, 448, 448, 2, seed=5)
    prompts = [[user(video(film), text(f"What is {word}?"))] for word in VOCABULARY[:4]]
    config = write_sparse_config(tmp_path / "heads.json")
    flags = ("--attention-backend", "mminfer", "--mminfer-config", str(config), "--chunked-prefill-size", "512")
    trace = tmp_path / "trace"
    env = {settings.TRACE.variable: str(trace), settings.SPARSE.variable: "always"}

    def server(name: str, *flags: str) -> Served:
        return Served(Server(model, *flags, "--dtype", "bfloat16", env=env, log=tmp_path / name, timeout=900), trace)

    plain = server("plain", *flags)
    with plain.server:
        expected = [plain.ask(prompt, NEW_TOKENS) for prompt in prompts]
    draft = eagle3.make(tmp_path / "draft", model, [answer.token_ids for answer in expected[:2]], layers=range(LAYERS))
    drafts = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft))
    speculating = server("speculating", *flags, *drafts, *more)
    with speculating.server:
        answers = speculating.ask_all(prompts, NEW_TOKENS, rids=[f"ask-{i}" for i in range(len(prompts))])
        for i, (answer, got) in enumerate(zip(expected, answers, strict=True)):
            result = compare(answer, got)
            assert result.prompt_equal and result.max_difference < ROUNDED, str(result)
            assert ran_sparse([r for r in speculating.records(f"ask-{i}") if r.seq_len > DENSE_BELOW])
        counters = json.loads(speculating.get("/mminfer"))["counters"]
        assert 0 < counters["requests"]["mode_target_verify"] < 0.95 * NEW_TOKENS * len(prompts)
