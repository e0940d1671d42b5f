"""The command line of `mminfer search`."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_mminfer import settings
from sglang_mminfer.tools.search import BOUNDARIES

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_mminfer.tools.search.run import SearchResult

DENSITY = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("model_path", help="a model directory, or its name on the hub")
    parser.add_argument("--video", type=Path, action="append", default=[], help="a calibration video; may be repeated")
    parser.add_argument(
        "--conversation", type=Path, action="append", default=[], help="a JSON list of OpenAI messages; may be repeated"
    )
    parser.add_argument("--held-out", type=Path, help="a video (or .json conversation) that only the report looks at")
    parser.add_argument("--out", type=Path, default=Path("head_config.json"), help="where the config goes")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--density", type=_share, help="mean density of all heads, above 0 to 1 (default: 0.25)")
    budget.add_argument("--error", type=float, help="mean error of all heads, in place of a density")
    parser.add_argument(
        "--boundaries",
        type=_boundaries,
        default=BOUNDARIES,
        metavar="none,q,2d",
        help="which a head may have; all are measured, so that with the same --work an ablation measures once",
    )
    parser.add_argument(
        "--cost",
        choices=("time", "pairs"),
        default="time",
        help="what an error is weighed against: what the tile visits take on this machine (default), or the pairs they "
        "hold. Times are measured once and kept in --work; measured again they may differ a little, and the config too",
    )
    parser.add_argument(
        "--tile-times", type=Path, metavar="FILE", help="another search's WORK/tile_times.json, to decide as it did"
    )
    parser.add_argument("--dense-below", type=int, default=0, help="rows below this position see everything")
    parser.add_argument(
        "--max-memory",
        type=_gib,
        metavar="GIB",
        help="what measuring may take in each rank, beside the server's own (default: a quarter of the machine, "
        "shared by the ranks; of a GPU a twentieth); heads that do not fit are measured one after the other",
    )
    parser.add_argument(
        "--work", type=Path, help="folder for what was measured (default: OUT.search); makes it resumable"
    )
    parser.add_argument(
        "--server-args", nargs=argparse.REMAINDER, default=[], help="further flags of the SGLang server"
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a density above 0 and at most 1, got {text}")
    return value


def _gib(text: str) -> int:
    """A number of GiB, in bytes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number of GiB above 0, got {text!r}")
    return int(value * 2**30)


def _boundaries(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BOUNDARIES]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(BOUNDARIES)}, got {unknown[0]!r}")
    return tuple(name for name in BOUNDARIES if name in names)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit status: 1 if the search cannot go on, else 0."""
    from rich.console import Console

    from sglang_mminfer.tools.search.run import SearchError

    console = Console(stderr=True)
    try:
        result = _search(options, console)
    except SearchError as error:
        console.print(f"[red]mminfer search:[/red] {error}")
        return 1
    result.config.save(options.out)
    report = options.out.with_suffix(".html")
    from sglang_mminfer.tools.search.report import page

    report.write_text(page(result))
    _print(result)
    print(f"Head config: {options.out}   report: {report}")
    return 0


def _search(options: argparse.Namespace, console: Console) -> SearchResult:
    from transformers import AutoConfig

    from sglang_mminfer.head_config import fingerprint_of
    from sglang_mminfer.tools.search import job as jobs
    from sglang_mminfer.tools.search.run import SERVER_FLAGS, Calibration, Prober, SearchError, read_times, search
    from sglang_mminfer.tools.server import Server

    for path in (*options.video, *options.conversation, *([options.held_out] if options.held_out else [])):
        if not path.is_file():
            raise SearchError(f"{path}: no such file")
    calibrations = [Calibration.of_video(path) for path in options.video]
    calibrations += [Calibration.of_file(path) for path in options.conversation]
    if not calibrations:
        raise SearchError("expected at least one --video or --conversation to calibrate on")
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
        *options.server_args,
        env={settings.OBSERVERS.variable: f"{jobs.OBSERVER}={work}"},
        timeout=3600,
    )
    with console.status("") as status:
        try:
            return search(
                Prober(server, work, model.layers, status.update, options.max_memory),
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


def _print(result: SearchResult) -> None:
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
        Console(file=sys.stdout).print(table)
    print(result.cost_words)
    for doubt in result.doubts:
        print(f"Mind: {doubt}")
