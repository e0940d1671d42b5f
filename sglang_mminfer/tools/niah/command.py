"""`mminfer niah`: its options, its servers, its table and its files."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sglang_mminfer.tools import connections, machine, verdicts
from sglang_mminfer.tools.errors import Failed, Refused
from sglang_mminfer.tools.needles import kits
from sglang_mminfer.tools.niah import ask as niah
from sglang_mminfer.tools.niah.against import compared
from sglang_mminfer.tools.niah.ask import Answer, Cell, Media, Settings, Target
from sglang_mminfer.tools.niah.figure import TITLES, draw
from sglang_mminfer.tools.server import Server, shown_wait
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry


def settings_of(options: SimpleNamespace, kit: kits.Kit, model: str, relays: bool) -> Settings:
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


def run(options: SimpleNamespace) -> int:
    """Ask servers, and write table, picture and file. Returns exit status 0; 1 if a server gave no answer at all.

    Args:
        options: what `commands.niah` read, attributes of the options' names.

    Raises:
        Failed: the questions cannot be asked; the message says why.
    """
    console = wide_console(options.json)
    for name in options.mminfer_config:
        check_config(name)
    running = [target_of(url, options.model, options.timeout, options.api_key) for url in options.url]
    models = [options.model_path] if options.model_path else [target.model for target in running]
    kit = kit_of(options.needles, models)
    settings = settings_of(options, kit, models[0], options.relays)
    media = Media(settings, kit, options.out / "media", options.inline_media)
    answers_of: dict[str, list[Answer]] = {}
    if options.model_path:
        for name in options.mminfer_config or ["default"]:
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
    content = {
        **provenance("niah"),
        "models": [Path(model).name if Path(model).exists() else model for model in models],
        "needles": kit.name,
        "settings": asdict(settings),
        "servers": {name: niah.report(answers, settings) for name, answers in answers_of.items()},
        "compared": verdicts.to_json(comparisons, baseline),
    }
    write_json(result, content)
    if options.json:
        print(json.dumps(content, indent=1, ensure_ascii=False))
    console.print(f"written: {result}, {picture}", highlight=False)
    silent = [name for name, answers in answers_of.items() if all(answer.error for answer in answers)]
    if silent:
        raise Failed("; ".join(f"{name} answered nothing: {answers_of[name][0].error}" for name in silent))
    return 0


def wide_console(as_json: bool = False) -> Console:
    """A console that has room for a table even if the output is no terminal. `as_json`: on standard error, because
    standard output is for the result alone."""
    stream = sys.stderr if as_json else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 180)


def server_flags(options: SimpleNamespace, kit: kits.Kit) -> list[str]:
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
        raise Refused(f"--mminfer-config: {error}") from None


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


def target_of(url: str, model: str | None, timeout: float, api_key: str | None = None) -> Target:
    """The running server at a URL.

    Raises:
        Failed: nothing answers there, or what answers is no OpenAI-compatible server.
    """
    import openai

    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    client = connections.openai_client(base, timeout, api_key)
    try:
        listed = [entry.id for entry in client.with_options(timeout=20).models.list().data]
    except openai.APIStatusError as error:
        raise Failed(f"--url {url}: {base}/models answers with an error: {error}") from None
    except openai.APIConnectionError:
        raise Failed(f"--url {url}: no server there; start one with `sglang serve`") from None
    except Exception as error:  # a web page, for example, for which the client has no error type
        raise Failed(f"--url {url}: no OpenAI-compatible server: {type(error).__name__}") from None
    if not model and not listed:
        raise Failed(f"--url {url}: the server lists no models; name one with --model")
    return Target(urlsplit(base).netloc, client, model or listed[0], telemetry_of(base, api_key))


def telemetry_of(url: str, api_key: str | None = None) -> Telemetry | None:
    """The telemetry of a running server; None if it has none, as a server without mminfer."""
    found = Telemetry(url, api_key)
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


def bar_of_answers(console: Console) -> Progress:
    """A bar that goes when it is done, and is shown on a terminal only. Its tasks have `words` behind the count."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Any]:
    """A function to call after each answer. If the output is no terminal, it prints a line for each quarter."""
    done = right = errors = 0
    with bar_of_answers(console) as bar:
        bar_task = bar.add_task(label, total=total, words="")

        def count_answer(answer: Answer) -> None:
            nonlocal done, right, errors
            done, right, errors = done + 1, right + answer.right, errors + (answer.error is not None)
            score = f"{right} right" + (f", {errors} errors" if errors else "")
            bar.update(bar_task, completed=done, words=score)
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
