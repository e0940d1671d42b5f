"""Comparisons with dense as tables, JSON and a line of text; niah, compare and eval print the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sglang_mminfer.tools.paired import CONFIDENCE, FEW, POWER, Comparison

Verdicts = Mapping[str, Sequence[Comparison]]
"""Config -> its comparisons with dense, one for each task."""


def baseline_of(names: Iterable[str]) -> str:
    """The config that the others are compared with: `dense`, or the first if none has that name."""
    names = list(names)
    return "dense" if "dense" in names else names[0]


def rows_of(verdicts: Verdicts, baseline: str) -> list[list[str]]:
    """The table as rows of cells, the heading first."""
    margin = next((c.margin for found in verdicts.values() for c in found), 0.0)
    rows = [
        [
            "config",
            "task",
            "questions",
            "videos",
            f"minus {baseline}, points",
            f"{100 * CONFIDENCE:g} %",
            "gained / lost",
            "p (Holm)",
            f"not worse by more than {100 * margin:g} point{'' if margin == 0.01 else 's'}",
        ]
    ]
    for name, comparisons in verdicts.items():
        for found in comparisons:
            rows.append(
                [
                    name,
                    found.task,
                    f"{found.questions:,}",
                    f"{found.videos:,}",
                    f"{100 * found.difference:+.1f}",
                    f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
                    "graded" if found.gained is None else f"{found.gained} / {found.lost}",
                    p_text(found.holm),
                    found.sentence,
                ]
            )
    return rows


def p_text(value: float) -> str:
    """A p-value with two digits that count."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.995 else "1"


def notes_of(verdicts: Verdicts, baseline: str) -> list[str]:
    """What a reader of the table must know."""
    if not any(verdicts.values()):
        return []
    notes = [
        f"Positive is better than {baseline}. p: exact, by whole videos or conversations (McNemar's test where each "
        "has one question). Interval: Tango's score interval, or the bootstrap by videos for graded scores.",
        f"“Would do”: as many questions bring a verdict with a probability of {POWER:g}, if there is no difference "
        "(where the interval leaves 0 out: if the difference is the one seen).",
    ]
    compared = [found for comparisons in verdicts.values() for found in comparisons]
    if min(found.videos for found in compared) <= FEW:
        notes.append(f"With {FEW} videos or fewer p cannot fall below 0.05, whatever is answered.")
    if any(found.clusters_unknown for found in compared):
        notes.append(
            f"Where answers about fewer than {FEW} videos differ, nothing tells how much questions about one video "
            "hang together, and the interval is that of independent questions."
        )
    return notes


def to_json(verdicts: Verdicts, baseline: str) -> dict[str, Any]:
    """The comparisons for a result file."""
    return {
        "baseline": baseline,
        "confidence": CONFIDENCE,
        "configs": {name: [dataclasses.asdict(found) for found in found_of] for name, found_of in verdicts.items()},
    }


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the heading first, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines) + "\n"


def markdown_section(verdicts: Verdicts, baseline: str) -> str:
    """The table and its notes; nothing if nothing was compared."""
    if not any(verdicts.values()):
        return ""
    notes = "\n".join(f"\n{note}" for note in notes_of(verdicts, baseline))
    return f"\nCompared with {baseline}:\n\n{markdown(rows_of(verdicts, baseline))}{notes}\n"


def rich_table(rows: list[list[str]], title: str) -> Any:
    """Rows of cells, the heading first, as a table for the terminal."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name.replace(", ", "\n"), justify="right" if i else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def printed(console: Any, verdicts: Verdicts, baseline: str) -> None:
    """Print the table and its notes on a rich console; nothing if nothing was compared."""
    if any(verdicts.values()):
        rows = rows_of(verdicts, baseline)
        rows[0][-1] = rows[0][-1].replace(" by more", ", by more")
        console.print(rich_table(rows, f"Compared with {baseline}"))
        for note in notes_of(verdicts, baseline):
            console.print(note, highlight=False)
