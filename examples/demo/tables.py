"""The demo's tables: who answers right, and what an answer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.columns import Columns
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


def costs(answers: Answers, stock: str) -> Columns:
    """Tokens, density and time to first token of each turn. `stock`: the server that runs without mminfer."""
    return Columns([_tokens_table(answers, stock), _times_table(answers)])


def _tokens_table(answers: Answers, stock: str) -> Table:
    sparse = {name: given for name, given in answers.items() if name != stock}
    table = _table("Tokens, and density")
    table.add_column("turn")
    for name in ("prompt", "= cached", "+ new", "new,\nstock", *(f"density\n{name}" for name in sparse)):
        table.add_column(name, justify="right")
    counted = next(iter(sparse.values()), answers.get(stock, ()))
    for number, answer in enumerate(counted):
        tokens = (answer.prompt_tokens, answer.cached_tokens, answer.new_tokens)
        dense = f"{answers[stock][number].new_tokens:,}" if answers.get(stock) else ""
        densities = [_density(given[number]) for given in sparse.values()]
        table.add_row(str(number + 1), *(f"{n:,}" for n in tokens), dense, *densities)
    return table


def _times_table(answers: Answers) -> Table:
    table = _table("Seconds to the first token (TTFT)")
    table.add_column("\nturn")
    for name in answers:
        table.add_column(f"\n{name}", justify="right")
    for number, given in enumerate(zip(*answers.values(), strict=True), 1):
        table.add_row(str(number), *(f"{answer.first_token:.2f}" for answer in given))
    table.add_section()
    table.add_row("all", *(f"{seconds_of(given):.2f}" for given in answers.values()))
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


def _density(answer: Answer) -> str:
    return "" if answer.density is None else f"{answer.density:.2f}"
