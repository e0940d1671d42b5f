"""An embedding model runs its prefill through mminfer, as a generating model does."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch

from config_files import config_file
from serving import LAYERS, Media
from sglang_mminfer import settings
from sglang_mminfer.serving.trace import read_trace
from sglang_mminfer.testing.oracle import HFOracle
from sglang_mminfer.tools.server import Server


def test_an_embedding_is_transformers_last_hidden_state(model: Path, media: Media, tmp_path: Path) -> None:
    """The config leaves nothing out; the prompt runs on the sparse path, in chunks."""
    trace, picture = tmp_path / "trace.jsonl", str(media.images[0])
    prompt = "<|vision_start|><|image_pad|><|vision_end|>" + "What do you see?" * 40
    covering = ("--attention-backend", "mminfer", "--mminfer-config", config_file("test_covering"))
    flags = (*covering, "--chunked-prefill-size", "64")
    env = {settings.TRACE.variable: str(trace), settings.SPARSE.variable: "always", "SGLANG_PLATFORM": None}
    with Server(model, *flags, "--is-embedding", env=env, log=tmp_path / "server.log", timeout=400) as server:
        body = {"text": prompt, "image_data": picture, "rid": "embedded"}
        request = urllib.request.Request(
            f"{server.url}/encode", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            got = torch.tensor(json.loads(answer.read())["embedding"])
    records = [r for r in read_trace(trace) if r.rid == "embedded"]
    assert len(records) > 1 and {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
    oracle = HFOracle(model)
    from PIL import Image

    inputs = oracle.processor(text=[prompt], images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        hidden = oracle.model.model(**inputs).last_hidden_state[0, -1]
    assert torch.allclose(got, hidden / hidden.norm(), atol=1e-4)


def test_it_is_no_generating_model(model: Path) -> None:
    """Without this the test before might test a generating model."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(model), is_embedding=True, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "mminfer_cpu")
        server_args.resolve_once()
    assert not model_config_of(server_args).is_generation
