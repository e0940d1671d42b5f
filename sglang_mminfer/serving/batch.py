"""One prefill batch: its requests, how each of them runs, and the record of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.serving import observe
from sglang_mminfer.serving.encoder_watch import EncodedAgain
from sglang_mminfer.serving.late_records import mean_density
from sglang_mminfer.serving.served_heads import BatchHeads, ServedHeads
from sglang_mminfer.serving.stock_rows import StockRows
from sglang_mminfer.serving.trace import PrefillRecord, map_entries


@dataclass
class PrefillRequest:
    """One request of a batch and how it runs; becomes its PrefillRecord.

    Attributes:
        rid: the request id.
        prefix_len, chunk_len: tokens before the chunk, and tokens of the chunk.
        row_start: the chunk's first row in the batch's q.
        served: what the model's heads do for it.
        prompt_stop: tokens of the prompt; generated tokens begin there.
        map: the modality map of the conversation; None without media.
        dense_reason: why it runs dense; None: it runs sparse.
        slots: int64 [seq_len], the KV slot of each position; None unless there are observers.
        densities: one for each layer that ran sparse and whose density is known; a scalar on the device, or a number.
    """

    rid: str
    prefix_len: int
    chunk_len: int
    row_start: int
    served: ServedHeads
    prompt_stop: int = 0
    map: ModalityMap | None = None
    dense_reason: str | None = None
    slots: torch.Tensor | None = None
    densities: list[torch.Tensor | float] = field(default_factory=list)

    @property
    def seq_len(self) -> int:
        """Tokens up to the end of the chunk."""
        return self.prefix_len + self.chunk_len

    @property
    def ends_prompt(self) -> bool:
        """Whether the chunk holds the prompt's last token. False without a map."""
        return self.map is not None and self.prefix_len < self.map.length <= self.seq_len

    def view(self) -> observe.RequestView:
        """The request as observers see it."""
        assert self.slots is not None
        return observe.RequestView(
            rid=self.rid,
            prefix_len=self.prefix_len,
            chunk_len=self.chunk_len,
            row_start=self.row_start,
            prompt_stop=self.prompt_stop,
            map=self.map,
            dense_reason=self.dense_reason,
            slots=self.slots,
        )


class PrefillBatch:
    """One prefill batch: its requests, its planner if a request runs sparse, and its times.

    Args:
        forward_batch: SGLang's ForwardBatch.
        served: what the model's heads do for requests that begin now.

    Attributes:
        num_rows: rows of q.
        planner: None if the whole batch runs dense.
        planned: the request of each of the planner's chunks.
        heads: what the model's heads do in it.
        stock_rows: rows that the stock backend computes while the plan computes the others; None if there are none.
        sparse_layers: layers that ran sparse so far.
        layer_reasons: how many layers ran dense, by reason.
        masked: whether the dense backend's metadata hold a mask of the model's own.
        plan_s, attn_s, forward_s: seconds spent planning, in attention, and since the start.
        started: the clock when planning began.
        ran: plan and LSE of the current layer; None unless it ran sparse.
    """

    def __init__(self, forward_batch: Any, served: ServedHeads) -> None:
        lengths = forward_batch.extend_seq_lens_cpu
        prefixes = forward_batch.extend_prefix_lens_cpu or [0] * len(lengths)
        rids = forward_batch.rids or [""] * len(lengths)
        starts = [0, *accumulate(lengths)]
        self.requests = [
            PrefillRequest(rid, int(prefix), int(length), start, served)
            for rid, prefix, length, start in zip(rids, prefixes, lengths, starts)
        ]
        self.num_rows = starts[-1]
        self.planner: BatchPlanner | None = None
        self.planned: list[PrefillRequest] = []
        self.heads: BatchHeads = served
        self.stock_rows: StockRows | None = None
        self.sparse_layers = 0
        self.layer_reasons: Counter[str] = Counter()
        self.masked = False
        self.plan_s = self.attn_s = self.forward_s = 0.0
        self.started = 0.0
        self.ran: tuple[BlockPlan, torch.Tensor] | None = None

    def run_dense(self, reason: str) -> None:
        """Makes the whole batch dense; a request that has a dense_reason keeps it."""
        self.planner = None
        for request in self.requests:
            request.dense_reason = request.dense_reason or reason

    def records(self, again: EncodedAgain, encode_ms: float, waited: bool) -> list[PrefillRecord]:
        """One record for each request.

        Args:
            again: what the vision encoder ran on again during the batch.
            encode_ms: how long it ran.
            waited: whether the host waited for the device; without that, times are those of kernel launches and count
                as 0.
        """
        overflowing = sum(map(int, self.planner.overflow)) if waited and self.planner is not None else 0
        records = []
        for request in self.requests:
            sparse = request.dense_reason is None and self.sparse_layers > 0
            if waited:
                request.densities = [float(density) for density in request.densities]
            reason = None if sparse else request.dense_reason or ",".join(sorted(self.layer_reasons)) or "no_layer"
            records.append(
                PrefillRecord(
                    rid=request.rid,
                    prefix_len=request.prefix_len,
                    chunk_len=request.chunk_len,
                    seq_len=request.seq_len,
                    segments=len(request.map.segments) if request.map else 0,
                    map=map_entries(request.map) if request.ends_prompt and request.map else None,
                    sparse_layers=self.sparse_layers if sparse else 0,
                    density=mean_density(request.densities, self.sparse_layers) if sparse else None,
                    dense_reason=reason,
                    plan_ms=self.plan_s * 1e3,
                    attn_ms=self.attn_s * 1e3 if waited else 0.0,
                    forward_ms=self.forward_s * 1e3 if waited else 0.0,
                    encode_ms=encode_ms,
                    encoded_again=again.times,
                    encoded_again_ms=again.milliseconds,
                    overflowing_tiles=overflowing,
                    guarded_heads=request.served.guarded if sparse else 0,
                )
            )
        return records
