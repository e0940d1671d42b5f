"""What sparse attention of a chunk costs beside dense attention: estimated before anything is planned.

The figures follow from the map, the patterns and the chunk's bounds alone, and no clock is read, so all tensor-parallel
ranks and every repetition decide alike. They are a few percent from what a plan visits: one row of each query tile
stands for the tile, and lines through rasters are counted by their lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.modality.runs import Ints, Runs, expand
from sglang_mminfer.modality.segment_table import SegmentTable, codes_of
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.boundary import UNNAMED, HeadPattern, patterns_of, row_classes
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.planning.lines import room_for_frames
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q

PAIR_COST = {"fa4": 620 / 600, "triton": 620 / 450, "flashinfer": 620 / 290, "torch": 1.25}
"""How long an executor takes for one visited (row, key) pair; the dense backend takes 1.

On a GPU: TFLOP/s of the best dense kernel on an H100, over those that are modelled for the executor's full tiles. On a
CPU: measured in the server at 5,120 to 8,192 tokens, beside `torch_native` (benchmarks/results/cpu_prefill*.json). An
executor without a figure counts as 1."""

CHOSEN_PAIR_COST = {"torch": lambda head_dim: 2.2 + 56 / head_dim}
"""The same for pairs of heads that choose their keys, where it differs: on a CPU each head gathers its own keys, tile
by tile. By processor time at 4,096 to 16,384 tokens: 3.6 to 4.0 with 32 dimensions a head, 3.2 with 64, 2.5 to 2.8 with
128."""

COMPUTES_THE_PREFIX_AGAIN = frozenset({"torch_native"})
"""Dense backends that compute the rows of the prefix once more with every chunk."""

MARGIN = 1.1
"""By so much sparse attention must be faster by the estimate, for what the estimate leaves out: planning, launches, the
last programs of a layer."""

SAMPLE = 12
"""The most patterns of a model that are looked at; if it has more, these are spread over all, by how many heads each
has."""


def dense_pairs(start: int, stop: int, dense_backend: str) -> int:
    """The (row, key) pairs up to the diagonal that a dense backend computes for rows [start, stop)."""
    first = 0 if dense_backend in COMPUTES_THE_PREFIX_AGAIN else start
    return (first + 1 + stop) * (stop - first) // 2


class Comparison:
    """Compares sparse attention with dense attention, for one model.

    Args:
        layers: the heads of every layer, those of all ranks.
        executor, dense_backend: the names of what runs sparse and dense attention.
        dense_below: rows before this position see everything.
        head_dim: what choosing keys costs depends on it.
        shares: the mean share of the keys between sink and window that tiles of heads with a pattern visit, as far as
            it is known.
        dense_on_stock: whether the dense backend runs dense heads also beside sparse ones. Then they cost the same
            either way and do not count; else the executor's own speed counts.
    """

    def __init__(
        self,
        layers: Iterable[Iterable[HeadPattern]],
        executor: str,
        dense_backend: str,
        dense_below: int,
        head_dim: int = 128,
        shares: Mapping[HeadPattern, float] | None = None,
        dense_on_stock: bool = True,
    ) -> None:
        heads = Counter(head for layer in layers for head in layer)
        dense = heads.pop(UNNAMED, 0)
        counts = heads.most_common()
        self._sample = counts[:: -(-len(counts) // SAMPLE) or 1]
        self._pair_cost = PAIR_COST.get(executor, 1.0)
        chosen = CHOSEN_PAIR_COST.get(executor)
        self._chosen_cost = 1.0 if chosen is None else chosen(head_dim) / self._pair_cost
        self._dense_backend, self._dense_below, self._head_dim = dense_backend, dense_below, head_dim
        self._shares = shares or {}
        # As many dense heads of the executor's own as there are for each head of the sample.
        sampled = sum(count for _, count in self._sample)
        self._own_dense = 0.0 if dense_on_stock else dense * sampled / max(heads.total(), 1)

    def sparse_is_faster(self, modality_map: ModalityMap, start: int, stop: int) -> bool:
        """Whether rows [start, stop) of a prompt are worth a plan."""
        rows = ChunkRows(modality_map, start, stop, self._dense_below)
        remaining = sum(count for _, count in self._sample)
        pairs, dense = dense_pairs(start, stop, ""), dense_pairs(start, stop, self._dense_backend) / self._pair_cost
        # Pairs that may be visited before dense attention is as fast.
        allowance = remaining * dense / MARGIN + self._own_dense * (dense - pairs)
        for head, count in self._sample:
            visited = rows.visited_pairs(head, self._shares.get(head))
            visited *= self._chosen_cost if any(pattern.basis_rank for pattern in patterns_of(head)) else 1
            allowance -= count * (visited + rows.estimate_pairs(head, self._head_dim))
            remaining -= count
            if allowance <= 0:
                return False
            if remaining * pairs < allowance:  # whatever the other heads visit
                return True
        return True

    def own_dense_is_faster(self, start: int, stop: int) -> bool:
        """Whether the executor runs rows [start, stop) that see everything faster than the dense backend."""
        return dense_pairs(start, stop, "") * self._pair_cost < dense_pairs(start, stop, self._dense_backend)


class ChunkRows:
    """Rows [start, stop) of one prompt, and how much patterns visit for them.

    Args:
        dense_below: rows before this position see everything.
    """

    def __init__(self, modality_map: ModalityMap, start: int, stop: int, dense_below: int = 0) -> None:
        self.map, self.start, self.stop, self.dense_below = modality_map, start, stop, dense_below
        self._lines: dict[tuple[str, Modality | None], LineKeys] = {}

    def visited_pairs(self, head: HeadPattern, share: float | None = None) -> float:
        """About how many (row, key) pairs up to the diagonal lie in the tiles that the head visits.

        Args:
            share: of the keys between sink and window that it visits by its estimate; None: what its pattern expects.
        """
        pairs = 0.0
        for row_class in row_classes(head):
            for keys, pattern in row_class.pairs:
                scope = Scope(self.map, self.stop, row_class.rows, keys, row_class.text_rule)
                pairs += self._pairs(scope, pattern.index(scope), share)
        return pairs

    def estimate_pairs(self, head: HeadPattern, head_dim: int) -> float:
        """What the head's estimates cost, in (row, key) pairs of attention."""
        pairs = 0.0
        for row_class in row_classes(head):
            for keys, pattern in row_class.pairs:
                if isinstance(pattern, Estimated):
                    scope = Scope(self.map, self.stop, row_class.rows, keys, row_class.text_rule)
                    rows = scope.row_members.clip(max(self.start, self.dense_below), self.stop)
                    pairs += pattern.looks_at(len(rows), len(scope.key_members), head_dim)
        return pairs

    def _pairs(self, scope: Scope, index: PairIndex, share: float | None) -> float:
        rows = scope.row_members.clip(self.start, self.stop)
        choosy = rows.clip(self.dense_below, self.stop)
        if index.whole_rows is not None:
            choosy = choosy - index.whole_rows
        pairs = 0.0
        if len(rows) > len(choosy):
            seeing_all = _one_of_each_tile(rows - choosy)
            pairs += (len(rows) - len(choosy)) * float(scope.key_members.rank(seeing_all + 1).mean())
        if len(choosy):
            pairs += len(choosy) * float(self._visited_keys(scope, index, _one_of_each_tile(choosy), share).mean())
        return pairs

    def _visited_keys(self, scope: Scope, index: PairIndex, row: Ints, share: float | None) -> NDArray[np.float64]:
        """float64, like `row`: about how many keys the tiles of these rows visit, rows that do not see everything."""
        keys = scope.key_members
        reach = keys.rank(row + 1)
        query_rows = min(BLOCK_Q, index.query_rows or BLOCK_Q)
        window = np.maximum(reach - index.local - (query_rows + BLOCK_K) // 2, 0)  # the first key of the window
        sink = -(-index.sink // BLOCK_K) * BLOCK_K
        visited = reach - window + np.minimum(sink, window).astype(np.float64)
        if index.estimated is not None:
            between = np.maximum(window - sink, 0)
            visited += index.estimated.expected(reach) if share is None else share * between
            if not index.local:  # what is picked is taken to lie side by side, and what is picked beside a window alone
                visited += BLOCK_Q + BLOCK_K
        if index.columns is not None:
            rank = keys.rank(index.columns)
            visited += np.maximum(np.searchsorted(rank, window) - np.searchsorted(rank, sink), 0)
        if index.lines is not None and len(keys):
            bound = np.where(window > 0, keys.select(np.minimum(window, len(keys) - 1)), 0)
            visited += self._lines_of(index.lines.stride, scope.keys).visited(row, bound)
        return np.minimum(visited, reach)

    def _lines_of(self, stride: str, keys: Modality | None) -> LineKeys:
        if (stride, keys) not in self._lines:
            self._lines[stride, keys] = LineKeys(self.map.table, stride, keys)
        return self._lines[stride, keys]


def _one_of_each_tile(rows: Runs) -> Ints:
    """int64: the middle row of every BLOCK_Q of the rows, which are not empty."""
    return rows.select(np.arange(min(len(rows), BLOCK_Q) // 2, len(rows), BLOCK_Q))


class LineKeys:
    """How many keys lie along the lines of a map's rasters.

    Args:
        stride: of the lines, "frame" or "row". keys: the modality of the keys that count; None: all.
    """

    def __init__(self, table: SegmentTable, stride: str, keys: Modality | None) -> None:
        self._segment_start = table.start
        placed = table.has_cells(stride)
        cells = np.maximum(table.rows * table.cols, 1)
        _, shape = np.unique(table.rows << 32 | table.cols, return_inverse=True)
        room = room_for_frames(np.maximum(table.frames, 1), cells, BLOCK_Q)
        self._in_frame = np.ones_like(cells) if stride == "frame" else table.rows  # keys of a line in one frame
        length = np.maximum(room * self._in_frame, 1)
        # A query tile holds whole lines where lines and tiles fit, and else a part of one line more.
        fits = (BLOCK_Q % length == 0) | (length % BLOCK_Q == 0)
        lines = np.where(fits, np.maximum(BLOCK_Q / length, 1), (BLOCK_Q - 1) / length + 1)
        num_lines = cells if stride == "frame" else np.maximum(table.cols, 1)
        self._lines_of_tile = np.where(placed, np.minimum(lines, num_lines), 0)
        self._at_the_ends = np.where(fits, 0, BLOCK_K)  # keys of other lines in the first and the last key tile
        self._shape = shape
        counting = np.flatnonzero(placed & np.isin(table.code, codes_of(keys)))
        frames = table.frames[counting]
        frame_starts = table.frame_starts[expand(table.first_frame[counting], frames)]
        self._beyond = int(table.stop[-1]) + 1
        place = np.repeat(shape[counting], frames) * self._beyond + frame_starts
        by_place = np.argsort(place, kind="stable")
        self._place = place[by_place]
        packs = np.repeat(1 / room[counting], frames)[by_place]  # of which a frame fills so much
        self._packs = np.concatenate([[0.0], np.cumsum(packs)])

    def visited(self, row: Ints, bound: Ints) -> NDArray[np.float64]:
        """float64, like `row`: about how many keys below `bound` the query tiles of these rows visit along lines."""
        segment = np.searchsorted(self._segment_start, row, side="right") - 1
        first = np.searchsorted(self._place, self._shape[segment] * self._beyond)
        stop = np.searchsorted(self._place, self._shape[segment] * self._beyond + bound)
        lines = self._lines_of_tile[segment]
        keys = lines * self._in_frame[segment] * (stop - first)
        keys += self._at_the_ends[segment] * (self._packs[stop] - self._packs[first])
        return np.where(lines > 0, keys, 0.0)
