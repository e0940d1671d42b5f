"""Two plots from a result file: speed-up against length, and throughput against density.

python -m sglang_mminfer.benchmarks.plots sglang_mminfer/benchmarks/results/gpu_tile_attention_triton.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_mminfer.benchmarks.cases import AIM_TFLOPS, CHUNK, MEASURED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = "osD^vPX*<"  # one for each pattern
STYLES = {"28/4": "-", "32/8": "--"}


def draw(results: Path) -> list[Path]:
    """Draw NAME_length.png and NAME_density.png beside the result file, if it has data. Returns their paths."""
    cases = [case for case in json.loads(results.read_text())["cases"].values() if "speedup" in case]
    written = []
    for name, plot in (("length", _against_length), ("density", _against_density)):
        if cases:
            figure = plot(cases)
            path = results.with_name(f"{results.stem}_{name}.png")
            figure.savefig(path, dpi=160, facecolor="white")
            written.append(path)
    return written


def _figure(columns: int, legend: float = 0) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * columns + legend, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(True, which="both", alpha=0.25)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, list(axes)


def _against_length(cases: list[dict[str, Any]]) -> Figure:
    """Left: the last chunk of a prompt. Right: the whole prompt at once."""
    kinds: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
        (f"the last {CHUNK:,} rows", lambda c: c["rows"] == CHUNK and c["tokens"] > CHUNK),
        ("the whole prompt", lambda c: c["rows"] == c["tokens"]),
    ]
    figure, axes = _figure(2, legend=2.6)
    for ax, (title, belongs) in zip(axes, kinds):
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for c in cases:
            if belongs(c) and c["slots"] == "shuffled":
                lines.setdefault((c["pattern"], c["shape"]), []).append((c["tokens"], c["speedup"]))
        for (pattern, shape), points in sorted(lines.items()):
            x, y = zip(*sorted(points))
            number = MEASURED.index(pattern)
            style: dict[str, Any] = {"color": f"C{number}", "marker": MARKS[number], "ls": STYLES.get(shape, "-")}
            ax.plot(x, y, ms=5, lw=1.4, label=f"{pattern}, {shape} heads", **style)
        ax.axhline(1, color="black", lw=1, ls="--")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:,.0f}K")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        ax.set_xlabel("keys")
        ax.set_ylabel("attention speed-up over dense")
        ax.set_title(title, fontsize=10, loc="left")
    entries = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _against_density(cases: list[dict[str, Any]]) -> Figure:
    figure, (ax,) = _figure(1)
    for number, shape in enumerate(sorted({c["shape"] for c in cases})):
        of_shape = [c for c in cases if c["shape"] == shape]
        x, y = [c["density"] for c in of_shape], [c["tflops_on_visited_tiles"] for c in of_shape]
        ax.scatter(x, y, s=22, marker=MARKS[number], alpha=0.8, label=f"ours, {shape} heads, visited tiles")
    dense = sorted(c["tflops_dense"] for c in cases if c["tokens"] >= 131072)
    if dense:
        ax.axhline(dense[len(dense) // 2], color="black", lw=1, ls="--", label="dense, median from 128K keys")
    for executor, tflops in AIM_TFLOPS.items():
        ax.axhline(tflops, color="#c0392b", lw=1, ls=":", label=f"aim of {executor}: {tflops}")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    ax.set_xlabel("density: visited over causal pairs")
    ax.set_ylabel("TFLOP/s")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for drawn in draw(Path(name)):
            print(drawn)
