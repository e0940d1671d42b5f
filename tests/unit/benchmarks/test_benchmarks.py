"""The GPU benchmarks as far as they go without a GPU: what they compare is the same thing, and they do run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_mminfer import AShape, Boundary2D, Dense, Grid, HeadConfig, Modality, ModalityMap, VerticalSlash
from sglang_mminfer.benchmarks import answers, cases, inputs, measure, model_prefill, report, tile_attention, tuning
from sglang_mminfer.benchmarks import rivals as baselines
from sglang_mminfer.kernels import reference, torch_gather
from sglang_mminfer.kernels.block_plan import nothing
from sglang_mminfer.kernels.triton.configurations import Configuration
from sglang_mminfer.kernels.work_items import NUM_PAIRS, work_items
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


@pytest.mark.parametrize("pattern", [Grid("frame", True, True, True, 3, 8, 40), VerticalSlash(9, 20), Dense()], ids=str)
def test_the_difference_is_that_of_sampled_rows(pattern):
    given = made(60, 400)
    plan = planned(given, pattern, conversation(30, (5, 8, 8), 50))
    torch_gather.run(given.q, given.k_cache, given.v_cache, plan, given.scale, given.out, given.lse)
    rows = list(range(60))
    assert answers.difference(given, plan, rows).is_within(torch.float32)
    given.out[17, 2] *= 1.5
    given.lse[40, 1] += 0.25
    found = answers.difference(given, plan, rows)
    assert found.out == pytest.approx(0.5, rel=1e-3) and found.lse == pytest.approx(0.25, rel=1e-3)
    assert answers.difference(given, plan, [3, 40]).out < 1e-4
    given.out[59] = torch.nan
    assert answers.difference(given, plan).out == float("inf"), "the last row is always looked at"


def test_rows_without_keys_are_zeros():
    given = made(4, 100)
    plan = nothing(4, 4, 128, 64, torch.device("cpu"))
    given.out.zero_()
    given.lse.fill_(-torch.inf)
    assert answers.difference(given, plan) == answers.Difference(0.0, 0.0)
    given.lse[3, 3] = 0
    assert answers.difference(given, plan).lse == float("inf")


def test_how_items_use_a_card():
    given = made(300, 900)
    items = work_items(planned(given, Dense()), 2, 128)
    used = measure.use(items, 32)
    assert used.items == items.num_items and used.longest_visits == items.visits.max()
    multiplied = sum(128 * visits for visits in items.visits.tolist())
    held = sum(row[NUM_PAIRS] * visits for row, visits in zip(items.table.tolist(), items.visits.tolist()))
    assert used.rows_used == pytest.approx(held / multiplied) and held < multiplied
    assert used.longest_share == pytest.approx(132 * used.longest_visits / items.visits.sum())


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
    for first, tokens in ((listed[:4], 131072), (listed[4:8], 1048576)):
        assert {case.pattern for case in first} == {cases.GRID_STATIC, cases.ROW, "a_shape", cases.SEARCHED}
        assert {(case.tokens, case.rows) for case in first} == {(tokens, 8192)}
    choosing = listed[8 : 8 + 4 * len(cases.CHOOSING)]
    assert {(case.tokens, case.pattern) for case in choosing} == {
        (tokens, pattern) for tokens in (8192, 32768, 131072, 1048576) for pattern in cases.CHOOSING
    }
    listed = [case for case in listed if case not in choosing]
    later = listed[8 : len(cases.MEASURED) + 4]
    assert {case.pattern for case in (*listed[:4], *later)} == set(cases.MEASURED)
    assert {case.tokens for case in listed} == {*cases.LENGTHS, *cases.SHORT}
    assert {case.shape for case in listed} == {"28/4", "32/8"}
    assert {case.rows for case in listed if not case.is_whole} == {2048, 8192, 16384}


@pytest.mark.parametrize("pattern", [name for name in cases.MEASURED if name != "vertical_slash"])
def test_densities_are_usual_ones(pattern):
    case = cases.Case("28/4" if pattern == cases.SEARCHED else "2/1", cases.TARGET, cases.CHUNK, pattern)
    chunk = RequestChunk(cases.conversation(case), case.tokens - case.rows, case.tokens, 0, torch.arange(case.tokens))
    plan = BatchPlanner([chunk], case.rows).plan(cases.layers(case)[0])
    density = measure.visited_pairs(plan) / measure.causal_pairs(case.rows, case.tokens)
    assert (0.02 if pattern == cases.GRID_STATIC else 0.05) <= density <= 0.1
    assert measure.index_bytes(plan) < 0.02 * 2 * case.tokens * 4 * 128 * 2 * 28


def test_a_searched_config_has_a_pattern_for_each_head():
    case = cases.Case("28/4", 32768, 8192, cases.SEARCHED)
    layers = cases.layers(case)
    assert len(layers) > 20 and {len(heads) for heads in layers} == {28}
    assert len({head for heads in layers for head in heads}) > 100
    assert sum(len(set(heads)) for heads in layers) / len(layers) > 18
    assert cases.searched_layers(cases.video_map(32768), 28)[: len(layers)] == layers, "drawn alike every time"


@pytest.mark.parametrize("tokens", [2048, 8192, 32768])
def test_maps_are_as_long_as_asked_for(tokens):
    assert cases.video_map(tokens).length == cases.turns_map(tokens).length == tokens


def test_the_static_grid_is_that_of_its_config():
    (head,) = set(HeadConfig.load("grid_static").patterns(0, 28))
    assert head == cases.PATTERNS[cases.GRID_STATIC]
    assert model_prefill.heads_of("grid_static", cases.video_map(2048), 4) == [(head,) * 4]
    assert HeadConfig.load("grid_static").defaults.dense_below == model_prefill.DENSE_BELOW


# ---- the programs --------------------------------------------------------------------------------------------


def benchmark(out: Path, *options: str) -> str:
    """What the benchmark prints about very small cases."""
    command = [sys.executable, "-m", "sglang_mminfer.benchmarks.tile_attention", "--tiny", "--out", str(out), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_benchmark(tmp_path: Path):
    """A run, and a second one that has nothing left to do."""
    out = tmp_path / "tiny.json"
    for checks in ("1", "0"):
        shown = benchmark(out, "--executor", "torch", "--checks", checks)
    found = json.loads(out.read_text())
    (run,) = found["runs"]  # the second measured nothing
    assert run["executor"] == "torch" and run["self_check"]["good"] and run["self_check"]["times"] == 1
    assert "5 of 5 cases done, 0 failed" in shown
    assert set(found["cases"]) == {case.name for case in cases.tiny_cases()}
    for figures in found["cases"].values():
        assert figures["run"] == 0 and figures["sparse_ms"] > 0 and figures["plan_wall_ms"] > 0, figures
        assert figures["speedup"] == pytest.approx(figures["dense_ms"] / figures["sparse_ms"], rel=1e-3)
        assert 0 < figures["rows_used"] <= 1 and figures["longest_share"] > 0 and figures["items"] > 0
        assert figures["difference"] < 1e-4 and figures["lse_difference"] < 1e-4
    assert run["versions"]["torch"] and run["versions"]["flash-attn-4"] and "tile_attention" in run["command"]
    assert set(run["baselines"]) == {"flashinfer", "flash_attention_3", "cudnn_block_sparse"}
    assert "vertical_slash" in out.with_suffix(".md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"tiny_length.png", "tiny_density.png"}


def test_the_benchmark_in_the_interpreter(tmp_path: Path):
    """The Triton kernel's self-check; no case begins, because the check takes longer than the run may."""
    out = tmp_path / "tiny.json"
    assert "Time is up" in benchmark(out, "--checks", "1", "--minutes", "0.001")
    found = json.loads(out.read_text())
    assert found["runs"][0]["executor"] == "triton" and found["runs"][0]["self_check"]["good"]
    assert not found["cases"]


def test_a_case_against_another_kernel():
    """All is visited here: in eager mode FlexAttention looks at positions alone."""
    figures = tile_attention.Bench("cpu", "torch", 64).run(cases.Case("2/1", 512, 64, "a_shape", "flex_attention"))
    assert figures["speedup_over_other"] == pytest.approx(figures["other_ms"] / figures["sparse_ms"], rel=1e-3)
    assert figures["other_difference"] < 1e-5 and "dense_ms" not in figures


def test_a_case_that_fails_costs_no_other(tmp_path: Path, monkeypatch):
    real, out = tile_attention.Bench.run, tmp_path / "result.json"
    chosen = [cases.Case("2/1", 512, 64, name) for name in ("a_shape", "grid frame")]

    def broken(self, case: cases.Case):
        if case.pattern == "a_shape":
            raise RuntimeError("no such thing\nat all")
        raise baselines.NotApplicable("the plan has 2 passes")

    monkeypatch.setattr(tile_attention.Bench, "run", broken)
    run_cases = functools.partial(tile_attention.run_cases, chosen, "cpu", "torch", out, 1.0, checks=0)
    found = run_cases(retry=False)["cases"]
    assert found[chosen[0].name]["error"].startswith("RuntimeError: no such thing")
    assert found[chosen[1].name]["not_applicable"] == "the plan has 2 passes"
    assert "no such thing" in report.markdown({"cases": found, "runs": [{"executor": "torch"}]})
    calls: list[str] = []
    monkeypatch.setattr(tile_attention.Bench, "run", lambda self, case: calls.append(case.name) or {"sparse_ms": 1.0})
    monkeypatch.setattr(report, "line", lambda name, figures: name)
    run_cases(retry=False)
    assert calls == [], "a failure is not tried again"
    run_cases(retry=True)
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


def test_a_wrong_answer_is_no_result(tmp_path: Path, monkeypatch):
    """An executor that leaves one key tile out of its longest lists is found out, by the self-check and by the case."""

    def lossy(q, k_cache, v_cache, plan, scale, out, lse):
        visits = plan.block_indptr.diff()
        fewer = visits - (visits == visits.max()).int()  # the last one, which is partial or gathered
        indptr = torch.cat([torch.zeros(1), fewer.cumsum(0)]).int()
        tile, number = plan.visits()
        kept = plan.block_indices[: len(tile)][number < fewer[tile]]
        short = replace(plan, block_indptr=indptr, block_indices=kept, num_full=torch.minimum(plan.num_full, fewer))
        torch_gather.run(q, k_cache, v_cache, short, scale, out, lse)

    monkeypatch.setitem(tile_attention.executors.EXECUTORS, "torch", lossy)
    case = cases.Case("2/1", 4096, 256, "a_shape")
    results = tile_attention.run_cases([case], "cpu", "torch", tmp_path / "x.json", 1.0, retry=False, checks=1)
    assert "the answer is wrong" in results["cases"][case.name]["error"], results["cases"]
    check = results["runs"][0]["self_check"]
    assert not check["good"] and "largest error" in check["answer"]
    assert "WRONG" in report.markdown(results)


def test_aims():
    def case(tokens: int, rows: int, **figures: float) -> dict:
        usual = {
            "density": 0.08,
            "tflops_on_visited_tiles": 560.0,
            "share_of_ideal": 0.9,
            "speedup_with_plan": 1.2,
            "plan_share_of_attention": 0.01,
            "longest_share": 0.2,
            "index_share_of_kv": 0.0005,
        }
        return {"tokens": tokens, "rows": rows, "pattern": cases.ROW, **usual, **figures}

    good = [case(131072, 8192), case(1 << 20, 8192), case(8192, 8192), case(2048, 2048, speedup_with_plan=0.6)]
    assert [met for _, _, met in report.aims(good, "fa4")] == ["yes"] * 6
    bad = [
        case(131072, 8192, tflops_on_visited_tiles=540.0, plan_share_of_attention=0.05),
        case(1 << 20, 8192, share_of_ideal=0.8, index_share_of_kv=0.03, longest_share=0.3),
        case(8192, 8192, speedup_with_plan=0.9),
    ]
    assert [met for _, _, met in report.aims(bad, "fa4")] == ["no"] * 6
    assert [met for _, _, met in report.aims(bad, "triton")] == ["yes", *["no"] * 5], "Triton's own aim is lower"
    assert report.aims([], "fa4") == []


# ---- the model -----------------------------------------------------------------------------------------------

SHAPE = model_prefill.Shape(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, mrope=(2, 3, 3))


def prefilled(attention: model_prefill.Attention, chat: ModalityMap, chunk: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    layers = [model_prefill.Layer(SHAPE, chat.length, torch.float32, "cpu", random) for _ in range(3)]
    x = torch.randn(chat.length, SHAPE.hidden, generator=random)
    angles = model_prefill.mrope(chat, SHAPE, "cpu", torch.float32)
    ran = model_prefill.prefill(layers, lambda start, stop: x[start:stop], angles, attention, chunk, "cpu")
    assert ran.layers == 3 and ran.attention > 0 and ran.linear > 0 and ran.planning >= 0
    return ran.hidden


def sparse_attention(chat: ModalityMap, *layers) -> model_prefill.SparseAttention:
    return model_prefill.SparseAttention(chat, layers, "torch", "cpu", 0, planned_layers=3)


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
        sparse = prefilled(sparse_attention(chat, covering, covering[::-1]), chat, chunk)
        torch.testing.assert_close(dense, expected[-last:], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sparse, expected[-last:], rtol=1e-3, atol=1e-4)
    other = prefilled(sparse_attention(chat, [AShape(1, 4)] * 4), chat, n)
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


def test_the_model_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path, capsys):
    out = tmp_path / "model.json"
    command = ["--tiny", "--out", str(out)]
    assert model_prefill.main([*command, "--minutes", "0"]) == 0
    assert "Time is up" in capsys.readouterr().out
    ((_, figures),) = json.loads(out.read_text())["lengths"].items()
    assert "dense" not in figures
    assert model_prefill.main([*command, "--configs", "grid_static"]) == 0
    ((_, first),) = json.loads(out.read_text())["lengths"].items()
    assert model_prefill.main(command) == 0
    ((_, figures),) = json.loads(out.read_text())["lengths"].items()
    assert first.items() <= figures.items(), "nothing is measured twice"
    for name in ("dense", *model_prefill.CONFIGS):
        seconds = figures[name]["seconds"]
        assert seconds["total"] == pytest.approx(sum(s for part, s in seconds.items() if part != "total"), abs=1e-3)
    assert ("planning" in figures["searched"]["seconds"]) and ("planning" not in figures["dense"]["seconds"])
    assert figures["vision_tower"]["seconds"] > 0
