"""vertical_slash: columns and diagonals picked from the attention of the last queries (MInference algorithm 1).

The only pattern that depends on Q and K, so it is estimated anew for every layer and chunk: all heads with the
pattern together, wholly on the device, without waiting for it. Tensors that hold what was picked have the same
size whatever the estimate says; how much of them counts is known on the device only.
"""

from __future__ import annotations

import torch

from sglang_mminfer.kernels.block_plan import pack_lanes
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.spec import VerticalSlash


def pair_index(pattern: VerticalSlash, scope: Scope) -> PairIndex:
    return PairIndex(estimated=pattern)


def estimate(
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


def select(
    pattern: VerticalSlash, column_mass: torch.Tensor, diagonal_mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns and the diagonals of each head: int64 [heads, most], indices in the class, ascending."""
    return (
        _heaviest(column_mass, pattern.vertical, pattern.forced_columns),
        _heaviest(diagonal_mass, pattern.slash, pattern.forced_diagonals),
    )


def _heaviest(mass: torch.Tensor, count: int, forced: int) -> torch.Tensor:
    """Ascending indices of the `count` largest values of each row, the first `forced` always among them."""
    mass = mass.clone()
    mass[:, :forced] = torch.inf
    return mass.topk(min(count, mass.shape[1]), dim=1).indices.sort(dim=1).values


class Diagonals:
    """Which key tiles the diagonals of each head cross in each query tile.

    The diagonal at distance d crosses a tile's keys near - 1 - d .. far - 1 - d.

    Args:
        distances: int64 [H, S], ascending; near, far: int64 [T], keys up to the first and the last row of a tile.
    """

    def __init__(self, distances: torch.Tensor, near: torch.Tensor, far: torch.Tensor, block_k: int) -> None:
        self.distances, self.near, self.far, self.block_k = distances, near, far, block_k

    def ranges(self, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key tiles number 0 to below[t] - 1: start and count, int64 [H, T, S]; starts ascend, no two overlap.

        From the farthest diagonal to the nearest, both ends of what they cross ascend: each adds what lies
        before the next one's start, and what they add together is all they cross.
        """
        back = self.distances.flip(1)[:, None, :]
        start = (self.near[:, None] - 1 - back).clamp_min(0) // self.block_k
        stop = (self.far[:, None] - 1 - back + self.block_k).clamp_min(0) // self.block_k
        stop = stop.minimum(below[:, None])
        stop[:, :, :-1] = stop[:, :, :-1].minimum(start[:, :, 1:])
        return start, (stop - start).clamp_min(0)

    def cross(self, blocks: torch.Tensor) -> torch.Tensor:
        """bool [H, T, X]: whether any diagonal crosses key tile blocks[h, t, x] (blocks: [H or 1, T or 1, X])."""
        heads, tiles = len(self.distances), len(self.near)
        blocks = blocks.expand(heads, tiles, -1)
        # Of those that start at or before the tile's end, the nearest reaches farthest.
        bound = self.near[:, None] - 1 - (blocks + 1) * self.block_k
        number = torch.searchsorted(self.distances, bound.flatten(1), right=True)
        distances = torch.nn.functional.pad(self.distances, (0, 1), value=1 << 40)
        nearest = distances.gather(1, number).view(bound.shape)
        return self.far[:, None] - 1 - nearest >= blocks * self.block_k


def column_lanes(ranks: torch.Tensor, diagonals: Diagonals, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Visits of gathered columns: whether each of a head's column tiles is visited, and which lanes do not count.

    Args:
        ranks: int64 [H, V], the columns' indices in the class, ascending.

    Returns:
        int64 [H, T, C] (1: visited) and int32 [H, T, C, words], packed: a column whose own tile is crossed by a
        diagonal is visited there.
    """
    heads, tiles, lanes = len(ranks), len(diagonals.far), -(-ranks.shape[1] // block_k) * block_k
    hidden = diagonals.cross(ranks[:, None] // block_k) | (ranks[:, None] >= diagonals.far[:, None])
    hidden = torch.nn.functional.pad(hidden, (0, lanes - ranks.shape[1]), value=True)
    hidden = hidden.view(heads, tiles, -1, block_k)
    return (~hidden).any(dim=3).long(), pack_lanes(hidden)
