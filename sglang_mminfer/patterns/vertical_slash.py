"""vertical_slash: columns and diagonals picked from the attention of the last queries (MInference algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.kernels.triton import interpreted
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.base import Count, Pattern, Size
from sglang_mminfer.patterns.estimated import Estimated, Evidence, Findings, Picked, QueryTiles, crossed
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.ladder import Prompt
from sglang_mminfer.patterns.pair import Pair

FORCED_COLUMNS, FORCED_DIAGONALS = 30, 100
SMALL = ((64, 64), (256, 64), (64, 256), (256, 256), (1000, 100), (100, 800), (500, 700))
PAPER = ((1000, 1024), (1000, 2048), (1000, 6096), (3500, 100))  # MMInference table 4
KERNEL_ROWS = 64  # what the GPU's kernel takes at a time
MASS_BYTES = 64 << 20
"""The memory that the masses of some heads may take at a time: at a million keys, of eight heads."""


@dataclass(frozen=True)
class VerticalSlash(Estimated, kind="vertical_slash", colour="#e45756"):
    """The heaviest `vertical` columns and `slash` diagonals of the attention of the last `last_q` queries, estimated
    anew for every chunk. The first columns and the nearest diagonals are always kept, inside the budget: at most 30
    and 100, at most half of it.

    MInference (2407.02490) algorithm 1.
    """

    vertical: Count
    slash: Size
    last_q: Size = 64
    """How many of the last rows of its row class it looks at."""

    @property
    def forced_columns(self) -> int:
        """How many of the first columns are kept whatever they weigh."""
        return min(FORCED_COLUMNS, (self.vertical + 1) // 2)

    @property
    def forced_diagonals(self) -> int:
        """How many of the nearest diagonals are kept whatever they weigh."""
        return min(FORCED_DIAGONALS, (self.slash + 1) // 2)

    # ---- the exact rule ------------------------------------------------------------------------------------

    def visible(self, pair: Pair) -> torch.Tensor:
        columns, diagonals = self._heaviest_of(pair)
        on_diagonal = torch.zeros_like(pair.causal)
        within = (pair.distance >= 0) & pair.keys
        on_diagonal[within] = diagonals[pair.distance[within]]
        return on_diagonal | columns[None, :]

    def _heaviest_of(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """Heaviest columns (bool over key positions) and diagonals (bool over distances) of the last rows."""
        columns = torch.zeros(pair.kv_stop, dtype=torch.bool)
        diagonals = torch.zeros(pair.kv_stop + 1, dtype=torch.bool)
        last = pair.rows.nonzero().flatten()[-self.last_q :]
        if len(last) == 0 or not bool(pair.keys.any()):
            return columns, diagonals
        q, k = (x.float() for x in pair.queries_and_keys(self.kind))
        scale = pair.scale_of(q)
        scores = (q[last] @ k.T) * scale
        weights = torch.softmax(scores.masked_fill(~pair.causal[last], -torch.inf), dim=-1)
        weights = weights * pair.keys
        key_positions = pair.keys.nonzero().flatten()
        column_mass = weights.sum(dim=0)[key_positions]
        column_mass[: self.forced_columns] = torch.inf
        best = column_mass.topk(min(self.vertical, len(key_positions))).indices
        columns[key_positions[best]] = True
        within = (pair.distance[last] >= 0) & pair.keys
        diagonal_mass = torch.zeros(len(key_positions))
        diagonal_mass.index_add_(0, pair.distance[last][within], weights[within])
        diagonal_mass[: self.forced_diagonals] = torch.inf
        diagonals[diagonal_mass.topk(min(self.slash, len(key_positions))).indices] = True
        return columns, diagonals

    # ---- for planning --------------------------------------------------------------------------------------

    def index(self, scope: Scope) -> PairIndex:
        return PairIndex(estimated=self)

    def picks(self, tokens: int) -> int:
        return min(self.vertical, tokens) + min(self.slash, tokens)

    def expected(self, keys: Ints) -> NDArray[np.float64]:
        return (np.minimum(self.vertical, keys) + np.minimum(self.slash, keys)).astype(np.float64)

    def looks_at(self, rows: int, keys: int, head_dim: int) -> float:
        return 2.0 * self.last_q * keys  # two kernels compute each pair

    def estimate(self, evidence: Evidence) -> Findings:
        """The heaviest columns and the distances of the heaviest diagonals, int64 [heads, ...], ascending."""
        columns, distances = [], []
        for column_mass, diagonal_mass in self._masses(evidence):
            columns.append(_heaviest(column_mass, self.vertical, self.forced_columns))
            distances.append(_heaviest(diagonal_mass, self.slash, self.forced_diagonals))
        return torch.cat(columns), torch.cat(distances)

    def _masses(self, evidence: Evidence) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Mass of every column and diagonal, float32 [some heads, keys] twice, see `masses_of`: some heads at a time,
        and the keys of the class that some of its rows may see."""
        request, scope, device = evidence.request, evidence.scope, evidence.q.device
        q_pos = evidence.last_rows(self.last_q)
        first, stop = int(q_pos[0]), int(q_pos[-1]) + 1
        side_by_side = stop - first == len(q_pos)
        on_kernel = device.type == "cuda" or interpreted()
        if on_kernel and scope.keys is None and side_by_side and len(q_pos) <= KERNEL_ROWS:
            from sglang_mminfer.kernels.triton.estimate import estimate  # Triton: see prefill.py

            (heads,) = to_device(device, np.array(evidence.heads))
            q = evidence.q[first - request.q_start : stop - request.q_start]
            for some in heads.split(max(1, MASS_BYTES // (8 * stop))):
                yield estimate(q, evidence.k_cache, request.slots32[:stop], some, first + 1, evidence.sm_scale)
            return
        (positions,) = to_device(device, q_pos)
        positions = positions.long()
        q, frontier = evidence.q[positions - request.q_start], scope.key_members.rank(q_pos + 1).tolist()
        group = q.shape[1] // evidence.k_cache.shape[1]
        for kv_head in sorted({head // group for head in evidence.heads}):
            of_kv = slice(kv_head * group, (kv_head + 1) * group)
            own = [head - of_kv.start for head in evidence.heads if head // group == kv_head]
            k = evidence.k_cache[:, kv_head : kv_head + 1][request.slots]
            yield masses_of(q[:, of_kv], k, own, positions, frontier, evidence.sm_scale, evidence.keys)

    def select(self, evidence: Evidence, findings: Findings, tiles: QueryTiles) -> Picked:
        columns, distances = findings
        keys_of_first_row, keys_of_last_row, _ = tiles.on_device
        return crossed(columns, Diagonals(distances, keys_of_first_row, keys_of_last_row, tiles.block_k), tiles)

    # ---- for reports and searches --------------------------------------------------------------------------

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Pattern]]:
        for vertical, slash in (*SMALL, *PAPER):
            if vertical < prompt.tokens and slash < prompt.tokens // 2:
                yield f"vertical_slash {vertical} {slash}", cls(vertical, slash)

    @property
    def label(self) -> str:
        return f"vs {self.vertical},{self.slash}"


def masses_of(
    q: torch.Tensor,
    k: torch.Tensor,
    heads: list[int],
    q_pos: torch.Tensor,
    frontier: list[int],
    sm_scale: float,
    keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of every column and diagonal, from a few queries.

    Args:
        q: [rows, Hq, D], the last queries of the row class; k: [kv_len, Hkv, D]; heads: the query heads to
            estimate; q_pos: int64 [rows], absolute positions, ascending; frontier: keys of the class that each
            row may see; sm_scale: factor on q . k.
        keys: int64, positions of the key class; None: all. The softmax runs over all keys, the sums over these.

    Returns:
        float32 [heads, keys of the class] twice: mass by column, and by distance back from the causal frontier.
    """
    group = q.shape[1] // k.shape[1]
    future = torch.arange(k.shape[0], device=k.device)[None, :] > q_pos[:, None]
    by_kv: dict[int, list[int]] = {}
    for head in heads:
        by_kv.setdefault(head // group, []).append(head)
    parts = []
    for kv_head, own in by_kv.items():  # heads ascend, so the parts stand in their order
        scores = torch.einsum("rhd,kd->hrk", q[:, own[0] : own[-1] + 1].float(), k[:, kv_head].float())
        if len(own) != own[-1] + 1 - own[0]:
            scores = torch.stack([scores[head - own[0]] for head in own])
        weights = torch.softmax((scores * sm_scale).masked_fill_(future, -torch.inf), dim=-1)
        parts.append(weights if keys is None else weights[:, :, keys])
    weights = torch.cat(parts)
    diagonals = torch.zeros(len(heads), weights.shape[2], device=k.device)
    for i, visible in enumerate(frontier):
        diagonals[:, :visible] += weights[:, i, :visible].flip(-1)
    return weights.sum(dim=1), diagonals


def _heaviest(mass: torch.Tensor, count: int, forced: int) -> torch.Tensor:
    """Ascending indices of the `count` largest values of each row, the first `forced` always among them."""
    count = min(count, mass.shape[1])
    forced = min(forced, count)
    first = torch.arange(forced, device=mass.device).expand(len(mass), -1)
    rest = mass[:, forced:].topk(count - forced, dim=1, sorted=False).indices + forced
    return torch.cat([first, rest.sort(dim=1).values], dim=1)


class Diagonals:
    """Which key tiles the diagonals of each head cross in each query tile.

    In a tile the diagonal at distance d crosses the keys keys_of_first_row - 1 - d .. keys_of_last_row - 1 - d.

    Args:
        distances: int64 [H, S], ascending.
        keys_of_first_row, keys_of_last_row: int64 [T], keys up to that row of a tile.

    What is computed for each (head, tile, diagonal) is int32 and computed in place: there are tens of millions.
    """

    def __init__(
        self, distances: torch.Tensor, keys_of_first_row: torch.Tensor, keys_of_last_row: torch.Tensor, block_k: int
    ) -> None:
        self.distances, self.block_k = distances.int(), block_k
        self.keys_of_first_row, self.keys_of_last_row = keys_of_first_row, keys_of_last_row

    def ranges(self, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key tiles number 0 to below[t] - 1: start and count, int32 [H, T, S]; starts ascend, no two overlap.

        From the farthest diagonal to the nearest, both ends of what they cross ascend: each adds what lies
        before the next one's start, and what they add together is all they cross.
        """
        back = self.distances.flip(1)[:, None, :]
        start = (self.keys_of_first_row.int()[:, None] - 1) - back
        start.clamp_min_(0).floor_divide_(self.block_k)
        stop = (self.keys_of_last_row.int()[:, None] - 1 + self.block_k) - back
        stop.clamp_min_(0).floor_divide_(self.block_k)
        torch.minimum(stop, below.int()[:, None], out=stop)
        torch.minimum(stop[:, :, :-1], start[:, :, 1:], out=stop[:, :, :-1])
        return start, stop.sub_(start).clamp_min_(0)

    def cross(self, blocks: torch.Tensor) -> torch.Tensor:
        """bool [H, T, X]: whether any diagonal crosses key tile blocks[h, t, x] (blocks: [H or 1, T or 1, X])."""
        heads, tiles = len(self.distances), len(self.keys_of_first_row)
        blocks = blocks.int().expand(heads, tiles, -1)
        # The nearest of those that start at or before the tile's end reaches farthest.
        bound = self.keys_of_first_row.int()[:, None] - 1 - (blocks + 1) * self.block_k
        number = torch.searchsorted(self.distances, bound.flatten(1), right=True)
        distances = torch.nn.functional.pad(self.distances, (0, 1), value=1 << 30)
        nearest = distances.gather(1, number).view(bound.shape)
        return self.keys_of_last_row.int()[:, None] - 1 - nearest >= blocks * self.block_k
