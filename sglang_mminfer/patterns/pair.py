"""What the exact rule of a pattern is told: the rows of one class and the keys of one class, in one chunk.

Plain tensors over single tokens, for small inputs. Nothing here is shared with what planning uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.basis import HeadBasis


@dataclass(frozen=True)
class Pair:
    """Rows [q_start, q_stop) over keys [0, kv_stop) of one conversation.

    rows: bool [Lq], keys: bool [Lk]: members of the two classes. text_rule: False where a boundary gives every
    (row, key) pair its own pattern, so that "a text row with vision before it sees all" does not hold by itself.
    q: [Lq, D], k: [Lk, D]: one head's queries and keys, for patterns that are estimated. sm_scale: factor on q . k;
    None: 1 / sqrt(D). basis: the head's low-rank form of q . k; None: there is none.
    """

    map: ModalityMap
    q_start: int
    q_stop: int
    kv_stop: int
    rows: torch.Tensor
    keys: torch.Tensor
    text_rule: bool
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    sm_scale: float | None = None
    basis: HeadBasis | None = None

    @cached_property
    def q_pos(self) -> torch.Tensor:
        """int64 [Lq]: absolute positions."""
        return torch.arange(self.q_start, self.q_stop)

    @cached_property
    def k_pos(self) -> torch.Tensor:
        """int64 [Lk]: absolute positions."""
        return torch.arange(self.kv_stop)

    @cached_property
    def causal(self) -> torch.Tensor:
        """bool [Lq, Lk]: keys up to each row."""
        return self.k_pos[None, :] <= self.q_pos[:, None]

    @cached_property
    def key_rank(self) -> torch.Tensor:
        """int64 [Lk]: how many keys of the class come before each."""
        return self.keys.cumsum(0) - 1

    @cached_property
    def distance(self) -> torch.Tensor:
        """int64 [Lq, Lk]: how many keys of the class lie between a key and the last one that a row may see."""
        return self.key_rank[self.q_pos][:, None] - self.key_rank[None, :]

    @cached_property
    def text_after_vision(self) -> torch.Tensor:
        """bool [Lq]: text rows that have an image or a video before them."""
        return self.map.members(Modality.TEXT)[self.q_pos] & (self.q_pos > self.map.first_vision)

    @cached_property
    def sees_all(self) -> torch.Tensor:
        """bool [Lq]: text rows that have vision before them, unless a boundary says what they see."""
        return self.text_after_vision if self.text_rule else torch.zeros_like(self.text_after_vision)

    def queries_and_keys(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [Lq, D] and [Lk, D], for a pattern of this kind.

        Raises:
            ValueError: they are missing, or their shapes do not fit.
        """
        if self.q is None or self.k is None:
            raise ValueError(f"pattern_mask: {kind} chooses by q and k, so it needs q [rows, D] and k [kv_stop, D]")
        q, k = self.q.flatten(1).double(), self.k.flatten(1).double()
        if q.shape[0] != len(self.q_pos) or k.shape[0] != self.kv_stop or q.shape[1] != k.shape[1]:
            raise ValueError(
                f"pattern_mask: expected q [{len(self.q_pos)}, D] and k [{self.kv_stop}, D] of one head, "
                f"got {list(q.shape)} and {list(k.shape)}"
            )
        return q, k

    def scale_of(self, q: torch.Tensor) -> float:
        """The factor on q . k, for q [Lq, D]."""
        return float(q.shape[1]) ** -0.5 if self.sm_scale is None else self.sm_scale

    def window(self, sink: int, local: int) -> torch.Tensor:
        """bool [Lq, Lk]: the first `sink` keys of the class, and the last `local` ones up to a row."""
        return (self.key_rank[None, :] < sink) | (self.distance < local)

    def everything(self) -> torch.Tensor:
        """bool [Lq, Lk]: all keys."""
        return torch.ones_like(self.causal)
