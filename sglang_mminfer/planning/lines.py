"""The key order along the lines of rasters, phase-major: what a `grid` pattern with `s` sees of other frames.

Line c of a raster is cell c of every frame (stride "frame") or column c of every row of every frame ("row"). Frames
of one shape and modality are laid out in packs, each pack line by line, ascending inside a line. A large segment is
a pack of its own. The frames of small ones share packs: a tile of its own for each of a thousand small images would be
mostly padding, and would have to be visited for each of them.

What keeps this order the same for every chunk and turn: a segment is small or large by itself, small ones are packed
as they come, and a pack has room for a fixed number of frames. So a frame's place depends on nothing that comes
after its segment, and frames that are yet to come, of this turn or another, have theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Bools, Ints, expand
from sglang_mminfer.modality.segment_table import CODES, SegmentTable
from sglang_mminfer.planning.line_loops import LineRows, Packs, TileEnds, ends_of_tiles, rows_by_line

PACK_QUERY_TILES = 4
"""A pack of small segments has room for at most so many query tiles of rows. A larger one visits fewer other lines
where there are many frames, and wastes more padding where there are few."""


class LineOrder:
    """Packs of all rasters that share their shape with one that has rows in the chunk [q_start, kv_len)."""

    def __init__(self, table: SegmentTable, stride: str, q_start: int, kv_len: int, block_q: int, block_k: int) -> None:
        self.block_q, self.block_k = block_q, block_k
        self._q_start, self._kv_len = q_start, kv_len
        chosen = np.flatnonzero(table.has_cells(stride) & (table.start < kv_len))
        _, shape = np.unique(table.rows[chosen] << 32 | table.cols[chosen], return_inverse=True)
        with_rows = np.zeros(len(chosen), dtype=np.bool_)
        with_rows[shape[table.stop[chosen] > q_start]] = True
        chosen, shape = chosen[with_rows[shape]], shape[with_rows[shape]]

        cells, frames = table.rows[chosen] * table.cols[chosen], table.frames[chosen]
        small = frames * cells <= PACK_QUERY_TILES * block_q
        room = room_for_frames(frames, cells, block_q)
        group = (shape * len(CODES) + table.code[chosen]) * 2 + small
        by_group = np.argsort(group, kind="stable")
        chosen, shape, small, group = chosen[by_group], shape[by_group], small[by_group], group[by_group]
        frames, room = frames[by_group], room[by_group]
        # Frame by frame: a pack begins with a group, with a large segment, and where a pack of small ones is full.
        segment = np.repeat(np.arange(len(chosen)), frames)
        number = np.arange(len(segment))
        starts_segment, starts_group = _changes(segment), _changes(group[segment])
        in_group = number - np.maximum.accumulate(np.where(starts_group, number, 0))
        starts_pack = np.where(small[segment], in_group % room[segment] == 0, starts_segment)
        frame_starts = table.frame_starts[expand(table.first_frame[chosen], frames)]
        first_frame = np.flatnonzero(starts_pack)
        in_pack = np.diff(np.append(first_frame, len(segment)))
        by_place = np.lexsort((frame_starts[first_frame], group[segment[first_frame]] // 2))
        first_frame, in_pack = first_frame[by_place], in_pack[by_place]
        of_pack = segment[first_frame]

        in_frame = stride == "frame"
        cells, cols = (table.rows * table.cols)[chosen][of_pack], table.cols[chosen][of_pack]
        rows = np.ones_like(cols) if in_frame else table.rows[chosen][of_pack]
        num_lines = cells if in_frame else cols
        shape, length = shape[of_pack], room[of_pack] * rows
        size = length * num_lines
        self.packs = Packs(
            code=table.code[chosen][of_pack],
            length=length,
            filled=in_pack * rows,
            num_lines=num_lines,
            size=size,
            nearest_key=frame_starts[first_frame],
            first_frame=first_frame,
            num_frames=in_pack,
            cells=cells,
            rows=rows,
            cols=cols,
            alike=shape.searchsorted(shape),
            first_tile=np.concatenate([[0], np.cumsum(-(-size // block_k))]),
            frame_starts=frame_starts,
        )

    @property
    def num_tiles(self) -> int:
        return int(self.packs.first_tile[-1])

    @cached_property
    def rows(self) -> LineRows:
        """All rows of the chunk that have a cell."""
        return rows_by_line(self.packs, self._q_start, self._kv_len)

    @cached_property
    def tile_ends(self) -> TileEnds:
        """Where the keys of each key tile lie."""
        return ends_of_tiles(self.packs, self.block_k)

    def count_visits(self) -> int:
        """About how many (query tile, key tile) pairs the chunk's rows visit along their lines. Counted from packs,
        without looking at a tile."""
        packs, num_packs = self.packs, len(self.packs.code)
        pack = np.repeat(np.arange(num_packs), packs.num_frames)
        start = packs.frame_starts[expand(packs.first_frame, packs.num_frames)]
        in_chunk = np.minimum(start + packs.cells[pack], self._kv_len) - np.maximum(start, self._q_start)
        num_rows = np.bincount(pack, weights=np.maximum(in_chunk, 0), minlength=num_packs)
        # A line's rows of one chunk stand side by side, in as few query tiles as they fill and one more.
        query_tiles = np.minimum(-(-packs.size // self.block_q), num_rows)
        query_tiles = np.minimum(query_tiles, num_rows / self.block_q + packs.num_lines)
        # A query tile visits its share of the lines in each pack, and at both ends a part of a key tile more.
        aligned = (self.block_q % packs.length == 0) | (packs.length % self.block_q == 0)
        lines = self.block_q / packs.length
        lines = np.where(aligned, np.maximum(lines, 1), lines + 1)
        share = np.minimum(lines / packs.num_lines, 1)
        by_shape = [np.bincount(packs.alike, weights) for weights in (query_tiles * share, query_tiles)]
        key_tiles = np.bincount(packs.alike, packs.size / self.block_k)
        return int(by_shape[0] @ key_tiles + by_shape[1] @ np.bincount(packs.alike))

    @staticmethod
    def positions_of(orders: Sequence[LineOrder], device: torch.device) -> list[torch.Tensor]:
        return [order.positions(device) for order in orders]

    def positions(self, device: torch.device) -> torch.Tensor:
        """int32 [num_tiles * block_k] absolute positions, PAD_POSITION where a tile is not filled."""
        starts, first_frame, length, filled, size, rows, cols, first_tile = to_device(
            device,
            self.packs.frame_starts,
            self.packs.first_frame,
            self.packs.length,
            self.packs.filled,
            self.packs.size,
            self.packs.rows,
            self.packs.cols,
            self.packs.first_tile[:-1],
        )
        tile = torch.arange(self.num_tiles, dtype=torch.int32, device=device)
        pack = torch.searchsorted(first_tile, tile, right=True) - 1
        lane = torch.arange(self.block_k, dtype=torch.int32, device=device)
        index = (tile - first_tile[pack])[:, None] * self.block_k + lane
        inside = index < size[pack, None]
        index = index.where(inside, 0)
        pack = pack[:, None]
        # Line number index // length; in it, `rows` keys of each frame, `cols` apart, `filled` in all.
        line, at = index // length[pack], index % length[pack]
        there = inside & (at < filled[pack])
        at = at.where(there, 0)
        position = starts[first_frame[pack] + at // rows[pack]] + at % rows[pack] * cols[pack] + line
        return position.where(there, PAD_POSITION).to(torch.int32).flatten()


def room_for_frames(frames: Ints, cells: Ints, block_q: int) -> Ints:
    """int64 [segments]: how many frames of `cells` tokens a pack has room for that holds a segment of `frames`."""
    most = PACK_QUERY_TILES * block_q
    return np.where(frames * cells <= most, _power_of_two(most // cells), frames)


def _power_of_two(values: Ints) -> Ints:
    """The greatest power of two up to each value, 1 for those below. Lines of such a length end where tiles end."""
    return 1 << (np.frexp(np.maximum(values, 1))[1].astype(np.int64) - 1)


def _changes(values: Ints) -> Bools:
    """Which values differ from the one before; the first does."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]
