"""The observer of `mminfer inspect`: inside the server, it records what chosen heads do with one request.

Attention is computed in the server, where q and K are. It leaves the server as sums over squares of (query, key)
pairs, so the record does not grow with the square of the prompt. A long prompt is sampled: one random row from each
of many equal stretches. Rows at a regular step would always meet the same cells of the frames.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sglang_mminfer.kernels.rows import SLAB_SCORES, causal_weights
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.visited import order_of, visited_rows
from sglang_mminfer.serving import audit, observe
from sglang_mminfer.serving.trace import PrefillRecord

# The observer's value is a folder with a `Request` in it. The record is written to the same folder.
REQUEST, MAP = "request.json", "map.json"


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What to record.

    rid:   the id of the request.
    heads: (layer, head), numbered over the whole model.
    rows:  how many rows of the prompt to sample at most.
    bins:  how many squares lie along a side of the (query, key) matrix at most.
    """

    rid: str
    heads: list[tuple[int, int]]
    rows: int = 2048
    bins: int = 192


def create(folder: str, rank: observe.RankInfo) -> Capture:
    """The observer's factory for `settings.OBSERVERS`.

    Args:
        folder: holds the request; the record is written there.
    """
    path = Path(folder)
    return Capture(msgspec.json.decode((path / REQUEST).read_bytes(), type=Request), path, rank)


@dataclass
class _Side:
    """The sums over squares in one order of the tokens, float64 [bins, bins] each."""

    bin_of: torch.Tensor  # int64 [length]: the bin of each position
    mass: torch.Tensor
    lost: torch.Tensor
    visited: torch.Tensor
    causal: torch.Tensor


@dataclass
class _Head:
    """The record of one head. The lists hold one tensor for each slab of sampled rows."""

    order_name: str
    sides: dict[str, _Side]
    first_row: int  # tokens before it came from the radix cache
    position: list[torch.Tensor] = field(default_factory=list)
    recall: list[torch.Tensor] = field(default_factory=list)
    error: list[torch.Tensor] = field(default_factory=list)
    norm: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Layer:
    """The sums over all chunks of one layer, for each of its heads."""

    visited: torch.Tensor
    causal: int = 0
    rows: int = 0
    error: torch.Tensor | None = None
    recall: torch.Tensor | None = None


class Capture:
    """Records one request, as `Request` says, and writes the record when the prompt is prefilled."""

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
        for request in view.requests:
            if request.rid == self.request.rid and request.map is not None and not self._done:
                self._begin(request.map)
                self._overview(view, request)
                for layer, head in self.request.heads:
                    if layer == view.layer_id and 0 <= head - view.first_head < view.num_heads:
                        self._head(view, request, head - view.first_head)
                self._last = request.seq_len >= request.prompt_stop and request.seq_len >= request.map.length

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

    def _overview(self, view: observe.LayerView, request: observe.RequestView) -> None:
        """Record density, error and recall of all heads of the layer; error and recall on the rows an audit samples."""
        causal = (request.prefix_len + 1 + request.seq_len) * request.chunk_len // 2
        all_pairs = torch.full((view.num_heads,), causal, dtype=torch.float64)
        layer = self._layers.setdefault(view.layer_id, _Layer(torch.zeros_like(all_pairs)))
        layer.causal += causal
        if view.plan is None or view.lse is None:
            layer.visited += all_pairs
            return
        visited = view.plan.visited_by_row[request.rows].sum(dim=0).double().cpu()
        visited[list(view.stock_heads)] = causal
        layer.visited += visited
        rows = audit.sample_rows(request)
        if len(rows):
            audited = audit.examine(view, request, rows)
            zero = torch.zeros(view.num_heads)
            layer.error = (zero if layer.error is None else layer.error) + audited.error.cpu() * audited.rows
            layer.recall = (zero if layer.recall is None else layer.recall) + audited.recall.cpu() * audited.rows
            layer.rows += audited.rows

    def _head(self, view: observe.LayerView, request: observe.RequestView, head: int) -> None:
        name = (view.layer_id, view.first_head + head)
        device = view.q.device
        if name not in self._heads:
            self._heads[name] = self._new_head(view.patterns[head], request.prefix_len, device)
        record = self._heads[name]
        all_keys = torch.arange(request.prefix_len + 1, request.seq_len + 1, device=device)
        dense = view.plan is None or head in view.stock_heads
        per_row = all_keys if dense or view.plan is None else view.plan.visited_by_row[request.rows, head]
        self._visited.setdefault(name, []).append(per_row.cpu())
        rows = self._rows[(self._rows >= request.prefix_len) & (self._rows < request.seq_len)]
        slab_rows = max(1, SLAB_SCORES // request.seq_len)
        for first in range(0, len(rows), slab_rows):
            positions = torch.from_numpy(rows[first : first + slab_rows]).to(device)
            self._slab(view, request, head, record, positions, dense)

    def _slab(
        self,
        view: observe.LayerView,
        request: observe.RequestView,
        head: int,
        record: _Head,
        position: torch.Tensor,
        dense: bool,
    ) -> None:
        rows = position - request.prefix_len + request.row_start
        kv = head // (view.num_heads // view.k_cache.shape[1])
        k, v = view.k_cache[request.slots, kv].float(), view.v_cache[request.slots, kv].float()
        causal = torch.arange(request.seq_len, device=k.device) <= position[:, None]
        weights = causal_weights(view.q[rows, head], k, position, view.sm_scale)
        seen = causal if dense or view.plan is None else visited_rows(view.plan, head, rows, request.seq_len)
        lost = weights.masked_fill(seen, 0)
        for side in record.sides.values():
            for sums, values in (
                (side.mass, weights),
                (side.lost, lost),
                (side.visited, seen & causal),
                (side.causal, causal),
            ):
                _add(sums, values, side.bin_of[position], side.bin_of[: request.seq_len])
        o = weights @ v * view.v_scale
        record.position.append(position.cpu())
        record.recall.append((1 - lost.sum(dim=1)).clamp(0, 1).cpu())
        record.error.append((view.out[rows, head].float() - o).norm(dim=1).cpu())
        record.norm.append(o.norm(dim=1).cpu())

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
        for name, record in self._heads.items():
            arrays: dict[str, Any] = {
                f"{key}_{array_name}": getattr(side, array_name).cpu().numpy()
                for key, side in record.sides.items()
                for array_name in ("mass", "lost", "visited", "causal")
            }
            for array_name in ("position", "recall", "error", "norm"):
                arrays[array_name] = torch.cat(getattr(record, array_name)).numpy()
            arrays["visited_by_row"] = torch.cat(self._visited[name]).numpy()
            arrays["order_name"], arrays["first_row"] = record.order_name, record.first_row
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
        # This file comes last and appears complete, because the command waits for it.
        target = self.folder / f"overview-{self.rank.rank}-of-{self.rank.ranks}.json"
        partial = target.with_suffix(".part")
        partial.write_bytes(msgspec.json.encode(overview))
        os.replace(partial, target)


def _add(sums: torch.Tensor, values: torch.Tensor, row_bins: torch.Tensor, key_bins: torch.Tensor) -> None:
    """Add values [R, keys] to the squares that their rows and keys belong to."""
    by_key_bin = values.new_zeros(len(values), sums.shape[1], dtype=torch.float32)
    by_key_bin.index_add_(1, key_bins, values.float())
    sums.index_add_(0, row_bins, by_key_bin.double())
