"""The table of all patterns for the documents: python -m sglang_mminfer.patterns"""

from __future__ import annotations

import dataclasses
import inspect

from sglang_mminfer.patterns.base import Field, Pattern, fields_of, kinds


def table() -> str:
    """Markdown: a row for each pattern, made from its class."""
    rows = ["| `kind` | fields | visible keys of a query (besides k <= q) |", "|---|---|---|"]
    rows += [f"| `{kind}` | {_fields(pattern)} | {_keys(pattern)} |" for kind, pattern in kinds().items()]
    return "\n".join(rows)


def _fields(pattern: type[Pattern]) -> str:
    return ", ".join(map(_field, fields_of(pattern)))


def _field(field: Field) -> str:
    values = field.expected.removeprefix("an integer ")
    default = "" if field.default is dataclasses.MISSING else f"; {field.default} if left out"
    return f"`{field.name}` ({values}{default})"


def _keys(pattern: type[Pattern]) -> str:
    """The first paragraph of its docstring."""
    return " ".join(inspect.cleandoc(pattern.__doc__ or "").partition("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    print(table())
