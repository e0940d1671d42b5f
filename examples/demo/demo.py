"""`make demo`: a conversation of videos, images and text whose every question has a right answer.

A small trained model of the real Qwen2.5-VL architecture (examples/needle_vlm/mixed) answers it in four real servers,
two at a time, through the official OpenAI client:

* stock:     SGLang's own dense attention (torch_native), without mminfer;
* default:   mminfer with its built-in config, as a server is started without further flags: rows choose their keys;
* searched:  mminfer with a config that `mminfer search` made for this model from other conversations;
* a_shape:   a baseline that sees the first keys and the nearest, at about the density of searched.

A table of right and wrong grows while the servers answer; another has tokens, density and times. Figures, a picture,
the conversation with its media and the servers' logs go to the output folder. The exit status is 0 only if stock,
default and searched answer everything right and the baseline does not: if it did, the questions would show nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from conversation import Answer, NoAnswer, Question, ask, questions
from sglang_mminfer import HeadConfig, settings
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.planning.planner import is_static
from sglang_mminfer.tools import baselines, machine
from sglang_mminfer.tools.needles.kits import GLYPHS, prompt_map
from sglang_mminfer.tools.niah.ask import mm_process_flags
from sglang_mminfer.tools.server import Server, ServerError
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry
from tables import answers_table, costs, seconds_of

STOCK, DEFAULT, SEARCHED, A_SHAPE = "stock", "default", "searched", "a_shape"
NAMES = (STOCK, DEFAULT, SEARCHED, A_SHAPE)

NEEDLE_VLM = Path(__file__).resolve().parents[1] / "needle_vlm"
MODEL = NEEDLE_VLM / "mixed"
SEARCHED_CONFIG = NEEDLE_VLM / "results" / "searched_mixed.json"

SEED = 2
"""The first seed whose conversation has media in four messages, each with text, a video and at least one image."""

A_SHAPE_DENSITY = 0.25
"""The density of the baseline on the whole prompt; searched visits about as much."""

FLAGS = (
    *mm_process_flags(GLYPHS),  # the server samples every frame of the videos, each at its own size
    *("--chunked-prefill-size", "-1"),  # stock computes rows again for each chunk; without chunks it is fastest
    "--enable-cache-report",  # `usage` of every answer tells the tokens from the radix cache
    "--sleep-on-idle",  # an idle server leaves its core to the server that answers
)

ENVIRONMENT = {settings.SPARSE.variable: "always"}
"""The variables of the servers with mminfer. By itself a server runs a chunk dense where that is estimated to be
faster, as for short prompts on a CPU. The tables would then show stock's attention under other names."""

BYTES_PER_SERVER = 4 << 30
"""What a server may need, with some to spare. With less free memory than for two, the servers run one by one."""


class Demo:
    """All that the demo makes and runs."""

    def __init__(self, out: Path, tokens: int, seed: int, names: Sequence[str], console: Console) -> None:
        self.out, self.names, self.console = out, names, console
        self.begin = time.monotonic()
        console.print(INTRODUCTION, highlight=False)
        out.mkdir(parents=True, exist_ok=True)
        self.questions, conversation = questions(tokens, seed, out / "media")
        (self.warm_up, *_), _ = questions(tokens, seed + 1, out / "media")
        self.a_shape = baselines.at_density(A_SHAPE, A_SHAPE_DENSITY, prompt_map(conversation, GLYPHS))
        self.a_shape.save(out / "a_shape.json")
        self.servers: dict[str, Server] = {}
        self.answers: dict[str, list[Answer]] = {name: [] for name in names}

    def run(self) -> int:
        """Hold the conversation with every server, and report. Returns the exit status."""
        together = 2 if psutil.virtual_memory().available > 2 * BYTES_PER_SERVER else 1
        if together == 1:
            self.console.print("Memory for two servers is not free, so they run one by one, which takes longer.")
        waits = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.console)
        with Live(get_renderable=lambda: Group(*self._table(), waits), console=self.console, refresh_per_second=4):
            for first in range(0, len(self.names), together):
                group = self.names[first : first + together]
                with self._started(group, waits):
                    self._converse(group, waits)
        return self._report()

    def _table(self) -> list[Any]:
        return [answers_table(self.questions, self.answers)] if any(self.answers.values()) else []

    # Servers

    def _server(self, name: str) -> Server:
        backend, environment = ("torch_native", {}) if name == STOCK else ("mminfer", ENVIRONMENT)
        config = {
            STOCK: (),
            DEFAULT: (),  # what a server takes by itself
            SEARCHED: ("--mminfer-config", str(SEARCHED_CONFIG)),
            A_SHAPE: ("--mminfer-config", str((self.out / "a_shape.json").resolve())),
        }[name]
        flags = ("--attention-backend", backend, *config, *FLAGS)
        return Server(MODEL, *flags, serve=True, log=self.out / "logs" / f"{name}.log", env=environment)

    @contextlib.contextmanager
    def _started(self, group: Sequence[str], waits: Progress) -> Iterator[None]:
        """The servers of a group, started side by side. All of them end with the block, whatever ends it."""
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor())
            for name in group:
                self.servers[name] = server = self._server(name)
                stack.callback(server.stop)  # a start that still waits ends, too
                environment = "" if name == STOCK else " ".join(f"{k}={v}" for k, v in ENVIRONMENT.items()) + " "
                self.console.print(f"{name}:\n  {environment}{_typed(server.command)}", style="dim", highlight=False)
            with _waiting(waits, f"starting {' and '.join(group)}"):
                list(pool.map(Server.start, [self.servers[name] for name in group]))
            yield

    # The conversation

    def _converse(self, group: Sequence[str], waits: Progress) -> None:
        """Ask the servers of a group every question, one server at a time so that none disturbs another's times."""
        clients = {name: self.servers[name].client() for name in group}
        telemetry = {name: Telemetry(self.servers[name].url) for name in group if name != STOCK}
        for name in group:
            with _waiting(waits, f"{name}: warming up with another conversation"):
                ask(clients[name], self.warm_up)
                self.servers[name].flush_cache()
        for number, question in enumerate(self.questions, 1):
            for name in group:
                with _waiting(waits, f"{name}: question {number} of {len(self.questions)}", quiet=True):
                    answer = ask(clients[name], question, telemetry.get(name))
                self.answers[name].append(answer)
                if not self.console.is_terminal:
                    verdict = "right" if answer.right else "WRONG"
                    self.console.print(f"  {name}, turn {number}: {answer.text}, {verdict}", highlight=False)

    # Results

    def _report(self) -> int:
        say = self.console.print
        if not self.console.is_terminal:
            say()  # Live ends without a line break there
        say(costs(self.answers, STOCK))
        failures = failures_of(self.questions, self.answers)
        picture = self._draw()
        (self.out / "conversation.json").write_text(json.dumps(self._whole_conversation(), indent=1) + "\n")
        figures = self._figures(failures)
        (self.out / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
        for line in speed_lines(self.answers):
            say(line, highlight=False)
        say(NOTES, highlight=False)
        written = ["figures.json", "conversation.json", "media/", "logs/", *([picture.name] if picture else [])]
        say(f"In {self.out}: {', '.join(written)}. {figures['seconds']:.0f} s in all.", highlight=False)
        for line in failures:
            say(f"FAILED: {line}", style="bold red", markup=False, highlight=False)
        return 1 if failures else 0

    def _draw(self) -> Path | None:
        """Draw what was cached and what was new in each turn, and what heads of the baseline and of searched visit."""
        from sglang_mminfer.serving.trace import map_of_entries
        from sglang_mminfer.tools.figures import conversation_figure, save, turn_of_records

        served = next((answers for name, answers in self.answers.items() if name != STOCK), None)
        entries = served[-1].records[-1].map if served else None
        if served is None or not entries:
            return None
        modality_map: ModalityMap = map_of_entries(entries)
        turns = [turn_of_records(f"turn {n}", answer.records) for n, answer in enumerate(served, 1)]
        heads = [("a_shape, every head:\nthe first keys and the nearest", self.a_shape.rows[0][0])]
        for number, pattern in enumerate(HeadConfig.load(SEARCHED_CONFIG).rows[0]):
            if is_static(pattern):  # others choose keys by what they see, which only the server knows
                heads.append((f"searched, layer 0, head {number}:\nby the row's modality", pattern))
        title = f"{len(turns)} turns, {modality_map.length:,} tokens"
        return save(conversation_figure(modality_map, turns, heads, title=title), self.out / "conversation.png")

    def _whole_conversation(self) -> list[dict[str, Any]]:
        last = self.questions[-1]
        return [*last.prompt, {"role": "assistant", "content": last.right}]

    def _figures(self, failures: Sequence[str]) -> dict[str, Any]:
        def turn(number: int, question: Question) -> dict[str, Any]:
            answers = {name: as_json(given[number]) for name, given in self.answers.items()}
            asked = {"shows": question.shows, "needles": question.way, "right": question.right}
            return {"turn": number + 1, **asked, "answers": answers}

        return {
            **machine.describe(),
            "command": shlex.join(["python", "examples/demo/demo.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.begin, 1),
            "failures": list(failures),
            "model": f"{MODEL.parent.name}/{MODEL.name}",
            "configs": {A_SHAPE: self.a_shape.describe(), SEARCHED: HeadConfig.load(SEARCHED_CONFIG).describe()},
            "environment": ENVIRONMENT,
            "servers": {
                name: {"command": _typed(server.command), "start_seconds": round(server.start_seconds or 0.0, 1)}
                for name, server in self.servers.items()
            },
            "right": {name: sum(answer.right for answer in given) for name, given in self.answers.items()},
            "first_token_seconds": {name: round(seconds_of(given), 3) for name, given in self.answers.items()},
            "turns": [turn(number, question) for number, question in enumerate(self.questions)],
        }


INTRODUCTION = """\
A small trained model is asked about letters and digits that lie hidden in texts, images and videos. The same questions
go to stock SGLang, to mminfer with two configs, and to a sparse baseline that sees too little. Making the files ...\
"""

NOTES = """\
asked for: a letter. A needle is a letter with its digit, L3, or with another letter, J=L: J has L's digit, so J is 3.
right: every question has one right answer, a digit; a guess is right once in ten times.
new, stock: stock SGLang keeps all videos of a prompt under one hash, so a further one voids what was cached of others.
density: the share of (query, key) pairs that attention visits, of those that dense attention visits; 1 is dense. In
  default rows of text see everything, so turns that only ask are dense; they have few rows.
TTFT: seconds from the request to the first text, with decoding and encoding of the media. Servers answer one at a time,
  and all get the same messages. Stock's torch_native computes rows of cached tokens again, which later turns wait for.
SGLANG_MMINFER_SPARSE=always: by itself a server runs a chunk on stock's attention where that is estimated to be faster,
  as for short prompts on a CPU. The tables would then show stock's attention under other names."""


def speed_lines(answers: Mapping[str, Sequence[Answer]]) -> list[str]:
    """For each config a line that says whether it was faster than stock here."""
    stock = seconds_of(answers.get(STOCK, ()))
    lines = []
    for name, given in answers.items():
        if stock and name != STOCK:
            times = seconds_of(given) / stock
            verdict = "faster" if times < 1 else "NOT faster"
            lines.append(
                f"{name}: first tokens took {times:.2f} times as long as stock's: {verdict} on this CPU, in this run"
            )
    return lines


def failures_of(questions: Sequence[Question], answers: Mapping[str, Sequence[Answer]]) -> list[str]:
    """What went otherwise than it has to: wrong answers of servers that must be right, and a baseline without any."""
    lines = []
    for name, given in answers.items():
        wrong = [number for number, answer in enumerate(given) if not answer.right]
        if name == A_SHAPE:
            if not wrong:
                lines.append(f"{name} answered every question right, so these questions show nothing")
            continue
        for number in wrong:
            asked = questions[number]
            said = given[number].text or "nothing"
            lines.append(f"{name}, turn {number + 1}: answered {said}; {asked.right} is right: {asked.way}")
    return lines


def as_json(answer: Answer) -> dict[str, Any]:
    records = [msgspec.to_builtins(record) for record in answer.records]
    fields = {name: value for name, value in asdict(answer).items() if name != "records"}
    return {**fields, "new_tokens": answer.new_tokens, "prefills": records}


def _typed(command: Sequence[str]) -> str:
    """A command as a user would type it: the program without its folder, this checkout's files from here."""
    words = [Path(command[0]).name, *command[1:]]
    here = Path.cwd()
    return shlex.join(str(Path(w).relative_to(here)) if w.startswith(f"{here}/") else w for w in words)


@contextlib.contextmanager
def _waiting(waits: Progress, what: str, quiet: bool = False) -> Iterator[None]:
    """Show what is being waited for. Output that is no terminal gets a line for it, if not `quiet`."""
    if not waits.console.is_terminal and not quiet:
        waits.console.print(f"{what} …", highlight=False)
    task = waits.add_task(what)
    try:
        yield
    finally:
        waits.remove_task(task)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns exit status 0; 1 if an answer is not as it must be or a server fails; 2; 130 on Ctrl-C."""
    import openai

    parser = argparse.ArgumentParser(
        prog="demo.py",
        description="Hold a conversation of videos, images and text with real SGLang servers, and compare the answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for figures, picture, media and logs"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="about how many tokens the conversation has")
    parser.add_argument("--seed", type=int, default=SEED, help="of the conversation")
    parser.add_argument("--servers", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="which to ask")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        names = [name for name in NAMES if name in options.servers]
        return Demo(options.out, options.tokens, options.seed, names, console).run()
    except KeyboardInterrupt:
        console.print("interrupted; every server is stopped", style="bold")
        return 130
    except (ServerError, NoAnswer, NoTelemetry, openai.OpenAIError, OSError, ValueError) as error:
        console.print(
            f"FAILED: {error}\nserver logs: {options.out / 'logs'}", style="bold red", markup=False, highlight=False
        )
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
