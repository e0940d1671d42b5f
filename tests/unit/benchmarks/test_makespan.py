"""The model of a layer's time: list scheduling, and what work items gain on a real plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_mminfer.benchmarks import cases, makespan

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "sglang_mminfer/benchmarks/results/makespan.json"
SMALL = cases.Case("28/4", 32 * cases.K, 2048, cases.GRID_STATIC)


def test_programs_go_to_whoever_is_free_first():
    assert makespan.makespan([]) == 0
    assert makespan.makespan([3.0]) == 3
    assert makespan.makespan([1.0] * makespan.PROCESSORS + [1.0]) == 2
    long_first = [10.0] + [1.0] * (10 * (makespan.PROCESSORS - 1))
    assert makespan.makespan(long_first) == 10
    assert makespan.makespan(long_first[::-1]) > 15, "a long program that starts last is all that runs in the end"


def test_work_items_are_faster_and_none_is_long():
    figures = makespan.modelled(SMALL)
    before, triton = figures["before"], figures["triton"]
    assert before["longest_over_makespan"] > 0.5 and before["rows_used"] < 0.4, "what work items are for"
    for name in ("triton", "fa4_gathered", "fa4_paged"):
        engine = figures[name]
        assert engine["longest_over_makespan"] <= 0.25
        assert engine["ms"] < before["ms"] / 2
        assert 0.7 < engine["rows_used"] <= 1
        assert engine["ms"] == pytest.approx(engine["programs_ms"] + engine["copies_ms"], rel=1e-3)
        assert engine["share_of_ideal"] < makespan.RATES[name] / makespan.DENSE
    assert triton["programs"] < before["programs"]


def test_a_plan_without_short_or_long_tiles_gains_nothing_and_loses_nothing():
    figures = makespan.modelled(cases.Case("32/8", 32 * cases.K, 8192, "a_shape"))
    before, triton = figures["before"], figures["triton"]
    assert triton["programs"] == before["programs"] and triton["scratch_mb"] == 0
    assert triton["programs_ms"] == before["programs_ms"]
    assert before["copies_ms"] > triton["copies_ms"] == 0, "what was zeroed before"


def test_every_kind_of_case_is_modelled():
    listed = list(makespan.cases())
    assert len({case.name for case in listed}) == len(listed)
    assert {case.shape for case in listed} == {"28/4", "32/8"}
    assert {case.tokens for case in listed} == {32768, 131072, 262144, 1048576}
    assert {case.rows for case in listed if case.pattern == cases.GRID_STATIC} == {2048, 8192, 16384}
    assert cases.SEARCHED in {case.pattern for case in listed}


def test_the_kept_figures_are_those_of_this_program():
    kept = json.loads(KEPT.read_text())
    assert set(kept["cases"]) == {case.name for case in makespan.cases()}
    for name, figures in makespan.modelled(SMALL).items():
        assert kept["cases"][SMALL.name][name] == pytest.approx(figures, rel=0.05), "run the program again"


def test_the_documents_quote_the_kept_figures():
    kept = json.loads(KEPT.read_text())["cases"]
    section = (ROOT / "docs/performance.md").read_text().split("## On a GPU: a model")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 3 * len(makespan.PATTERNS)
    tokens = {"32K": 32768, "128K": 131072, "1M": 1048576}
    for label, pattern, *cells in rows[1:]:
        figures = kept[cases.Case("28/4", tokens[label], 8192, pattern).name]
        speedups = [f"{figures[name]['speedup']:.1f} x" for name in makespan.RATES]
        layer = figures["layer"]
        shares = (
            figures["fa4_paged"]["share_of_ideal"],
            figures["before"]["rows_used"],
            figures["triton"]["rows_used"],
        )
        shown = [f"{layer['density']:.1%}", f"{layer['dense_ms']:.3g}", *speedups, *map("{:.0%}".format, shares)]
        assert cells == shown, f"{label}, {pattern}"


def test_the_program(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(makespan, "cases", lambda: [SMALL])
    out = tmp_path / "makespan.json"
    assert makespan.main(["--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["cases"]) == {SMALL.name} and found["assumed"]["tflops"] == makespan.RATES
    assert found["versions"]["torch"] and "of ideal" in capsys.readouterr().out
