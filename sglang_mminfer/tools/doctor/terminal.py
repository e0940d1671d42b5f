"""How the doctor's report reaches the terminal, without what SGLang logs meanwhile."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

from sglang_mminfer.tools.doctor.finding import Finding, brief


class _Collect(logging.Handler):
    """Collects logged errors, with the message of their exception, instead of printing them."""

    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._into.append(record.getMessage() + (f" ({brief(error)})" if error else ""))


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep logging and warnings off the terminal. Yields the list in which logged errors are collected."""
    problems: list[str] = []
    root, handler = logging.getLogger(), _Collect(problems)
    before, root.handlers = root.handlers, [handler]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield problems
    finally:
        root.handlers = before


_MARKS = {"ok": "[green]✓[/]", "note": "[dim]·[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}


@contextlib.contextmanager
def waiting() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows on standard error which section is being checked: beside a spinner on a terminal, if
    `rich` is installed, else as a line each."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        console = None
    else:
        console = Console(stderr=True)
    stream = sys.stderr
    if console is None or not console.is_terminal:
        yield lambda section: print(f"checking: {section} ...", file=stream, flush=True)
        return
    with console.status("Asking SGLang ...") as status:
        yield lambda section: status.update(f"Checking: {section} ...")


def print_findings(findings: list[Finding], ok: bool) -> None:
    """The findings as a table, and below it whether there is something to mend; in colour if `rich` is installed."""
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        _print_plainly(findings, ok)
    else:
        _print_in_colour(findings, ok)


def _print_plainly(findings: list[Finding], ok: bool) -> None:
    widths = [max(len(getattr(finding, field)) for finding in findings) for field in ("section", "status", "name")]
    section = ""
    for finding in findings:
        cells = ("" if finding.section == section else finding.section, finding.status, finding.name)
        section = finding.section
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths)), finding.text]))
        if finding.fix:
            print(" " * (sum(widths) + 6) + f"fix: {finding.fix}")
    print(_verdict(findings, ok))


def _verdict(findings: list[Finding], ok: bool) -> str:
    wrong = sum(finding.status == "error" for finding in findings)
    return "All that is needed is fine." if ok else f"{wrong} thing(s) to mend, see the fixes."


def _print_in_colour(findings: list[Finding], ok: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = ""
    for finding in findings:
        shown = "" if finding.section == section else finding.section
        section = finding.section
        table.add_row(shown, _MARKS[finding.status], escape(finding.name), escape(finding.text))
        if finding.fix:
            table.add_row("", "", "", f"[bold]fix:[/] {escape(finding.fix)}")
    console = Console(highlight=False)
    console.print(table)
    console.print(_verdict(findings, ok), style="green" if ok else "red")
