"""Observers of the attention layers of a prefill batch: the audit, `mminfer inspect` and the search.

After each layer an observer gets the layer's q, the paged K and V, and what the layer did. It only reads. An exception
in an observer is counted, logged once, and changes no answer. Without observers none of this code runs.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_mminfer import settings
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern

if TYPE_CHECKING:
    from sglang_mminfer.serving.trace import PrefillRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestView:
    """One request of the batch: rows q[row_start : row_start + chunk_len], positions [prefix_len, seq_len).

    Attributes:
        prompt_stop: tokens of the prompt; generated tokens begin there.
        map: the modality map; None without media.
        dense_reason: why the request runs dense; None: it runs sparse.
        slots: int64 [seq_len], the KV slot of each position.
    """

    rid: str
    prefix_len: int
    chunk_len: int
    row_start: int
    prompt_stop: int
    map: ModalityMap | None
    dense_reason: str | None
    slots: torch.Tensor

    @property
    def seq_len(self) -> int:
        """Tokens up to the end of the chunk."""
        return self.prefix_len + self.chunk_len

    @property
    def rows(self) -> slice:
        """The request's rows in q, out and lse."""
        return slice(self.row_start, self.row_start + self.chunk_len)


@dataclass(frozen=True)
class LayerView:
    """What one layer did for one batch. Observers must not write to it, and must copy what they keep.

    Heads are those of this rank.

    Attributes:
        first_head: the model's number of the rank's first head.
        q, out: [tokens, Hq, D].
        k_cache, v_cache: [slots, Hkv, D], as stored; they hold the batch's own keys and values too.
        sm_scale: the factor on q . k for stored keys. v_scale: the factor on sums of stored values; see `KVScales`.
        patterns: the pattern of each head. Where the guard made a head dense, a request that began before may still
            run it as it was.
        stock_heads: heads that the stock backend ran beside sparse ones. No pass of the plan has them, and their LSE
            is -inf.
        plan: None if the stock backend ran the whole layer.
        lse: float32 [tokens, Hq], base 2; None like `plan`. -inf for rows that the stock backend ran: those of dense
            requests, and generated tokens.
    """

    layer_id: int
    first_head: int
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    sm_scale: float
    requests: tuple[RequestView, ...]
    patterns: tuple[HeadPattern, ...]
    stock_heads: tuple[int, ...]
    out: torch.Tensor
    plan: BlockPlan | None = None
    lse: torch.Tensor | None = None
    v_scale: float = 1.0

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return self.q.shape[1]


class Observer(Protocol):
    """Reads what attention layers do."""

    def layer(self, view: LayerView) -> None:
        """Called after every layer of plain causal attention, sparse or dense."""

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        """Called after the batch. The records go to trace and metrics afterwards, with what is added to them here."""


@dataclass(frozen=True)
class RankInfo:
    """Where an observer runs.

    Attributes:
        rank, ranks: this rank of the attention's tensor parallelism, and their number.
        num_layers: layers of the model.
        server_args: SGLang's ServerArgs.
    """

    rank: int
    ranks: int
    num_layers: int
    server_args: Any


class Observers:
    """The observers of one model runner. False if there are none.

    Attributes:
        failures: exceptions in observers so far.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._all = list(observers)
        self.failures = 0
        self._logged: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, observer: Observer) -> None:
        """Adds an observer."""
        self._all.append(observer)

    def remove(self, observer: Observer) -> None:
        """Removes an observer, which may be in the middle of a call."""
        self._all = [other for other in self._all if other is not observer]

    def show(self, make: Callable[[], LayerView | None]) -> None:
        """Shows every observer the view that `make` returns; None: there is nothing to show."""
        try:
            view = make()
        except Exception:
            return self._failed("the look into a layer")
        for observer in self._all if view is not None else ():
            self._call(observer, observer.layer, view)
        return None

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        """Tells every observer that the batch has run."""
        for observer in self._all:
            self._call(observer, observer.batch_done, records)

    def _call(self, observer: Observer, method: Any, argument: Any) -> None:
        try:
            method(argument)
        except Exception:
            self._failed(type(observer).__name__)

    def _failed(self, what: str) -> None:
        self.failures += 1
        if what not in self._logged:
            self._logged.add(what)
            logger.exception("mminfer: %s failed; answers are not affected", what)


def from_environment(rank: RankInfo, environ: Mapping[str, str] | None = None) -> Observers:
    """The observers that `settings.OBSERVERS` names. One that cannot be made is logged and left out."""
    observers = Observers()
    for line in settings.OBSERVERS.read(environ).splitlines():
        function, _, value = line.partition("=")
        try:
            observers.add(pkgutil.resolve_name(function)(value, rank))
        except Exception:
            logger.exception("mminfer: %s: %s: this observer could not be made", settings.OBSERVERS.variable, line)
    return observers
