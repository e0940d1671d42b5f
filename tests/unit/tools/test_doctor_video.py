"""What `mminfer doctor --video` says of a real file, against transformers' processor on the same checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.plugins import load_plugins

from sglang_mminfer import cli, settings
from sglang_mminfer.head_config import Defaults, HeadConfig, Provenance
from sglang_mminfer.kernels import reference
from sglang_mminfer.mends import media_cache
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.testing.oracle import HFOracle
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools.doctor import report as doctor
from sglang_mminfer.tools.doctor import video as doctor_video
from sglang_mminfer.tools.doctor.video import VideoOptions
from sglang_mminfer.tools.media import make_video
from support import conversation

load_plugins()

LAYERS, HEADS, KV_HEADS, D = 2, 4, 2, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    recipe = {"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": D}
    return str(make_tiny_qwen2_5_vl(tmp_path_factory.mktemp("tiny") / "model", **recipe))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_video(tmp_path_factory.mktemp("video") / "a.mp4", frames=60, width=224, height=140, fps=10))


@pytest.fixture
def without_weights(model: str, tmp_path: Path) -> str:
    """The same checkpoint without its weights, because the command must not need them."""
    copy = tmp_path / "no_weights"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    return str(copy)


def named(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def asked(model: str, video: str, config: str | None = None, **options: Any) -> dict[str, doctor.Finding]:
    return named(list(doctor_video.examine_video(model, config, VideoOptions(video, **options))))


def processed(model: str, video: str, config: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The prompt of the same request and [frames, rows, cols] in patches, by transformers' processor."""
    parts = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": doctor_video.QUESTION}]
    inputs = HFOracle(model, mm_process_config=config).inputs([{"role": "user", "content": parts}])
    return inputs["input_ids"][0].tolist(), inputs["video_grid_thw"][0].tolist()


def test_time_is_told_by_stage_and_what_is_kept(
    without_weights: str, video: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(text: str) -> dict[str, int]:
        return {name: int(number) for name, number in re.findall(r"(\w+) (\d+)(?=[,;]|$)", text)}

    for megabytes, kept in (("64", True), ("0", False)):
        monkeypatch.setenv(settings.MEDIA_CACHE_MB.variable, megabytes)
        media_cache.of_process.cache_clear()
        findings = asked(without_weights, video, time=True)
        first, later = (findings[f"time, {turn}"].text for turn in ("first turn", "later turns"))
        for text in (first, later):
            total = int(re.match(r"\d+", text)[0])
            assert stages(text).keys() >= {"open", "decode", "resize", "preprocess", "features"}
            assert sum(stages(text).values()) <= total + 3, "stages follow one another"
        assert stages(first)["decode"] > 0 and (stages(later)["decode"] == 0) == kept
        assert ("nothing of it is kept" in later) != kept and f"{megabytes} MB" in later
        assert "encode_ms" in findings["time, not here"].text
    media_cache.of_process.cache_clear()
    assert "time, first turn" not in asked(without_weights, video)


CONFIGS = [None, {"video": {"fps": 5, "min_pixels": 4 * 784, "max_pixels": 40 * 784}}]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "mm_process_config"])
def test_tokens_grid_and_map_are_those_of_the_processor(
    config: dict[str, Any] | None, model: str, without_weights: str, video: str
) -> None:
    prompt_ids, (frames, height, width) = processed(model, video, config)
    rows, cols = height // 2, width // 2
    server_args = doctor.server_args_of(without_weights, None, mm_process_config=config)
    prompt = doctor_video.prompt_of(server_args, video)
    assert prompt.input_ids == prompt_ids

    from sglang.srt.arg_groups.overrides import model_config_of

    segments = doctor_video.map_of(prompt, model_config_of(server_args)).segments
    (seen,) = [segment for segment in segments if segment.modality == "video"]
    token = max(set(prompt_ids), key=prompt_ids.count)  # a video's placeholder is most of the prompt
    assert (seen.start, seen.stop) == (prompt_ids.index(token), prompt_ids.index(token) + frames * rows * cols)
    assert seen.grid is not None and (seen.grid.frames, seen.grid.rows, seen.grid.cols) == (frames, rows, cols)

    found = asked(without_weights, video, mm_process_config=config)
    media = frames * rows * cols
    assert prompt_ids.count(token) == media
    assert found["tokens"].text.startswith(f"{len(prompt_ids):,} in a prompt with it and one question: {media:,} of")
    assert found["grid"].text.startswith(f"{frames} frames of {rows} x {cols} tokens")
    assert found["file"].text.startswith("60 frames, 10 a second")
    assert ('"fps": 5' in found["file"].text) == (config is not None)
    size = len(prompt_ids) * LAYERS * KV_HEADS * 2 * D * 4
    assert found["KV cache"].text.startswith(f"{size / 2**20:.1f} MB for this prompt"), "fp32 on a CPU"
    assert 0 < float(found["density"].text.split()[0]) <= 1
    assert " of what dense attention computes, default" in found["density"].text
    assert not [finding for finding in found.values() if finding.status in ("warning", "error")]


def test_a_video_that_the_cache_refuses(without_weights: str, video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video is encoded once for every chunk that holds a part of it; with the suggested cache size, only once."""
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", "0")
    found = asked(without_weights, video, chunked_prefill_size=100)
    media = int(found["tokens"].text.split(": ")[1].split(" of")[0].replace(",", ""))
    finding = found["vision encoder"]
    first = 20  # most of the 30 text tokens precede the video; the count may be off by one chunk
    runs = int(finding.text.split("runs ")[1].split()[0])
    assert abs(runs - (first + media) / 100) <= 1
    assert finding.status == "warning" and f"{media * HEADS * D * 4 / 2**20:.1f} MB of embeddings" in finding.text
    assert finding.fix and "SGLANG_VLM_CACHE_SIZE_MB=64" in finding.fix
    assert asked(without_weights, video, chunked_prefill_size=-1)["vision encoder"].status == "ok"
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", "64")
    assert asked(without_weights, video, chunked_prefill_size=100)["vision encoder"].status == "ok"


def test_chunks_of_spans() -> None:
    class Item:
        def __init__(self, *offsets: tuple[int, int]) -> None:
            self.offsets = offsets

    assert doctor_video.chunks_of([Item((10, 99))], 100) == 1
    assert doctor_video.chunks_of([Item((10, 100))], 100) == 2
    assert doctor_video.chunks_of([Item((10, 20), (450, 460)), Item((455, 500))], 100) == 3
    assert doctor_video.chunks_of([Item((10, 10**6))], None) == 1


def test_density_is_that_of_what_all_heads_visit() -> None:
    """Two layers of unlike heads, each counted tile by tile; rows below `dense_below` see everything."""
    modality_map = conversation(30, (12, 5, 6), 20, (1, 8, 8), 25)
    length = modality_map.length
    rows = (
        (AShape(8, 40), Grid("frame", True, False, True, 3, 8, 40), Dense()),
        (AShape(8, 40), Grid("row", False, True, True, 2, 0, 16), AShape(0, 16)),
    )
    config = HeadConfig("two", Provenance("handwritten", "A test."), "layers", rows, defaults=Defaults(100))
    shares = []
    for heads in rows:
        chunk = RequestChunk(modality_map, 0, length, 0, torch.arange(length))
        plan = BatchPlanner([chunk], length, dense_below=100).plan(heads)
        for head in range(len(heads)):
            visited = int(reference.visited_mask(plan, head, slice(0, length), length).tril().sum())
            shares.append(visited / (length * (length + 1) / 2))
    assert min(shares) < 0.9 and max(shares) == 1
    expected = doctor_video.expected_density(modality_map, config, 2)
    assert expected == pytest.approx(sum(shares) / len(shares), rel=1e-6)


# If something cannot be told, the command says so in one clear sentence.


@pytest.fixture
def broken(tmp_path: Path, video: str) -> str:
    path = tmp_path / "broken.mp4"
    path.write_bytes(Path(video).read_bytes()[:700])
    return str(path)


def one(findings: dict[str, doctor.Finding]) -> doctor.Finding:
    (found,) = findings.values()
    assert found.status == "error" and found.fix and "\n" not in found.text
    return found


def test_a_missing_file(model: str) -> None:
    assert one(asked(model, "/absent/a.mp4")).text == "/absent/a.mp4: no such file"


def test_a_broken_video(model: str, broken: str) -> None:
    assert f"{broken}: not a video that can be decoded (700 bytes): " in one(asked(model, broken)).text


def test_a_model_without_media(tmp_path: Path, video: str) -> None:
    content = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64}
    content |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert one(asked(str(tmp_path), video)).text == "Qwen2ForCausalLM takes no images or video"


def test_a_model_that_is_not_there(tmp_path: Path, video: str) -> None:
    assert one(asked(str(tmp_path / "absent"), video)).text.startswith("not looked at, because no server would start")


def test_a_video_longer_than_the_context(without_weights: str, video: str) -> None:
    path = Path(without_weights) / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["max_position_embeddings"] = 100
    path.write_text(json.dumps(content))
    found = named(list(doctor_video.examine_video(without_weights, None, VideoOptions(video))))
    assert found["video"].status == "error" and "context length (100 tokens)" in found["video"].text


def test_the_command(without_weights: str, video: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model-path", without_weights, "--video", video, "--mm-process-config", '{"video": {"fps": 1}}']
    assert cli.main(["doctor", "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    shown = {finding["name"]: finding["text"] for finding in report["findings"] if finding["section"] == "this video"}
    assert set(shown) == {"file", "tokens", "grid", "vision encoder", "KV cache", "density"}
    assert shown["grid"].startswith("3 frames of ")  # six seconds, one a second, two to a token


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--video", __file__], "--video needs --model-path"),
        (["--mm-process-config", "[1]"], "expected a JSON object, got '[1]'"),
        (["--mm-process-config", "{"], "expected a JSON object, got '{'"),
    ],
)
def test_usage_errors(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *flags]) == 2 and said in capsys.readouterr().err
