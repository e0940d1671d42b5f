"""The command line of `mminfer search`."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, TextIO

from sglang_mminfer import settings

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_mminfer.tools.search.run import SearchResult

DENSITY = 0.25


def run(options: SimpleNamespace) -> int:
    """Search, and write config and report. Returns exit status 0.

    Args:
        options: what `commands.search` read, attributes of the options' names.

    Raises:
        SearchError: the search cannot go on; the message says why.
    """
    from rich.console import Console

    from sglang_mminfer.tools.search import publish
    from sglang_mminfer.tools.search.report import page, rows_of

    if options.push_to_hub:
        publish.check_login(options.push_to_hub)
    result = _search(options, Console(stderr=True))
    result.config.save(options.out)
    report = options.out.with_suffix(".html")
    report.write_text(page(result))
    files = {"config": str(options.out), "report": str(report)}
    if options.push_to_hub:
        files["hub"] = publish.push(result, options.out, report, options.push_to_hub)
    _print(result, files, sys.stderr if options.json else sys.stdout)
    if options.json:
        scores = {"calibration": result.calibration, "held_out": result.held_out}
        columns = ("config", "density", "error", "ms")
        tables = {
            name: [dict(zip(columns, row, strict=True)) for row in rows_of(score)]
            for name, score in scores.items()
            if score is not None
        }
        print(json.dumps({**files, **tables, "cost": result.cost_words, "doubts": list(result.doubts)}, indent=1))
    return 0


def _search(options: SimpleNamespace, console: Console) -> SearchResult:
    from transformers import AutoConfig

    from sglang_mminfer.head_config import fingerprint_of
    from sglang_mminfer.tools.search import job as jobs
    from sglang_mminfer.tools.search.run import SERVER_FLAGS, Calibration, Prober, SearchError, read_times, search
    from sglang_mminfer.tools.server import Server

    calibrations = [Calibration.of_video(path) for path in options.video]
    calibrations += [Calibration.of_file(path) for path in options.conversation]
    held_out = options.held_out
    held_out_calibration = None
    if held_out is not None:
        held_out_calibration = (
            Calibration.of_file(held_out) if held_out.suffix == ".json" else Calibration.of_video(held_out)
        )
    times = read_times(options.tile_times) if options.tile_times else None
    try:
        model = fingerprint_of(AutoConfig.from_pretrained(options.model_path))
    except (OSError, ValueError) as error:
        raise SearchError(f"{options.model_path}: expected a model: {error}") from None
    work = (options.work or options.out.with_suffix(".search")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / jobs.JOB).unlink(missing_ok=True)
    server = Server(
        options.model_path,
        *SERVER_FLAGS,
        *shlex.split(options.server_flags),
        env={settings.OBSERVERS.variable: f"{jobs.OBSERVER}={work}"},
        timeout=3600,
    )
    with console.status("") as status:
        try:
            return search(
                Prober(server, work, model, status.update, options.max_memory),
                model,
                calibrations,
                held_out_calibration,
                density=None if options.error is not None else options.density or DENSITY,
                error=options.error,
                boundaries=options.boundaries,
                times=times,
                by_time=options.cost == "time",
                dense_below=options.dense_below,
                name=options.out.stem,
                today=datetime.date.today(),
            )
        finally:
            server.stop()


def _print(result: SearchResult, files: dict[str, str], stream: TextIO) -> None:
    """Tables, doubts and the names of what was written, in words."""
    from rich.console import Console
    from rich.table import Table as RichTable

    from sglang_mminfer.tools.search.report import rows_of

    for scores, title in ((result.calibration, "calibration"), (result.held_out, "held-out")):
        if scores is None:
            continue
        table = RichTable(title=f"On the {title} input")
        for column in ("config", "density", "error", "ms"):
            table.add_column(column, justify="left" if column == "config" else "right")
        for name, density, error, ms in rows_of(scores):
            table.add_row(name, f"{density:.1%}", f"{error:.4f}", f"{ms:,.0f}")
        Console(file=stream).print(table)
    print(result.cost_words, file=stream)
    for doubt in result.doubts:
        print(f"Mind: {doubt}", file=stream)
    print("   ".join(f"{name}: {file}" for name, file in files.items()), file=stream)
