"""The demo's conversation, and how a server is asked it: needles in text, images and videos, with the right answers.

The needle models of examples/needle_vlm know letters and digits. A needle is a word of a text (`D4`) or a card in an
image or a video: a letter and its digit. Every question of the demo is about a *relay*, a needle like `M=D`: "M has the
same digit as D". So the model has to find M, from there D, and there the digit. A sparse pattern that hides one of the
two gives a wrong answer.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_mminfer.serving.trace import PrefillRecord, density_of_records
from sglang_mminfer.tools.needles.kits import GLYPHS
from sglang_mminfer.tools.needles.task import Conversation, Turn
from sglang_mminfer.tools.niah.ask import Media, Settings
from sglang_mminfer.tools.telemetry import Telemetry

Message = dict[str, Any]

QUESTIONS = 8
"""Relays that are asked for, from the start of the conversation to its end. A message about which no relay is asked
gets a question for a plain needle."""


@dataclass(frozen=True)
class Question:
    """One turn of the user.

    Attributes:
        shows: what the message brings, such as "text, 2 images, video"; empty if it only asks.
        way: the needles that lead to the answer, and what they stand in: "M=D (video), D4 (text)".
        right: the right answer, a digit.
        prompt: the OpenAI messages up to this question, with the right answers to all before it.
    """

    shows: str
    way: str
    right: str
    prompt: list[Message] = field(repr=False)


def questions(tokens: int, seed: int, folder: Path) -> tuple[list[Question], Conversation]:
    """The questions of a conversation of about `tokens` tokens. The media are written to `folder`.

    The same `tokens` and `seed` give the same conversation, one of those that `mminfer niah --relays` holds.

    Raises:
        ValueError: `tokens` is out of range.
    """
    settings = Settings(tasks=("mm-relay",), lengths=(tokens,), depths=QUESTIONS, seeds=1, seed=seed)
    case = settings.cases[0]
    conversation = settings.conversation(case).conversation
    messages = Media(settings, GLYPHS, folder).messages(case)
    places = {needle.key: (needle.word, part.kind) for part in conversation.parts for needle in part.needles}
    relays = {needle.key: needle.same_as for needle in conversation.needles}
    asked = []
    for number, turn in enumerate(conversation.turns):
        keys = [turn.question, relays[turn.question]] if turn.relay else [turn.question]
        way = ", ".join("{} ({})".format(*places[key]) for key in keys if key)
        asked.append(Question(_shown(turn), way, turn.answer, messages[: 2 * number + 1]))
    return asked, conversation


def _shown(turn: Turn) -> str:
    counts = Counter(part.kind for part in turn.parts)
    return ", ".join(kind if count == 1 else f"{count} {kind}s" for kind, count in counts.items())


@dataclass(frozen=True)
class Answer:
    """A server's answer to one question.

    Attributes:
        first_token: seconds from the request to the first text: media decoded and encoded, and the prompt prefilled.
        density: visited over causal (query, key) pairs of the new tokens; None where a server does not tell it.
    """

    text: str
    right: bool
    prompt_tokens: int
    cached_tokens: int
    first_token: float
    density: float | None = None
    records: list[PrefillRecord] = field(default_factory=list, repr=False)

    @property
    def new_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class NoAnswer(Exception):
    """A server's answer was empty."""


def ask(client: Any, question: Question, telemetry: Telemetry | None = None) -> Answer:
    """Ask a server one question, and stream the answer.

    Args:
        client: an OpenAI client of the server.
        telemetry: of the same server; None for one that has none, as stock SGLang.

    Raises:
        NoAnswer: no text came.
        openai.OpenAIError: the request failed.
        NoTelemetry: the server does not remember the request.
    """
    begin = time.perf_counter()
    stream = client.chat.completions.create(
        model="default",
        messages=question.prompt,
        max_tokens=GLYPHS.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, first, usage, request_id = "", None, None, ""
    for event in stream:
        request_id, usage = event.id or request_id, event.usage or usage
        for choice in event.choices:
            if choice.delta.content:
                first = first or time.perf_counter()
                text += choice.delta.content
    if first is None or usage is None:
        raise NoAnswer("the answer was empty")
    records = telemetry.records(request_id) if telemetry else []
    details = usage.prompt_tokens_details
    return Answer(
        text=text.strip(),
        right=GLYPHS.is_right(question.right, text),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=int(details.cached_tokens or 0) if details else 0,
        first_token=first - begin,
        density=density_of_records(records),
        records=records,
    )
