"""How many keys query tiles visit by a basis: taken of a few tiles of the conversation that gives the basis.

Whether choosing keys pays depends on how many are chosen. That differs from model to model and from head to head, and
must be known before the first request. So some rows of the conversation are kept, and in the end they choose as rows of
requests will: by the finished forms, among all keys before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.adaptive import QUERY_ROWS, Adaptive
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.estimated import Evidence, QueryTiles
from sglang_mminfer.patterns.index import Scope
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.tiles import BLOCK_K
from sglang_mminfer.serving.observe import LayerView, RequestView

TILES = 4
"""Query tiles of a conversation that are looked at. For 28 heads of 128 dimensions their rows take 1.8 MiB a layer."""

LEAST = 512
"""Keys between sink and window that such a tile has, at least. A larger share of fewer is chosen: they are nearer."""

Stretch = tuple[int, int]
"""Positions [start, stop)."""


def sampled(rule: Adaptive, modality_map: ModalityMap, tokens: int) -> list[Stretch]:
    """Where query tiles are looked at in a conversation of so many tokens: each ends with a vision row, and they are
    spread over the second half of those that have enough keys before them. Empty if there are none."""
    first = rule.sink + rule.local + LEAST + QUERY_ROWS
    rows = modality_map.runs(Modality.VISION).clip(first, tokens)
    if not len(rows):
        return []
    last = rows.select(np.linspace(len(rows) // 2, len(rows) - 1, TILES).astype(np.int64))
    return [(row + 1 - QUERY_ROWS, row + 1) for row in np.unique(last).tolist()]


@dataclass
class LayerSample:
    """The sampled rows of one layer of one conversation, which come chunk by chunk.

    Attributes:
        rule: how rows choose.
        stretches: where the tiles are.
        q: the queries of each, [rows, Hq, D] for each chunk that has some: copies on the device.
        view, request: of the last chunk. Its keys stay where they are until the batch is done.
    """

    rule: Adaptive
    stretches: list[Stretch]
    q: list[list[torch.Tensor]]
    view: LayerView
    request: RequestView

    @classmethod
    def of(cls, rule: Adaptive, view: LayerView, request: RequestView) -> LayerSample:
        """The sample of a conversation whose first chunk this is."""
        stretches = [] if request.map is None else sampled(rule, request.map, request.prompt_stop)
        return cls(rule, stretches, [[] for _ in stretches], view, request)

    def add(self, view: LayerView, request: RequestView) -> None:
        """Keeps the sampled rows of a chunk."""
        self.view, self.request = view, request
        q = view.q[request.rows]
        for (start, stop), parts in zip(self.stretches, self.q):
            first, last = max(start, request.prefix_len), min(stop, request.seq_len)
            if first < last:
                parts.append(q[first - request.prefix_len : last - request.prefix_len].clone())

    def shares(self, basis: Basis) -> torch.Tensor | None:
        """See `Basis.shares`; None if no tile was seen. To be asked before the batch of the last chunk ends. Waits for
        the device.

        Args:
            basis: of the layer's heads on this rank.
        """
        tiles = [(start, torch.cat(parts)) for (start, _), parts in zip(self.stretches, self.q) if parts]
        if not tiles or self.request.map is None:
            return None
        slots, scale = self.request.slots, self.view.sm_scale
        return shares(self.rule, tiles, self.request.map, self.view.k_cache, slots, scale, basis)


def shares(
    rule: Adaptive,
    tiles: Sequence[tuple[int, torch.Tensor]],
    modality_map: ModalityMap,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    sm_scale: float,
    basis: Basis,
) -> torch.Tensor:
    """The share of the keys between sink and window that query tiles visit: float32 [Hq], on the host, the mean over
    the tiles.

    Args:
        rule: how rows choose.
        tiles: at least one, in the order of their positions: the position of the first row, and the queries [rows, Hq,
            D] of this row and those behind it. Only vision rows are looked at.
        k_cache: [slots, Hkv, D]. slots: int64 [tokens], the cache row of each position.
        sm_scale: the factor on q . k.
        basis: the forms by which the heads choose.
    """
    device = k_cache.device
    heads, basis = tuple(range(tiles[0][1].shape[1])), basis.to(device)
    vision = modality_map.members(Modality.VISION)
    findings, found = None, []
    for start, q in reversed(tiles):
        stop = start + len(q)
        chunk = RequestChunk(modality_map, start, stop, 0, slots[:stop])
        evidence = Evidence(chunk, Scope(modality_map, stop), heads, q, k_cache, None, sm_scale, basis)
        findings = findings or rule.estimate(evidence)  # the last tile has the keys of all
        rows = vision[start:stop].nonzero().flatten()
        found.append(rule.shares(evidence, findings, _tile(start, rows, device)))
    return torch.cat(found, dim=1).mean(dim=1).float().cpu()


def _tile(start: int, rows: torch.Tensor, device: torch.device) -> QueryTiles:
    """One query tile. rows: int64, ascending, counted from position `start`."""
    first, last = (np.array([start + int(rows[i]) + 1]) for i in (0, -1))
    ends = first, last, first // BLOCK_K
    a, b, c = (torch.from_numpy(end).to(device) for end in ends)
    return QueryTiles(rows.to(device), np.array([len(rows)], dtype=np.int32), *ends, (a, b, c), BLOCK_K)
