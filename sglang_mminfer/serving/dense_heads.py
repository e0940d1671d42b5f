"""Dense heads of a layer that also has sparse ones, in the form in which the stock backend can run them.

A dense backend takes as many query heads for each KV head, in order. So dense heads are taken out of q, KV head by
KV head, and where one has fewer than another, it runs one of them again and the result is dropped.
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

# Stock backends that are told the number of heads by the layer alone; others plan with the model's before it runs.
BACKENDS = ("fa3", "fa4", "triton", "torch_native")
# Running heads again must not cost more than what our kernel loses to the best dense one (about 70 % of its speed).
MOST_REPEATED = 1.4


@dataclass(frozen=True)
class DenseHeads:
    """Indices of query heads; tensors are int32.

    heads, index: the dense heads, the latter on the device. taken: [Hkv * per_kv] heads to give to the stock
    backend. place: [heads] where each dense head stands in `taken`.
    """

    heads: tuple[int, ...]
    index: torch.Tensor
    taken: torch.Tensor
    place: torch.Tensor

    def run(self, stock: Callable[..., torch.Tensor], q: torch.Tensor, layer: Any, out: torch.Tensor) -> None:
        """Write the dense heads of out [tokens, Hq, D]: stock(q, layer) -> [tokens, heads * D] does the work."""
        view = copy.copy(layer)
        view.tp_q_head_num = len(self.taken)
        o = stock(q.index_select(1, self.taken).flatten(1), view)
        o = o.view(len(q), len(self.taken), -1).index_select(1, self.place)
        out.index_copy_(1, self.index.long(), o.to(out.dtype))


def dense_heads(
    patterns: Sequence[HeadPattern], num_kv_heads: int, device: torch.device, most_repeated: float = MOST_REPEATED
) -> DenseHeads | None:
    """The dense heads among a layer's patterns; None where there are none.

    None also where the heads to run were more than `most_repeated` times the dense ones.
    """
    group = len(patterns) // num_kv_heads
    dense = [head for head, pattern in enumerate(patterns) if isinstance(pattern, Dense)]
    if not dense:
        return None
    of_kv = [[head for head in dense if head // group == kv] for kv in range(num_kv_heads)]
    per_kv = max(map(len, of_kv))
    if per_kv * num_kv_heads > most_repeated * len(dense):
        return None
    # A KV head that has none runs any of its heads.
    taken = [head for kv, own in enumerate(of_kv) for head in _filled(own or [kv * group], per_kv)]
    place = [taken.index(head) for head in dense]
    return DenseHeads(tuple(dense), *to_device(device, dense, taken, place))


def _filled(heads: list[int], count: int) -> list[int]:
    return heads + heads[:1] * (count - len(heads))
