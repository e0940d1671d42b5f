"""The model of what choosing keys costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_mminfer.benchmarks import selection_cost
from sglang_mminfer.benchmarks.cases import K

ROOT = Path(__file__).parents[3]
KEPT = json.loads((ROOT / "sglang_mminfer/benchmarks/results/selection_cost.json").read_text())
LOOPS = {int(rank): loop for rank, loop in KEPT["loops"].items()}


def test_a_score_takes_what_its_columns_and_instructions_take():
    loop = {"VIMNMX": 64, "HGMMA": 2, "IMAD": 4}  # of four warps, for 64 keys, 2 heads and 128 rows
    matrix, others = selection_cost.cycles_of_a_score(8, loop)
    assert matrix == 2 * 32 / 4096, "26 columns, filled up to 32"
    assert others == 2 * 64 / (64 * 2 * 128), "the minimums take longer than issuing all"
    assert selection_cost.cycles_of_a_score(8, {"IMAD": 100})[1] == 100 / (64 * 2 * 128)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("rank", LOOPS)
def test_parts_are_the_whole_and_the_scan_is_most_of_it_where_prompts_are_long(rank, dtype):
    figures = [selection_cost.modelled(n, rank, dtype, LOOPS[rank]) for n in selection_cost.LENGTHS]
    for own in figures:
        for end in ("least", "most"):
            parts = own["keys"] + own["queries"] + own[f"scan_{end}"] + own["packing"]
            assert own[f"selection_{end}"] == pytest.approx(parts, rel=0.02)
        assert own["scan_least"] < own["scan_most"] <= 2.01 * own["scan_least"]
        assert own["speedup_most"]["0.01"] > own["speedup_least"]["0.01"] > own["speedup_least"]["0.05"]
    assert figures[-1]["scan_least"] > 0.8 * figures[-1]["selection_least"]
    assert figures[0]["queries"] > figures[-1]["queries"]


def test_the_kept_figures_are_those_of_this_program():
    assert "not a measurement" in KEPT["what"]
    cases = {
        f"{tokens} keys, rank {rank}, {dtype}": selection_cost.modelled(tokens, rank, dtype, LOOPS[rank])
        for tokens in (8 * K, 32 * K, 128 * K, 1024 * K)
        for rank in (8, 16, 32)
        for dtype in ("bf16", "fp8")
    }
    assert KEPT["cases"] == json.loads(json.dumps(cases))
