"""What `mminfer doctor --video` says for every family of `tests/families`, against the family's oracle."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins

from families import FAMILIES, Family
from sglang_mminfer.tools.doctor import report as doctor
from sglang_mminfer.tools.doctor import video as doctor_video
from sglang_mminfer.tools.doctor.video import VideoOptions
from sglang_mminfer.tools.media import make_video

load_plugins()

MB = 2**20
FP32 = 4
TAIL = {"llava_onevision": 1}
"""Tokens of a video beside its frames: a newline at its end."""


@dataclass(frozen=True)
class Case:
    family: Family
    path: str
    video: str

    @property
    def mm_process_config(self) -> dict[str, Any] | None:
        return {"video": dict(self.family.video_options)} if self.family.video_options else None

    @property
    def launch(self) -> dict[str, bool]:
        """Those of the family's flags that the command has, too, as fields of ServerArgs."""
        ours = {"--trust-remote-code": "trust_remote_code", "--enable-multimodal": "enable_multimodal"}
        return {ours[flag]: True for flag in self.family.flags if flag in ours}

    def found(self, **options: Any) -> dict[str, doctor.Finding]:
        asked = VideoOptions(self.video, self.mm_process_config, **options)
        found = doctor_video.examine_video(self.path, None, asked, self.launch)
        return {finding.name: finding for finding in found}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_video(tmp_path_factory.mktemp("video") / "a.mp4", frames=12, width=128, height=96, fps=4, seed=1))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest, video: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family: Family = request.param
    return Case(family, str(family.make(tmp_path_factory.mktemp(family.name) / "model")), video)


def model_config(path: str) -> dict[str, Any]:
    """A config.json, or the part of it that is the model's, where others are beside it."""
    config = json.loads((Path(path) / "config.json").read_text())
    return config.get("thinker_config") or config


def text_config(path: str) -> dict[str, Any]:
    """The language model's part of a config.json, wherever the config has it."""
    root = Path(path)
    config = model_config(path)
    for name in ("text_config", "llm_config"):
        if name in config:
            return config[name]
    return json.loads((root / "llm" / "config.json").read_text()) if (root / "llm").is_dir() else config


def test_tokens_grid_and_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if not case.family.video:
        pytest.skip("another test says what comes of it")
    parts = [{"type": "video_url", "video_url": {"url": case.video}}, {"type": "text", "text": doctor_video.QUESTION}]
    expected = case.family.make_oracle(case.path).answer([{"role": "user", "content": parts}], 1).prompt_ids
    server_args = doctor.server_args_of(case.path, None, mm_process_config=case.mm_process_config, **case.launch)
    prompt = doctor_video.prompt_of(server_args, case.video)
    assert prompt.input_ids == expected

    # Without room in the cache, the command says what the cache would have to hold and how often the encoder runs.
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", "0")
    found = case.found(chunked_prefill_size=32)
    assert set(found) == {"file", "tokens", "grid", "vision encoder", "KV cache", "density"}, found
    total, media = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+", found["tokens"].text)[:2])
    assert total == len(expected)
    frames, rows, cols = map(int, re.match(r"(\d+) frames of (\d+) x (\d+) tokens", found["grid"].text).groups())
    assert frames * rows * cols + TAIL.get(case.family.name, 0) == media

    config = text_config(case.path)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    layers = config.get("layer_types", []).count("full_attention") or config["num_hidden_layers"]
    kv = total * layers * config["num_key_value_heads"] * 2 * head_dim * FP32
    assert found["KV cache"].text.startswith(f"{kv / MB:.1f} MB for this prompt")
    deep = model_config(case.path).get("vision_config") or {}
    width = hidden * (1 + len(deep.get("deepstack_visual_indexes") or ()))
    assert found["vision encoder"].text.startswith(f"{media * width * FP32 / MB:.1f} MB of embeddings")
    assert ("in chunks of 32" in found["vision encoder"].text) == case.family.chunked_prefill
    assert 0 < float(found["density"].text.split()[0]) <= 1
    assert " of what dense attention computes, default" in found["density"].text
    assert found["grid"].status == found["tokens"].status == "ok"


def test_a_family_without_video_says_so(case: Case) -> None:
    if case.family.video:
        pytest.skip("it takes video")
    (finding,) = case.found().values()
    assert finding.status == "error" and finding.fix
    name = case.family.architecture
    assert re.search(f"{name} takes images, and SGLang no video|video: .* SGLang reads none for {name}", finding.text)
