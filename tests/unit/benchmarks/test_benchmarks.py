"""The GPU benchmarks as far as they go without a GPU: what they compare is the same thing, and they do run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_mminfer import AShape, Boundary2D, Dense, Grid, HeadConfig, Modality, ModalityMap, VerticalSlash
from sglang_mminfer.benchmarks import cases, inputs, measure, model_prefill, report, tile_attention, tuning
from sglang_mminfer.benchmarks import rivals as baselines
from sglang_mminfer.kernels import reference, torch_gather
from sglang_mminfer.kernels.triton.configurations import Configuration
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import conversation


def made(rows: int, tokens: int, slots: str = "shuffled") -> inputs.Inputs:
    return inputs.make_inputs(rows, tokens, (4, 2), 32, torch.float32, "cpu", slots)


def planned(given: inputs.Inputs, pattern, chat: ModalityMap | None = None):
    tokens, rows = len(given.keys), len(given.q)
    chunk = RequestChunk(chat or cases.video_map(tokens), tokens - rows, tokens, 0, given.slots)
    return BatchPlanner([chunk], rows).plan([pattern] * given.q.shape[1], given.q, given.k_cache, given.scale)


def by_gathering(given: inputs.Inputs, plan) -> torch.Tensor:
    torch_gather.run(given.q, given.k_cache, given.v_cache, plan, given.scale, given.out, given.lse)
    return given.out


# ---- what is compared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", ["shuffled", "ordered"])
@pytest.mark.parametrize("rows", [100, 400])
def test_dense_computes_causal_attention_of_the_last_rows(rows, slots, monkeypatch):
    given = made(rows, 400, slots)
    group, causal = 2, torch.arange(400) <= torch.arange(400 - rows, 400)[:, None]
    expected = torch.stack(
        [
            reference.masked_attention(
                given.q[:, h], given.keys[:, h // group], given.values[:, h // group], causal, given.scale
            )[0]
            for h in range(4)
        ],
        dim=1,
    ).float()
    for most in (baselines.MOST_ELEMENTS, 1):  # at once, and one KV head at a time
        monkeypatch.setattr(baselines, "MOST_ELEMENTS", most)
        dense = baselines.dense(given)
        torch.testing.assert_close(dense.joined(dense.run()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_gathering(given, planned(given, Dense())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [AShape(40, 150), Grid("row", False, False, True, 0, 8, 40), Dense()], ids=str)
def test_flex_attention_is_given_the_same_tiles(pattern):
    """In eager mode it looks at the mask of positions alone, so the tiles are put into that mask here."""
    given = made(300, 900)
    plan = planned(given, pattern, conversation(100, (5, 8, 8), 480))
    if len(plan.passes) > 1:
        with pytest.raises(baselines.NotApplicable, match="passes"):
            baselines.flex_attention(given, plan)
        return
    flex = baselines.flex_attention(given, plan)
    tile, block, _ = measure.visits(plan)
    visited = torch.zeros_like(flex.block_mask.to_dense()[0, 0])
    visited[tile, block] = 1
    assert torch.equal(flex.block_mask.to_dense()[0, 0], visited)

    own = flex.gathered
    mask = visited.bool().repeat_interleave(plan.block_q, 0).repeat_interleave(plan.block_k, 1)
    mask &= plan.keys.kv_pos < own.q_stop[:, None]
    got = torch.zeros_like(given.q)
    real = own.rows >= 0
    for head in range(4):
        o, _ = reference.masked_attention(own.q[head], own.k[head // 2], own.v[head // 2], mask, given.scale)
        got[own.rows[real], head] = o[real].float()
    torch.testing.assert_close(got, by_gathering(given, plan), rtol=1e-4, atol=1e-5)


def test_flex_attention_runs_where_every_tile_is_visited():
    given = made(200, 500)
    plan = planned(given, Dense())
    got = baselines.flex_attention(given, plan).output(given.q)
    torch.testing.assert_close(got, by_gathering(given, plan), rtol=1e-4, atol=1e-5)


def test_the_estimate_finds_what_the_inputs_have():
    """The heaviest diagonals lie side by side and the heavy keys are columns, so that few tiles are visited."""
    given = made(512, 16384)
    plan = planned(given, VerticalSlash(100, 1024))
    density = measure.visited_pairs(plan) / measure.causal_pairs(512, 16384)
    assert 0.06 < density < 0.15, density


def test_counts():
    given = made(300, 900)
    plan = planned(given, AShape(40, 150))
    own = plan
    tile, block, kind = measure.visits(own)
    counts = own.block_indptr.diff()
    assert torch.equal(torch.bincount(tile, minlength=own.num_tiles), counts.long())
    assert torch.equal(torch.bincount(tile[kind == 0], minlength=own.num_tiles), own.num_full.long())
    assert torch.equal(block, own.block_indices[: len(block)].long())
    assert measure.visited_pairs(plan) == float((own.q_indptr.diff() * counts).sum()) * own.block_k
    before = measure.index_bytes(plan)
    roomy = replace(own, block_indices=torch.cat([own.block_indices, own.block_indices.new_zeros(1000)]))
    assert measure.visits(roomy)[1].shape == block.shape
    assert measure.index_bytes(roomy) == before + 4000
    assert measure.causal_pairs(300, 900) == sum(range(601, 901))


# ---- the cases -----------------------------------------------------------------------------------------------


def test_the_most_important_cases_come_first():
    listed = list(cases.cases(("flashinfer",)))
    assert len({case.name for case in listed}) == len(listed)
    first = listed[: len(cases.MEASURED)]
    assert {case.pattern for case in first} == set(cases.MEASURED)
    assert {(case.tokens, case.rows) for case in first} == {(131072, 8192)}
    assert {case.tokens for case in listed} == {*cases.LENGTHS, *cases.SHORT}
    assert {case.shape for case in listed} == {"28/4", "32/8"}
    assert {case.rows for case in listed if not case.is_whole} == {8192, 16384}


@pytest.mark.parametrize("pattern", [name for name in cases.MEASURED if name != "vertical_slash"])
def test_densities_are_usual_ones(pattern):
    case = cases.Case("2/1", cases.TARGET, cases.CHUNK, pattern)
    chunk = RequestChunk(cases.conversation(case), case.tokens - case.rows, case.tokens, 0, torch.arange(case.tokens))
    plan = BatchPlanner([chunk], case.rows).plan([cases.PATTERNS[pattern]] * 2)
    density = measure.visited_pairs(plan) / measure.causal_pairs(case.rows, case.tokens)
    assert (0.02 if pattern == cases.DEFAULT else 0.05) <= density <= 0.1
    assert measure.index_bytes(plan) < 0.02 * 2 * case.tokens * 4 * 128 * 2 * 28


@pytest.mark.parametrize("tokens", [2048, 8192, 32768])
def test_maps_are_as_long_as_asked_for(tokens):
    assert cases.video_map(tokens).length == cases.turns_map(tokens).length == tokens


def test_the_default_pattern_is_that_of_the_default_config():
    (head,) = set(HeadConfig.load("default").patterns(0, 28))
    assert head == cases.PATTERNS[cases.DEFAULT] == model_prefill.configs(4)["default"][0]
    assert HeadConfig.load("default").defaults.dense_below == model_prefill.DENSE_BELOW


# ---- the programs --------------------------------------------------------------------------------------------


def test_the_benchmark_in_the_interpreter(tmp_path: Path):
    """A run, and a second one that has nothing left to do."""
    out = tmp_path / "tiny.json"
    command = [sys.executable, "-m", "sglang_mminfer.benchmarks.tile_attention", "--tiny", "--out", str(out)]
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
        )
        assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert len(found["runs"]) == 1, "the second run measured nothing"
    assert "3 of 3 cases done, 0 failed" in done.stdout
    assert set(found["cases"]) == {case.name for case in cases.tiny_cases()}
    for figures in found["cases"].values():
        assert figures["run"] == 0 and figures["sparse_ms"] > 0 and figures["plan_wall_ms"] > 0, figures
        assert figures["speedup"] == pytest.approx(figures["dense_ms"] / figures["sparse_ms"], rel=1e-3)
    assert found["runs"][0]["versions"]["torch"] and "tile_attention" in found["runs"][0]["command"]
    assert set(found["runs"][0]["baselines"]) == {"flashinfer", "flash_attention_3", "cudnn_block_sparse"}
    assert "vertical_slash" in out.with_suffix(".md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"tiny_length.png", "tiny_density.png"}


def test_a_case_that_fails_costs_no_other(tmp_path: Path, monkeypatch):
    real, out = tile_attention.Bench.run, tmp_path / "result.json"
    chosen = [cases.Case("2/1", 512, 64, name) for name in ("a_shape", "grid frame")]

    def broken(self, case: cases.Case):
        if case.pattern == "a_shape":
            raise RuntimeError("no such thing\nat all")
        raise baselines.NotApplicable("the plan has 2 passes")

    monkeypatch.setattr(tile_attention.Bench, "run", broken)
    found = tile_attention.run_cases(chosen, "cpu", out, 1.0, retry=False)["cases"]
    assert found[chosen[0].name]["error"].startswith("RuntimeError: no such thing")
    assert found[chosen[1].name]["not_applicable"] == "the plan has 2 passes"
    assert "no such thing" in report.markdown({"cases": found})
    calls: list[str] = []
    monkeypatch.setattr(tile_attention.Bench, "run", lambda self, case: calls.append(case.name) or {"sparse_ms": 1.0})
    monkeypatch.setattr(report, "line", lambda name, figures: name)
    tile_attention.run_cases(chosen, "cpu", out, 1.0, retry=False)
    assert calls == [], "a failure is not tried again"
    tile_attention.run_cases(chosen, "cpu", out, 1.0, retry=True)
    assert calls == [chosen[0].name]
    assert real is not tile_attention.Bench.run


def test_tuning_names_the_fastest_and_keeps_what_did_not_fit(tmp_path: Path, monkeypatch, capsys):
    """The torch executor stands in for the kernel: what is tried is how builds are chosen and kept."""

    def stand_in(*arguments, chosen: Configuration) -> None:
        if chosen.num_stages == 7:
            raise RuntimeError("out of resource: shared memory")
        torch_gather.run(*arguments)

    monkeypatch.setattr(tuning.launch, "run", stand_in)
    out = tmp_path / "tuning.json"
    assert tuning.main(out, "cpu", tiny=True, minutes=1) == 0
    (own,) = json.loads(out.read_text())["head_dims"].values()
    names = [name for name, _, _ in tuning.candidates(128)]
    assert set(own) == {*names, "best"}
    assert "shared memory" in own[names[0]]["error"]
    assert own["best"] == max(names[1:], key=lambda name: own[name]["tflops"])
    assert {own[name]["block_k"] for name in names} == {64, 128}
    assert "best:" in capsys.readouterr().out


def test_aims():
    def case(tokens: int, rows: int, **figures: float) -> dict:
        usual = {
            "density": 0.08,
            "tflops_on_visited_tiles": 500.0,
            "speedup": 10.0,
            "share_of_ideal": 0.8,
            "speedup_with_plan": 1.2,
        }
        usual |= {"plan_share_of_attention": 0.01, "index_share_of_kv": 0.001}
        return {"tokens": tokens, "rows": rows, "pattern": cases.ROW, **usual, **figures}

    good = [case(131072, 8192), case(1 << 20, 8192), case(8192, 8192), case(2048, 2048, speedup_with_plan=0.6)]
    assert [met for _, _, met in report.aims(good)] == ["yes"] * 5
    bad = [
        case(131072, 8192, tflops_on_visited_tiles=440.0, plan_share_of_attention=0.05),
        case(1 << 20, 8192, share_of_ideal=0.6, index_share_of_kv=0.03),
        case(8192, 8192, speedup_with_plan=0.9),
    ]
    assert [met for _, _, met in report.aims(bad)] == ["no"] * 5
    assert report.aims([]) == []


# ---- the model -----------------------------------------------------------------------------------------------

SHAPE = model_prefill.Shape(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, mrope=(2, 3, 3))


def prefilled(attention: model_prefill.Attention, chat: ModalityMap, chunk: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    layers = [model_prefill.Layer(SHAPE, chat.length, torch.float32, "cpu", random) for _ in range(3)]
    x = torch.randn(chat.length, SHAPE.hidden, generator=random)
    angles = model_prefill.mrope(chat, SHAPE, "cpu", torch.float32)
    ran = model_prefill.prefill(layers, lambda start, stop: x[start:stop], angles, attention, chunk, "cpu")
    assert ran.layers == 3 and ran.attention > 0 and ran.linear > 0
    return ran.hidden


def test_the_model_is_the_same_with_patterns_that_cover_everything():
    chat = conversation(30, (5, 6, 7), 70)
    n = chat.length
    covering = [
        AShape(n, 1),
        AShape(0, n),
        Grid("frame", True, True, True, 0, 0, n),
        Boundary2D({(Modality.VIDEO, Modality.VISION): AShape(n, n)}),
    ]
    expected = prefilled(model_prefill.DenseAttention(n, "cpu"), chat, chunk=n)
    for chunk in (n, 60):
        last = (n - 1) % chunk + 1
        dense = prefilled(model_prefill.DenseAttention(n, "cpu"), chat, chunk)
        sparse = prefilled(model_prefill.SparseAttention(chat, covering, SHAPE, "cpu", 0), chat, chunk)
        torch.testing.assert_close(dense, expected[-last:], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sparse, expected[-last:], rtol=1e-3, atol=1e-4)
    other = prefilled(model_prefill.SparseAttention(chat, [AShape(1, 4)] * 4, SHAPE, "cpu", 0), chat, n)
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-2)


def test_positions_of_a_video():
    """Text counts on; a video's tokens lie at their frame, row and column; text after it goes on behind them all."""
    chat = conversation(3, (2, 2, 4), 2)
    angles = torch.arange(8) * 0.0
    cos, sin = model_prefill.mrope(chat, SHAPE, "cpu", torch.float64)
    assert cos.shape == sin.shape == (chat.length, 1, 8)
    first = SHAPE.theta ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for token, (time, row, column) in {2: (2, 2, 2), 3: (3, 3, 3), 9: (3, 4, 5), 14: (4, 3, 6), 19: (7, 7, 7)}.items():
        angles = torch.tensor([time] * 2 + [row] * 3 + [column] * 3) * first
        torch.testing.assert_close(sin[token, 0], angles.sin())


def test_the_model_benchmark_runs(tmp_path: Path):
    out = tmp_path / "model.json"
    assert model_prefill.main(["--tiny", "--out", str(out)]) == 0
    ((_, figures),) = json.loads(out.read_text())["lengths"].items()
    for name in ("dense", "default", "mixed"):
        seconds = figures[name]["seconds"]
        assert seconds["total"] == pytest.approx(sum(s for part, s in seconds.items() if part != "total"), abs=1e-3)
    assert ("planning" in figures["mixed"]["seconds"]) and ("planning" not in figures["dense"]["seconds"])
    assert figures["vision_tower"]["seconds"] > 0
