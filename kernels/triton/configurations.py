"""How the kernel is compiled: rows of a program, warps and pipeline stages for each head dim and card. Not tuned yet.

Until a GPU has timed the candidates these follow from what the compiler says of each build: no spills, shared memory
that fits, and a pipeline that copies ahead. Block id, slot and key are three loads that wait for each other, and each
takes its share of the stages: below 7 the full tiles' copy of the next keys is issued only after this tile's products.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (64, 96, 128, 256)
LITTLE_SHARED = (86, 89, 120, 121)  # cards with 99 KiB of shared memory for a program


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
    """What to run on a card of compute capability `capability`: 80 for 8.0.

    Raises:
        ValueError: a head dim the kernel is not compiled for.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS} for the triton executor, got {head_dim}")
    # Without a warp group's own accumulators (sm_80), or with 256 dims, 128 rows spill registers.
    little_shared = capability in LITTLE_SHARED
    if head_dim == 256:
        return Configuration(rows=64, num_warps=8, num_stages=1 if capability < 90 or little_shared else 2)
    if capability < 90 or little_shared:
        stages = 5 if little_shared and head_dim > 64 else 7
        return Configuration(rows=128 if head_dim == 64 else 64, num_warps=8, num_stages=stages)
    if capability >= 100 and head_dim == 64:  # two programs fit on a multiprocessor, if each takes 128 registers
        return Configuration(rows=64, num_warps=8, num_stages=7)
    return Configuration(rows=128, num_warps=8, num_stages=7)
