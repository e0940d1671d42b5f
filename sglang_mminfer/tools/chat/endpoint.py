"""A server for the chat: what it can do, and its answers as they come.

The client is asynchronous to the core. When a task that waits for an answer is cancelled, its connection closes, and
SGLang ends the request, in the middle of a long prefill, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from sglang_mminfer.serving.telemetry_http import ServerReport
from sglang_mminfer.tools import connections
from sglang_mminfer.tools.chat.conversation import Messages, Question, Sampling, Turn, messages_of
from sglang_mminfer.tools.chat.reply import Phase, Reply
from sglang_mminfer.tools.chat.uploads import KINDS, Kind
from sglang_mminfer.tools.errors import Failed
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry

CONNECT_SECONDS = 30.0
"""How long a connection may take. An answer may take any time, because a long prefill does; the user stops it."""

ASK_SECONDS = 1.0
"""Between two questions to the server how far it has read."""

PIECE = 1 << 18
"""Bytes of a request that are sent at a time."""

MOST_WORDS = 600
"""Letters of a server's error that are shown."""


class NoServer(Failed):
    """There is no server, or it is none that can chat. The message names it."""


class AnswerError(Exception):
    """The server gave no answer; the message is what it said."""


@dataclass(frozen=True)
class Facts:
    """What a server says of itself.

    Attributes:
        model: the model's name.
        context: the most tokens of prompt and answer; None if the server does not tell.
        takes: kinds of media that the model takes.
        most: the most media of a kind in a request.
        page_size: tokens that the radix cache keeps together.
        report: how it serves with mminfer.
        no_report: why there is none.
    """

    model: str
    context: int | None
    takes: frozenset[Kind]
    most: dict[Kind, int]
    page_size: int
    report: ServerReport | None
    no_report: str = ""


class Endpoint:
    """A server with SGLang's OpenAI API.

    Args:
        url: its address, with or without the /v1 of its API.
        api_key: the server's.

    Attributes:
        local: whether the address is this machine's.
        as_files: whether the server is told the paths of files, and reads them itself. It is tried where the address is
            this machine's, and given up when the server cannot read one: behind a tunnel, in a container.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.local = connections.is_local(self.url)
        self.as_files = self.local
        self.page_size = 1
        self._model = "default"
        self._context: int | None = None
        self._tells_reading = False
        self._api_key = api_key
        self._telemetry = Telemetry(self.url, api_key, timeout=30.0)

    async def facts(self) -> Facts:
        """What the server is and can do.

        Raises:
            NoServer: it does not answer, or wants another API key.
        """
        async with self._client(httpx.Timeout(60.0)) as client:
            card = (await self._get(client, "/v1/models"))["data"][0]
            info: dict[str, Any] = {}
            with contextlib.suppress(NoServer):  # only SGLang has it
                info = await self._get(client, "/server_info")
                self.page_size = int(info.get("page_size") or 1)
            takes = frozenset([kind for kind in KINDS if await self._takes(client, kind)])
        self._model, self._context = card["id"], card.get("max_model_len")
        report, why = await self.report()
        self._tells_reading = report is not None
        most = info.get("limit_mm_data_per_request") or {}
        most = json.loads(most) if isinstance(most, str) else most
        return Facts(
            model=self._model,
            context=self._context,
            takes=takes,
            most={kind: int(most[kind]) for kind in KINDS if kind in most},
            page_size=self.page_size,
            report=report,
            no_report=why,
        )

    async def report(self) -> tuple[ServerReport | None, str]:
        """How the server serves with mminfer; or None, and why it does not tell."""
        try:
            return await asyncio.to_thread(self._telemetry.server), ""
        except NoTelemetry as error:
            return None, str(error)

    async def least_tokens(self, turns: Sequence[Turn], question: Question) -> int | None:
        """The least tokens that a prompt can have: all words, and the media of earlier turns, which were counted then.
        What new media add only the server's processor knows. None if the server does not count."""
        async with self._client(httpx.Timeout(60.0)) as client:
            words = await self._count(client, _without_content(messages_of(turns, True, question)))
            if words is None or not turns or turns[-1].reply.prompt_tokens is None:
                return words
            before = _without_content(messages_of(turns[:-1], True, turns[-1].question))
            counted = await self._count(client, before)
            return words if counted is None else words + turns[-1].reply.prompt_tokens - counted

    async def answer(self, turns: Sequence[Turn], question: Question, reply: Reply, sampling: Sampling) -> None:
        """Answers a question after some turns; see `conversation.Answering`.

        Raises:
            AnswerError: the server refused or broke off.
        """
        least = await self.least_tokens(turns, question)
        if least is not None and self._context is not None and least >= self._context:
            raise AnswerError(
                f"the conversation has at least {least:,} tokens, and the model's context is {self._context:,}: "
                "start a new one, or take turns back"
            )
        names = [upload.path.name for turn in turns for upload in turn.question.uploads]
        names += [upload.path.name for upload in question.uploads]
        while True:
            as_files = self.as_files
            try:
                messages = await asyncio.to_thread(messages_of, turns, as_files, question)
                await self._stream(messages, reply, sampling)
                return
            except openai.APIConnectionError as error:
                raise AnswerError(f"no answer from {self.url}: {error.__cause__ or error}") from None
            except openai.APIError as error:
                message = _shortened(error.message)
                if not (as_files and not reply.text and any(name in error.message for name in names)):
                    raise AnswerError(message) from None
                self.as_files = False  # the server reads no files of this machine, or not from this folder
            except OSError as error:  # a file of this machine
                raise AnswerError(str(error)) from None

    async def _stream(self, messages: Messages, reply: Reply, sampling: Sampling) -> None:
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        extra: dict[str, Any] = {} if sampling.temperature is None else {"temperature": sampling.temperature}
        watch = asyncio.create_task(self._watch(reply))
        async with self._client(timeout, reply) as http:
            client = openai.AsyncOpenAI(
                base_url=f"{self.url}/v1", api_key=self._api_key or "none", http_client=http, max_retries=0
            )
            try:
                stream = await client.chat.completions.create(
                    model=self._model,
                    messages=messages,
                    max_tokens=sampling.max_tokens,
                    stream=True,
                    stream_options={"include_usage": True, "continuous_usage_stats": True},
                    extra_body={"rid": reply.rid},
                    **extra,
                )
                async for event in stream:
                    _take(event, reply)
            finally:
                watch.cancel()
        reply.phase = Phase.DONE

    async def settle(self, reply: Reply) -> None:
        """Asks the server what the prefill of an answer was; see `conversation.Answering`."""
        if self._tells_reading:
            try:
                reply.take(await asyncio.to_thread(self._telemetry.records, reply.rid))
            except NoTelemetry as error:
                reply.no_records = f"the server {error}"

    async def _watch(self, reply: Reply) -> None:
        """Asks now and then how far the server has read, until it answers."""
        while self._tells_reading:
            await asyncio.sleep(ASK_SECONDS)
            if reply.phase is Phase.READING:
                with contextlib.suppress(NoTelemetry):  # it has not begun, or is busy
                    records = await asyncio.to_thread(self._telemetry.records, reply.rid)
                    if not reply.text:
                        reply.take(records)

    async def _takes(self, client: httpx.AsyncClient, kind: Kind) -> bool:
        """Whether the chat template has a place for media of a kind. A server that counts no tokens may take all."""
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": "data:,"}}
        words = {"type": "text", "text": "a"}
        alone = await self._count(client, [{"role": "user", "content": [words]}])
        if alone is None:
            return True
        beside = await self._count(client, [{"role": "user", "content": [part, words]}])
        return beside is not None and beside > alone

    async def _count(self, client: httpx.AsyncClient, messages: Messages) -> int | None:
        """Tokens of messages, a few for each medium; None if the server refuses or does not count."""
        try:
            answer = await client.post("/v1/tokenize", json={"model": "default", "messages": messages})
            return int(answer.json()["count"]) if answer.is_success else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    async def _get(self, client: httpx.AsyncClient, path: str) -> Any:
        try:
            answer = await client.get(path)
        except httpx.HTTPError as error:
            raise NoServer(f"{self.url} does not answer: {error or type(error).__name__}") from None
        if answer.status_code == 401:
            raise NoServer(f"{self.url} wants an API key, or another one: set OPENAI_API_KEY")
        try:
            return answer.raise_for_status().json()
        except (httpx.HTTPStatusError, ValueError):
            raise NoServer(f"{self.url}{path} answers {answer.status_code}; expected a server of SGLang's") from None

    def _client(self, timeout: httpx.Timeout, reply: Reply | None = None) -> httpx.AsyncClient:
        async def count(request: httpx.Request) -> None:
            if reply is not None and request.method == "POST":
                request.stream = _Counted(request.content, reply)

        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            timeout=timeout,
            trust_env=not self.local,
            event_hooks={"request": [count]},
        )


class _Counted(httpx.AsyncByteStream):
    """A request's body that notes in the reply how much of it has left."""

    def __init__(self, body: bytes, reply: Reply) -> None:
        self._body, self._reply = body, reply
        reply.body_bytes, reply.sent_bytes = len(body), 0
        reply.phase = Phase.SENDING

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), PIECE):
            piece = self._body[start : start + PIECE]
            yield piece
            self._reply.sent_bytes += len(piece)
        self._reply.phase = Phase.READING


def _take(event: Any, reply: Reply) -> None:
    now = time.monotonic()
    if event.usage is not None:
        reply.prompt_tokens = event.usage.prompt_tokens
        reply.answer_tokens = event.usage.completion_tokens
        details = event.usage.prompt_tokens_details
        if details is not None and details.cached_tokens is not None:
            reply.cached_tokens = details.cached_tokens
    for choice in event.choices:
        if piece := choice.delta.content:
            reply.first = reply.first or now
            reply.last = now
            reply.text += piece
            reply.phase = Phase.ANSWERING
        reply.cut_off = reply.cut_off or choice.finish_reason == "length"


def _without_content(messages: Messages) -> Messages:
    """The messages with empty media: what stands in a template for each of them."""
    return [
        {**message, "content": [_emptied(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _emptied(part: dict[str, Any]) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": part["type"], part["type"]: {"url": "data:,"}}


def _shortened(message: str) -> str:
    """A server's error without the content of files."""
    short = re.sub(r"data:[\w/.+-]*;base64,[\w+/=]*(\.\.\.)?", "the file", message).strip()
    return short if len(short) <= MOST_WORDS else short[:MOST_WORDS] + " ..."
