"""One answer of a server: its text so far, what is being waited for, and what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from sglang_mminfer.serving.trace import PrefillRecord, density_of_records


class Phase(StrEnum):
    """What happens to a question. The last three are ends."""

    SENDING = "sending"
    READING = "reading"
    ANSWERING = "answering"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class Reply:
    """An answer while it comes, and afterwards.

    Attributes:
        rid: the id of the request. The client chooses it, so that the server can be asked about it while it reads.
        text: what has come, byte for byte.
        error: why there is no answer, if the phase is FAILED.
        began, first, last: when the question was sent, and when the first and the latest token came; seconds of
            `time.monotonic`.
        body_bytes, sent_bytes: the size of the request, and how much of it has left.
        prompt_tokens, cached_tokens, answer_tokens: as the server counts them; None while it has not told.
        tokens_read: tokens of the prompt in the cache or computed, while the server reads.
        records: the prefill chunks of the request, if the server tells.
        no_records: why it does not.
        cut_off: whether the answer ended because it reached the most tokens it may have.
    """

    rid: str
    phase: Phase = Phase.SENDING
    text: str = ""
    error: str = ""
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    body_bytes: int = 0
    sent_bytes: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    answer_tokens: int | None = None
    tokens_read: int = 0
    records: list[PrefillRecord] = field(default_factory=list)
    no_records: str = ""
    cut_off: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.phase in (Phase.DONE, Phase.STOPPED, Phase.FAILED)

    @property
    def in_history(self) -> bool:
        """Whether the turn is part of what later turns send: it was answered, or stopped after a part of an answer."""
        return self.phase is Phase.DONE or (self.phase is Phase.STOPPED and bool(self.text))

    @property
    def first_token_seconds(self) -> float | None:
        """From the question to the first token of its answer."""
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of the answer after its first token; None for an answer of one token."""
        if self.first is None or self.last is None or self.last <= self.first or (self.answer_tokens or 0) < 2:
            return None
        return ((self.answer_tokens or 0) - 1) / (self.last - self.first)

    @property
    def new_tokens(self) -> int | None:
        """Tokens of the prompt that had to be computed."""
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens

    @property
    def density(self) -> float | None:
        """Visited over causal pairs of the new tokens; None where the server does not tell."""
        return density_of_records(self.records)

    @property
    def dense_reasons(self) -> list[str]:
        """Why chunks ran dense, in the order in which reasons first occurred."""
        return list(dict.fromkeys(record.dense_reason for record in self.records if record.dense_reason))

    @property
    def sparse_layers(self) -> int:
        return max((record.sparse_layers for record in self.records), default=0)

    def take(self, records: list[PrefillRecord]) -> None:
        """Notes what the server says of the request's prefill."""
        self.records = records
        if records:
            self.tokens_read = records[-1].seq_len
            self.cached_tokens = records[0].prefix_len
