"""The rows of one request that a batch computes, and where the request's keys lie in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_mminfer.modality.segments import ModalityMap


@dataclass(frozen=True)
class RequestChunk:
    """One request of a batch: its rows are q[row_start : row_start + kv_len - q_start].

    A request without a map runs dense, whatever the heads do.
    """

    map: ModalityMap | None
    q_start: int
    kv_len: int
    row_start: int
    slots: torch.Tensor  # int64 [kv_len]: cache row of every position

    @cached_property
    def slots32(self) -> torch.Tensor:
        """`slots` as int32."""
        return self.slots.to(torch.int32)

    @property
    def num_rows(self) -> int:
        return self.kv_len - self.q_start

    @property
    def causal_pairs(self) -> int:
        """(row, key) pairs at or below the diagonal."""
        return (self.q_start + 1 + self.kv_len) * self.num_rows // 2
