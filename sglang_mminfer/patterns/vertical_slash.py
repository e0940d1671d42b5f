"""vertical_slash: columns and diagonals picked from the attention of the last queries (MInference algorithm 1).

The only pattern whose index depends on Q and K, so it is made anew for every layer and chunk.
"""

from __future__ import annotations

import torch

from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.spec import VerticalSlash


def estimate(
    q: torch.Tensor,
    k: torch.Tensor,
    kv_heads: list[int],
    q_pos: torch.Tensor,
    sm_scale: float,
    key_members: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of every column and diagonal, from a few queries.

    Args:
        q: [rows, H, D], the last queries of the row class; k: [kv_len, Hkv, D]; kv_heads: [H], the KV head of
            each query head; q_pos: int64 [rows], absolute positions, ascending; sm_scale: factor on q . k.
        key_members: bool [kv_len], the key class. The softmax runs over all keys, the sums over these.

    Returns:
        float32 [H, keys of the class] twice: mass by column, and by distance back from the causal frontier.
    """
    rows, heads, _ = q.shape
    future = torch.arange(k.shape[0], device=k.device)[None, :] > q_pos[:, None]
    weights = torch.empty(heads, rows, int(key_members.sum()), device=k.device)
    for head, kv_head in enumerate(kv_heads):
        scores = (q[:, head].float() @ k[:, kv_head].float().T) * sm_scale
        weights[head] = torch.softmax(scores.masked_fill_(future, -torch.inf), dim=-1)[:, key_members]
    diagonals = torch.zeros(heads, weights.shape[2], device=k.device)
    frontier = key_members.cumsum(0)[q_pos]
    for i, visible in enumerate(frontier.tolist()):
        diagonals[:, :visible] += weights[:, i, :visible].flip(-1)
    return weights.sum(dim=1), diagonals


def pair_index(
    pattern: VerticalSlash, scope: Scope, column_mass: torch.Tensor, diagonal_mass: torch.Tensor
) -> PairIndex:
    """The index of one head from its masses, each [keys of the class]."""
    keys = scope.key_members.nonzero().flatten()
    columns = _heaviest(column_mass, pattern.vertical, pattern.forced_columns)
    return PairIndex(columns=keys[columns], diagonals=_heaviest(diagonal_mass, pattern.slash, pattern.forced_diagonals))


def _heaviest(mass: torch.Tensor, count: int, forced: int) -> torch.Tensor:
    """Ascending indices of the `count` largest values, the first `forced` always among them."""
    mass = mass.clone()
    mass[:forced] = torch.inf
    return mass.topk(min(count, len(mass))).indices.sort().values.cpu()
