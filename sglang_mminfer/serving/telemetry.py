"""What a scheduler remembers of its latest prefills, and what it answers when the HTTP server asks (telemetry_http.py).

SGLang's tokenizer process can ask all schedulers for their internal state, and each data-parallel replica answers once.
The question here is such a request with a request id of ours, so it travels, waits its turn and is answered as SGLang's
own; the scheduler reads what it remembers and does nothing else for it.

The trace has the same records for good, in a file on the server's disk.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import msgspec

from sglang_mminfer.serving.trace import PrefillRecord

MOST_RECORDS = 4096
"""Records that a scheduler remembers. A million tokens in chunks of 8,192 are 123."""

MOST_SECONDS = 3600.0
"""How long it remembers one."""

QUESTION = "mminfer-telemetry:"
"""How the request id of a question begins. The id of the request whose records are wanted follows, or nothing, to ask
how the scheduler does."""

KEY = "mminfer"
"""The entry of an internal state that holds the answer."""


class Counters(msgspec.Struct, kw_only=True):
    """Sums over all prefills since the server started; the same as the metrics of these names.

    Attributes:
        requests, tokens: requests and new tokens in prefill batches, by how they ran: "sparse", or the reason for
            dense. Batches that verify drafts are counted, too, with the tokens that they verify.
        density_tokens: density times new tokens of sparse prefills; over the sparse tokens it is the mean density.
        plan_ms, attn_ms: milliseconds spent on plans, and in attention.
        encoded_again, encoded_again_ms: media that the vision encoder ran on once more, and how long that took.
    """

    requests: dict[str, int] = {}
    tokens: dict[str, int] = {}
    density_tokens: float = 0.0
    plan_ms: float = 0.0
    attn_ms: float = 0.0
    encoded_again: int = 0
    encoded_again_ms: float = 0.0

    def count(self, ran: str, requests: int, tokens: int) -> None:
        """Counts requests and their tokens of one batch."""
        self.requests[ran] = self.requests.get(ran, 0) + requests
        self.tokens[ran] = self.tokens.get(ran, 0) + tokens

    def add(self, records: Sequence[PrefillRecord]) -> None:
        """Counts the records of one batch."""
        for record in records:
            self.count(record.dense_reason or "sparse", 1, record.chunk_len)
            self.density_tokens += (record.density or 0.0) * record.chunk_len
        if records:
            self.plan_ms += records[0].plan_ms
            self.attn_ms += records[0].attn_ms
            self.encoded_again += records[0].encoded_again
            self.encoded_again_ms += records[0].encoded_again_ms

    def joined(self, other: Counters) -> Counters:
        """The sums of both: of two replicas."""
        return Counters(
            requests=dict(Counter(self.requests) + Counter(other.requests)),
            tokens=dict(Counter(self.tokens) + Counter(other.tokens)),
            **{
                name: getattr(self, name) + getattr(other, name)
                for name in self.__struct_fields__
                if name not in ("requests", "tokens")
            },
        )


class Serving(msgspec.Struct, kw_only=True):
    """How a scheduler serves.

    Attributes:
        head_config: the head config's name, or its path.
        named_by: the setting that named it, in words.
        description: what its heads do, in a line.
        provenance: how it came about, in words.
        executor: what runs the plans.
        dense_backend: SGLang's backend, on which everything else runs.
        dense_reason: why everything runs dense; None if not everything does.
        guarded_heads: heads of rank 0 that the guard made dense.
    """

    head_config: str
    named_by: str
    description: str
    provenance: str
    executor: str
    dense_backend: str
    dense_reason: str | None = None
    guarded_heads: int = 0


class Answer(msgspec.Struct, kw_only=True):
    """A scheduler's answer to a question.

    Attributes:
        serving: how it serves; None before its backend is made, and with the records of a request.
        counters: what it has done.
        kept: records that it remembers.
        records: those of the request that was asked for, oldest first; None if none was.
    """

    serving: Serving | None = None
    counters: Counters = msgspec.field(default_factory=Counters)
    kept: int = 0
    records: list[PrefillRecord] | None = None


class Telemetry:
    """The latest records of this process, and sums over all.

    Args:
        most: records to keep.
        seconds: how long.
        clock: seconds, of any beginning.

    Attributes:
        serving: says how this process serves; the backend sets it.
        before_answer: adds what is known by now; the backend sets it.
    """

    def __init__(
        self, most: int = MOST_RECORDS, seconds: float = MOST_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.serving: Callable[[], Serving] | None = None
        self.before_answer: Callable[[], None] = lambda: None
        self._counters = Counters()
        self._records: deque[tuple[float, PrefillRecord]] = deque(maxlen=most)
        self._seconds, self._clock = seconds, clock

    def add(self, records: Sequence[PrefillRecord]) -> None:
        """Remembers the records of one batch."""
        self._counters.add(records)
        self._forget()
        now = self._clock()
        self._records.extend((now, record) for record in records)

    def count(self, ran: str, requests: int, tokens: int) -> None:
        """Counts a batch of which there are no records."""
        self._counters.count(ran, requests, tokens)

    def answer(self, rid: str) -> Answer:
        """The records of the request with this id; how this process serves and what it did if the id is empty."""
        self.before_answer()
        self._forget()
        if rid:
            return Answer(records=[record for _, record in self._records if record.rid == rid])
        serving = self.serving() if self.serving is not None else None
        return Answer(serving=serving, counters=self._counters, kept=len(self._records))

    def _forget(self) -> None:
        oldest = self._clock() - self._seconds
        while self._records and self._records[0][0] < oldest:
            self._records.popleft()


@cache
def of_process() -> Telemetry:
    """This process's telemetry. Two-batch overlap makes three attention backends in a process, and all add to it."""
    return Telemetry()


def get_internal_state(original: Callable[..., Any], self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Scheduler.get_internal_state: answers a question of ours, and leaves SGLang's to SGLang."""
    rid = getattr(recv_req, "rid", None)
    if not isinstance(rid, str) or not rid.startswith(QUESTION):
        return original(self, recv_req, *args, **kwargs)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    answer = of_process().answer(rid.removeprefix(QUESTION))
    return GetInternalStateReqOutput(internal_state={KEY: msgspec.to_builtins(answer)})


def answers_in(states: Iterable[dict[str, Any]]) -> list[Answer]:
    """The answers in the schedulers' internal states."""
    return [msgspec.convert(state[KEY], Answer) for state in states if KEY in state]
