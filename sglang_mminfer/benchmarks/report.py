"""The results of `tile_attention` as lines and as Markdown tables, and whether they meet the aims.

In the tables "longest" is the longest work item over what a multiprocessor has to do, "issue" what the host takes to
issue a layer, and "difference" how far sampled rows are from float64.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sglang_mminfer.benchmarks.cases import AIM_TFLOPS, CHUNK, LENGTHS, TARGET

AIM_OF_IDEAL = 0.86  # of dense's speed over density
AIM_PLAN = 0.02  # of attention
WORTH_IT = 8192  # keys

COLUMNS = {  # heading: (figure, how to write it)
    "density": ("density", "{:.1%}"),
    "ours ms": ("sparse_ms", "{:.3g}"),
    "dense ms": ("dense_ms", "{:.4g}"),
    "speed-up": ("speedup", "{:.2f}"),
    "of ideal": ("share_of_ideal", "{:.0%}"),
    "TFLOP/s": ("tflops_on_visited_tiles", "{:.0f}"),
    "dense TFLOP/s": ("tflops_dense", "{:.0f}"),
    "rows used": ("rows_used", "{:.0%}"),
    "longest": ("longest_share", "{:.0%}"),
    "issue ms": ("issue_ms", "{:.2f}"),
    "difference": ("difference", "{:.1e}"),
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
    header = ["heads", "keys", "rows", "pattern", *COLUMNS]
    text = [*_about(results["runs"][-1]), "## Against dense", "", _row(header), _row(["---"] * len(header))]
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
    if aimed := list(aims(good, results["runs"][-1].get("executor", "triton"))):
        text += ["", "## Aims", "", _row(["aim", "measured", "met"]), _row(["---"] * 3)]
        text += [_row(answer) for answer in aimed]
    for kind in ("error", "not_applicable"):
        text += [f"\n{kind}: {name}: {c[kind].splitlines()[0]}" for name, c in results["cases"].items() if kind in c]
    return "\n".join([*text, ""])


def _about(run: dict[str, Any]) -> list[str]:
    """What ran where."""
    card, versions = run.get("card", {}), run.get("versions", {})
    named = {"executor": run.get("executor"), "keys of a tile": run.get("block_k")}
    named |= {"card": card.get("gpu"), "ptxas": card.get("ptxas")}
    named |= {name: versions.get(name) for name in ("torch", "triton", "flash-attn-4")}
    lines = [", ".join(f"{name} {value}" for name, value in named.items() if value), ""]
    if check := run.get("self_check"):
        verdict = "right" if check["good"] else "WRONG"
        lines += [f"Self-check, {check['times']} times: {verdict}: {check['answer']}.", ""]
    return lines


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: float | None, format_spec: str) -> str:
    return "" if value is None else format_spec.format(value)


def aims(cases: list[dict[str, Any]], executor: str) -> list[tuple[str, str, str]]:
    """(aim, what was measured, whether the aim is met: "yes" or "no"), for each aim that has cases."""
    answers = []

    def worst(aim: str, figure: str, show: str, of: list[dict[str, Any]], bound: float, at_least: bool = True) -> None:
        """Add an aim that holds for each of some cases."""
        if of:
            case = (min if at_least else max)(of, key=lambda c: c[figure])
            met = case[figure] >= bound if at_least else case[figure] <= bound
            shown = f"{show.format(case[figure])} ({case['pattern']}, {case['tokens']:,} keys, {case['rows']:,} rows)"
            answers.append((aim, ("at least " if at_least else "at most ") + shown, "yes" if met else "no"))

    long = [c for c in cases if c["tokens"] >= TARGET]
    chunks = [c for c in long if c["rows"] == CHUNK]
    least = AIM_TFLOPS.get(executor, AIM_TFLOPS["triton"])
    dense_enough = [c for c in chunks if c["tokens"] == TARGET and 0.05 <= c["density"] <= 0.1]
    aim = f"at least {least} TFLOP/s on visited tiles at 128K keys, density 5 to 10 %"
    worst(aim, "tflops_on_visited_tiles", "{:.0f}", dense_enough, least)
    aim = f"at least {AIM_OF_IDEAL:.0%} of dense's speed over density, from 128K keys"
    worst(aim, "share_of_ideal", "{:.0%}", chunks, AIM_OF_IDEAL)
    aim = f"plan time at most {AIM_PLAN:.0%} of attention time, from 128K keys"
    worst(aim, "plan_share_of_attention", "{:.1%}", long, AIM_PLAN, at_least=False)
    # A server leaves chunks to the dense backend for which it estimates no gain, so short prompts do not count here.
    worth_it = [c for c in cases if c["tokens"] >= WORTH_IT]
    worst(
        f"never slower than dense from {WORTH_IT:,} keys, plans counted", "speedup_with_plan", "{:.2f} x", worth_it, 1
    )
    aim = "no item longer than a quarter of the layer, from 128K keys"
    worst(aim, "longest_share", "{:.0%}", long, 0.25, at_least=False)
    aim = "index bytes at most 0.1 % of the KV cache's at 1M keys"
    worst(aim, "index_share_of_kv", "{:.3%}", [c for c in cases if c["tokens"] == LENGTHS[-1]], 0.001, at_least=False)
    return answers


def draw_if_possible(results: Path) -> None:
    """Draw the plots beside the result file, or print the command that draws them on a machine with matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No matplotlib here. Draw later: python -m sglang_mminfer.benchmarks.plots {results}")
        return
    from sglang_mminfer.benchmarks import plots

    for path in plots.draw(results):
        print(f"Drawn: {path}")
