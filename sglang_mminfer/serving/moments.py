"""Second moments of queries and keys, summed up while a request is computed: what a basis is made of.

With them come some rows, of which the shares of the basis are taken: see `shares.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.basis import Basis, basis_of, second_moments
from sglang_mminfer.serving.observe import LayerView, RequestView
from sglang_mminfer.serving.shares import LayerSample

SLAB = 1024
"""Rows that are taken at a time, so that no float64 copy of a whole chunk is made."""


@dataclass
class LayerMoments:
    """Sums over the rows of a request so far.

    Attributes:
        rows: how many.
        q: float64 [Hq, D, D], or [Hkv, D, D], the sum over the query heads of each KV head.
        k: float64 [Hkv, D, D].
    """

    rows: int
    q: torch.Tensor
    k: torch.Tensor

    def basis(self, rank: int, *, shared: bool = True) -> Basis:
        """The forms of the layer's heads on this rank, on the CPU. Waits for the device."""
        return basis_of(self.q.cpu() / self.rows, self.k.cpu() / self.rows, rank, shared=shared)


class Moments:
    """The moments of requests, layer by layer. They stay on the device, and nothing waits for it.

    Args:
        by_head: keep those of each query head, not of those that share a KV head together.
        rule: how heads choose keys by the basis, for its shares; None: it has none.
    """

    def __init__(self, by_head: bool = False, rule: Adaptive | None = None) -> None:
        self.by_head, self.rule = by_head, rule
        self.layers: dict[int, LayerMoments] = {}
        self._samples: dict[int, LayerSample] = {}

    def add(self, view: LayerView, request: RequestView) -> None:
        """Adds the rows of a chunk of the request in one layer, and their keys."""
        q = view.q[request.rows]
        slots = request.slots[request.prefix_len : request.seq_len]
        layer = self.layers.get(view.layer_id)
        if self.rule is not None:
            if request.prefix_len == 0 or view.layer_id not in self._samples:
                self._samples[view.layer_id] = LayerSample.of(self.rule, view, request)
            self._samples[view.layer_id].add(view, request)
        for begin in range(0, len(q), SLAB):
            part = slice(begin, begin + SLAB)
            k = view.k_cache[slots[part]]
            count = len(k)
            q_sum, k_sum = (count * second_moments(x) for x in (q[part], k))
            if not self.by_head:
                q_sum = q_sum.unflatten(0, (k.shape[1], -1)).sum(dim=1)
            if layer is None:
                layer = self.layers[view.layer_id] = LayerMoments(count, q_sum, k_sum)
            else:
                layer.rows += count
                layer.q += q_sum
                layer.k += k_sum

    def with_shares(self, layer: int, basis: Basis) -> Basis:
        """The basis of a layer with its shares in the request that was added last, which must be complete, and its
        batch not done. Waits for the device."""
        sample = self._samples.get(layer)
        return basis if sample is None else replace(basis, shares=sample.shares(basis))
