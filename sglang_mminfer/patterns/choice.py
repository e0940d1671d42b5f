"""Choosing keys row by row: which keys between the sink and the window any row of a query tile asks for.

For each query tile its rows are scored against these keys, in slabs that stay in the cache: a key is asked for if the
largest score minus bound of the tile's rows is above 0. A GPU has kernels for it, see `choice_on_card.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.kernels.threads import for_each
from sglang_mminfer.kernels.triton import interpreted
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.choice_loops import DIMENSIONS, any_row_above, log_masses, side_by_side
from sglang_mminfer.patterns.estimated import Evidence, Findings, QueryTiles

MARGIN = 1e-3
"""How far below its bound a score may lie and its key be kept all the same: more than what rounding takes."""

SLAB = 1 << 18
"""Scores of a slab where they are stored: 1 MiB of float32."""


AT_A_TIME = 1 << 28
"""(query tile, key, head) that are decided before any are packed: 256 MiB."""

ROOM = 1 << 27
"""Keys that all query tiles and heads of a request pick together, at most. The host knows of no better bound of what a
device will pick than the budgets of all tiles, which are gigabytes where a prompt is long. A GPU takes 12 bytes for
each: 1.5 GiB; a tile of 28 heads and 8,192 rows may pick 75,000 on average."""

PROJECTED = 1 << 13
"""Keys that are projected at a time, so that no second copy of them all is made."""

KERNEL_RANK = 42
"""The largest rank that the kernels of a GPU are built for: more columns would not fit beside each other."""


@dataclass(frozen=True)
class Between:
    """The keys between the sink and the window of T query tiles, in whole key tiles. int64 [T] on the host.

    first, num_tiles: key tiles of the class. All rows of a query tile see all of their keys.
    """

    first: Ints
    num_tiles: Ints
    block_k: int

    @classmethod
    def of(cls, sink: int, local: int, tiles: QueryTiles) -> Between:
        """What lies between sink and window of each query tile."""
        window = np.maximum(tiles.keys_of_first_row - local, 0) // tiles.block_k
        first = np.minimum(window, -(-sink // tiles.block_k))
        return cls(first, window - first, tiles.block_k)

    @property
    def num_keys(self) -> Ints:
        return self.num_tiles * self.block_k

    @property
    def before(self) -> Ints:
        """int64 [T + 1]: the keys of all query tiles one after the other, where those of each begin."""
        return np.concatenate([[0], self.num_keys.cumsum()])

    @staticmethod
    def upload(device: torch.device, *arrays: Ints) -> Sequence[torch.Tensor]:
        """int64 on the device."""
        return [x.long() for x in to_device(device, *arrays)]


@dataclass(frozen=True)
class HeadsOfKeys:
    """Query heads that share their keys and the low-rank form of them.

    index: where they stand among the heads of the evidence. form: the number of their form; None: there is none.
    """

    index: slice
    heads: tuple[int, ...]
    kv_head: int
    form: int | None

    @classmethod
    def of(cls, evidence: Evidence) -> list[HeadsOfKeys]:
        """The heads to estimate, by KV head and form."""
        num_heads, kv_heads = evidence.q.shape[1], evidence.k_cache.shape[1]
        by_form: dict[tuple[int, int | None], list[int]] = {}
        for head in evidence.heads:
            form = None if evidence.basis is None else evidence.basis.number(head, num_heads)
            by_form.setdefault((head * kv_heads // num_heads, form), []).append(head)
        found, at = [], 0
        for (kv_head, form), heads in by_form.items():  # heads ascend, so those of one form stand side by side
            found.append(cls(slice(at, at + len(heads)), tuple(heads), kv_head, form))
            at += len(heads)
        return found

    def keys(self, evidence: Evidence, part: slice) -> torch.Tensor:
        """float32 [n, D]: some keys of the class."""
        return evidence.k_cache[evidence.key_slots[part], self.kv_head].float()

    def project(self, evidence: Evidence, rank: int) -> torch.Tensor:
        """float32 [r, keys of the class]: B k, with dimensions of 0 behind the last."""
        parts = []
        for begin in range(0, len(evidence.key_slots), PROJECTED):
            low = self.keys(evidence, slice(begin, begin + PROJECTED))
            if evidence.basis is not None and self.form is not None:
                low = low @ evidence.basis.keys[self.form, :rank].T
            parts.append(_whole(low).T)
        return torch.cat(parts, dim=1)

    def project_queries(self, evidence: Evidence, rank: int, q: torch.Tensor) -> torch.Tensor:
        """[heads, m, r], A q. q: float32 [heads, m, D], scaled."""
        if evidence.basis is not None and self.form is not None:
            q = q @ evidence.basis.queries[self.form, :rank].T
        return _whole(q)


def _whole(low: torch.Tensor) -> torch.Tensor:
    """With dimensions of 0 behind the last, as many as the loop of a CPU takes at a time."""
    return torch.nn.functional.pad(low, (0, -low.shape[-1] % DIMENSIONS))


class Rule(NamedTuple):
    """What rows ask for, see `Adaptive`."""

    sink: int
    local: int
    rank: int
    ln_alpha: float
    budget: float


Choose = Callable[[Evidence, Findings, QueryTiles, Between, Rule], tuple[Any, torch.Tensor]]
Pack = Callable[[Evidence, Any, torch.Tensor, Between, Ints, int], tuple[torch.Tensor, torch.Tensor]]


def project(evidence: Evidence, rank: int) -> Findings:
    """The low-rank form of the keys of the class, for each of `HeadsOfKeys.of`, as `pick` takes it."""
    if _has_kernels(evidence, rank):
        from sglang_mminfer.patterns import choice_on_card  # Triton, which a CPU may lack

        return choice_on_card.project(evidence, rank)
    return tuple(heads.project(evidence, rank) for heads in HeadsOfKeys.of(evidence))


def _has_kernels(evidence: Evidence, rank: int) -> bool:
    return evidence.basis is not None and rank <= KERNEL_RANK and (evidence.q.device.type == "cuda" or interpreted())


def _way(evidence: Evidence, rank: int) -> tuple[Choose, Pack]:
    """How keys are chosen here, and how the chosen ones are packed: see `_choose` and `packed`."""
    if _has_kernels(evidence, rank):
        from sglang_mminfer.patterns import choice_on_card

        return choice_on_card.choose, choice_on_card.packed
    return _choose, packed


def pick(
    evidence: Evidence, findings: Findings, tiles: QueryTiles, between: Between, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The keys that each query tile picks.

    Returns:
        `Picked.lanes`; int64 [H, T] twice, the first key tile of each query tile and how many keys it picks; and bool
        [H, T], whether it asks for too much, or those before it left it no room, so that it picks none.
    """
    choose, pack = _way(evidence, rule.rank)
    all_keys, block_k = max(1, int(between.num_keys.sum())), tiles.block_k
    lanes, firsts, counts, overflows, key_tiles = [], [], [], [], 0
    for part in tiles.parts(between.num_keys * len(evidence.heads), AT_A_TIME):
        own = Between.of(rule.sink, rule.local, part)
        chosen, count = choose(evidence, findings, part, own, rule)
        within = np.floor(rule.budget * own.num_keys).astype(np.int64)
        overflow = count > own.upload(evidence.q.device, within)[0]
        most_tiles = ROOM * int(own.num_keys.sum()) // all_keys // block_k
        if most_tiles < len(evidence.heads) * int((-(-within // block_k)).sum()):
            needed = (-(-count.masked_fill(overflow, 0) // block_k)).flatten().cumsum(0)
            overflow |= (needed > most_tiles).view(count.shape)
        count = count.masked_fill(overflow, 0)
        picked, first = pack(evidence, chosen, count, own, within, most_tiles)
        lanes.append(picked)
        firsts.append(first + key_tiles)
        counts.append(count)
        overflows.append(overflow)
        key_tiles += len(picked) // tiles.block_k
    # What is alone is not copied.
    all_lanes = lanes[0] if len(lanes) == 1 else torch.cat(lanes)
    return all_lanes, torch.cat(firsts, dim=1), torch.cat(counts, dim=1), torch.cat(overflows, dim=1)


def _choose(
    evidence: Evidence, findings: Findings, tiles: QueryTiles, between: Between, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys any row of each query tile asks for.

    Returns:
        bool [H, N], the keys of all query tiles one after the other (`Between.before`); and int64 [H, T], how many.
    """
    device, before = evidence.q.device, between.before
    first_row = np.concatenate([[0], tiles.rows_per_tile.cumsum()])
    chosen = torch.zeros(len(evidence.heads), int(before[-1]), dtype=torch.bool, device=device)
    count = torch.zeros(len(evidence.heads), len(between.first), dtype=torch.int64, device=device)
    keys_of_row = keys_of_rows(evidence, tiles)
    (heads,) = to_device(device, np.array(evidence.heads))
    scan, log_mass = (scan_on_host, log_mass_on_host) if evidence.on_host else (scan_on_device, log_mass_on_device)
    by_form = [(own, low, own.keys(evidence, slice(rule.sink))) for own, low in zip(HeadsOfKeys.of(evidence), findings)]

    def choose_for(item: tuple[tuple[HeadsOfKeys, torch.Tensor, torch.Tensor], int]) -> None:
        (own, low, sink_keys), t = item
        rows = slice(int(first_row[t]), int(first_row[t + 1]))
        q = evidence.q[tiles.rows[rows, None], heads[own.index]].transpose(0, 1).float() * evidence.sm_scale
        window = slice(max(int(tiles.keys_of_first_row[t]) - rule.local, 0), int(tiles.keys_of_last_row[t]))
        keys_before = keys_of_row[rows] - window.start
        bound = log_mass(q, sink_keys, own.keys(evidence, window), rule.local, keys_before)
        bound += rule.ln_alpha - MARGIN
        queries = own.project_queries(evidence, rule.rank, q)
        key, stop = (int(between.first[t] + n) * tiles.block_k for n in (0, between.num_tiles[t]))
        asked = scan(low, queries, bound, key, stop)
        chosen[own.index, int(before[t]) : int(before[t + 1])] = asked
        count[own.index, t] = asked.sum(dim=1)

    items = [(own, t) for own in by_form for t in np.flatnonzero(between.num_tiles).tolist()]
    if evidence.on_host:
        for_each(choose_for, items)
    else:
        for item in items:
            choose_for(item)
    return chosen, count


def keys_of_rows(evidence: Evidence, tiles: QueryTiles) -> torch.Tensor:
    """int32 [R]: keys of the class up to each row of the tiles."""
    position = tiles.rows + evidence.request.q_start
    if evidence.keys is None:
        return (position + 1).int()
    return torch.searchsorted(evidence.keys, position, right=True, out_int32=True)


def scan_on_device(low: torch.Tensor, queries: torch.Tensor, bound: torch.Tensor, key: int, stop: int) -> torch.Tensor:
    """bool [heads, stop - key]: what `choice_loops.any_row_above` gives."""
    heads, rows = bound.shape
    size, asked = max(SLAB // (heads * rows), 1), []
    for begin in range(key, stop, size):
        scores = torch.addmm(-bound.reshape(-1, 1), queries.flatten(0, 1), low[:, begin : min(begin + size, stop)])
        asked.append(scores.view(heads, rows, -1).amax(dim=1) > 0)
    return torch.cat(asked, dim=1)


def scan_on_host(low: torch.Tensor, queries: torch.Tensor, bound: torch.Tensor, key: int, stop: int) -> torch.Tensor:
    """bool [heads, stop - key]: what `choice_loops.any_row_above` gives."""
    asked = torch.empty(len(bound), stop - key, dtype=torch.bool)
    # Arrays of one layout, so that one build serves all.
    low, queries, bound = low.contiguous(), queries.contiguous(), bound.contiguous()
    any_row_above(low.numpy(), queries.numpy(), bound.numpy(), key, stop, asked.numpy())
    return asked


def log_mass_on_host(
    q: torch.Tensor, sink_keys: torch.Tensor, keys: torch.Tensor, local: int, keys_of_row: torch.Tensor
) -> torch.Tensor:
    """What `log_mass_on_device` gives."""
    scores, out = torch.cat([sink_keys, keys]) @ q.transpose(1, 2), torch.empty(q.shape[:2])
    log_masses(scores.numpy(), len(sink_keys), keys_of_row.numpy(), local, out.numpy())
    return out


def log_mass_on_device(
    q: torch.Tensor, sink_keys: torch.Tensor, keys: torch.Tensor, local: int, keys_of_row: torch.Tensor
) -> torch.Tensor:
    """float32 [heads, m]: the log of what rows give to the sink and to the last `local` keys together.

    Args:
        q: [heads, m, D], scaled. sink_keys: [sink, D], which lie before the windows of all rows. keys: [n, D], which
            hold these windows.
        keys_of_row: int32 [m], how many of `keys` come up to each row.
    """
    number = torch.arange(len(keys), dtype=torch.int32, device=q.device)
    outside = (number < keys_of_row[:, None] - local) | (number >= keys_of_row[:, None])
    in_window = (q @ keys.T).masked_fill_(outside, -torch.inf)
    return torch.cat([q @ sink_keys.T, in_window], dim=2).logsumexp(dim=2)


def packed(
    evidence: Evidence,
    chosen: torch.Tensor,
    count: torch.Tensor,
    between: Between,
    most: Ints,
    most_tiles: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key tiles of the chosen keys, those of each (head, query tile) by themselves.

    Args:
        chosen: bool [H, N], the keys of all query tiles one after the other (`Between.before`). count: int64 [H, T],
            how many of them are taken: all of a query tile's or 0.
        most: int64 [T], a bound on `count`. most_tiles: one on the key tiles of all of them; None: there is no other.

    Returns:
        `Picked.lanes`; and int64 [H, T], the first key tile of each.
    """
    first, room = first_key_tiles(evidence, count, between, most, most_tiles)
    lanes = torch.full((room * between.block_k + 1,), -1, dtype=torch.int64, device=chosen.device)
    if evidence.on_host:
        pack_on_host(chosen, count, first, between, lanes)
    else:
        pack_on_device(chosen, count, first, between, lanes, int(most.sum()))
    return lanes[:-1], first


def pack_on_host(
    chosen: torch.Tensor, count: torch.Tensor, first: torch.Tensor, between: Between, lanes: torch.Tensor
) -> None:
    """What `pack_on_device` does."""
    before, keys = between.before, between.first * between.block_k
    takes, lane, out = (count > 0).numpy(), (first * between.block_k).numpy(), lanes.numpy()

    def pack(head: int) -> None:
        side_by_side(chosen[head].numpy(), before, keys, takes[head], lane[head], out)

    for_each(pack, range(len(chosen)))


def pack_on_device(
    chosen: torch.Tensor, count: torch.Tensor, first: torch.Tensor, between: Between, lanes: torch.Tensor, most: int
) -> None:
    """Write the indices of chosen keys into `lanes`, see `packed`.

    Args:
        first: int64 [H, T], the key tile of `lanes` where the keys of each begin.
        lanes: int64; the last one takes what is left of the room for `most` keys of a head.
    """
    device, num_tiles, block_k = chosen.device, count.shape[1], between.block_k
    # From a key's place among those of all query tiles to its index in the class.
    sizes, shift = between.upload(device, between.num_keys, between.first * block_k - between.before[:-1])
    for head in range(len(chosen)):
        taken = chosen[head] & torch.repeat_interleave(count[head] > 0, sizes, output_size=chosen.shape[1])
        place = torch.nonzero_static(taken, size=most, fill_value=0).squeeze(1)
        # One more query tile takes what is left of the room.
        counts = torch.cat([count[head], most - count[head].sum(0, keepdim=True)])
        tile = torch.repeat_interleave(counts, output_size=most)
        rank = torch.arange(most, device=device) - (counts.cumsum(0) - counts)[tile]
        is_left = tile == num_tiles
        tile = tile.clamp_max(num_tiles - 1)
        lane = (first[head][tile] * block_k + rank).masked_fill(is_left, len(lanes) - 1)
        lanes[lane] = (place + shift[tile]).masked_fill(is_left, -1)


def first_key_tiles(
    evidence: Evidence, count: torch.Tensor, between: Between, most: Ints, most_tiles: int | None
) -> tuple[torch.Tensor, int]:
    """int64 [H, T], the first key tile of each (head, query tile), see `packed`; and for how many there is room."""
    key_tiles = -(-count // between.block_k)
    first = (key_tiles.flatten().cumsum(0) - key_tiles.flatten()).view(count.shape)
    if evidence.on_host:
        return first, int(key_tiles.sum())
    room = len(count) * int((-(-most // between.block_k)).sum())
    # What picks nothing may begin behind the last.
    return first, room if most_tiles is None else min(room, most_tiles)
