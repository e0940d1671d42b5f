"""`mminfer inspect` shows what the layers did: checked against their LSE, the exact masks, and whole pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

import observed
from config_files import config_file
from families import qwen3_5
from sglang_mminfer import AShape, Dense, Grid, HeadConfig, Modality, QBoundary, cli, settings
from sglang_mminfer.kernels import reference
from sglang_mminfer.kernels.rows import dense_rows
from sglang_mminfer.patterns import dense, grid
from sglang_mminfer.patterns.index import TEXT_AFTER_VISION
from sglang_mminfer.planning.visited import order_of, visited_rows
from sglang_mminfer.serving import audit, observe
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.tools.inspect import command
from sglang_mminfer.tools.inspect import reasons as inspect_reasons
from sglang_mminfer.tools.inspect.capture import REQUEST, Capture, Request, create

HEADS = [(0, head) for head in range(observed.HEADS)] + [(1, 0)]
CHUNKS = {"whole": [0, observed.LENGTH], "chunks": [0, 96, 300, 555, observed.LENGTH]}


def captured(
    folder: Path, config: str, monkeypatch: pytest.MonkeyPatch, cuts: list[int], rows: int = 5000
) -> list[observe.LayerView]:
    """Prefill a prompt with a Capture at work, which writes its record to `folder`."""
    monkeypatch.setenv(settings.TRACE.variable, str(folder / "trace.jsonl"))
    (folder / REQUEST).write_bytes(msgspec.json.encode(Request(command.RID, HEADS, rows=rows, bins=50)))
    capture = create(str(folder), observe.RankInfo(0, 1, observed.LAYERS, None))
    assert isinstance(capture, Capture)
    watch = observed.Keeps()
    prefill = observed.prefill(config, monkeypatch, capture, watch)
    for start, stop in zip(cuts, cuts[1:]):  # noqa: RUF007
        observed.run(prefill, observed.batch(start, stop, command.RID))
    assert prefill.observers.failures == 0
    return watch.views


@pytest.mark.parametrize("cuts", CHUNKS)
@pytest.mark.parametrize("config", ["test_mixed_heads", "test_vertical_slash", "dense"])
def test_squares_and_rows_are_those_of_the_layers(
    tmp_path: Path, config: str, cuts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = captured(tmp_path, config, monkeypatch, CHUNKS[cuts])
    for layer, head in HEADS:
        with np.load(tmp_path / f"head-{layer}-{head}.npz") as saved:
            assert np.array_equal(saved["position"], np.arange(observed.LENGTH))  # so few rows that all are sampled
            lost = 0.0
            for view in (view for view in views if view.layer_id == layer):
                (request,) = view.requests
                mine = slice(request.prefix_len, request.seq_len)
                if view.lse is None:
                    assert (saved["recall"][mine] == 1).all() and saved["error"][mine].max() < 1e-4
                    continue
                where = torch.arange(request.prefix_len, request.seq_len)
                k, v = view.k_cache, view.v_cache
                o, lse = dense_rows(view.q, where, k, v, request.slots, view.sm_scale)
                recall = torch.exp2(view.lse[:, head] - lse[:, head])
                assert np.allclose(saved["recall"][mine], recall, atol=1e-4)
                assert np.allclose(saved["error"][mine], (view.out - o)[:, head].norm(dim=1), atol=1e-4)
                lost += float((1 - recall).sum())
                visited = reference.visited_mask(view.plan, head, request.rows, request.seq_len)
                assert torch.equal(visited, visited_rows(view.plan, head, where - mine.start, request.seq_len))
                assert np.array_equal(saved["visited_by_row"][mine], visited.sum(dim=1))
            causal = observed.LENGTH * (observed.LENGTH + 1) / 2
            for side in ("original", "permuted"):
                assert saved[f"{side}_mass"].sum() == pytest.approx(observed.LENGTH, rel=1e-4)
                assert saved[f"{side}_lost"].sum() == pytest.approx(lost, abs=0.05)
                assert saved[f"{side}_causal"].sum() == causal
                assert saved[f"{side}_visited"].sum() == saved["visited_by_row"].sum()
                assert (saved[f"{side}_visited"] <= saved[f"{side}_causal"]).all()


def test_few_rows_are_taken_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured(tmp_path, "test_a_shape", monkeypatch, CHUNKS["chunks"], rows=40)
    with np.load(tmp_path / "head-0-0.npz") as saved:
        rows = saved["position"]
        assert len(rows) == 40 and np.diff(rows).max() < 2 * observed.LENGTH / 40 + 1
        assert saved["original_mass"].sum() == pytest.approx(40, rel=1e-4)


def test_another_request_is_not_taken_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Capture(Request("somebody", HEADS), tmp_path, observe.RankInfo(0, 1, 2, None))
    observed.run(observed.prefill("test_a_shape", monkeypatch, capture), observed.batch())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", ["test_grid_frame", "test_grid_row", "test_q_boundary", "test_2d_boundary"])
def test_an_order_is_a_permutation_that_joins_what_belongs_together(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (view, _) = captured(tmp_path, config, monkeypatch, CHUNKS["whole"])
    modality_map = view.requests[0].map
    assert modality_map is not None
    name, order = order_of(modality_map, view.patterns[0])
    assert np.array_equal(np.sort(order), np.arange(observed.LENGTH))
    if "grid" in config:
        cells = modality_map.cells("frame" if config == "test_grid_frame" else "row").numpy()[order]
        assert (np.diff(cells[cells >= 0]) >= 0).all() and "by c" in name
    else:
        text = modality_map.members(Modality.TEXT).numpy()[order]
        assert (np.diff(text.astype(int)) <= 0).all() and "modality by modality" in name


def test_reasons_are_those_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (view, _) = captured(tmp_path, "test_grid_frame", monkeypatch, CHUNKS["whole"])
    modality_map, pattern = view.requests[0].map, view.patterns[0]
    assert modality_map is not None and view.plan is not None and isinstance(pattern, Grid) and pattern.h
    visited = view.plan.visited_by_row[:, 0].numpy()
    start = 400  # not in the sink and the window, which the row sees anyway
    found = inspect_reasons.reasons_by_row(modality_map, pattern, 50, visited[start:], start, False)
    phase = modality_map.cells("frame").numpy() == pattern.phase
    assert (found[phase[start:]] == grid.ON_PHASE).all()
    assert (found[observed.VIDEO[1] + 1 - start :] == TEXT_AFTER_VISION).all()
    assert set(found) <= {grid.ON_PHASE, TEXT_AFTER_VISION, inspect_reasons.TILES, inspect_reasons.SPARSE}
    early = inspect_reasons.reasons_by_row(modality_map, pattern, 50, visited, 0, False)
    assert (early[:50] == inspect_reasons.BELOW).all() and early[51] == inspect_reasons.START
    everything = np.arange(1, 9)
    assert set(inspect_reasons.reasons_by_row(modality_map, Dense(), 0, everything, 0, False)) == {dense.BY_CONFIG}
    assert set(inspect_reasons.reasons_by_row(modality_map, AShape(1, 1), 0, everything, 0, True)) == {
        inspect_reasons.ALL_DENSE
    }
    boundary = QBoundary({Modality.VIDEO: pattern})
    found_q = inspect_reasons.reasons_by_row(modality_map, boundary, 50, visited[start:], start, False)
    assert (found_q[phase[start:]] == grid.ON_PHASE).all()
    assert (found_q[observed.VIDEO[1] + 1 - start :] == inspect_reasons.MODALITY).all()
    account = inspect_reasons.account(found, visited[start:])
    assert sum(why.rows for why in account) == len(found)
    assert sum(why.pairs for why in account) == pytest.approx(1)


def embedded_only(page: Path) -> str:
    """The text of a page; the page must fetch nothing."""
    text = page.read_text()
    assert set(re.findall(r'(?:src|href)="(.{0,20})', text)) <= {"data:image/png;base64"[:20]}
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "<script" not in text and "url(" not in text
    return text


def test_page_and_pictures_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured(tmp_path, "test_mixed_heads", monkeypatch, CHUNKS["chunks"])
    shape = SimpleNamespace(layers=observed.LAYERS, heads=observed.HEADS, full_layers=None)
    monkeypatch.setattr("sglang_mminfer.head_config.config.fingerprint_of", lambda _: shape)
    config = HeadConfig.load(config_file("test_mixed_heads")).bind(None)
    chosen = command.default_heads([config.patterns(layer) for layer in range(observed.LAYERS)])
    assert len(chosen) == len({config.patterns(layer)[head] for layer, head in chosen}) == command.MOST_HEADS
    out = tmp_path / "out"
    text = embedded_only(command.draw(tmp_path, config, [(0, 1), (1, 0), (1, 5)], out, "a <model>"))
    assert text.count("<img ") == 2 + 2 * 2 and "a &lt;model&gt;" in text
    assert "Layer 1, head 5" in text and "Not taken down" in text
    assert sorted(p.name for p in out.iterdir()) == [
        *("head-0-1.png", "head-1-0.png", "inspect.html", "map.png", "overview.png", "rows-0-1.png", "rows-1-0.png"),
    ]


def test_page_of_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    monkeypatch.setenv(settings.TRACE.variable, str(trace))
    prefill = observed.prefill("test_grid_frame", monkeypatch, audit.Audit(1.0))
    for start, stop in ((0, 300), (300, observed.LENGTH)):
        observed.run(prefill, observed.batch(start, stop, "first"))
    observed.run(observed.prefill("dense", monkeypatch), observed.batch(rid="second"))
    assert cli.main(["inspect", "--trace", str(trace), "--out", str(tmp_path / "out")]) == 0
    text = embedded_only(Path(capsys.readouterr().out.strip()))
    assert cli.main(["inspect", "--trace", str(trace), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"page": str(tmp_path / "out" / "inspect.html"), "pictures": [str(tmp_path / "out" / "map-0.png")]}
    assert text.count("<img ") == 1  # of the sparse one; a dense config makes no map
    assert "dense_config" in text and "error, mean" in text
    assert cli.main(["inspect", "--trace", str(trace), "--rid", "third", "--out", str(tmp_path / "out")]) == 1
    assert "no request third; the last ones are: first, second" in capsys.readouterr().err


BAD: list[tuple[list[str], str]] = [
    (["--video", "nothing.mp4"], "--video: nothing.mp4: no such file"),
    ([], "nothing to look at: give --video, --image or --messages"),
    (["--messages", "nothing.json"], "--messages: nothing.json: no such file"),
    (["--heads", "1:2", "3"], "--heads: expected LAYER:HEAD, like 0:3, got '3'"),
]


@pytest.mark.parametrize("arguments, words", BAD)
def test_bad_input_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--model-path", "m", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_messages_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"role": "user"}))
    arguments = SimpleNamespace(messages=path)
    with pytest.raises(command.InspectError, match="expected a list of messages"):
        command.conversation(arguments)


def test_a_head_of_a_layer_without_attention_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = dict.fromkeys(tiny_model.SPECIAL_TOKENS, 0)
    qwen3_5.make_config(ids, 64, moe=False).save_pretrained(tmp_path)
    (tmp_path / "messages.json").write_text('[{"role": "user", "content": "What?"}]')
    arguments = ["--messages", str(tmp_path / "messages.json"), "--heads", "3:7", "4:0"]
    assert cli.main(["inspect", "--model-path", str(tmp_path), *arguments]) == 1
    words = "--heads 4:0: the model has 8 layers of 8 heads, counted from 0; those with attention are 3, 7"
    assert words in capsys.readouterr().err
