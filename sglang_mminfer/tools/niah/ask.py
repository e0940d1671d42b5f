"""Needles in a haystack: which share of the needles a served model finds, by length and depth.

`ask_all` puts questions to one OpenAI-compatible server; `mminfer niah` (command.py) and `mminfer compare` (compare.py)
use it. Conversations are a function of the seed, so every server gets the same questions.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sglang_mminfer.serving.trace import density_of_records
from sglang_mminfer.tools.media import data_url
from sglang_mminfer.tools.needles.kits import Kit
from sglang_mminfer.tools.needles.placed import MAX_DEPTHS, SHORTEST, Placed, mixed_needles, video_needles
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry

TASKS: dict[str, tuple[Callable[..., Placed], bool]] = {
    "v-niah": (video_needles, False),
    "mm-niah": (mixed_needles, False),
    "v-relay": (video_needles, True),
    "mm-relay": (mixed_needles, True),
}
"""Task -> the function that makes its conversations, and whether it asks for relays or for plain needles."""


@dataclass(frozen=True)
class Settings:
    """The questions of one run.

    tasks:   keys of TASKS.
    lengths: about how many tokens a conversation has.
    depths:  at how many depths needles lie, from the first frames to the last.
    seeds:   how many conversations each task and length has. seed: the seed of the first.

    Raises:
        ValueError: a setting is out of range; the message names it and what was expected.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: int = 5
    seeds: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("depths", self.depths, 2, MAX_DEPTHS),
            ("seeds", self.seeds, 1, 10_000),
            *(("lengths", length, SHORTEST, 10_000_000) for length in self.lengths),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {name}")
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected at least one, and none twice, got {', '.join(map(str, values))}")

    @property
    def cases(self) -> list[Case]:
        """All conversations, shortest first."""
        return [
            Case(task, length, self.seed + i)
            for length in sorted(self.lengths)
            for task in self.tasks
            for i in range(self.seeds)
        ]

    @property
    def questions(self) -> int:
        """How many questions a server is asked."""
        return len(self.cases) * self.depths

    def depth(self, index: int) -> float:
        """The depth with this index, from 0 (the start of a conversation) to 1 (its end)."""
        return index / (self.depths - 1)

    def conversation(self, case: Case) -> Placed:
        """The conversation of a case; the same settings give the same one."""
        make, relays = TASKS[case.task]
        random = np.random.default_rng((case.seed, case.length, list(TASKS).index(case.task)))
        return make(case.length, [self.depth(i) for i in range(self.depths)], random, relays=relays)


@dataclass(frozen=True)
class Case:
    """One conversation of one task."""

    task: str
    length: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.length}-{self.seed}"


@dataclass
class Answer:
    """A server's answer to one question. `seconds`: how long the request took. `density`: visited over causal pairs of
    the tokens that were new; None if the server does not tell it. `dense_reasons`: why chunks of it ran dense."""

    task: str
    length: int
    seed: int
    turn: int
    depth: int
    kind: str
    expected: str
    said: str = ""
    right: bool = False
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    request_id: str = ""
    density: float | None = None
    dense_reasons: list[str] = field(default_factory=list)

    @property
    def mostly_cached(self) -> bool:
        """Whether this is a later turn over a cached prefix, not a prompt that only shares its system prompt."""
        return self.cached_tokens > self.prompt_tokens / 2


@dataclass
class Target:
    """A server to ask, and its label in tables. `telemetry`: None for a server that has none."""

    label: str
    client: Any
    model: str
    telemetry: Telemetry | None = None


class Media:
    """The messages of every conversation. The first use of a conversation writes its media files.

    Args:
        inline: put the media into the messages (base64), for servers that cannot read this machine's files.
    """

    def __init__(self, settings: Settings, kit: Kit, folder: Path, inline: bool = False) -> None:
        self.settings, self.kit, self.folder, self.inline = settings, kit, folder, inline
        self._made: dict[Case, list[dict[str, Any]]] = {}
        self._locks: dict[Case, threading.Lock] = {case: threading.Lock() for case in settings.cases}

    def messages(self, case: Case) -> list[dict[str, Any]]:
        """All turns with the right answers between them."""
        with self._locks[case]:
            if case not in self._made:
                conversation = self.settings.conversation(case).conversation
                self._made[case] = self.kit.messages(conversation, self.folder, case.name)
        chat = self._made[case]
        return _inlined(chat) if self.inline else chat


def _inlined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    inlined = copy.deepcopy(messages)
    for message in inlined:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] != "text":
                reference = part[part["type"]]
                reference["url"] = data_url(Path(reference["url"]), part["type"].removesuffix("_url"))
    return inlined


def ask_all(
    target: Target, media: Media, concurrency: int = 1, heard: Callable[[Answer], None] = lambda answer: None
) -> list[Answer]:
    """Ask every question of every conversation. The turns of a conversation follow each other.

    Args:
        concurrency: how many conversations run side by side.
        heard: called after each answer, from any thread.

    Returns:
        All answers. A request that failed is an answer with an `error`.
    """

    stopped = threading.Event()

    def converse(case: Case) -> list[Answer]:
        answers = []
        for answer in unanswered(media.settings, case):
            if stopped.is_set():
                break
            _ask(target, media, case, answer)
            answers.append(answer)
            heard(answer)
        return answers

    pool = ThreadPoolExecutor(max(1, concurrency))
    try:
        return [answer for answers in pool.map(converse, media.settings.cases) for answer in answers]
    finally:  # Ctrl-C waits for requests that have been sent, and for nothing else
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def unanswered(settings: Settings, case: Case) -> list[Answer]:
    """The questions of a conversation, in the order of its turns, as answers that are still empty."""
    placed = settings.conversation(case)
    return [
        Answer(case.task, case.length, case.seed, asked.turn, asked.depth, asked.kind, "")
        for asked in sorted(placed.asked, key=lambda asked: asked.turn)
    ]


def _ask(target: Target, media: Media, case: Case, answer: Answer) -> None:
    import openai

    chat = media.messages(case)
    answer.expected = chat[2 * answer.turn + 1]["content"]
    begun = time.perf_counter()
    try:
        response = target.client.chat.completions.create(
            model=target.model,
            messages=chat[: 2 * answer.turn + 1],
            max_tokens=media.kit.max_tokens,
            temperature=0,
        )
    except openai.APIStatusError as error:
        answer.error = f"{error.status_code}: {_first_line(error.message)}"
    except openai.OpenAIError as error:
        answer.error = _first_line(str(error)) or type(error).__name__
    else:
        answer.said = (response.choices[0].message.content or "") if response.choices else ""
        answer.right = media.kit.is_right(answer.expected, answer.said)
        answer.request_id = response.id or ""
        if response.usage is not None:
            answer.prompt_tokens = response.usage.prompt_tokens
            details = response.usage.prompt_tokens_details
            answer.cached_tokens = int(details.cached_tokens or 0) if details else 0
    answer.seconds = round(time.perf_counter() - begun, 3)
    if target.telemetry is not None and answer.error is None:
        with contextlib.suppress(NoTelemetry):  # of a request whose prompt was cached as a whole, for example
            records = target.telemetry.records(answer.request_id)
            answer.density = density_of_records(records)
            answer.dense_reasons = sorted({record.dense_reason for record in records if record.dense_reason})


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]


# ---- figures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """How many answers were right, how many there were, and how many requests failed."""

    right: int
    answered: int
    errors: int

    @property
    def share(self) -> float | None:
        """The share of right answers, 0 to 1; None if there are no answers."""
        return self.right / self.answered if self.answered else None

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Cell:
        """The counts of some answers."""
        answers = list(answers)
        failed = sum(a.error is not None for a in answers)
        return cls(sum(a.right for a in answers), len(answers) - failed, failed)


def cells(answers: Sequence[Answer], settings: Settings) -> dict[str, list[list[Cell]]]:
    """task -> [lengths][depths] cells."""
    return {
        task: [
            [
                Cell.of(a for a in answers if (a.task, a.length, a.depth) == (task, length, depth))
                for depth in range(settings.depths)
            ]
            for length in settings.lengths
        ]
        for task in settings.tasks
    }


def report(answers: Sequence[Answer], settings: Settings) -> dict[str, Any]:
    """The figures of one server for a result file. `over_cached_prefix` counts only prompts that were mostly cached;
    `density` is there where the server told it."""
    densities = {str(n): density([a for a in answers if a.length == n]) for n in settings.lengths}
    return {
        "accuracy": {
            task: {
                str(n): asdict(Cell.of(a for a in answers if (a.task, a.length) == (task, n))) for n in settings.lengths
            }
            for task in settings.tasks
        },
        "over_cached_prefix": {
            task: {
                str(n): asdict(Cell.of(a for a in answers if (a.task, a.length) == (task, n) and a.mostly_cached))
                for n in settings.lengths
            }
            for task in settings.tasks
        },
        "grid": {
            task: [[asdict(cell) for cell in row] for row in rows] for task, rows in cells(answers, settings).items()
        },
        "prompt_tokens": {str(n): _mean([a.prompt_tokens for a in answers if a.length == n]) for n in settings.lengths},
        **({"density": densities} if any(densities.values()) else {}),
        "errors": sorted({a.error for a in answers if a.error}),
        "answers": [asdict(a) for a in answers],
    }


def density(answers: Sequence[Answer]) -> float | None:
    """Visited over causal pairs of all new tokens of some answers; None where no server told it."""
    visited = causal = 0.0
    for answer in answers:
        if answer.density is not None:
            pairs = (answer.prompt_tokens**2 - answer.cached_tokens**2) / 2
            causal += pairs
            visited += pairs * answer.density
    return round(visited / causal, 4) if causal else None


def _mean(values: Sequence[int]) -> int | None:
    measured = [value for value in values if value]
    return round(sum(measured) / len(measured)) if measured else None


def mm_process_flags(kit: Kit) -> tuple[str, ...]:
    """The flags with which an SGLang server sees every frame of the kit's videos."""
    return "--mm-process-config", json.dumps(kit.mm_process_config)
