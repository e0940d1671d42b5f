"""`mminfer niah`: its options, its servers, its table and its files."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sglang_mminfer.tools import machine, verdicts
from sglang_mminfer.tools.needles import kits
from sglang_mminfer.tools.niah import ask as niah
from sglang_mminfer.tools.niah.against import compared
from sglang_mminfer.tools.niah.ask import Answer, Cell, Media, Settings, Target
from sglang_mminfer.tools.niah.figure import TITLES, draw
from sglang_mminfer.tools.server import Server, ServerError, shown_wait
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry

DESCRIPTION = (
    "Hides needles in long videos (v-niah) and in conversations of text, images and videos over several turns "
    "(mm-niah), asks for them, and draws which are found, by length and depth. With --url it asks any running "
    "OpenAI-compatible server; with --model-path it starts SGLang servers with the plugin, one after another for each "
    "--config. All are asked the same and stand side by side in one table, one picture and one JSON file."
)


class Refused(Exception):
    """The command cannot do this; the message tells the user why."""


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for questions, which niah and compare share."""
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--tasks", nargs="+", metavar="TASK", choices=("v-niah", "mm-niah"), help="v-niah, mm-niah; default: what fits"
    )
    group.add_argument(
        "--lengths", nargs="+", type=int, metavar="TOKENS", default=[4096, 8192], help="about; %(default)s"
    )
    group.add_argument("--depths", type=int, metavar="N", default=5, help="needles asked for, from start to end; 5")
    group.add_argument("--seeds", type=int, metavar="N", default=2, help="conversations of each task and length; 2")
    group.add_argument("--seed", type=int, default=1, help="the first of them; 1")
    group.add_argument(
        "--needles",
        choices=("cards", "glyphs"),
        help="cards: sentences that a real model reads; glyphs: for the needle models of examples/needle_vlm. Default: "
        "what the model is",
    )


def settings_of(options: argparse.Namespace, kit: kits.Kit, model: str, relays: bool) -> Settings:
    """The questions that the options name.

    Raises:
        Refused: a value is out of range.
    """
    # A needle model that was trained on videos only cannot read text.
    only_videos = kit is kits.GLYPHS and Path(model).name == "video"
    tasks = tuple(options.tasks or (("v-niah",) if only_videos else ("v-niah", "mm-niah")))
    if relays:
        tasks += tuple(task.replace("niah", "relay") for task in tasks)
    try:
        return Settings(tasks, tuple(options.lengths), options.depths, options.seeds, options.seed)
    except ValueError as error:
        raise Refused(f"--{error}") from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to `parser`."""
    servers = parser.add_argument_group("servers")
    servers.add_argument("--url", action="append", default=[], help="of a running server; may be given several times")
    servers.add_argument("--model", help="name to ask those servers for; default: the first that each lists")
    servers.add_argument(
        "--model-path", metavar="P", help="start SGLang with this model: a folder, or a name on the hub"
    )
    servers.add_argument("--config", action="append", metavar="NAME|PATH", help="head config, several times; default")
    servers.add_argument(
        "--server-flags", default="", metavar="'FLAGS'", help="further flags for servers that are started"
    )
    servers.add_argument(
        "--inline-media", action="store_true", help="send media in the requests, to servers that cannot read files here"
    )
    add_question_options(parser)
    parser.add_argument("--relays", action="store_true", help="ask for relays, too: needles that name an earlier one")
    parser.add_argument("--concurrency", type=int, default=2, metavar="N", help="conversations side by side; 2")
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="seconds for an answer; 1800")
    parser.add_argument("--out", type=Path, default=Path("niah-out"), help="folder for niah.json, niah.png and media")


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns exit status 0; 1 if a server gave no answer at all; 2 for wrong arguments."""
    console = wide_console()
    return status_of(lambda: _run(options, console), console, "every server that was started is stopped")


def status_of(work: Callable[[], int], console: Console, if_interrupted: str) -> int:
    """Run `work` and return its exit status. If an error or Ctrl-C ends it, say so in one line."""
    try:
        return work()
    except Refused as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except (ServerError, OSError) as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(f"interrupted; {if_interrupted}", style="bold")
        return 130


def _run(options: argparse.Namespace, console: Console) -> int:
    if bool(options.url) == bool(options.model_path):
        raise Refused("name running servers with --url, or a model to serve with --model-path; one of the two")
    if options.config and not options.model_path:
        raise Refused("--config is for servers that are started: give --model-path, too")
    for name in options.config or ():
        check_config(name)
    if options.concurrency < 1:
        raise Refused(f"--concurrency: expected 1 or more, got {options.concurrency}")
    running = [target_of(url, options.model, options.timeout) for url in options.url]
    models = [options.model_path] if options.model_path else [target.model for target in running]
    kit = kit_of(options.needles, models)
    settings = settings_of(options, kit, models[0], options.relays)
    media = Media(settings, kit, options.out / "media", options.inline_media)
    answers_of: dict[str, list[Answer]] = {}
    if options.model_path:
        for name in options.config or ["default"]:
            label = unique(Path(name).stem, answers_of)
            flags = ["--attention-backend", "mminfer", "--mminfer-config", name, *server_flags(options, kit)]
            with contextlib.ExitStack() as stack:
                with shown_wait(f"{label}: server starts") as wait:
                    log = options.out / f"{label}.log"
                    server = stack.enter_context(Server(options.model_path, *flags, progress=wait, log=log))
                target = Target(label, server.client(options.timeout), server.model, telemetry_of(server.url))
                answers_of[label] = ask_with_progress(target, media, options.concurrency, console)
    else:
        for target in running:
            target.label = unique(target.label, answers_of)
            answers_of[target.label] = ask_with_progress(target, media, options.concurrency, console)
    console.print(table(answers_of, settings))
    baseline, comparisons = compared(answers_of)
    verdicts.printed(console, comparisons, baseline)
    picture = draw(
        {name: niah.cells(answers, settings) for name, answers in answers_of.items()},
        settings,
        options.out / "niah.png",
    )
    result = options.out / "niah.json"
    write_json(
        result,
        {
            **provenance("niah"),
            "models": [Path(model).name if Path(model).exists() else model for model in models],
            "needles": kit.name,
            "settings": asdict(settings),
            "servers": {name: niah.report(answers, settings) for name, answers in answers_of.items()},
            "compared": verdicts.to_json(comparisons, baseline),
        },
    )
    console.print(f"written: {result}, {picture}", highlight=False)
    silent = [name for name, answers in answers_of.items() if all(answer.error for answer in answers)]
    for name in silent:
        console.print(f"error: {name} answered nothing: {answers_of[name][0].error}", style="bold red", markup=False)
    return 1 if silent else 0


def wide_console() -> Console:
    """A console that has room for a table even if the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 180)


def server_flags(options: argparse.Namespace, kit: kits.Kit) -> list[str]:
    """The flags of a server that the command starts: to see every frame of the kit's videos, and the user's own."""
    return [*niah.mm_process_flags(kit), "--enable-cache-report", *shlex.split(options.server_flags)]


def check_config(name: str) -> None:
    """Read a head config before any server is started.

    Raises:
        Refused: the config cannot be read.
    """
    from sglang_mminfer.head_config import HeadConfig, HeadConfigError

    try:
        HeadConfig.load(name)
    except HeadConfigError as error:
        raise Refused(f"--config: {error}") from None


def kit_of(name: str | None, models: Sequence[str]) -> kits.Kit:
    """The kit of that name, or else the kit that fits every model.

    Raises:
        Refused: no kit fits every model.
    """
    if name:
        return kits.KITS[name]
    are_needle_models = {kits.knows_glyphs(model) for model in models}
    if len(are_needle_models) > 1:
        raise Refused("some of these servers have a needle model and some have not: say --needles cards or glyphs")
    return kits.GLYPHS if are_needle_models == {True} else kits.CARDS


def target_of(url: str, model: str | None, timeout: float) -> Target:
    """The running server at a URL.

    Raises:
        Refused: nothing answers there, or what answers is no OpenAI-compatible server.
    """
    import openai

    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    host = urlsplit(base).hostname
    if host is None or urlsplit(base).scheme not in ("http", "https"):
        raise Refused(f"--url: expected something like http://127.0.0.1:30000, got {url}")
    is_local = host in ("127.0.0.1", "localhost", "::1")
    client = openai.OpenAI(
        base_url=base,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        timeout=timeout,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=not is_local, timeout=timeout),
    )
    try:
        listed = [entry.id for entry in client.with_options(timeout=20).models.list().data]
    except openai.APIStatusError as error:
        raise Refused(f"--url: {base}/models answers with an error: {error}") from None
    except openai.APIConnectionError:
        raise Refused(f"--url: no server at {base}; start one with `sglang serve`") from None
    except Exception as error:  # a web page, for example, for which the client has no error type
        raise Refused(f"--url: {base} is no OpenAI-compatible server: {type(error).__name__}") from None
    if not model and not listed:
        raise Refused(f"--url: {base} lists no models; name one with --model")
    return Target(urlsplit(base).netloc, client, model or listed[0], telemetry_of(base))


def telemetry_of(url: str) -> Telemetry | None:
    """The telemetry of a running server; None if it has none, as a server without mminfer."""
    found = Telemetry(url, os.environ.get("OPENAI_API_KEY"))
    try:
        found.server()
    except NoTelemetry:
        return None
    return found


def unique(label: str, labels: dict[str, Any]) -> str:
    """`label`, with a number behind it if `labels` has it already."""
    number = 2
    name = label
    while name in labels:
        name, number = f"{label} ({number})", number + 1
    return name


@contextlib.contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Any]:
    """A function to call after each answer. If the output is no terminal, it prints a line for each quarter."""
    done = right = errors = 0
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[score]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        bar_task = bar.add_task(label, total=total, score="")

        def count_answer(answer: Answer) -> None:
            nonlocal done, right, errors
            done, right, errors = done + 1, right + answer.right, errors + (answer.error is not None)
            score = f"{right} right" + (f", {errors} errors" if errors else "")
            bar.update(bar_task, completed=done, score=score)
            if not console.is_terminal and done * 4 // total != (done - 1) * 4 // total:
                console.print(f"{label}: {done} of {total} answers, {score}", highlight=False)

        yield count_answer


def ask_with_progress(target: Target, media: Media, concurrency: int, console: Console) -> list[Answer]:
    """`ask.ask_all` with a progress bar on the console."""
    with progress_bar(console, target.label, media.settings.questions) as count_answer:
        return niah.ask_all(target, media, concurrency, count_answer)


def table(answers_of: dict[str, list[Answer]], settings: Settings) -> Table:
    """The table of right answers, by server, task and length."""
    rows = Table(title="Needles found", title_justify="left")
    rows.add_column("server", no_wrap=True)
    for task in settings.tasks:
        for length in settings.lengths:
            rows.add_column(f"{TITLES[task]}\n{length:,}", justify="right", no_wrap=True)
    densities = {name: niah.density(answers) for name, answers in answers_of.items()}
    if told := any(value is not None for value in densities.values()):
        rows.add_column("density", justify="right")
    rows.add_column("errors", justify="right")
    for name, answers in answers_of.items():
        row = [
            percent(Cell.of(a for a in answers if (a.task, a.length) == (task, length)))
            for task in settings.tasks
            for length in settings.lengths
        ]
        if told:
            row.append("–" if densities[name] is None else f"{densities[name]:.3f}")
        rows.add_row(name, *row, str(sum(a.error is not None for a in answers)))
    return rows


def percent(cell: Cell) -> str:
    """The share of right answers as text."""
    return "–" if cell.share is None else f"{100 * cell.share:.1f} %"


def provenance(command: str) -> dict[str, Any]:
    """Date, machine, versions and command for a result file. Absolute paths are cut to their last part, because the
    folders of this machine mean nothing elsewhere."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    words = words[words.index(command) :] if command in words else [command]
    today = datetime.date.today().isoformat()
    return {"date": today, **machine.describe(), "command": shlex.join(["mminfer", *words])}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(fresh, path)
