"""Inside the server: the observer that takes down what chosen heads do with one request, for `mminfer inspect`.

Attention is computed here, where q and K are, and leaves as sums over squares of (query, key) pairs: what is kept does
not grow with the prompt's square. Of a long prompt some rows are taken, drawn at random from equal stretches: a
regular step would fall in with the frames.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.visited import order_of, visited_rows
from sglang_mminfer.serving import audit, observe
from sglang_mminfer.serving.trace import PrefillRecord

# The observer's value is a folder with a `Request` in it; what was taken down is put there.
REQUEST, MAP = "request.json", "map.json"
SLAB_SCORES = 1 << 22


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What to take down. heads: (layer, head) of the whole model. rows: of the prompt, at most. bins: of a side."""

    rid: str
    heads: list[tuple[int, int]]
    rows: int = 2048
    bins: int = 192


def create(folder: str, rank: observe.RankInfo) -> Capture:
    """For `settings.OBSERVERS`: the value is the folder with the request."""
    path = Path(folder)
    return Capture(msgspec.json.decode((path / REQUEST).read_bytes(), type=Request), path, rank)


@dataclass
class _Side:
    """One order of the tokens, and what was summed over its squares; float64 [bins, bins]."""

    bin_of: torch.Tensor  # int64 [length]: of each position
    mass: torch.Tensor
    lost: torch.Tensor
    visited: torch.Tensor
    causal: torch.Tensor


@dataclass
class _Head:
    """What is taken down of one head; the last lists have an entry for each sampled row."""

    order_name: str
    sides: dict[str, _Side]
    first_row: int  # below it, tokens came from the cache
    position: list[torch.Tensor] = field(default_factory=list)
    recall: list[torch.Tensor] = field(default_factory=list)
    error: list[torch.Tensor] = field(default_factory=list)
    norm: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Layer:
    """Sums over the chunks of one layer, for its heads."""

    visited: torch.Tensor
    causal: int = 0
    rows: int = 0
    error: torch.Tensor | None = None
    recall: torch.Tensor | None = None


class Capture:
    """Takes down one request, as `Request` says, and writes it when its prompt is prefilled."""

    def __init__(self, request: Request, folder: Path, rank: observe.RankInfo) -> None:
        self.request, self.folder, self.rank = request, folder, rank
        self._heads: dict[tuple[int, int], _Head] = {}
        self._layers: dict[int, _Layer] = {}
        self._map: ModalityMap | None = None
        self._rows = np.zeros(0, dtype=np.int64)
        self._visited: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._done = False
        self._last = False

    def layer(self, view: observe.LayerView) -> None:
        for own in view.requests:
            if own.rid == self.request.rid and own.map is not None and not self._done:
                self._begin(own.map)
                self._overview(view, own)
                for layer, head in self.request.heads:
                    if layer == view.layer_id and 0 <= head - view.first_head < view.num_heads:
                        self._head(view, own, head - view.first_head)
                self._last = own.seq_len >= own.prompt_stop and own.seq_len >= own.map.length

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        if self._last and not self._done:
            self._done = True
            self._write()

    def _begin(self, modality_map: ModalityMap) -> None:
        if self._map is not None:
            return
        self._map = modality_map
        count = min(self.request.rows, modality_map.length)
        edges = np.linspace(0, modality_map.length, count + 1).astype(np.int64)
        self._rows = np.random.default_rng(0).integers(edges[:-1], edges[1:])

    def _overview(self, view: observe.LayerView, own: observe.RequestView) -> None:
        """Density, error and recall of all heads of the layer, on the few rows that an audit takes."""
        causal = (own.prefix_len + 1 + own.seq_len) * own.chunk_len // 2
        whole = torch.full((view.num_heads,), causal, dtype=torch.float64)
        layer = self._layers.setdefault(view.layer_id, _Layer(torch.zeros_like(whole)))
        layer.causal += causal
        if view.plan is None or view.lse is None:
            layer.visited += whole
            return
        visited = view.plan.visited_by_row[own.rows].sum(dim=0).double().cpu()
        visited[list(view.stock_heads)] = causal
        layer.visited += visited
        rows = audit.sample_rows(own)
        if len(rows):
            found = audit.examine(view, own, rows)
            zero = torch.zeros(view.num_heads)
            layer.error = (zero if layer.error is None else layer.error) + found.error.cpu() * found.rows
            layer.recall = (zero if layer.recall is None else layer.recall) + found.recall.cpu() * found.rows
            layer.rows += found.rows

    def _head(self, view: observe.LayerView, own: observe.RequestView, head: int) -> None:
        name = (view.layer_id, view.first_head + head)
        device = view.q.device
        if name not in self._heads:
            self._heads[name] = self._new_head(view.patterns[head], own.prefix_len, device)
        taken = self._heads[name]
        everything = torch.arange(own.prefix_len + 1, own.seq_len + 1, device=device)
        dense = view.plan is None or head in view.stock_heads
        per_row = everything if dense or view.plan is None else view.plan.visited_by_row[own.rows, head]
        self._visited.setdefault(name, []).append(per_row.cpu())
        rows = self._rows[(self._rows >= own.prefix_len) & (self._rows < own.seq_len)]
        size = max(1, SLAB_SCORES // own.seq_len)
        for first in range(0, len(rows), size):
            some = torch.from_numpy(rows[first : first + size]).to(device)
            self._slab(view, own, head, taken, some, dense)

    def _slab(
        self,
        view: observe.LayerView,
        own: observe.RequestView,
        head: int,
        taken: _Head,
        position: torch.Tensor,
        dense: bool,
    ) -> None:
        rows = position - own.prefix_len + own.row_start
        kv = head // (view.num_heads // view.k_cache.shape[1])
        k, v = view.k_cache[own.slots, kv].float(), view.v_cache[own.slots, kv].float()
        causal = torch.arange(own.seq_len, device=k.device) <= position[:, None]
        scores = (view.q[rows, head].float() @ k.T * view.sm_scale).masked_fill_(~causal, -math.inf)
        weights = torch.softmax(scores, dim=1)
        seen = causal if dense or view.plan is None else visited_rows(view.plan, head, rows, own.seq_len)
        lost = weights.masked_fill(seen, 0)
        for side in taken.sides.values():
            for into, what in (
                (side.mass, weights),
                (side.lost, lost),
                (side.visited, seen & causal),
                (side.causal, causal),
            ):
                _add(into, what, side.bin_of[position], side.bin_of[: own.seq_len])
        o = weights @ v
        taken.position.append(position.cpu())
        taken.recall.append((1 - lost.sum(dim=1)).clamp(0, 1).cpu())
        taken.error.append((view.out[rows, head].float() - o).norm(dim=1).cpu())
        taken.norm.append(o.norm(dim=1).cpu())

    def _new_head(self, pattern: HeadPattern, first_row: int, device: torch.device) -> _Head:
        assert self._map is not None
        length = self._map.length
        bins = min(self.request.bins, length)
        name, order = order_of(self._map, pattern)
        sides = {}
        for key, positions in (("original", np.arange(length)), ("permuted", order)):
            bin_of = torch.empty(length, dtype=torch.int64)
            bin_of[torch.from_numpy(positions)] = torch.arange(length) * bins // length
            zeros = [torch.zeros(bins, bins, dtype=torch.float64, device=device) for _ in range(4)]
            sides[key] = _Side(bin_of.to(device), *zeros)
        return _Head(name, sides, first_row)

    def _write(self) -> None:
        assert self._map is not None
        for name, taken in self._heads.items():
            arrays: dict[str, Any] = {
                f"{key}_{what}": getattr(side, what).cpu().numpy()
                for key, side in taken.sides.items()
                for what in ("mass", "lost", "visited", "causal")
            }
            for what in ("position", "recall", "error", "norm"):
                arrays[what] = torch.cat(getattr(taken, what)).numpy()
            arrays["visited_by_row"] = torch.cat(self._visited[name]).numpy()
            arrays["order_name"], arrays["first_row"] = taken.order_name, taken.first_row
            np.savez_compressed(self.folder / f"head-{name[0]}-{name[1]}.npz", **arrays)
        overview = {}
        for number, layer in self._layers.items():
            ones, rows_taken = torch.ones(len(layer.visited)), max(layer.rows, 1)
            overview[str(number)] = {
                "density": (layer.visited / layer.causal).tolist(),
                "error": (torch.zeros(len(ones)) if layer.error is None else layer.error / rows_taken).tolist(),
                "recall": (ones if layer.recall is None else layer.recall / rows_taken).tolist(),
            }
        if self.rank.rank == 0:
            (self.folder / MAP).write_bytes(msgspec.json.encode(self._map.segments))
        # Last of all, and whole at once: the other side waits for it.
        target = self.folder / f"overview-{self.rank.rank}-of-{self.rank.ranks}.json"
        partial = target.with_suffix(".part")
        partial.write_bytes(msgspec.json.encode(overview))
        os.replace(partial, target)


def _add(into: torch.Tensor, values: torch.Tensor, row_bins: torch.Tensor, key_bins: torch.Tensor) -> None:
    """Sums [R, keys] over squares."""
    narrow = values.new_zeros(len(values), into.shape[1], dtype=torch.float32)
    narrow.index_add_(1, key_bins, values.float())
    into.index_add_(0, row_bins, narrow.double())
