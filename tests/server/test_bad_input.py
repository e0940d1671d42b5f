"""Wrong input gets one clear sentence, as early as possible, and harms no other request."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch

from config_files import config_file
from serving import Media, Message, Served, image, same, text, user, video
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.serving import prompts
from sglang_mminfer.tools.media import make_video

# ---- at launch ---------------------------------------------------------------------------------------------

LAUNCH_ALL = """
import json, os, runpy, sys, tempfile, traceback
import sglang.launch_server, sglang.srt.entrypoints.http_server
from sglang.srt.server_args import prepare_server_args

def launch(arguments):
    sys.argv = ["sglang.launch_server", *arguments]
    try:
        runpy.run_module("sglang.launch_server", run_name="__main__")
    except SystemExit as error:
        return error.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for arguments in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = launch(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        print(json.dumps([code, output.read().decode()]), flush=True)
"""
"""Runs the launcher's own main in a process for each start; what all of them need is imported once."""


def content(**changes: Any) -> dict[str, Any]:
    return json.loads(HeadConfig.load(config_file("test_grid_frame")).to_json()) | changes


def other_model() -> dict[str, Any]:
    return {
        **{"architecture": "Qwen2_5_VLForConditionalGeneration", "layers": 28, "heads": 28, "kv_heads": 4},
        **{"head_dim": 128, "hidden_size": 3584, "rope_theta": 1e6},
    }


A_SHAPE = {"boundary": "none", "pattern": {"kind": "a_shape", "sink": 16, "local": 48}}

BAD_CONFIGS: dict[str, tuple[str | None, str]] = {
    "missing": (None, r"no such file$"),
    "malformed": ("{'schema': 1}", r"not valid JSON"),
    "truncated": (json.dumps(content())[:-40], r"not valid JSON|truncated"),
    "unknown key": (json.dumps(content(colour="red")), r"colour"),
    "bad range": (
        json.dumps(content(heads={"all": {"boundary": "none", "pattern": {**A_SHAPE["pattern"], "sink": -1}}})),
        r"heads\.all\.pattern\.sink: expected an integer >= 0, got -1$",
    ),
    "wrong shape": (json.dumps(content(heads=[[A_SHAPE] * 8, [A_SHAPE] * 7])), r"heads\[1\]: expected 8 heads"),
    "too few heads": (json.dumps(content(heads=[[A_SHAPE] * 2] * 2)), r"heads\[0\]: expected 8 heads as in the model"),
    "too many layers": (json.dumps(content(heads=[[A_SHAPE] * 8] * 3)), r"heads: expected 2 layers as in the model"),
    "wrong model": (json.dumps(content(model=other_model())), r"made for another model: layers"),
}
"""By name: the file's content (None: no file), and what the launch must say about it."""

FOUND_BY_THE_PARSER = ("missing", "malformed", "truncated", "unknown key", "bad range", "wrong shape")


@pytest.fixture(scope="module")
def launches(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """The exit status and last line of every launch."""
    root = tmp_path_factory.mktemp("bad")
    starts = []
    for name, (written, _) in BAD_CONFIGS.items():
        path = root / f"{name.replace(' ', '-')}.json"
        if written is not None:
            path.write_text(written)
        starts.append(
            [
                *("--model-path", str(model), "--device", "cpu"),
                *("--attention-backend", "mminfer", "--mminfer-config", str(path)),
            ]
        )
    out = subprocess.run(
        [sys.executable, "-c", LAUNCH_ALL, json.dumps(starts)], capture_output=True, text=True, check=True, timeout=300
    )
    results = [json.loads(line) for line in out.stdout.splitlines()]
    return {name: (code, said.strip().splitlines()[-1]) for name, (code, said) in zip(BAD_CONFIGS, results)}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_head_config_ends_the_launch(launches: dict[str, tuple[int, str]], name: str) -> None:
    code, line = launches[name]
    assert code == (2 if name in FOUND_BY_THE_PARSER else 1), line
    assert "--mminfer-config" in line
    assert f"{name.replace(' ', '-')}.json" in line
    assert re.search(BAD_CONFIGS[name][1], line), line


# ---- a request's media -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory, media: Media) -> dict[str, Path]:
    import imageio_ffmpeg

    root = tmp_path_factory.mktemp("bad-media")
    files = {name: root / f"{name.replace(' ', '-')}.mp4" for name in ("no video", "truncated", "zero frames")}
    files["no video"].write_bytes(b"this is no video" * 100)
    files["truncated"].write_bytes(media.videos[0].read_bytes()[:600])
    source = ["-f", "lavfi", "-i", "color=red:size=112x112:rate=8"]
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *source, "-t", "0", str(files["zero frames"])],
        check=True,
    )
    files["no such file"] = root / "nowhere.mp4"
    files["no image"] = root / "no.png"
    files["no image"].write_bytes(b"this is no image" * 100)
    return files


@pytest.mark.server("main")
@pytest.mark.parametrize("name", ["no video", "truncated", "zero frames", "no such file", "no image"])
def test_unreadable_medium_is_the_clients_error(
    servers: Callable[[str], Served], media: Media, bad_files: dict[str, Path], name: str
) -> None:
    main = servers("main")
    good = [user(video(media.videos[1]), text("And now?"))]
    before = main.ask(good)
    part = image if name == "no image" else video
    with pytest.raises(openai.APIStatusError) as raised:
        main.ask([user(part(bad_files[name]), text("What do you see?"))])
    assert raised.value.status_code == 400, raised.value
    assert len(str(raised.value)) > 20
    same(before, main.ask(good))


@pytest.mark.server("main")
def test_bad_request_in_a_batch_harms_no_other(
    servers: Callable[[str], Served], media: Media, bad_files: dict[str, Path]
) -> None:
    main = servers("main")
    good: list[list[Message]] = [media.conversation(seed, 1) for seed in range(60, 64)]
    expected = [main.ask(prompt) for prompt in good]
    main.server.flush_cache()
    for _ in range(3):
        with pytest.raises(openai.APIStatusError):
            main.ask([user(video(bad_files["truncated"]), text("Who?"))])
    for one, other in zip(expected, main.ask_all(good)):
        same(one, other)


@pytest.mark.server("main")
def test_shortest_video_is_served(main: Served, tmp_path: Path) -> None:
    """Two frames become one temporal patch, so the grid has a single frame."""
    path = make_video(tmp_path / "two.mp4", 2, 112, 112, 8, seed=9)
    answer = main.ask([user(video(path), text("What is this? " * 20))], rid="two-frames")
    assert len(answer.token_ids) == 8
    (*_, last) = main.records("two-frames")
    assert (last.dense_reason, last.segments) == (None, 3)


@pytest.mark.server("main")
def test_video_of_one_frame_is_refused_by_sglangs_sampler(main: Served, media: Media, tmp_path: Path) -> None:
    path = make_video(tmp_path / "one.mp4", 1, 112, 112, 8, seed=9)
    with pytest.raises(openai.BadRequestError, match="nframes should in interval"):
        main.ask([user(video(path), text("What is this?"))])
    assert main.ask([user(image(media.images[0]), text("And this?"))]).token_ids


# ---- what the processor says about the media ---------------------------------------------------------------

GRID = torch.tensor([[4, 8, 8]])  # 4 frames of 4 x 4 tokens
GOOD = ((20, 83), GRID)
LENGTH = 400

BAD_GEOMETRY: dict[str, tuple[list[tuple[tuple[int, int] | None, torch.Tensor]], str, str]] = {
    "overlapping": ([GOOD, ((60, 123), GRID)], "overlapping_offsets", "overlaps"),
    "out of range": ([((LENGTH - 10, LENGTH + 53), GRID)], "out_of_range_offsets", "inside the prompt of 400 tokens"),
    "negative": ([((-5, 58), GRID)], "out_of_range_offsets", "expected a first token >= 0"),
    "empty span": ([((30, 29), GRID)], "empty_span", "expected at least one token"),
    "no offsets": ([(None, GRID)], "no_offsets", "expected the offsets of its tokens"),
    "grid too large": ([((20, 83), torch.tensor([[5, 8, 8]]))], "grid_mismatch", "expected 80 tokens"),
    "odd grid": ([((20, 83), torch.tensor([[4, 7, 8]]))], "grid_mismatch", "divisible by the merge of 2"),
    "zero frames": ([((20, 83), torch.tensor([[0, 8, 8]]))], "zero_frames", "expected at least one"),
    "two grids": ([((20, 83), GRID.expand(2, 3))], "grid_mismatch", "got 2 for 1 spans"),
}
"""By name: offsets and grid of each video in a prompt, the reason in the trace, words of the warning."""


def inputs(videos: list[tuple[tuple[int, int] | None, torch.Tensor]]) -> Any:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

    items = [
        MultimodalDataItem(
            modality=Modality.VIDEO,
            offsets=None if offsets is None else [offsets],
            model_specific_data={"video_grid_thw": grid},
        )
        for offsets, grid in videos
    ]
    mm_inputs = MultimodalInputs(mm_items=items)
    mm_inputs.mrope_positions = torch.zeros(3, LENGTH, dtype=torch.long)
    return mm_inputs


def batch_of(*media_of_requests: Any) -> Any:
    """The fields of a ForwardBatch that `begin` reads."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    count = len(media_of_requests)
    rids = [f"request-{i}" for i in range(count)]
    prompts.keep(dict.fromkeys(rids, LENGTH))
    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        extend_seq_lens_cpu=[LENGTH] * count,
        extend_prefix_lens_cpu=[0] * count,
        rids=rids,
        mm_inputs=list(media_of_requests),
        req_pool_indices=torch.arange(count),
    )


@pytest.fixture
def prefill(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A SparsePrefill without a server; it writes its trace to `tmp_path`."""
    from transformers import AutoConfig

    from sglang_mminfer import settings
    from sglang_mminfer.serving.sparse_prefill import SparsePrefill

    monkeypatch.setenv(settings.TRACE.variable, str(tmp_path / "trace.jsonl"))
    monkeypatch.setenv("SGLANG_MMINFER_CONFIG", config_file("test_grid_frame"))
    monkeypatch.setattr(
        "sglang.srt.runtime_context.get_parallel",
        lambda: SimpleNamespace(attn_tp_rank=0, attn_tp_size=1, tp_rank=0, tp_size=1),
    )
    runner = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=AutoConfig.from_pretrained(model), num_hidden_layers=2, head_dim=16),
        server_args=SimpleNamespace(enable_metrics=False),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(4 * LENGTH).view(4, LENGTH)),
        token_to_kv_pool=None,
        device="cpu",
        dtype=torch.float32,
    )
    return SparsePrefill(runner, "torch_native")


@pytest.mark.parametrize("name", BAD_GEOMETRY)
def test_media_that_cannot_be_laid_out_run_dense_and_are_counted(
    prefill: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    videos, reason, words = BAD_GEOMETRY[name]
    bad = inputs(videos)
    prefill.begin(batch_of(bad))
    assert not prefill.takes(torch.empty(LENGTH, 1), SimpleNamespace(), {})  # the stock backend runs all of it
    prefill.begin(batch_of(bad))  # the next chunk
    prefill.end()
    records = traced(prefill)
    assert {(r.dense_reason, r.sparse_layers) for r in records} == {(reason, 0)}
    (warning,) = [r.getMessage() for r in caplog.records if "runs dense" in r.getMessage()]  # once, not for each chunk
    assert "request-0" in warning and words in warning


@pytest.mark.parametrize("name", BAD_GEOMETRY)
def test_its_neighbour_in_the_batch_stays_sparse(prefill: Any, name: str) -> None:
    videos, reason, _ = BAD_GEOMETRY[name]
    prefill.begin(batch_of(inputs([GOOD]), inputs(videos)))
    good, bad = prefill.batch.requests
    assert (good.dense_reason, bad.dense_reason) == (None, reason)
    with_map, without = prefill.batch.planner.requests
    assert with_map.map is good.map and without.map is None  # no map: plain causal attention


def traced(prefill: Any) -> list[Any]:
    from sglang_mminfer.serving.trace import read_trace

    return read_trace(prefill.trace.path)
