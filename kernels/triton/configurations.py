"""How the kernel is compiled: rows of a program, warps and pipeline stages for each head dim and GPU. Not tuned yet.

Until a GPU has timed the candidates, these values follow from what the compiler reports of each build: no spills,
shared memory that fits, and a pipeline that copies ahead. The loads of a key tile's number, slots and keys wait for
each other, and each takes its share of the stages: with fewer than 7 stages, the loop over full tiles issues the copy
of the next keys only after the products of the current tile.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (64, 96, 128, 256)
LITTLE_SHARED = (86, 89, 120, 121)  # capabilities with only 99 KiB of shared memory for a program


@dataclass(frozen=True)
class Configuration:
    """rows: how many rows of a query tile a program takes at most. The other fields are Triton's compiler options."""

    rows: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Triton's compiler options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def configuration(head_dim: int, capability: int) -> Configuration:
    """How to compile the kernel for a GPU of compute capability `capability` (80 means 8.0).

    Raises:
        ValueError: the kernel does not support this head dim.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS} for the triton executor, got {head_dim}")
    # 128 rows spill registers without warp group MMA (sm_80), and with 256 dims.
    little_shared = capability in LITTLE_SHARED
    if head_dim == 256:
        return Configuration(rows=64, num_warps=8, num_stages=1 if capability < 90 or little_shared else 2)
    if capability < 90 or little_shared:
        stages = 5 if little_shared and head_dim > 64 else 7
        return Configuration(rows=128 if head_dim == 64 else 64, num_warps=8, num_stages=stages)
    if capability >= 100 and head_dim == 64:  # two programs fit on a multiprocessor at 128 registers each
        return Configuration(rows=64, num_warps=8, num_stages=7)
    return Configuration(rows=128, num_warps=8, num_stages=7)
