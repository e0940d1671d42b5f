"""A look into the attention layers of the batch that is being prefilled: for the audit, `mminfer inspect`, the search.

An observer is given each layer's q, the paged K and V, and what the layer did, once the layer's answer is there. It
only reads. Whatever it raises is logged once and counted, and the answer stays what it was. Without an observer
nothing of this runs.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_mminfer import settings
from sglang_mminfer.kernels.block_plan import PrefillPlan
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern

if TYPE_CHECKING:
    from sglang_mminfer.serving.trace import PrefillRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestView:
    """One request of the batch: rows q[row_start : row_start + chunk_len], positions [prefix_len, seq_len).

    slots: int64 [seq_len], the cache row of every position. prompt_stop: where generated tokens begin.
    map: None where there are no media. dense_reason: why the request runs dense, None: it runs sparse.
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
        return self.prefix_len + self.chunk_len

    @property
    def rows(self) -> slice:
        """Of q, out and lse."""
        return slice(self.row_start, self.row_start + self.chunk_len)


@dataclass(frozen=True)
class LayerView:
    """What one layer did for one batch. Nothing in it may be written to, or kept without a copy.

    q, out: [tokens, Hq, D]; k_cache, v_cache: [slots, Hkv, D], the batch's own keys included; heads are those of
    this rank, the first of them is `first_head` of the model's. sm_scale: factor on q . k.
    plan, lse (float32 [tokens, Hq], base 2): None where the whole layer ran on the stock backend.
    patterns: what each head is configured to do. stock_heads: those that the stock backend ran beside sparse
    ones; they are in no pass of the plan, and their lse is -inf.
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
    plan: PrefillPlan | None = None
    lse: torch.Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]


class Observer(Protocol):
    """Something that looks into layers."""

    def layer(self, view: LayerView) -> None:
        """One layer has run. Called for every layer that is plain causal attention, sparse or not."""

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        """The batch has run. The records go to trace and metrics after this, with what is added to them here."""


@dataclass(frozen=True)
class RankInfo:
    """Where an observer works: which rank of the attention's tensor parallelism, and the model's layers."""

    rank: int
    ranks: int
    num_layers: int
    server_args: Any


class Observers:
    """The observers of one runner. False where there are none."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._all = list(observers)
        self.failures = 0
        self._said: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, observer: Observer) -> None:
        self._all.append(observer)

    def show(self, make: Callable[[], LayerView | None]) -> None:
        """Show all of them the view that `make` gives; None: there is nothing to see."""
        try:
            view = make()
        except Exception:
            return self._failed("the look into a layer")
        for observer in self._all if view is not None else ():
            self._call(observer, observer.layer, view)
        return None

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        for observer in self._all:
            self._call(observer, observer.batch_done, records)

    def _call(self, observer: Observer, what: Any, argument: Any) -> None:
        try:
            what(argument)
        except Exception:
            self._failed(type(observer).__name__)

    def _failed(self, what: str) -> None:
        self.failures += 1
        if what not in self._said:
            self._said.add(what)
            logger.exception("mminfer: %s failed; answers are not affected", what)


def from_environment(rank: RankInfo, environ: Mapping[str, str] | None = None) -> Observers:
    """The observers that `settings.OBSERVERS` asks for. One that cannot be made is logged, and left out."""
    observers = Observers()
    for line in settings.OBSERVERS.read(environ).splitlines():
        function, _, value = line.partition("=")
        try:
            observers.add(pkgutil.resolve_name(function)(value, rank))
        except Exception:
            logger.exception("mminfer: %s: %s: this observer could not be made", settings.OBSERVERS.variable, line)
    return observers
