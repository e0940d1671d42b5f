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

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.block_plan import PAD_POSITION
from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.modality.runs import Bools, Ints, expand
from sglang_mminfer.modality.segment_table import CODES, SegmentTable

PACK_QUERY_TILES = 4
"""A pack of small segments has room for at most so many query tiles of rows. A larger one visits fewer other lines
where there are many frames, and wastes more padding where there are few."""


class LineOrder:
    """Packs of all rasters that share their shape with one that has rows in the chunk [q_start, kv_len).

    Arrays with a value for each pack, which stand by shape, then modality, then position:
    shape: a number for each rows x cols. code: the modality, as in `SegmentTable`. length: keys of one line, room for
    frames yet to come included. filled: how many of them the map has. num_lines. size: length * num_lines; an index
    counts from the start of its pack. nearest_key: position of the first.
    first_tile: [packs + 1], packs begin at whole tiles.
    """

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
        self._frame_starts = table.frame_starts[expand(table.first_frame[chosen], frames)]
        first_frame = np.flatnonzero(starts_pack)
        in_pack = np.diff(np.append(first_frame, len(segment)))
        by_place = np.lexsort((self._frame_starts[first_frame], group[segment[first_frame]] // 2))
        first_frame, in_pack = first_frame[by_place], in_pack[by_place]
        of_pack = segment[first_frame]

        self._first_frame, self._num_frames = first_frame, in_pack
        self._in_frame = stride == "frame"
        self._cols = table.cols[chosen][of_pack]
        self._rows_in_line = np.ones_like(self._cols) if self._in_frame else table.rows[chosen][of_pack]  # of one frame
        self._cells = (table.rows * table.cols)[chosen][of_pack]
        self.shape, self.code = shape[of_pack], table.code[chosen][of_pack]
        self.num_lines = self._cells if self._in_frame else self._cols
        self.length, self.filled = room[of_pack] * self._rows_in_line, in_pack * self._rows_in_line
        self.size = self.length * self.num_lines
        self.nearest_key = self._frame_starts[first_frame]
        self.first_tile = np.concatenate([[0], np.cumsum(-(-self.size // block_k))])

    @property
    def num_packs(self) -> int:
        return len(self.shape)

    @property
    def num_tiles(self) -> int:
        return int(self.first_tile[-1])

    # ---- rows of the chunk ---------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> tuple[Ints, Ints, Ints]:
        """int64 [rows] each: the pack, the index in it and the position of all rows of the chunk that have a cell, by
        pack and index."""
        pack = np.repeat(np.arange(self.num_packs), self._num_frames)
        frame = expand(self._first_frame, self._num_frames)
        start = self._frame_starts[frame]
        low, high = np.maximum(start, self._q_start), np.minimum(start + self._cells[pack], self._kv_len)
        live = low < high
        pack, frame, start, low, high = (x[live] for x in (pack, frame, start, low, high))
        position, count = expand(low, high - low), high - low
        cell = position - np.repeat(start, count)
        in_line = np.repeat((frame - self._first_frame[pack]) * self._rows_in_line[pack], count)
        pack = np.repeat(pack, count)
        if self._in_frame:
            line = cell
        else:
            line, in_line = cell % self._cols[pack], in_line + cell // self._cols[pack]
        index = line * self.length[pack] + in_line
        order = np.argsort(self._before[pack] + index)
        return pack[order], index[order], position[order]

    @cached_property
    def _before(self) -> Ints:
        """int64 [packs]: the sizes of the packs before each."""
        return np.cumsum(self.size) - self.size

    def packs_before(self, pack: Ints, code: int, below: Ints) -> tuple[Ints, Ints]:
        """Packs of the shape of pack[i], of modality `code`, that begin below position below[i]: the first and how
        many, for they stand together."""
        group = self.shape[pack] * len(CODES) + code
        beyond = int(max(self.nearest_key.max(initial=0), below.max(initial=0))) + 1
        place = (self.shape * len(CODES) + self.code) * beyond + self.nearest_key
        first = np.searchsorted(place, group * beyond)
        return first, np.searchsorted(place, group * beyond + below) - first

    def tiles_of_lines(self, pack: Ints, first_line: Ints, last_line: Ints) -> tuple[Ints, Ints]:
        """The key tiles of pack[i] that hold lines first_line[i] to last_line[i]: the first and how many."""
        length, tile = self.length[pack], self.first_tile[pack]
        start = tile + first_line * length // self.block_k
        return start, tile - (-(last_line + 1) * length // self.block_k) - start

    def count_visits(self) -> int:
        """About how many (query tile, key tile) pairs the chunk's rows visit along their lines. Counted from packs,
        without looking at a tile."""
        pack = np.repeat(np.arange(self.num_packs), self._num_frames)
        start = self._frame_starts[expand(self._first_frame, self._num_frames)]
        in_chunk = np.minimum(start + self._cells[pack], self._kv_len) - np.maximum(start, self._q_start)
        num_rows = np.bincount(pack, weights=np.maximum(in_chunk, 0), minlength=self.num_packs)
        # A line's rows of one chunk stand side by side, in as few query tiles as they fill and one more.
        query_tiles = np.minimum(-(-self.size // self.block_q), num_rows)
        query_tiles = np.minimum(query_tiles, num_rows / self.block_q + self.num_lines)
        # A query tile visits its share of the lines in each pack, and at both ends a part of a key tile more.
        aligned = (self.block_q % self.length == 0) | (self.length % self.block_q == 0)
        lines = np.where(aligned, np.maximum(self.block_q / self.length, 1), self.block_q / self.length + 1)
        share = np.minimum(lines / self.num_lines, 1)
        by_shape = [np.bincount(self.shape, weights) for weights in (query_tiles * share, query_tiles)]
        key_tiles = np.bincount(self.shape, self.size / self.block_k)
        return int(by_shape[0] @ key_tiles + by_shape[1] @ np.bincount(self.shape))

    # ---- tiles of keys -------------------------------------------------------------------------------------

    @cached_property
    def _tile_ends(self) -> tuple[Ints, Ints, Ints]:
        """For each tile its pack, the index of its first key and of its last."""
        pack = np.repeat(np.arange(self.num_packs), np.diff(self.first_tile))
        first = (np.arange(self.num_tiles) - self.first_tile[pack]) * self.block_k
        return pack, first, np.minimum(first + self.block_k, self.size[pack]) - 1

    def _position(self, pack: Ints, index: Ints) -> tuple[Ints, Bools]:
        """Absolute positions of the keys number `index` of a pack, and which of them there are."""
        length, first, rows = self.length[pack], self._first_frame[pack], self._rows_in_line[pack]
        return _position(self._frame_starts, first, length, self.filled[pack], rows, self._cols[pack], index)

    @cached_property
    def nearest(self) -> Ints:
        """int64 [num_tiles]: the least position in each tile; PAD_POSITION where it has no key yet.

        Lines ascend, and so do their first keys, which a pack always has.
        """
        pack, first, last = self._tile_ends
        length = self.length[pack]
        position, there = self._position(pack, first)
        start = np.where(there, position, PAD_POSITION)
        next_line = (first // length + 1) * length
        return np.where(
            next_line <= last, np.minimum(start, self._position(pack, np.minimum(next_line, last))[0]), start
        )

    @cached_property
    def farthest(self) -> Ints:
        """int64 [num_tiles]: the greatest position in each tile; PAD_POSITION where it is not filled."""
        pack, first, last = self._tile_ends
        length = self.length[pack]
        line_before = last // length * length - 1
        stop, there = self._position(pack, last)
        crosses = line_before >= first
        before, there_before = self._position(pack, np.maximum(line_before, first))
        filled = there & (last - first == self.block_k - 1) & (there_before | ~crosses)
        return np.where(filled, np.where(crosses, np.maximum(stop, before), stop), PAD_POSITION)

    def touches(self, line: int) -> NDArray[np.bool_]:
        """bool [num_tiles]: tiles that hold a key of the line."""
        pack, first, last = self._tile_ends
        return (first // self.length[pack] <= line) & (line <= last // self.length[pack])

    def lanes(self, tiles: Ints) -> tuple[Ints, Ints]:
        """Positions and lines of the keys of some tiles, int64 [tiles, block_k]; PAD_POSITION and -1 for padding."""
        pack, first, last = (ends[tiles, None] for ends in self._tile_ends)
        index = first + np.arange(self.block_k)
        inside, index = index <= last, np.minimum(index, last)
        position, there = self._position(pack, index)
        there &= inside
        return np.where(there, position, PAD_POSITION), np.where(there, index // self.length[pack], -1)

    def positions(self, device: torch.device) -> torch.Tensor:
        """int32 [num_tiles * block_k] absolute positions, PAD_POSITION where a tile is not filled."""
        starts, first_frame, length, filled, size, rows, cols, first_tile = to_device(
            device,
            self._frame_starts,
            self._first_frame,
            self.length,
            self.filled,
            self.size,
            self._rows_in_line,
            self._cols,
            self.first_tile[:-1],
        )
        tile = torch.arange(self.num_tiles, dtype=torch.int32, device=device)
        pack = torch.searchsorted(first_tile, tile, right=True) - 1
        lane = torch.arange(self.block_k, dtype=torch.int32, device=device)
        index = (tile - first_tile[pack])[:, None] * self.block_k + lane
        inside = index < size[pack, None]
        index = index.where(inside, 0)
        pack = pack[:, None]
        position, there = _position(
            starts, first_frame[pack], length[pack], filled[pack], rows[pack], cols[pack], index
        )
        return position.where(inside & there, PAD_POSITION).to(torch.int32).flatten()


def _position(
    frame_starts: Any, first_frame: Any, length: Any, filled: Any, rows: Any, cols: Any, index: Any
) -> tuple[Any, Any]:
    """Line number index // length; in it, `rows` keys of each frame, `cols` apart, `filled` in all. For numpy and for
    torch. Where there is no key the position is some other one's."""
    line, at = index // length, index % length
    there = at < filled
    at = at * there
    return frame_starts[first_frame + at // rows] + at % rows * cols + line, there


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
