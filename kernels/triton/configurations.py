"""How the kernel is compiled: rows of a program, warps and pipeline stages for each head dim and dtype. Not tuned yet.

The starting point is compile evidence only (no spills, occupancy) until a GPU has timed the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (64, 96, 128, 256)


@dataclass(frozen=True)
class Configuration:
    """`rows` of a query tile for one program, at most; the rest as Triton means it (maxnreg: registers of a thread)."""

    rows: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """For the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def configuration(head_dim: int, capability: int) -> Configuration:
    """What to run on a card of compute capability `capability` (80, 90, 100).

    Raises:
        ValueError: a head dim the kernel is not compiled for.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS} for the triton executor, got {head_dim}")
    # Without a warp group's own accumulators (sm_80), or with 256 dims, 128 rows spill registers.
    if head_dim == 256:
        return Configuration(rows=64, num_warps=8, num_stages=1 if capability < 90 else 2)
    if capability < 90:
        return Configuration(rows=128 if head_dim == 64 else 64, num_warps=8, num_stages=3)
    if capability >= 100 and head_dim == 64:  # two programs fit on a multiprocessor, if each takes 128 registers
        return Configuration(rows=64, num_warps=8, num_stages=4)
    return Configuration(rows=128, num_warps=8, num_stages=4)
