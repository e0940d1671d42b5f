"""`make demo`: a conversation of videos, text and an image with a real server, with mminfer and without.

Three servers get the same conversation through the official OpenAI client, one request at a time:

* stock:    SGLang's own dense attention (torch_native);
* mminfer:  sparse, with a head config whose visited tiles a picture can show (`grid_static`);
* covering: mminfer with a config whose permuted, sparse code path visits everything, so its answers must equal
  stock's answers, token by token. It takes a video's times as stock does (`AS_STOCK`); the true times differ.

A table grows while the servers answer. At the end one picture and one JSON file are in the output folder. The exit
status is 0 only if every answer of the covering server equals stock's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sglang_mminfer import HeadConfig, settings
from sglang_mminfer.serving.trace import PrefillRecord, read_trace
from sglang_mminfer.tools import machine
from sglang_mminfer.tools.media import make_image, make_video
from sglang_mminfer.tools.server import Server, ServerError

STOCK, MMINFER, COVERING = "stock", "mminfer", "covering"

COVERING_CONFIG = Path(__file__).resolve().parents[2] / "tests" / "head_configs" / "test_covering_mixed.json"

AS_STOCK = "-video_seconds,-frames_apart"
"""The covering server's SGLANG_MMINFER_MENDS: it switches off the mends that change answers."""

FPS, SIDE = 10, 448
"""Frames per second of the videos, and the side of a frame in pixels. SGLang samples two frames per second, and the
model merges them in pairs: a second of video is a grid of 16 x 16 tokens."""
IMAGE = (672, 392)
WARM_UP_SECONDS = 26  # 6,656 tokens: enough that its config runs sparse

MODEL: Any = {"layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 64}
"""Small enough to be made here; wide enough that attention takes the time, not the decoding of the video."""

COMMON_FLAGS = (
    *("--context-length", "40960"),
    *("--max-total-tokens", "81920"),
    *("--enable-cache-report",),  # `usage` of every answer tells the tokens from the radix cache
    *("--sleep-on-idle",),  # an idle server leaves its core to the server that answers
)
CHUNK = ("--chunked-prefill-size", "2048")
NO_CHUNK = ("--chunked-prefill-size", "-1")

BYTES_PER_SERVER = 4 << 30
"""The memory that a server may need, with some to spare. With less free memory than three servers need, they run one
after the other."""

MAX_LOGPROB_DIFFERENCE = 1e-3


class DemoFailed(Exception):
    """An error that ends the demo; the message is for the user."""


@dataclass(frozen=True)
class Media:
    """The files of the conversation, and a video for the warm-up."""

    video: Path
    second_video: Path
    image: Path
    warm_up: Path

    def turns(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """For each turn of the user: its name in the table, and the parts of its message."""
        return [
            ("video", [_part("video", self.video), _text("What do you see in the video?")]),
            ("text", [_text("How many? Please answer in one word.")]),
            ("image", [_part("image", self.image), _text("And now? Describe the picture. Is that so?")]),
            ("second video", [_part("video", self.second_video), _text("Compare both. Which one came first?")]),
            ("text", [_text("Where did it go? Tell me more.")]),
        ]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _part(kind: str, path: Path) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": path.resolve().as_uri()}}


@dataclass
class Answer:
    """One streamed answer, as the client saw it. `ttft` and `total` are in seconds."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    prompt_ids: list[int] = field(repr=False)
    prompt_tokens: int
    cached_tokens: int
    ttft: float
    total: float
    request_id: str
    records: list[PrefillRecord] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def density(self) -> float | None:
        from sglang_mminfer.tools.figures import density_of_records

        return density_of_records(self.records)

    def to_json(self) -> dict[str, Any]:
        fields = {k: v for k, v in asdict(self).items() if k not in ("prompt_ids", "records")}
        records = [msgspec.to_builtins(record) for record in self.records]
        prefills = [{name: value for name, value in record.items() if name != "rid"} for record in records]
        return {**fields, "new_tokens": self.new_tokens, "density": self.density, "prefills": prefills}


@dataclass(frozen=True)
class Agreement:
    """Whether two servers agree on a prompt and its answer."""

    prompts_equal: bool
    tokens_equal: bool
    max_logprob_difference: float

    @property
    def holds(self) -> bool:
        return self.prompts_equal and self.tokens_equal and self.max_logprob_difference <= MAX_LOGPROB_DIFFERENCE

    @classmethod
    def of(cls, a: Answer, b: Answer) -> Agreement:
        same = a.token_ids == b.token_ids and len(a.logprobs) == len(b.logprobs) > 0
        distance = max((abs(x - y) for x, y in zip(a.logprobs, b.logprobs)), default=math.inf) if same else math.inf
        return cls(a.prompt_ids == b.prompt_ids, same, distance)


def ask(client: Any, messages: list[dict[str, Any]], max_tokens: int) -> Answer:
    """Ask one question and stream the answer. The time to first token ends with the first piece of text."""
    text = ""
    ids: list[int] = []
    prompt_ids: list[int] = []
    logprobs: list[float] = []
    first = usage = None
    request_id = ""
    begin = time.perf_counter()
    stream = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "ignore_eos": True,
            "return_input_ids_in_sglext": True,
            "return_output_ids_in_sglext": True,
        },
    )
    for event in stream:
        request_id = event.id or request_id
        usage = event.usage or usage
        if extra := (event.model_extra or {}).get("sglext"):
            prompt_ids = extra.get("input_ids") or prompt_ids
            ids = (extra.get("output_ids") or [ids])[0]
        for choice in event.choices:
            if choice.delta.content:
                first = first or time.perf_counter()
                text += choice.delta.content
            if choice.logprobs and choice.logprobs.content:
                logprobs += [entry.logprob for entry in choice.logprobs.content]
    end = time.perf_counter()
    if first is None or usage is None or not prompt_ids:
        raise DemoFailed("the server's answer was empty; see its log")
    details = usage.prompt_tokens_details
    cached = int(details.cached_tokens or 0) if details else 0
    return Answer(text, ids, logprobs, prompt_ids, usage.prompt_tokens, cached, first - begin, end - begin, request_id)


# ---- the screen ----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of the table: one turn, answered by each server."""

    name: str
    answers: dict[str, Answer] = field(default_factory=dict)
    agreement: Agreement | None = None


class Screen:
    """The table, and what the demo waits for. A terminal shows both live; any other output gets them line by line."""

    HEARTBEAT = 15.0

    def __init__(self, console: Console, rows: list[Row]) -> None:
        self.console, self.rows = console, rows
        self._waits: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=5, transient=False)

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self.live.start()
        else:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        with self._lock:
            self._waits.clear()
        if self.console.is_terminal:
            self.live.stop()
        elif any(row.answers for row in self.rows):
            self.console.print(self.table())

    @contextlib.contextmanager
    def wait(self, label: str) -> Iterator[None]:
        """Show `label` and the seconds of the wait until the block ends."""
        self.note(label, "")
        if not self.console.is_terminal:
            self.console.print(f"{label} …", highlight=False)
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(label, None)

    def note(self, label: str, detail: str) -> None:
        with self._lock:
            begin = self._waits.get(label, (time.monotonic(), ""))[0]
            self._waits[label] = (begin, detail)

    def say(self, line: str, style: str = "") -> None:
        self.console.print(line, style=style, highlight=False)

    def render(self) -> Group:
        now = time.monotonic()
        spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(now * 5) % 10]
        with self._lock:
            waits = [(label, now - begin, detail) for label, (begin, detail) in self._waits.items()]
        lines = []
        for label, seconds, detail in waits:
            line = Text(f" {spinner} {label}  {seconds:4.0f} s", style="cyan", no_wrap=True, overflow="ellipsis")
            lines.append(line.append(f"  {detail}" if detail else "", style="dim"))
        table = [self.table()] if any(row.answers for row in self.rows) else []
        return Group(*table, *lines)

    def table(self) -> Table:
        table = Table(title="One conversation, three servers", title_justify="left", title_style="bold")
        table.add_column("turn", no_wrap=True)
        for name in ("prompt\ntokens", "cached\nstock", "cached\nmminfer", "new\nmminfer"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("density", justify="right", no_wrap=True)
        for name in ("TTFT\nstock", "TTFT\nmminfer", "stock /\nmminfer"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("covering = stock?", no_wrap=True)
        for number, row in enumerate(self.rows, 1):
            table.add_row(f"{number} {row.name}", *self._cells(row))
        return table

    @staticmethod
    def _cells(row: Row) -> list[str | Text]:
        stock, sparse = row.answers.get(STOCK), row.answers.get(MMINFER)
        first_answer = stock or sparse
        cells: list[str | Text] = [f"{first_answer.prompt_tokens:,}" if first_answer else ""]
        cells += [f"{answer.cached_tokens:,}" if answer else "" for answer in (stock, sparse)]
        cells.append(f"{sparse.new_tokens:,}" if sparse else "")
        cells.append(f"{sparse.density:.2f}" if sparse and sparse.density is not None else "")
        cells += [f"{answer.ttft:.2f} s" if answer else "" for answer in (stock, sparse)]
        cells.append(f"{stock.ttft / sparse.ttft:.1f} ×" if stock and sparse else "")
        cells.append(_agreement_cell(row.agreement))
        return cells

    def _beat(self) -> None:
        """If the output is no terminal, print a line now and then during a long wait."""
        while not self._closed.wait(self.HEARTBEAT):
            with self._lock:
                waits = list(self._waits.items())
            for label, (begin, detail) in waits:
                if (seconds := time.monotonic() - begin) >= self.HEARTBEAT:
                    self.say(f"  {label}: {seconds:.0f} s  {detail}"[: self.console.width - 1])


def _agreement_cell(agreement: Agreement | None) -> Text:
    if agreement is None:
        return Text("")
    if agreement.holds:
        return Text(f"yes (to {agreement.max_logprob_difference:.0e})", style="green")
    if not agreement.prompts_equal:
        return Text("NO: other prompt", style="bold red")
    if not agreement.tokens_equal:
        return Text("NO: other tokens", style="bold red")
    return Text(f"NO: log-probs {agreement.max_logprob_difference:.0e}", style="bold red")


# ---- the demo ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    out: Path
    seconds: int
    max_tokens: int
    config: str
    covering: str
    one_by_one: bool | None


class Demo:
    """All that the demo makes and runs. `run` returns the exit status."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.out = settings.out
        self.begin = time.monotonic()
        self.rows: list[Row] = []
        self.servers: dict[str, Server] = {}
        self.start_seconds: dict[str, float] = {}
        self.screen = Screen(console, self.rows)

    def run(self) -> int:
        self.out.mkdir(parents=True, exist_ok=True)
        with self.screen:
            with self.screen.wait("making two videos, an image and a tiny Qwen2.5-VL"):
                media, model = self._make()
            self.rows += [Row(name) for name, _ in media.turns()]
            for group in self._groups():
                with contextlib.ExitStack() as stack:
                    self._start(group, model, stack)
                    self._converse(group, media)
            with self.screen.wait("drawing the picture"):
                picture = self._draw(model)
        return self._report(picture)

    def _make(self) -> tuple[Media, Path]:
        from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl

        folder, frames = self.out / "media", self.settings.seconds * FPS
        media = Media(
            make_video(folder / "first.mp4", frames, SIDE, SIDE, FPS, seed=1),
            make_video(folder / "second.mp4", frames, SIDE, SIDE, FPS, seed=2),
            make_image(folder / "image.png", *IMAGE, seed=3),
            make_video(
                folder / "warm-up.mp4", min(WARM_UP_SECONDS, self.settings.seconds) * FPS, SIDE, SIDE, FPS, seed=4
            ),
        )
        return media, make_tiny_qwen2_5_vl(self.out / "model", **MODEL)

    # Servers

    def _groups(self) -> list[list[str]]:
        """The servers' names, in groups that run at the same time."""
        import psutil

        names = [STOCK, MMINFER, COVERING]
        one_by_one = self.settings.one_by_one
        if one_by_one is None:
            one_by_one = psutil.virtual_memory().available < len(names) * BYTES_PER_SERVER
        return [[name] for name in names] if one_by_one else [names]

    def _server(self, name: str, model: Path) -> Server:
        logs = self.out / "logs"
        flags: tuple[str, ...]
        env: dict[str, str]
        if name == STOCK:
            flags, env = ("--attention-backend", "torch_native", *NO_CHUNK), {}
        else:
            trace = (logs / f"{name}.trace.jsonl").resolve()
            trace.parent.mkdir(parents=True, exist_ok=True)
            trace.unlink(missing_ok=True)
            config = self.settings.config if name == MMINFER else self.settings.covering
            flags = ("--attention-backend", "mminfer", "--mminfer-config", config, *CHUNK)
            env = {settings.TRACE.variable: str(trace)}
            if name == COVERING:  # a config that skips nothing would run on stock
                env |= {settings.MENDS.variable: AS_STOCK, settings.SPARSE.variable: "always"}
        return Server(
            model.resolve(), *flags, *COMMON_FLAGS, serve=True, log=logs / f"{name}.log", env=env, timeout=600
        )

    def _start(self, group: list[str], model: Path, stack: contextlib.ExitStack) -> None:
        """Start the servers of a group side by side. An error or Ctrl-C during the wait ends all of them."""
        failures: list[BaseException] = []
        cancelled = threading.Event()

        def start(name: str, server: Server) -> None:
            label = f"starting the server {name}"

            def progress(seconds: float, line: str) -> None:
                if cancelled.is_set():
                    raise ServerError("cancelled")
                self.screen.note(label, line)

            server.progress = progress
            try:
                with self.screen.wait(label):
                    server.start()
            except BaseException as error:
                if not cancelled.is_set():
                    failures.append(error)
                cancelled.set()

        threads = []
        try:
            for name in group:
                server = self.servers[name] = self._server(name, model)
                stack.callback(server.stop)
                thread = threading.Thread(target=start, args=(name, server))
                threads.append(thread)
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            cancelled.set()
            for thread in threads:
                thread.join()
            raise
        if failures:
            raise failures[0]
        for name in group:
            self.start_seconds[name] = self.servers[name].start_seconds or math.nan
            self.screen.say(f"$ {_shown(self.servers[name].command)}", style="dim")

    # The conversation

    def _converse(self, group: list[str], media: Media) -> None:
        clients = {name: self.servers[name].client() for name in group}
        warm_up = [{"role": "user", "content": [_part("video", media.warm_up), _text("What is this?")]}]
        for name in group:
            with self.screen.wait(f"warming up {name} with another video"):
                self._ask(name, clients[name], warm_up)
                self.servers[name].flush_cache()
        messages: list[dict[str, Any]] = []
        for row, (kind, parts) in zip(self.rows, media.turns()):
            messages.append({"role": "user", "content": parts})
            for name in group:  # one after the other: no server computes while another is timed
                with self.screen.wait(f"asking {name}: {kind}"):
                    row.answers[name] = answer = self._ask(name, clients[name], messages)
                    answer.records = self._records(name, answer)
                if name == COVERING:
                    row.agreement = Agreement.of(row.answers[STOCK], answer)
                if not self.console.is_terminal:
                    self.screen.say(
                        f"  {answer.prompt_tokens:,} tokens, {answer.cached_tokens:,} from cache, first token after "
                        f"{answer.ttft:.2f} s:{answer.text}"
                    )
            # All servers get the same history: stock's answers.
            messages.append({"role": "assistant", "content": row.answers[STOCK].text})

    def _ask(self, name: str, client: Any, messages: list[dict[str, Any]]) -> Answer:
        """Ask one question.

        Raises:
            DemoFailed: the request failed; the message has the end of the server's log.
        """
        import openai

        try:
            return ask(client, messages, self.settings.max_tokens)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            server = self.servers[name]
            tail = "\n".join(f"  | {line}" for line in server.tail(12).splitlines())
            raise DemoFailed(
                f"the server {name}: {error}\n  log: {server.log_path}, which ends with:\n{tail}"
            ) from error

    def _records(self, name: str, answer: Answer) -> list[PrefillRecord]:
        path = self.out / "logs" / f"{name}.trace.jsonl"
        if name == STOCK:
            return []
        records = [record for record in read_trace(path) if record.rid == answer.request_id]
        if not records:
            raise DemoFailed(f"{path}: no record of the request {answer.request_id}")
        return records

    # Results

    def _draw(self, model: Path) -> Path:
        """Draw the picture. Its modality map is made from the last prompt's token ids and the grids of the files."""
        from sglang_mminfer import AShape, Boundary2D, Grid, Modality
        from sglang_mminfer.families.maps import reader_of
        from sglang_mminfer.tools.figures import conversation_figure, map_of_prompt, save, turn_of_records

        hf_config = _hf_config(model)
        answers = [row.answers[MMINFER] for row in self.rows]
        placeholders = {Modality.IMAGE: hf_config.image_token_id, Modality.VIDEO: hf_config.video_token_id}
        edge = hf_config.vision_config.patch_size
        video = (self.settings.seconds, SIDE // edge, SIDE // edge)
        grids = {Modality.IMAGE: [(1, IMAGE[1] // edge, IMAGE[0] // edge)], Modality.VIDEO: [video, video]}
        modality_map = map_of_prompt(answers[-1].prompt_ids, placeholders, grids, reader_of(hf_config))
        served = answers[-1].records[-1].segments
        if served != len(modality_map.segments):
            raise DemoFailed(
                f"the map of the picture has {len(modality_map.segments)} segments, the server's had {served}"
            )
        turns = [
            turn_of_records(f"turn {number}: {row.name}", answer.records)
            for number, (row, answer) in enumerate(zip(self.rows, answers), 1)
        ]
        config = HeadConfig.load(self.settings.config).bind(hf_config)
        pattern = config.patterns(0)[0]
        vision, grid = Modality.VISION, Grid("frame", True, True, True, 0, 128, 1024)
        heads = [
            (f"{pattern.kind}: layer 0, head 0, as served\n(config {config.name})", pattern),
            ("a_shape: sink 128, local 1,024\n(another config's; not served here)", AShape(128, 1024)),
            (
                "2D boundary: vision sees vision on a grid\n(another config's; not served here)",
                Boundary2D({(vision, vision): grid, (vision, Modality.TEXT): AShape(128, 1024)}),
            ),
        ]
        figure = conversation_figure(
            modality_map,
            turns,
            heads,
            dense_below=config.defaults.dense_below,
            title=f"What mminfer prefilled: {len(turns)} turns, {modality_map.length:,} tokens",
        )
        return save(figure, self.out / "conversation.png")

    def _report(self, picture: Path) -> int:
        agreed = all(row.agreement is not None and row.agreement.holds for row in self.rows)
        seconds = time.monotonic() - self.begin
        same = sum(row.answers[STOCK].token_ids == row.answers[MMINFER].token_ids for row in self.rows)
        figures = self.out / "figures.json"
        figures.write_text(json.dumps(self._figures(agreed, seconds), indent=2, ensure_ascii=False) + "\n")
        turns = len(self.rows)
        say = self.screen.say
        say("")
        config = HeadConfig.load(self.settings.config).describe()
        say(f"density: visited over causal (query, key) pairs of the new tokens. Config {config}.")
        say(
            "TTFT: request sent to first text, decoding and encoding of the video included. One run, warmed up, one "
            "server at a time. Stock runs without chunks, which suits it; it computes rows of cached tokens again."
        )
        if lost := [str(n) for n, row in enumerate(self.rows, 1) if _lost_cache(row)]:
            say(
                f"cached, turn {', '.join(lost)}: stock SGLang keeps all videos of a prompt under one hash, so that a "
                "second one voids the cached first; with mminfer each has its own."
            )
        say(
            f"covering = stock?: the same tokens, log-probabilities as close as shown, with the config "
            f"{HeadConfig.load(self.settings.covering).name}, which skips nothing, and with a video's times as stock "
            f"has them ({AS_STOCK})."
        )
        say(
            f"With the sparse config {same} of {turns} answers are stock's. This model's weights are random, so what a "
            "sparse answer is worth cannot be seen here."
        )
        say(f"picture: {picture}\nfigures: {figures}\nserver logs: {self.out / 'logs'}\n{seconds:.0f} s in all")
        if not agreed:
            say("FAILED: the covering server did not give stock's answers.", style="bold red")
        return 0 if agreed else 1

    def _figures(self, agreed: bool, seconds: float) -> dict[str, Any]:
        turns = []
        for number, row in enumerate(self.rows, 1):
            agreement = {**asdict(row.agreement), "holds": row.agreement.holds} if row.agreement else None
            answers = {name: answer.to_json() for name, answer in row.answers.items()}
            turns.append({"turn": number, "kind": row.name, "agreement": agreement, "answers": answers})
        return {
            **machine.describe(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "agreed": agreed,
            "model": {"architecture": "Qwen2_5_VLForConditionalGeneration", "weights": "random", **MODEL},
            "video": {"seconds": self.settings.seconds, "frames": self.settings.seconds * FPS, "side": SIDE},
            "servers": {
                name: {"command": _shown(server.command), "start_seconds": round(self.start_seconds[name], 1)}
                for name, server in self.servers.items()
            },
            "turns": turns,
        }


def _lost_cache(row: Row) -> bool:
    return row.answers[STOCK].cached_tokens < row.answers[MMINFER].cached_tokens // 2


def _hf_config(model: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def _shown(command: Sequence[str]) -> str:
    """A command as a user would type it: the program without its folder."""
    return shlex.join([Path(command[0]).name, *command[1:]])


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Hold a conversation of videos, text and an image with a real SGLang server, with mminfer and "
        "without, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for picture, figures and logs")
    parser.add_argument("--seconds", type=int, default=30, help="length of each video; a second is 256 tokens")
    parser.add_argument("--max-tokens", type=int, default=12, help="length of each answer")
    parser.add_argument("--config", default="grid_static", help="head config of the sparse server, static")
    parser.add_argument("--covering", default=str(COVERING_CONFIG), help="head config that skips nothing")
    parser.add_argument(
        "--one-by-one",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run one server after the other; if not given, only where memory is short",
    )
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.seconds < 4 or settings.max_tokens < 1:
        parser.error("--seconds has to be 4 or more (SGLang samples at least four frames), --max-tokens 1 or more")
    console = Console(width=None if sys.stdout.isatty() else 110)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return Demo(settings, console).run()
    except KeyboardInterrupt:
        console.print("interrupted; every server is stopped", style="bold")
        return 130
    except (DemoFailed, ServerError, OSError, ValueError) as error:
        console.print(f"FAILED: {error}", style="bold red", markup=False, highlight=False)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    raise SystemExit(main())
