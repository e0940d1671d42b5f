"""A result file of `selectors.py` as a table, and as two pictures: output error and lost mass against density.

python -m sglang_mminfer.benchmarks.selectors_report sglang_mminfer/benchmarks/results/selectors.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sglang_mminfer.benchmarks.selectors import ADAPTIVE, CORRECTED, EXACT, MOST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "a_shape": {"color": "#8c8c8c", "marker": "v"},
    "tri_shape": {"color": "#5f5f5f", "marker": "^"},
    "grid": {"color": "#2ca02c", "marker": "P"},
    "vertical_slash": {"color": "#9467bd", "marker": "x"},
    "pooled_blocks": {"color": "#ff7f0e", "marker": "s"},
    CORRECTED: {"color": "#ff7f0e", "marker": "s", "ls": ":", "markerfacecolor": "white"},
    "pooled_queries": {"color": "#d62728", "marker": "D"},
    "pooled_queries, one maximum": {"color": "#d62728", "marker": "D", "ls": ":", "markerfacecolor": "white"},
    **{
        name: {"color": colour, "marker": "o", "lw": 2.2}
        for name, colour in zip(ADAPTIVE, ("#9ecae1", "#2171b5", "#08306b"))
    },
    EXACT: {"color": "black", "ls": "--", "marker": "."},
}

SHOWN = (0.15, 0.3)
"""Densities of the table."""

FLOOR = {"error": 0.01, "lost mass": 0.001}
"""What is smaller is drawn there."""


def draw(results: Path) -> list[Path]:
    """Draw NAME_error.png and NAME_lost_mass.png beside the result file. Returns their paths."""
    report = json.loads(results.read_text())
    written = []
    for figure_name, value in (("error", lambda p: p["error"]), ("lost mass", lambda p: 1 - p["recall"])):
        figure = _figure(report, figure_name, value)
        path = results.with_name(f"{results.stem}_{figure_name.replace(' ', '_')}.png")
        figure.savefig(path, dpi=110, facecolor="white")
        written.append(path)
    return written


def table(results: Path) -> str:
    """Markdown: each selector's error at the densities SHOWN, on every kind of head, and what choosing costs it."""
    report = json.loads(results.read_text())
    kinds = report["at_density"]
    rows = [f"| | {' | '.join(kinds)} | choosing |", "|---" * (len(kinds) + 2) + "|"]
    for selector in STYLES:
        cells = [" / ".join(_short(kinds[kind][selector][f"{d:g}"]) for d in SHOWN) for kind in kinds]
        shares = [p["choosing"] for curves in report["curves"].values() for p in curves[selector].values()]
        rows.append(f"| {selector} | {' | '.join(cells)} | {median(shares):.2f} |")
    return "\n".join(rows)


def _short(error: float | None) -> str:
    return "–" if error is None else f"{error:.2f}" if error >= 0.1 else f"{error:.3f}"


def _figure(report: dict[str, Any], name: str, value: Any) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = report["curves"]
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, -(-len(kinds) // 2), sharey=True, squeeze=False)
    for ax, (kind, curves) in zip(axes.flat, kinds.items()):
        for selector, points in curves.items():
            x = [point["density"] for point in points.values()]
            y = [max(value(point), FLOOR[name]) for point in points.values()]
            ax.plot(x, y, label=selector, **{"ms": 5, "lw": 1.4, **STYLES[selector]})
        ax.set_title(kind, fontsize=12, loc="left")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(0.04, MOST)
        ax.set_ylim(0.9 * FLOOR[name], 2 if name == "error" else 1)
        ax.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5], minor=False)
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter(lambda density, _: f"{density:g}")
        ax.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
        ax.grid(True, which="major", alpha=0.3)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("density: visited over causal pairs")
    for ax in axes[:, 0]:
        ax.set_ylabel("output error over output" if name == "error" else "attention mass that is not visited")
    lines, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    return figure


if __name__ == "__main__":
    for results_file in sys.argv[1:]:
        print(table(Path(results_file)))
        for drawn in draw(Path(results_file)):
            print(drawn)
