"""From the tiles of single requests to the plan of a whole ragged batch, for one layer's head patterns.

`tiles.py` says on the host what every tile visits, as ranges. `device_tiles.py` uploads them, `estimated.py` adds what
an estimate picks, `assembly.py` spells all of it out on the device. The host never waits for the device: it knows the
size of everything it allocates, exactly for static patterns and as a bound for estimated ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.threads import one_thread
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment
from sglang_mminfer.patterns.boundary import UNNAMED, HeadPattern, patterns_of
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.planning.assembly import Part, assemble
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.device_tiles import Tiles, upload
from sglang_mminfer.planning.estimated import Estimates, with_estimate
from sglang_mminfer.planning.orders import KeyOrders
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q, ChunkTiler


def _any_map(length: int) -> ModalityMap:
    return ModalityMap([Segment(Modality.TEXT, 0, length)])


def is_static(head: HeadPattern) -> bool:
    """True if the pattern's tiles do not depend on q and k."""
    return not any(isinstance(pattern, Estimated) for pattern in patterns_of(head))


class BatchPlanner:
    """Plans for one batch. What is static is made once, whatever layer asks for it.

    Args:
        keep: False: a plan is asked for and run once; it is not kept, and keeps little while it runs.
    """

    def __init__(
        self,
        requests: Sequence[RequestChunk],
        num_rows: int,
        *,
        dense_below: int = 0,
        block_q: int = BLOCK_Q,
        block_k: int = BLOCK_K,
        keep: bool = True,
    ) -> None:
        self.requests, self.num_rows, self.keep = tuple(requests), num_rows, keep
        self.block_q, self.block_k = block_q, block_k
        self.device = self.requests[0].slots.device if self.requests else torch.device("cpu")
        self._tilers = [
            ChunkTiler(r.map or _any_map(r.kv_len), r.q_start, r.kv_len, dense_below, block_q, block_k)
            for r in self.requests
        ]
        self._keys = KeyOrders(self.requests, block_k)
        self._tiles: dict[tuple[int, HeadPattern], list[Tiles]] = {}
        self._static_plans: dict[tuple[HeadPattern | None, ...], BlockPlan] = {}

    def plan(
        self,
        heads: Sequence[HeadPattern | None],
        q: torch.Tensor | None = None,
        k_cache: torch.Tensor | None = None,
        sm_scale: float = 1.0,
    ) -> BlockPlan:
        """The plan of one layer.

        Args:
            heads: the pattern of every query head; None for heads that somebody else computes.
            q [tokens, Hq, D], k_cache [slots, Hkv, D], sm_scale: for the heads whose pattern is estimated.

        Raises:
            ValueError: a pattern that is estimated, without q and k_cache.
        """
        name = tuple(heads)
        if name not in self._static_plans:
            with one_thread():
                plan = self._make(name, q, k_cache, sm_scale)
            if not self.keep or not all(is_static(head) for head in set(name) if head is not None):
                return plan
            self._static_plans[name] = plan
        return self._static_plans[name]

    def _make(
        self,
        heads: tuple[HeadPattern | None, ...],
        q: torch.Tensor | None,
        k_cache: torch.Tensor | None,
        sm_scale: float,
    ) -> BlockPlan:
        sharing: dict[HeadPattern, list[int]] = {}
        for head, pattern in enumerate(heads):
            if pattern is not None:
                sharing.setdefault(pattern, []).append(head)
        planned = tuple(head for head, pattern in enumerate(heads) if pattern is not None)
        with_map = [r for r, request in enumerate(self.requests) if request.map is not None]
        without = [r for r in range(len(self.requests)) if r not in with_map]
        items = [(r, planned, self._tiles_of(r, UNNAMED)) for r in without if planned]
        items += [(r, tuple(own), self._tiles_of(r, pattern)) for pattern, own in sharing.items() for r in with_map]
        keys = self._keys.table()
        levels: list[list[Part]] = []
        for r, own, passes in items:
            alone = sum(tiles.num_tiles > 0 for tiles in passes) == 1
            for number, tiles in enumerate(passes):
                if not tiles.num_tiles:
                    continue
                while len(levels) <= number:
                    levels.append([])
                if not tiles.estimated:
                    levels[number].append(Part((own,), tiles, r, alone))
                    continue
                if q is None or k_cache is None:
                    raise ValueError(f"{heads[own[0]]}: this pattern is estimated, so its plan needs q and the keys")
                estimates = Estimates(self.requests[r], own, q, k_cache, sm_scale)
                tiles, keys = with_estimate(tiles, estimates, keys, self.block_k)
                levels[number].append(Part(tuple((head,) for head in own), tiles, r, alone))
        return assemble(
            [level for level in levels if level],
            keys,
            num_rows=self.num_rows,
            num_heads=len(heads),
            block_q=self.block_q,
            block_k=self.block_k,
            once=not self.keep,
        )

    def _tiles_of(self, request: int, pattern: HeadPattern) -> list[Tiles]:
        name = (request, pattern)
        if name not in self._tiles:
            chunk, passes = self.requests[request], self._tilers[request].tile(pattern)
            self._tiles[name] = [upload(tile_pass, request, chunk, self._keys, self.device) for tile_pass in passes]
        return self._tiles[name]
