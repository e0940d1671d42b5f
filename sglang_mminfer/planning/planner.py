"""From the tiles of single requests to the plan of a whole ragged batch, for one layer's head patterns.

`tiles.py` says on the host what every tile visits, as ranges, and `placed.py` numbers key tiles as the batch does. So
far nothing needs the device, and a thread may do it ahead (`BatchPlanner.prepare`). `device_tiles.py` uploads the
ranges, `estimated.py` adds what an estimate picks, `assembly.py` spells all of it out on the device. The host never
waits for the device: it knows the size of everything it allocates, exactly for static patterns and as a bound for
estimated ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.threads import one_thread
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.patterns.boundary import UNNAMED, HeadPattern, patterns_of
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.planning.assembly import Part, assemble
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.device_tiles import Uploads
from sglang_mminfer.planning.estimated import Estimates, with_estimate
from sglang_mminfer.planning.orders import KeyOrders
from sglang_mminfer.planning.placed import PlacedTiles, placed
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q, ChunkTiler, TilePass

PlannedHead = HeadPattern | tuple[HeadPattern, ...] | None
"""What a query head does: a pattern for all requests, or one for each; None: somebody else computes the head."""
Heads = tuple[PlannedHead, ...]


def _any_map(length: int) -> ModalityMap:
    return ModalityMap([Segment(Modality.TEXT, 0, length)])


@cache
def is_static(head: HeadPattern) -> bool:
    """True if the pattern's tiles do not depend on q and k."""
    return not any(isinstance(pattern, Estimated) for pattern in patterns_of(head))


@cache
def worker() -> Executor:
    """The thread on which `BatchPlanner.prepare` works while the device does."""
    return ThreadPoolExecutor(1, thread_name_prefix="mminfer-plan")


class HeadTiles(NamedTuple):
    """The passes of one request and of the heads that share a pattern, each in parts."""

    request: int
    heads: tuple[int, ...]
    passes: list[list[PlacedTiles]]


@dataclass
class _Layer:
    """Layers whose heads have the same patterns.

    plans_to_come: how often they will be asked for; None: nobody said. tiles: what `prepare` made of them. plan: kept
    while it may be wanted again.
    """

    heads: Heads
    is_static: bool
    plans_to_come: int | None = None
    tiles: Future[list[HeadTiles]] | None = None
    plan: BlockPlan | None = None


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
            ChunkTiler(r.map or _any_map(r.kv_len), r.q_start, r.kv_len, dense_below, block_q, block_k, r.row_start)
            for r in self.requests
        ]
        self._keys = KeyOrders(self.requests, block_k)
        self._tiles: dict[tuple[int, HeadPattern], list[list[PlacedTiles]]] = {}
        self._placed: dict[TilePass, PlacedTiles] = {}
        self._uploads = Uploads(self.device)
        self._layers: dict[Heads, _Layer] = {}
        self._lock = threading.Lock()  # of all that `_tile` changes
        self.overflow: list[torch.Tensor] = []
        """int64 scalars on the device: query tiles of a head that saw everything because they asked for too much."""

    def prepare(self, layers: Iterable[Sequence[PlannedHead]], worker: Executor | None = None) -> None:
        """Do what the host can do for the plans of these layers, which will be asked for in this order, each once.

        Args:
            worker: where to do it, while the caller goes on and the device works; None: here.
        """
        for heads in layers:
            layer = self._layer(heads)
            layer.plans_to_come = (layer.plans_to_come or 0) + 1
            if layer.tiles is None:
                layer.tiles = Future() if worker is None else worker.submit(self._tile, layer.heads)
                if worker is None:
                    layer.tiles.set_result(self._tile(layer.heads))

    def plan(
        self,
        heads: Sequence[PlannedHead],
        q: torch.Tensor | None = None,
        k_cache: torch.Tensor | None = None,
        sm_scale: float = 1.0,
        basis: Basis | None = None,
    ) -> BlockPlan:
        """The plan of one layer.

        Args:
            heads: the pattern of every query head, or one for each request; None for heads that somebody else computes.
            q [tokens, Hq, D], k_cache [slots, Hkv, D], sm_scale: for the heads whose pattern is estimated.
            basis: the layer's low-rank forms of q . k, for heads that choose by them; None: they choose by q . k.

        Raises:
            ValueError: a pattern that is estimated, without q and k_cache.
        """
        layer = self._layer(heads)
        plan = layer.plan
        if plan is None:
            with one_thread():
                plan = self._make(layer, q, k_cache, sm_scale, basis)
        if layer.plans_to_come is not None:
            layer.plans_to_come -= 1
        wanted_again = layer.plans_to_come is None or layer.plans_to_come > 0
        layer.plan = plan if wanted_again and layer.is_static and self.keep else None
        return plan

    @property
    def uploaded_bytes(self) -> int:
        """What the plans so far hold on the device, beside their own tensors and the key table."""
        return self._uploads.num_bytes

    def _layer(self, heads: Sequence[PlannedHead]) -> _Layer:
        name = tuple(heads)
        layer = self._layers.get(name)
        if layer is None:
            patterns = {pattern for head in set(name) for pattern in (head if isinstance(head, tuple) else (head,))}
            layer = self._layers[name] = _Layer(name, all(is_static(pattern) for pattern in patterns if pattern))
        return layer

    def _make(
        self,
        layer: _Layer,
        q: torch.Tensor | None,
        k_cache: torch.Tensor | None,
        sm_scale: float,
        basis: Basis | None,
    ) -> BlockPlan:
        """Everything for which the device is needed."""
        items = self._tile(layer.heads) if layer.tiles is None else layer.tiles.result()
        keys = self._keys.table(self.device)
        tiles = iter(self._uploads.tiles([part for item in items for parts in item.passes for part in parts]))
        levels: list[list[Part]] = [[] for _ in range(max((len(item.passes) for item in items), default=0))]
        for request, own, passes in items:
            alone = len(passes) == 1
            for level, parts in zip(levels, passes):
                for part in parts:
                    on_device = next(tiles)
                    if not part.estimated:
                        level.append(Part((own,), on_device, request, alone))
                        continue
                    if q is None or k_cache is None:
                        raise ValueError(
                            f"{layer.heads[own[0]]}: this pattern is estimated, so its plan needs q and the keys"
                        )
                    estimates = Estimates(self.requests[request], own, q, k_cache, sm_scale, basis)
                    estimated, keys = with_estimate(on_device, estimates, keys, self.block_k)
                    self.overflow += estimates.overflow
                    level.append(Part(tuple((head,) for head in own), estimated, request, alone))
        return assemble(
            levels,
            keys,
            num_rows=self.num_rows,
            num_heads=len(layer.heads),
            block_q=self.block_q,
            block_k=self.block_k,
            once=not self.keep,
        )

    # ---- on the host ---------------------------------------------------------------------------------------

    def _tile(self, heads: Heads) -> list[HeadTiles]:
        """The tiles of all heads of a layer."""
        planned = tuple(head for head, pattern in enumerate(heads) if pattern is not None)
        with_map = [r for r, request in enumerate(self.requests) if request.map is not None]
        without = [r for r in range(len(self.requests)) if r not in with_map]
        sharing: dict[HeadPattern, dict[int, list[int]]] = {}
        for head in planned:
            for r in with_map:
                patterns = heads[head]
                pattern = patterns[r] if isinstance(patterns, tuple) else patterns
                assert pattern is not None
                sharing.setdefault(pattern, {}).setdefault(r, []).append(head)
        with self._lock:
            items = [HeadTiles(r, planned, self._tiles_of(r, UNNAMED)) for r in without if planned]
            for pattern, by_request in sharing.items():
                items += [HeadTiles(r, tuple(own), self._tiles_of(r, pattern)) for r, own in by_request.items()]
        return items

    def _tiles_of(self, request: int, pattern: HeadPattern) -> list[list[PlacedTiles]]:
        """The passes of one pattern, none of them without tiles."""
        name = (request, pattern)
        if name not in self._tiles:
            passes = self._tilers[request].tile(pattern)
            if not is_static(pattern):
                passes = [[TilePass.joined(parts)] for parts in passes]
            self._tiles[name] = [[self._placed_of(request, part) for part in parts] for parts in passes]
        return self._tiles[name]

    def _placed_of(self, request: int, part: TilePass) -> PlacedTiles:
        if part not in self._placed:
            self._placed[part] = placed(part, request, self._keys)
        return self._placed[part]
