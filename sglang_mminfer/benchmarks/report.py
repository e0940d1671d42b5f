"""The results of `tile_attention` as lines and as Markdown tables, and whether they meet the aims."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sglang_mminfer.benchmarks.cases import CHUNK, LENGTHS, ROW, SHORT, TARGET

COLUMNS = {  # heading: (figure, how to write it)
    "density": ("density", "{:.1%}"),
    "ours ms": ("sparse_ms", "{:.3g}"),
    "dense ms": ("dense_ms", "{:.4g}"),
    "speed-up": ("speedup", "{:.2f}"),
    "of ideal": ("share_of_ideal", "{:.0%}"),
    "TFLOP/s": ("tflops_on_visited_tiles", "{:.0f}"),
    "dense TFLOP/s": ("tflops_dense", "{:.0f}"),
    "plan ms": ("plan_wall_ms", "{:.2f}"),
    "of attention": ("plan_share_of_attention", "{:.1%}"),
    "index of KV": ("index_share_of_kv", "{:.2%}"),
}


def line(name: str, figures: dict[str, Any]) -> str:
    """One case as a line, printed while the run goes on."""
    if "error" in figures:
        return f"{name}: FAILED: {figures['error'].splitlines()[0]}"
    if "not_applicable" in figures:
        return f"{name}: not applicable: {figures['not_applicable']}"
    text = f"{name}: {figures['sparse_ms']:.3f} ms, {figures['tflops_on_visited_tiles']:.0f} TFLOP/s"
    text += f" at density {figures['density']:.1%}"
    if "speedup" in figures:
        return text + f", {figures['speedup']:.2f} x dense, plan {figures['plan_wall_ms']:.2f} ms"
    return text + f", {figures['speedup_over_other']:.2f} x the other"


def markdown(results: dict[str, Any]) -> str:
    """All measured cases and the aims, as Markdown."""
    cases = results["cases"].values()
    good = [c for c in cases if "speedup" in c]
    text = ["## Against dense", "", _row(["heads", "keys", "rows", "pattern", *COLUMNS]), _row(["---"] * 14)]
    for case in sorted(good, key=lambda c: (c["shape"], c["tokens"], c["rows"], c["pattern"], c["slots"])):
        pattern = case["pattern"] + ("" if case["slots"] == "shuffled" else f" ({case['slots']} slots)")
        cells = [case["shape"], f"{case['tokens']:,}", f"{case['rows']:,}", pattern]
        text.append(_row(cells + [_cell(case.get(figure), format_spec) for figure, format_spec in COLUMNS.values()]))
    others = [c for c in cases if "speedup_over_other" in c]
    if others:
        text += [
            "",
            "## Against other kernels",
            "",
            _row(["against", "keys", "pattern", "ours ms", "other ms", "ratio"]),
        ]
        text.append(_row(["---"] * 6))
    for c in others:
        figures = [f"{c[name]:.3g}" for name in ("sparse_ms", "other_ms", "speedup_over_other")]
        text.append(_row([c["against"], f"{c['tokens']:,}", c["pattern"], *figures]))
    if aimed := list(aims(good)):
        text += ["", "## Aims", "", _row(["aim", "measured", "met"]), _row(["---"] * 3)]
        text += [_row(answer) for answer in aimed]
    for kind in ("error", "not_applicable"):
        text += [f"\n{kind}: {name}: {c[kind].splitlines()[0]}" for name, c in results["cases"].items() if kind in c]
    return "\n".join([*text, ""])


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: float | None, format_spec: str) -> str:
    return "" if value is None else format_spec.format(value)


def aims(cases: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(aim, what was measured, whether the aim is met: "yes" or "no"), for each aim that has cases."""
    answers = []

    def answer(aim: str, measured: str, met: bool) -> None:
        answers.append((aim, measured, "yes" if met else "no"))

    def best(figure: str, chosen: list[dict[str, Any]], pick: Any = max) -> dict[str, Any] | None:
        return pick(chosen, key=lambda c: c[figure], default=None)

    target = [c for c in cases if c["tokens"] == TARGET and c["rows"] == CHUNK and 0.05 <= c["density"] <= 0.1]
    if target:
        low, high = best("tflops_on_visited_tiles", target, min), best("tflops_on_visited_tiles", target)
        assert low and high
        span = f"{low['tflops_on_visited_tiles']:.0f} ({low['pattern']}) to {high['tflops_on_visited_tiles']:.0f}"
        aim = "at least 450 TFLOP/s on visited tiles at 128K keys, density 5 to 10 %"
        answer(aim, f"{span} ({high['pattern']})", low["tflops_on_visited_tiles"] >= 450)
    longest = [c for c in cases if c["tokens"] == LENGTHS[-1] and c["pattern"] == ROW]
    if case := best("share_of_ideal", longest, min):
        figures = f"{case['speedup']:.1f} x at density {case['density']:.1%}: {case['share_of_ideal']:.2f} / density"
        answer("speed-up over dense at 1M keys at least 0.7 / density", figures, case["share_of_ideal"] >= 0.7)
    if case := best("plan_share_of_attention", [c for c in cases if c["tokens"] >= TARGET]):
        figures = f"at most {case['plan_share_of_attention']:.1%} ({case['pattern']}, {case['tokens']:,} keys)"
        answer("plan time under 3 % of attention time, from 128K keys", figures, case["plan_share_of_attention"] < 0.03)
    if short := [c for c in cases if c["tokens"] in SHORT and c["rows"] == c["tokens"]]:
        ahead = [c["tokens"] for c in short if c["speedup_with_plan"] >= 1]
        first = min(ahead, default=None)
        figures = "not reached" if first is None else f"{first:,} tokens, a layer's share of the plan counted"
        answer("break-even with dense at or below 8K tokens", figures, first is not None and first <= 8192)
    if case := best("index_share_of_kv", [c for c in cases if c["tokens"] == LENGTHS[-1]]):
        figures = f"at most {case['index_share_of_kv']:.3%} ({case['pattern']}, {case['rows']:,} rows)"
        answer("index bytes under 2 % of the KV cache's at 1M keys", figures, case["index_share_of_kv"] < 0.02)
    return answers


def draw_if_possible(results: Path) -> None:
    """Draw the plots beside the result file, or print the command that draws them on a machine with matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No matplotlib here. Draw later: python -m sglang_mminfer.benchmarks.plots {results}")
        return
    from sglang_mminfer.benchmarks import plots

    for path in plots.draw(results):
        print(f"Drawn: {path}")
