"""A conversation: its turns, what is sent for the next one, and where the server's cache ends.

Every turn sends all turns before it again. The server finds them in its radix cache as far as the prompt is the same,
so nothing of a turn is ever written anew: the words, the files and the answer stay what they were, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_mminfer.tools.chat.reply import Phase, Reply
from sglang_mminfer.tools.chat.uploads import Upload

Messages = list[dict[str, Any]]

TICK = 0.2
"""Seconds between two looks at an answer that is coming."""


@dataclass(frozen=True)
class Question:
    """What the user says in a turn: files, and words after them."""

    text: str
    uploads: tuple[Upload, ...] = ()

    def message(self, as_files: bool) -> dict[str, Any]:
        """As an OpenAI message; see `Upload.part` for `as_files`."""
        parts = [upload.part(as_files) for upload in self.uploads]
        return {"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}


@dataclass
class Turn:
    """A question and its answer."""

    question: Question
    reply: Reply


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_tokens: the most tokens of an answer.
        temperature: None leaves it to the server.
    """

    max_tokens: int = 1024
    temperature: float | None = None


class Answering(Protocol):
    """What a conversation needs of a server; `endpoint.Endpoint` is one."""

    as_files: bool
    """Whether the server reads files of this machine itself."""
    page_size: int
    """Tokens that the radix cache keeps together."""

    async def answer(self, turns: Sequence[Turn], question: Question, reply: Reply, sampling: Sampling) -> None:
        """Answers a question after some turns, and fills the reply as the answer comes. When it is cancelled, the
        request ends on the server, too."""
        ...

    async def settle(self, reply: Reply) -> None:
        """Adds to an answer that has ended what only the server knows of it."""
        ...


def messages_of(turns: Sequence[Turn], as_files: bool, question: Question | None = None) -> Messages:
    """OpenAI messages of some turns, and of a question after them."""
    messages: Messages = []
    for turn in turns:
        messages += [turn.question.message(as_files), {"role": "assistant", "content": turn.reply.text}]
    return messages if question is None else [*messages, question.message(as_files)]


class Busy(RuntimeError):
    """A question was asked, or a turn changed, while an answer was coming."""

    def __init__(self) -> None:
        super().__init__("an answer is still coming; stop it first")


@dataclass
class Conversation:
    """The turns of one user with one server.

    Attributes:
        turns: what later turns send again. While an answer comes its turn is not among them.
        current: the turn whose answer is coming, or that ended without one; None after the next action.
    """

    server: Answering
    turns: list[Turn] = field(default_factory=list)
    current: Turn | None = None
    _running: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer is coming."""
        return self._running is not None

    @property
    def uploads(self) -> list[Upload]:
        """The files of all turns."""
        return [upload for turn in self.turns for upload in turn.question.uploads]

    async def ask(self, question: Question, sampling: Sampling = Sampling()) -> AsyncIterator[Turn]:
        """Asks a question. Yields its turn again and again while the answer comes; the last time it has ended.

        A turn that ends without an answer, because the server refused or the user stopped before the first word, stays
        `current` and out of the history. If the caller closes the iterator, the request is stopped.

        Raises:
            Busy: an answer is still coming.
        """
        if self.busy:
            raise Busy
        turn = Turn(question, Reply(rid=uuid.uuid4().hex))
        task = asyncio.create_task(self.server.answer(list(self.turns), question, turn.reply, sampling))
        self.current, self._running = turn, task
        try:
            while not task.done():
                yield turn
                await asyncio.wait({task}, timeout=TICK)
            if turn.reply.text or turn.reply.phase is Phase.DONE:
                await self.server.settle(turn.reply)
        finally:
            await self._end(turn, task)
        yield turn

    async def _end(self, turn: Turn, task: asyncio.Task[None]) -> None:
        task.cancel()  # nothing if it is done
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
        self._running = None
        reply = turn.reply
        if not task.cancelled() and (error := task.exception()) is not None:
            reply.phase, reply.error = Phase.FAILED, str(error)
        elif not reply.ended:
            reply.phase = Phase.STOPPED
        if reply.in_history and self.current is turn:
            self.turns.append(turn)
            self.current = None

    def stop(self) -> None:
        """Stops the answer that is coming. What has come of it is kept."""
        if self._running is not None:
            self._running.cancel()

    def cut(self, index: int) -> Question:
        """Takes back turn `index` and all after it. Returns its question.

        Raises:
            Busy: an answer is coming.
            IndexError: there is no such turn.
        """
        if self.busy:
            raise Busy
        if index == len(self.turns) and self.current is not None:
            question = self.current.question
        else:
            question = self.turns[index].question
        del self.turns[index:]
        self.current = None
        return question

    def clear(self) -> None:
        """Takes back all turns, and stops the answer that is coming."""
        self.stop()
        self.turns, self.current = [], None

    def saved(self) -> Messages:
        """The conversation as OpenAI messages with the files in them, as `mminfer inspect` and `mminfer search` take
        them."""
        return messages_of(self.turns, as_files=False)

    def expected_cache(self, index: int) -> int | None:
        """Tokens that the cache can hold of the prompt of turn `index`, where every earlier turn is found again: the
        prompt and the answer of the turn before, but for the answer's last token, which was never an input. None if
        nobody counted them."""
        if index == 0:
            return 0
        before = self.turns[index - 1].reply
        if before.prompt_tokens is None:
            return None
        known = before.prompt_tokens + max((before.answer_tokens or 0) - 1, 0)
        return known - known % self.server.page_size

    def cache_gap(self, index: int) -> str:
        """Where the cache ended, if it ended before the end of the turns before turn `index`; else "".

        After a stopped answer the last tokens may not have been kept, which is no gap that anybody should look for.
        """
        reply, expected = self.turns[index].reply, self.expected_cache(index)
        if not expected or reply.cached_tokens is None or reply.cached_tokens >= expected:
            return ""
        lost = expected - reply.cached_tokens
        for number, turn in enumerate(self.turns[:index], 1):
            prompt, answer = turn.reply.prompt_tokens, turn.reply.answer_tokens or 0
            if prompt is None or reply.cached_tokens >= prompt + answer - 1:
                continue
            # A page is kept whole or not at all.
            if reply.cached_tokens >= prompt - prompt % self.server.page_size:
                if turn.reply.phase is Phase.STOPPED:
                    return ""
                return f"the cache ends in the answer of turn {number}: {lost:,} tokens were read again"
            return f"the cache ends in the question of turn {number}: {lost:,} tokens were read again"
        return ""
