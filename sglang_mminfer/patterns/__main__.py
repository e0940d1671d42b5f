"""The table of all patterns, made from their classes.

python -m sglang_mminfer.patterns                          # prints it
python -m sglang_mminfer.patterns docs/head-configs.md     # writes it between the marks of a page
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

from sglang_mminfer.patterns.base import Field, Pattern, fields_of, kinds


def table() -> str:
    """Markdown: a row for each pattern, made from its class."""
    rows = ["| `kind` | fields | visible keys of a query (besides k <= q) |", "|---|---|---|"]
    rows += [f"| `{kind}` | {_fields(pattern)} | {_keys(pattern)} |" for kind, pattern in kinds().items()]
    return "\n".join(rows)


def _fields(pattern: type[Pattern]) -> str:
    return ", ".join(map(_field, fields_of(pattern)))


def _field(field: Field) -> str:
    values = field.expected.removeprefix("an integer ").removeprefix("a number ")
    default = "" if field.default is dataclasses.MISSING else f"; {field.default} if left out"
    return f"`{field.name}` ({values}{default})"


def _keys(pattern: type[Pattern]) -> str:
    """The first paragraph of its docstring."""
    return " ".join(inspect.cleandoc(pattern.__doc__ or "").partition("\n\n")[0].split()).replace("|", "\\|")


BEGIN, END = "<!-- patterns -->", "<!-- /patterns -->"


def written(page: str) -> str:
    """A page with the table between its marks.

    Raises:
        ValueError: if the page has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END} in the page")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:]:
        path = Path(sys.argv[1])
        path.write_text(written(path.read_text()))
    else:
        print(table())
