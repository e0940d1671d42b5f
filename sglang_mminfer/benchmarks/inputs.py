"""q, k and v that resemble a model's closely enough that an estimate of columns and diagonals means something."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_mminfer.patterns.basis import Basis, basis_of, second_moments

PEAK = 8.0  # mean score of a query on its own key
NOISE = 0.5  # standard deviation of the noise in every value of q and k
PERIODS = (2048, 1 << 21)  # tokens in a full turn of the fastest and of the slowest pair of dimensions
RANK, SAMPLED = 32, 4096  # of a basis, and from how many tokens it is made
EVERY, HEAVY = 1024, 1.2  # one key in EVERY is longer by the factor HEAVY: a column


@dataclass
class Inputs:
    """The tensors of one layer for the last rows of a prompt.

    q:                [rows, Hq, D].
    keys, values:     [tokens, Hkv, D], in the order of the prompt.
    k_cache, v_cache: [tokens, Hkv, D], the same with token i in row slots[i].
    slots:            int64 [tokens].
    out, lse:         [rows, Hq, D] and float32 [rows, Hq], for the result.
    """

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    @cached_property
    def basis(self) -> Basis:
        """Low-rank forms of q . k, from some of the tokens."""
        queries, keys = (second_moments(x[:: max(1, len(x) // SAMPLED)]).cpu() for x in (self.q, self.keys))
        basis = basis_of(queries, keys, RANK)
        return Basis(basis.queries.to(self.q.device), basis.keys.to(self.q.device))


def make_inputs(
    rows: int, tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str, slots: str
) -> Inputs:
    """Random inputs; the same arguments give the same values.

    q and k are noise around one direction, rotated slowly by position. So attention falls off with distance, the
    heaviest diagonals lie side by side, as in a model, and one key in `EVERY` is heavy for all rows.

    Args:
        heads: how many query heads and how many KV heads. slots: "shuffled" or "ordered", see `cases.Case`.
    """
    random = torch.Generator(device).manual_seed(0)
    q = torch.empty(rows, heads[0], head_dim, device=device, dtype=dtype)
    keys, values = (torch.empty(tokens, heads[1], head_dim, device=device, dtype=dtype) for _ in range(2))
    turns = _turns(tokens, head_dim, device)
    for head in range(heads[0]):
        q[:, head] = _rotated(_noise(rows, head_dim, random), turns[tokens - rows :])
    heavy = torch.arange(tokens, device=device) % EVERY == EVERY // 2
    for head in range(heads[1]):
        noise = _noise(tokens, head_dim, random)
        keys[:, head] = _rotated(torch.where(heavy[:, None], noise * HEAVY, noise), turns)
        values[:, head] = torch.randn(tokens, head_dim, generator=random, device=device)
    if slots == "ordered":
        slot_of_token, k_cache, v_cache = torch.arange(tokens, device=device), keys, values
    else:
        slot_of_token = torch.randperm(tokens, generator=random, device=device)
        k_cache, v_cache = torch.empty_like(keys), torch.empty_like(values)
        k_cache[slot_of_token], v_cache[slot_of_token] = keys, values
    lse = torch.empty(rows, heads[0], device=device)
    return Inputs(q, keys, values, k_cache, v_cache, slot_of_token, torch.empty_like(q), lse)


def _noise(rows: int, head_dim: int, random: torch.Generator) -> torch.Tensor:
    """float32 [rows, D]: noise around a direction such that two rows have a mean scaled score of PEAK."""
    direction = (PEAK / head_dim**0.5) ** 0.5
    return torch.randn(rows, head_dim, generator=random, device=random.device) * NOISE + direction


def _turns(tokens: int, head_dim: int, device: str) -> torch.Tensor:
    """float32 [tokens, D / 2]: how far each pair of dimensions is turned at each position, in radians."""
    fastest, slowest = (math.log2(2 * math.pi / period) for period in PERIODS)
    speed = torch.logspace(fastest, slowest, head_dim // 2, base=2, device=device)
    return torch.arange(tokens, device=device)[:, None] * speed


def _rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=1)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
