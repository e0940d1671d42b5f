"""The rows of a batch that the stock backend computes while a plan computes the others.

They are the rows of requests that run dense, and generated tokens: in mixed batches, and after a retraction in the same
request as prompt rows. They go to a second instance of the stock backend, as a batch of their own, so the stock backend
plans for them as for any batch, and its first instance keeps the metadata of the whole batch. SGLang makes several
instances of a backend and parts of batches in the same way for two-batch overlap.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from sglang_mminfer.kernels.indexing import to_device

BACKENDS = ("fa3", "fa4", "flashinfer", "triton", "torch_native")
"""Stock backends whose metadata of a plain prefill were read and follow from the fields that `part_of` sets."""


@dataclass(frozen=True)
class RowRange:
    """Rows of one request: positions [start, stop), of which the first is row `row_start` of q.

    Attributes:
        request: its number in the batch.
    """

    request: int
    start: int
    stop: int
    row_start: int


def second_instance(factory: Any, name: str, runner: Any) -> Any | None:
    """Another instance of the stock backend; None if `StockRows` cannot run this backend or model.

    Args:
        factory: SGLang's factory of the backend. name: the backend's name.
    """
    if name not in BACKENDS or getattr(runner, "sliding_window_size", None) not in (None, -1):
        return None  # a pool with windows has slots of its own for them, which part_of does not choose
    return factory(runner)


class StockRows:
    """Some rows of one batch, planned for by a second instance of the stock backend.

    Args:
        backend: the second instance.
        forward_batch: SGLang's ForwardBatch of the whole batch.
        ranges: the rows, in the order of q.
    """

    def __init__(self, backend: Any, forward_batch: Any, ranges: list[RowRange]) -> None:
        self._backend = backend
        self._rows, self._part = part_of(forward_batch, ranges)
        backend.init_forward_metadata(self._part)

    def run(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, layer: Any, out: torch.Tensor
    ) -> None:
        """Writes these rows of `out`. The pool holds the batch's keys and values already.

        Args:
            q, out: [tokens, Hq, D]. k, v: the batch's keys and values [tokens, ...]; None if the layer has none of its
                own.
            layer: SGLang's RadixAttention.
        """
        some_q = q.index_select(0, self._rows).flatten(1)
        some_k, some_v = (x if x is None else x.index_select(0, self._rows) for x in (k, v))
        o = self._backend.forward_extend(some_q, some_k, some_v, layer, self._part, save_kv_cache=False)
        out.index_copy_(0, self._rows, o.view(len(self._rows), *out.shape[1:]).to(out.dtype))


def part_of(forward_batch: Any, ranges: list[RowRange]) -> tuple[torch.Tensor, Any]:
    """A prefill batch of some rows of another one.

    Returns:
        int64 [rows]: the rows in q; and the ForwardBatch, in which each range is a request whose prefix ends where the
        range begins.
    """
    lengths = [part.stop - part.start for part in ranges]
    prefixes, stops = [part.start for part in ranges], [part.stop for part in ranges]
    starts = [0, *accumulate(lengths)]
    request = [part.request for part in ranges]
    device = forward_batch.req_pool_indices.device
    # All of this is known on the host: nothing here waits for the device.
    numbers, row_starts, lengths_there, prefixes_there, stops_there, starts_there = to_device(
        device, request, [part.row_start for part in ranges], lengths, prefixes, stops, starts[:-1]
    )
    rows = torch.repeat_interleave(row_starts - starts_there, lengths_there, output_size=starts[-1]).long()
    rows += torch.arange(starts[-1], device=device)
    part = copy.copy(forward_batch)
    part.batch_size, part.extend_num_tokens, part.seq_lens_sum = len(ranges), starts[-1], sum(stops)
    part.req_pool_indices = forward_batch.req_pool_indices.index_select(0, numbers)
    part.seq_lens = stops_there.long()
    part.seq_lens_cpu = torch.tensor(stops, dtype=torch.int64)
    part.extend_seq_lens, part.extend_seq_lens_cpu = lengths_there, lengths
    part.extend_prefix_lens, part.extend_prefix_lens_cpu = prefixes_there, prefixes
    part.extend_start_loc = starts_there
    part.orig_seq_lens = part.extend_logprob_start_lens_cpu = part.mm_inputs = part.lora_ids = None
    part.rids = [forward_batch.rids[number] for number in request] if forward_batch.rids else None
    for name in ("input_ids", "positions", "out_cache_loc"):
        value = getattr(forward_batch, name)
        setattr(part, name, value if value is None else value.index_select(0, rows))
    part.req_pool_indices_cpu = None
    part._attn_output = None  # SGLang's room for the answer of the whole batch
    return rows, part
