"""One prefill batch: its requests, how each is run, and the account of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean
from typing import Any

import torch

from sglang_mminfer.kernels.block_plan import PrefillPlan
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.serving import observe
from sglang_mminfer.serving.encoder_watch import EncodedAgain
from sglang_mminfer.serving.trace import PrefillRecord, map_entries


@dataclass
class PrefillRequest:
    """One request of a batch and how it is run; becomes its PrefillRecord."""

    rid: str
    prefix_len: int
    chunk_len: int
    row_start: int
    prompt_stop: int = 0
    map: ModalityMap | None = None
    dense_reason: str | None = None
    slots: torch.Tensor | None = None  # for observers
    densities: list[torch.Tensor] = field(default_factory=list)  # one for each sparse layer, still on the device

    @property
    def seq_len(self) -> int:
        return self.prefix_len + self.chunk_len

    @property
    def ends_prompt(self) -> bool:
        """The chunk that holds the prompt's last token."""
        return self.map is not None and self.prefix_len < self.map.length <= self.seq_len

    def view(self) -> observe.RequestView:
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
    """One prefill batch: its requests, its planner if any request is sparse, and its account."""

    def __init__(self, forward_batch: Any) -> None:
        lengths = forward_batch.extend_seq_lens_cpu
        prefixes = forward_batch.extend_prefix_lens_cpu or [0] * len(lengths)
        rids = forward_batch.rids or [""] * len(lengths)
        starts = [0, *accumulate(lengths)]
        self.requests = [
            PrefillRequest(rid, int(prefix), int(length), start)
            for rid, prefix, length, start in zip(rids, prefixes, lengths, starts)
        ]
        self.num_rows = starts[-1]
        self.planner: BatchPlanner | None = None
        self.sparse_layers = 0
        self.layer_reasons: Counter[str] = Counter()
        self.masked = False
        """The dense backend's metadata have a mask of the model's own."""
        self.plan_s = self.attn_s = self.forward_s = 0.0
        self.started = 0.0
        self.ran: tuple[PrefillPlan, torch.Tensor] | None = None  # plan and lse of the current layer, if sparse

    def run_dense(self, reason: str) -> None:
        self.planner = None
        for request in self.requests:
            request.dense_reason = request.dense_reason or reason

    def records(self, again: EncodedAgain, waited: bool) -> list[PrefillRecord]:
        """A record of each request.

        Args:
            waited: whether the device was waited for, so that times are more than those of launches.
        """
        records = []
        for request in self.requests:
            sparse = request.dense_reason is None and self.sparse_layers > 0
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
                    density=fmean(map(float, request.densities)) if sparse and request.densities else None,
                    dense_reason=reason,
                    plan_ms=self.plan_s * 1e3,
                    attn_ms=self.attn_s * 1e3 if waited else 0.0,
                    forward_ms=self.forward_s * 1e3 if waited else 0.0,
                    encoded_again=again.times,
                    encoded_again_ms=again.milliseconds,
                )
            )
        return records
