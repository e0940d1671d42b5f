"""What the heads of a model do for a request, from its first chunk to its last.

It is what the head config says, until the guard makes a head dense. Requests that began before keep what they began
with, so a batch may hold requests of both kinds: see `together`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from sglang_mminfer import settings
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.cost import Comparison
from sglang_mminfer.planning.planner import Heads, is_static
from sglang_mminfer.serving.choice import Choice
from sglang_mminfer.serving.dense_heads import BACKENDS, MOST_REPEATED, DenseHeads, dense_heads
from sglang_mminfer.serving.known_shares import KnownShares

# There is no "_id" in this name, because SGLang's MultimodalInputs.merge copies such attributes to other requests.
_BEGAN_WITH = "_mminfer_served_heads"


class LayerShape(NamedTuple):
    """A layer and its heads on this rank."""

    layer_id: int
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, layer: Any) -> LayerShape:
        """That of SGLang's RadixAttention."""
        return cls(layer.layer_id, layer.tp_q_head_num, layer.tp_k_head_num)


@dataclass(frozen=True)
class LayerHeads:
    """The query heads of one layer on this rank.

    Attributes:
        patterns: the pattern of each head.
        planned: the same for the planner: None for a head that the stock backend runs.
        dense: the heads that the stock backend runs; None if there are none.
        static: whether the host knows what the planned heads visit.
        basis: low-rank forms of q . k, for patterns that choose keys by them; None if there are none.
    """

    patterns: tuple[HeadPattern, ...]
    planned: Heads
    dense: DenseHeads | None
    static: bool
    basis: Basis | None


class BatchHeads(Protocol):
    """What the heads do in one batch."""

    def is_dense(self, layer_id: int) -> bool:
        """Whether no head of the layer leaves anything out, on any rank."""

    def of(self, shape: LayerShape) -> LayerHeads:
        """The heads of one layer."""


@dataclass(frozen=True)
class Placement:
    """Where heads run.

    Attributes:
        rank: this rank of the attention's tensor parallelism.
        device: its device.
        head_dim: dimensions of a head.
        executor, dense_backend: the names of what runs sparse and dense attention.
    """

    rank: int
    device: torch.device
    head_dim: int
    executor: str
    dense_backend: str

    @property
    def dense_on_stock(self) -> bool:
        """Whether the stock backend runs dense heads beside sparse ones."""
        return self.dense_backend in BACKENDS and settings.dense_heads_on_stock(str(self.device)) != "never"


class ServedHeads:
    """What the heads of a model do for some requests.

    Args:
        head_config: bound to the model.
        placement: where heads run.
        guarded: how many heads of this rank the guard has made dense.
        shares: how many keys heads choose. None: what the config's basis tells of it.

    Attributes:
        choice: decides which of their chunks run sparse.
        all_dense: whether every head of every layer is dense.
        bases: low-rank forms of q . k of this rank's heads, by layer, as far as they are known.
    """

    def __init__(
        self, head_config: HeadConfig, placement: Placement, guarded: int = 0, shares: KnownShares | None = None
    ) -> None:
        self.head_config, self.guarded = head_config, guarded
        self._placement = placement
        self._layers: dict[LayerShape, LayerHeads] = {}
        self.bases: dict[int, Basis] = {}
        self.shares = shares or KnownShares.of(head_config)
        self.all_dense = head_config.all_dense
        self.choice = self._choice()

    def _choice(self) -> Choice:
        config, placement, mean = self.head_config, self._placement, self.mean_share
        comparison = Comparison(
            config.layers,
            placement.executor,
            placement.dense_backend,
            config.defaults.dense_below,
            placement.head_dim,
            {} if self.shares is None or mean is None else {self.shares.rule: mean},
            placement.dense_on_stock,
        )
        return Choice(config, comparison)

    @property
    def mean_share(self) -> float | None:
        """How much of the keys between sink and window the heads that choose visit; None: it is not known."""
        return None if self.shares is None else self.shares.mean(self.head_config)

    def with_dense(self, heads: Sequence[tuple[int, int]]) -> ServedHeads:
        """The same with some heads dense, for requests that begin from now on.

        Args:
            heads: (layer, head) of this rank, numbered as in the whole model.
        """
        denser = ServedHeads(
            self.head_config.with_dense(heads), self._placement, self.guarded + len(heads), self.shares
        )
        denser.bases, denser.choice.lacks_basis = self.bases, self.choice.lacks_basis
        return denser

    def settle_basis(self, bases: Mapping[int, Basis], shares: KnownShares | None = None) -> None:
        """Takes the basis by which heads choose keys, where the head config brings none. Once, before any request runs
        sparse.

        Args:
            bases: of this rank's heads, by layer; empty: heads choose by q . k itself.
            shares: what the basis tells of the heads of all ranks; None: nothing.
        """
        self.bases |= {layer_id: basis.to(self._placement.device) for layer_id, basis in bases.items()}
        self.shares = shares or self.shares
        self.choice = self._choice()
        self.choice.lacks_basis = not self.bases
        self._layers.clear()

    def is_dense(self, layer_id: int) -> bool:
        """Whether no head of the layer leaves anything out, on any rank. A rank knows only its own guarded heads."""
        return self.head_config.is_dense(layer_id)

    def of(self, shape: LayerShape) -> LayerHeads:
        """The heads of one layer on this rank."""
        if shape not in self._layers:
            self._layers[shape] = self._make(shape)
        return self._layers[shape]

    def _make(self, shape: LayerShape) -> LayerHeads:
        layer_id, count, num_kv_heads = shape
        first, device = self._placement.rank * count, self._placement.device
        patterns = tuple(self.head_config.patterns(layer_id)[first : first + count])
        dense = None
        if self._placement.dense_on_stock:
            limit = math.inf if settings.dense_heads_on_stock(str(device)) == "always" else MOST_REPEATED
            dense = dense_heads(patterns, num_kv_heads, device, limit)
        on_stock = dense.heads if dense is not None else ()
        planned = tuple(None if head in on_stock else pattern for head, pattern in enumerate(patterns))
        static = all(is_static(head) for head in planned if head is not None)
        if (whole := self.head_config.basis) is not None and layer_id not in self.bases:
            self.bases[layer_id] = whole.layer(layer_id, first, count, device)
        return LayerHeads(patterns, planned, dense, static, self.bases.get(layer_id))


class MixedHeads:
    """The heads of a batch whose requests began with different ones.

    The stock backend would run a head for all rows, so here it runs none, and a dense head is a pattern like others.

    Args:
        by_request: for each of the planner's requests, in their order.
    """

    def __init__(self, by_request: Sequence[ServedHeads]) -> None:
        self._by_request = by_request
        self._layers: dict[LayerShape, LayerHeads] = {}

    def is_dense(self, layer_id: int) -> bool:
        """Whether no head of the layer leaves anything out for any request."""
        return all(served.is_dense(layer_id) for served in self._by_request)

    def of(self, shape: LayerShape) -> LayerHeads:
        """The heads of one layer. `patterns` are those of the requests that began last."""
        if shape not in self._layers:
            layers = [served.of(shape) for served in self._by_request]
            last = layers[max(range(len(layers)), key=lambda i: self._by_request[i].guarded)]
            by_head = zip(*(layer.patterns for layer in layers))
            planned = tuple(head[0] if len(set(head)) == 1 else head for head in by_head)
            static = all(is_static(head) for layer in layers for head in layer.patterns)
            self._layers[shape] = dataclasses.replace(last, planned=planned, dense=None, static=static)
        return self._layers[shape]


def together(by_request: Sequence[ServedHeads]) -> BatchHeads:
    """The heads of a batch.

    Args:
        by_request: what each of the planner's requests began with; at least one.
    """
    return by_request[0] if len(set(map(id, by_request))) == 1 else MixedHeads(by_request)


def of_request(mm_inputs: Any, rid: str, now: ServedHeads) -> ServedHeads:
    """`now` for a request that begins, and for its later chunks what it began with, also after a retraction.

    It is kept on the object for the request's media, which SGLang hands over with every chunk and which lives as long
    as the request. Turns of a session may share the object, so it is kept by request.
    """
    began_with: dict[str, ServedHeads] | None = getattr(mm_inputs, _BEGAN_WITH, None)
    if began_with is None:
        began_with = {}
        setattr(mm_inputs, _BEGAN_WITH, began_with)
    return began_with.setdefault(rid, now)
