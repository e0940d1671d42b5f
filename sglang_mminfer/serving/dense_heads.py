"""The dense heads of a layer that also has sparse heads, in a form that the stock backend can run.

A dense backend needs the same number of query heads for each KV head, in order. So the dense heads are gathered from q,
KV head by KV head. A KV head with fewer dense heads than another runs one of its heads again; that result is dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_mminfer.kernels.indexing import to_device
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.patterns.dense import Dense

# Stock backends that read the number of heads from the layer. Others plan with the model's before the layer runs.
BACKENDS = ("fa3", "fa4", "triton", "torch_native")
# Heads that run again must not cost more than our kernel loses: it has about 70 % of the best dense kernel's speed.
MOST_REPEATED = 1.4


@dataclass(frozen=True)
class DenseHeads:
    """Which query heads the stock backend runs. Tensors are int32, on the device.

    Attributes:
        heads: the dense heads.
        index: [heads], the same as a tensor.
        taken: [Hkv * heads per KV head], the heads of q that the stock backend gets, in order.
        place: [heads], the index in `taken` of each dense head.
    """

    heads: tuple[int, ...]
    index: torch.Tensor
    taken: torch.Tensor
    place: torch.Tensor

    def run(self, stock: Callable[..., torch.Tensor], q: torch.Tensor, layer: Any, out: torch.Tensor) -> None:
        """Writes the dense heads of `out`.

        Args:
            stock: stock(q, layer) -> [tokens, heads * D], the stock backend's attention.
            q, out: [tokens, Hq, D].
            layer: SGLang's RadixAttention; a copy of it with fewer heads goes to `stock`.
        """
        view = copy.copy(layer)
        view.tp_q_head_num = len(self.taken)
        o = stock(q.index_select(1, self.taken).flatten(1), view)
        o = o.view(len(q), len(self.taken), -1).index_select(1, self.place)
        out.index_copy_(1, self.index.long(), o.to(out.dtype))


def dense_heads(
    patterns: Sequence[HeadPattern], num_kv_heads: int, device: torch.device, most_repeated: float = MOST_REPEATED
) -> DenseHeads | None:
    """The dense heads among a layer's patterns.

    None if there are none, or if the stock backend would have to run more than `most_repeated` times as many heads.
    """
    group = len(patterns) // num_kv_heads
    dense = [head for head, pattern in enumerate(patterns) if isinstance(pattern, Dense)]
    if not dense:
        return None
    dense_of_kv = [[head for head in dense if head // group == kv] for kv in range(num_kv_heads)]
    heads_per_kv = max(map(len, dense_of_kv))
    if heads_per_kv * num_kv_heads > most_repeated * len(dense):
        return None
    # A KV head without dense heads runs its first head.
    gathered = [head for kv, heads in enumerate(dense_of_kv) for head in _filled(heads or [kv * group], heads_per_kv)]
    index_of_dense = [gathered.index(head) for head in dense]
    return DenseHeads(tuple(dense), *to_device(device, dense, gathered, index_of_dense))


def _filled(heads: list[int], count: int) -> list[int]:
    return heads + heads[:1] * (count - len(heads))
