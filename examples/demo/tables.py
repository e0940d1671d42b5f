"""The demo's two tables: who answers right, and what an answer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from conversation import Answer, Question

Answers = Mapping[str, Sequence[Answer]]
"""Name of a server -> its answers so far, in the order of the questions."""


def answers_table(questions: Sequence[Question], answers: Answers) -> Table:
    """Each question, the needles that lead to its answer, and what every server said."""
    table = _table("Right or wrong")
    for name in ("turn", "the message brings", "asked for: needles to find", "right"):
        table.add_column(name)
    for name in answers:
        table.add_column(name, no_wrap=True)
    for number, question in enumerate(questions):
        said = [_verdict(given[number]) if number < len(given) else "" for given in answers.values()]
        table.add_row(str(number + 1), question.shows or "(only asks)", question.way, question.right, *said)
    table.add_section()
    scores = [f"{sum(answer.right for answer in given)} of {len(given)}" for given in answers.values()]
    table.add_row("", "", "right answers", "", *scores)
    return table


def costs_table(answers: Answers, stock: str) -> Table:
    """Tokens, density and time to first token of each turn. `stock`: the server that runs without mminfer."""
    table = _table("What an answer takes")
    sparse = {name: given for name, given in answers.items() if name != stock}
    table.add_column("turn")
    for name in ("prompt\ntokens", "= from\ncache", "+ new", "new,\nstock"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in sparse:
        table.add_column(f"density\n{name}", justify="right", no_wrap=True)
    for name in answers:
        table.add_column(f"first token\n{name}", justify="right", no_wrap=True)
    counted = next(iter(sparse.values()), ())
    for number, answer in enumerate(counted or answers[stock]):
        tokens = (
            [f"{n:,}" for n in (answer.prompt_tokens, answer.cached_tokens, answer.new_tokens)] if counted else [""] * 3
        )
        dense = answers.get(stock, ())
        tokens.append(f"{dense[number].new_tokens:,}" if number < len(dense) else "")
        densities = [_density(given, number) for given in sparse.values()]
        times = [f"{given[number].first_token:.2f} s" if number < len(given) else "" for given in answers.values()]
        table.add_row(str(number + 1), *tokens, *densities, *times)
    table.add_section()
    sums = [f"{seconds_of(given):.2f} s" if given else "" for given in answers.values()]
    table.add_row("all", "", "", "", "", *["" for _ in sparse], *sums)
    return table


def seconds_of(answers: Sequence[Answer]) -> float:
    """Seconds to the first tokens of all answers."""
    return sum(answer.first_token for answer in answers)


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )


def _verdict(answer: Answer) -> Text:
    said = answer.text[:8] or "nothing"
    return Text(f"{said} right", style="green") if answer.right else Text(f"{said} WRONG", style="bold red")


def _density(answers: Sequence[Answer], number: int) -> str:
    density = answers[number].density if number < len(answers) else None
    return "" if density is None else f"{density:.2f}"
