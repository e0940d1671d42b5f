"""The picture of `mminfer eval`: for each task the difference of every config from dense, with its interval."""

from __future__ import annotations

from pathlib import Path

from sglang_mminfer.tools.verdicts import Verdicts

COLOURS = {"yes": "#1b7837", "no": "#b2182b", "not enough questions": "#7f7f7f"}
"""By verdict. The marker tells it, too."""
MARKERS = {"yes": "o", "no": "X", "not enough questions": "s"}
WORDS = {
    "yes": "not worse by more than the margin",
    "no": "worse by more than the margin",
    "not enough questions": "not enough questions",
}


def draw(verdicts: Verdicts, baseline: str, path: Path) -> Path:
    """Write a PNG file and return its path."""
    from matplotlib.figure import Figure

    every = [(name, found) for name, comparisons in verdicts.items() for found in comparisons]
    rows = [row for task in dict.fromkeys(found.task for _, found in every) for row in every if row[1].task == task]
    margin = 100 * rows[0][1].margin
    figure = Figure(figsize=(8.4, 1.5 + 0.42 * len(rows)), layout="constrained", dpi=130)
    ax = figure.subplots()
    ax.axvspan(-margin, 100, color="#1b7837", alpha=0.07, linewidth=0)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.axvline(-margin, color="#1b7837", linewidth=0.8, linestyle="--")
    drawn = set()
    for y, (_, found) in enumerate(rows):
        low, middle, high = (100 * value for value in (found.low, found.difference, found.high))
        label = None if found.verdict in drawn else WORDS[found.verdict]
        drawn.add(found.verdict)
        ax.errorbar(
            middle,
            y,
            xerr=[[middle - low], [high - middle]],
            fmt=MARKERS[found.verdict],
            color=COLOURS[found.verdict],
            capsize=3,
            markersize=6,
            label=label,
        )
    for y in range(1, len(rows)):
        if rows[y][1].task != rows[y - 1][1].task:
            ax.axhline(y - 0.5, color="#cccccc", linewidth=0.8)
    ax.set_yticks(
        range(len(rows)), [f"{found.task}\n{name}, n = {found.questions:,}" for name, found in rows], fontsize=8
    )
    ax.set_ylim(len(rows) - 0.5, -0.5)
    low, high = min(100 * found.low for _, found in rows), max(100 * found.high for _, found in rows)
    space = 0.06 * (max(high, 0) - min(low, -margin)) + 0.5
    ax.set_xlim(min(low, -margin) - space, max(high, 0) + space)
    ax.set_xlabel(f"right answers minus those of {baseline}, in points, with the interval of 95 %", fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    ax.set_title(f"Margin {margin:g} point{'' if margin == 1 else 's'} (dashed)", fontsize=9, loc="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
