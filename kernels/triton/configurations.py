"""How the kernel is compiled: tile shapes, warps and pipeline stages for each head dim and dtype. Not tuned yet.

The starting point is compile evidence only (no spills, occupancy) until a GPU has timed the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (64, 96, 128, 256)


@dataclass(frozen=True)
class Configuration:
    """block_q query rows and block_k keys a tile; `num_warps` and `num_stages` as Triton means them."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def configuration(head_dim: int, capability: int) -> Configuration:
    """What to run on a card of compute capability `capability` (80, 90, 100).

    Raises:
        ValueError: a head dim the kernel is not compiled for.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS} for the triton executor, got {head_dim}")
    if head_dim == 256:
        return Configuration(block_q=128, block_k=64, num_warps=8, num_stages=2)
    return Configuration(block_q=128, block_k=64, num_warps=8, num_stages=3 if capability < 90 else 4)
