"""The attention backend inside SGLang: the dense backend it would have used, with sparse prefill on top.

The dense backend is built by its own factory, then its instance is given a subclass made at run time. So every
flag, buffer, graph path and isinstance check of the stock backend stays as it was, and only two things change:
metadata of prefill batches also plans sparse requests, and eligible layers of such batches run the plan. A batch
without a sparse request runs the stock code and nothing else.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from statistics import fmean
from typing import Any

import torch

from sglang_mminfer import settings
from sglang_mminfer.families.maps import GeometryError, cached_map, reader_of
from sglang_mminfer.kernels import executors
from sglang_mminfer.kernels.block_plan import PrefillPlan
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.spec import HeadPattern
from sglang_mminfer.planning.budget import PlanBudget, line_strides
from sglang_mminfer.planning.coverage import lacks_raster, leaves_out
from sglang_mminfer.planning.planner import BatchPlanner, RequestChunk
from sglang_mminfer.serving import dense_backend, flags, head_config_choice, observe, prompts, self_check, trace
from sglang_mminfer.serving import encoder_watch as embedding_cache
from sglang_mminfer.serving.audit import Audit
from sglang_mminfer.serving.dense_heads import BACKENDS, MOST_REPEATED, DenseHeads, dense_heads
from sglang_mminfer.serving.encoder_watch import EncodedAgain, EncoderWatch
from sglang_mminfer.serving.trace import PrefillRecord, TraceFile, map_entries

logger = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Plans and layers that may fail before everything runs dense: a defect that stays costs a traceback only once."""


def create_backend(runner: Any) -> Any:
    """The backend for one model runner: factory of the name `mminfer` in SGLang's registry.

    Raises:
        HeadConfigError: if the head config does not fit the model.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    name = dense_backend.dense_backend_name(runner.server_args, runner.device)
    backend = ATTENTION_BACKENDS[name](runner)
    if runner.is_draft_worker:  # a draft model's head config would be another one: dense
        return backend
    head_config_choice.announce_once(runner)
    dense: Any = type(backend)
    backend.__class__ = _sparse_class(dense)
    backend.mminfer = SparsePrefill(runner, name)
    return backend


@cache
def _sparse_class(dense: Any) -> Any:
    """A subclass of one dense backend. Made with that one base only, so that instances can change to it."""

    class Sparse(dense):
        mminfer: SparsePrefill

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self.mminfer.end()
            super().init_forward_metadata(forward_batch)
            self.mminfer.begin(forward_batch)

        def init_forward_metadata_out_graph(self, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
            self.mminfer.end()  # what is captured in a graph, or replayed from one, is dense
            super().init_forward_metadata_out_graph(forward_batch, *args, **kwargs)

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
        ) -> Any:
            sparse = self.mminfer
            start, o = sparse.clock(), None
            masked = getattr(getattr(self, "forward_metadata", None), "custom_mask", None) is not None
            if sparse.takes(q, layer, kwargs, masked):
                if save_kv_cache and k is not None and v is not None:
                    sparse.save_kv(k, v, layer, forward_batch)
                    save_kv_cache = False
                dense_forward = super().forward_extend

                def stock(some_heads: torch.Tensor, view: Any) -> torch.Tensor:
                    return dense_forward(some_heads, k, v, view, forward_batch, False)

                o = sparse.run_layer(q, layer, stock)
            if o is None:
                o = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            sparse.layer_done(q, layer, kwargs, o, start)
            return o

    Sparse.__name__ = Sparse.__qualname__ = f"MMInfer{dense.__name__}"
    return Sparse


@dataclass
class _Request:
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


class _Batch:
    """One prefill batch: its requests, its planner if any request is sparse, and its account."""

    def __init__(self, forward_batch: Any) -> None:
        lengths = forward_batch.extend_seq_lens_cpu
        prefixes = forward_batch.extend_prefix_lens_cpu or [0] * len(lengths)
        rids = forward_batch.rids or [""] * len(lengths)
        starts = [0, *accumulate(lengths)]
        self.requests = [
            _Request(rid, int(prefix), int(length), start)
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


@dataclass(frozen=True)
class _LayerHeads:
    """Patterns of a layer's query heads, None for those that the stock backend runs: `dense`."""

    planned: tuple[HeadPattern | None, ...]
    dense: DenseHeads | None


class SparsePrefill:
    """Plans and runs the sparse layers of one runner's prefill batches, and keeps the account of them.

    `begin` is called with a batch's metadata, while its media are still at hand (SGLang drops them before the
    first layer). A layer's plan is made when the layer runs, and shared with all layers whose heads do the same.
    """

    def __init__(self, runner: Any, dense_backend: str) -> None:
        from sglang.srt.runtime_context import get_parallel

        hf_config = runner.model_config.hf_config
        self.head_config, _ = head_config_choice.load_for_model(runner.server_args, hf_config)
        self.reader = reader_of(hf_config)
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.kv_pool = runner.token_to_kv_pool
        self.device = torch.device(runner.device)
        parallel = get_parallel()
        self.rank, self.ranks = parallel.attn_tp_rank, parallel.attn_tp_size
        # Of each group that has requests of its own one rank gives account: tensor-parallel ranks and pipeline stages
        # have the same requests, ranks of data-parallel attention have others.
        self.leads = self.rank == 0 and getattr(parallel, "pp_rank", 0) == 0
        data_rank = getattr(parallel, "attn_dp_rank", 0)
        audited = flags.audit_rate(runner.server_args)
        self.trace = TraceFile(None)
        if self.leads or (audited and self.rank):
            self.trace = TraceFile.from_environment(self.rank, data_rank)
        self.metrics = trace.metrics() if runner.server_args.enable_metrics and self.leads else None
        self._failures = 0
        prompts.watch()
        # To time a GPU, or to count what it visits, is to wait for it: with a trace only, which says so.
        self._waits = self.device.type == "cpu" or self.trace.enabled
        self._encoder = EncoderWatch()
        if self.leads:
            embedding_cache.watch = self._encoder
        self._num_layers = runner.model_config.num_hidden_layers
        self._last_layer = getattr(runner, "end_layer", None) or self._num_layers
        self._all_dense = all(self.head_config.is_dense(layer) for layer in range(self._num_layers))
        self._patterns = {head for layer in range(self._num_layers) for head in self.head_config.patterns(layer)}
        self._budget, self._line_strides = PlanBudget(*settings.plan_budget()), line_strides(self._patterns)
        self._heads: dict[tuple[int, int], _LayerHeads] = {}
        self._dense_backend = dense_backend
        self._executor = executors.name_for(settings.executor(), self.device)
        self._unfit = None if self._all_dense else self._why_unfit(runner)
        self._batch: _Batch | None = None
        self.observers = observe.from_environment(
            observe.RankInfo(self.rank, self.ranks, self._num_layers, runner.server_args)
        )
        if audited:
            self.observers.add(Audit(audited, trace.audit_metrics() if runner.server_args.enable_metrics else None))

    def _why_unfit(self, runner: Any) -> str | None:
        """Why nothing can run sparse here, found out before the first request: the reason that is counted.

        On a GPU the executor computes a small case first, in the model's shapes, which also compiles it.
        """
        stored, computed = getattr(runner, "kv_cache_dtype", None), getattr(runner, "dtype", None)
        if stored is not None and computed is not None and stored != computed:
            logger.warning(
                "mminfer: the KV cache stores %s and attention computes in %s, so every request runs dense, on %s. A "
                "checkpoint may ask for that; --kv-cache-dtype bfloat16 keeps the cache as wide as the model.",
                stored,
                computed,
                self._dense_backend,
            )
            return "kv_cache_dtype"
        if self.device.type == "cpu":
            return None
        model = runner.model_config
        heads = model.num_attention_heads // self.ranks, model.get_num_kv_heads(self.ranks)
        execute = executors.EXECUTORS[self._executor]
        try:
            answer = self_check.check(execute, self.device, runner.dtype, model.head_dim, *heads)
        except Exception:
            logger.exception("mminfer: the %s executor does not run here; everything runs dense", self._executor)
            return "executor_failed"
        if answer.good:
            logger.info("mminfer: the %s executor was checked on %s: %s", self._executor, self.device, answer)
            return None
        logger.error("mminfer: the %s executor is wrong here (%s); everything runs dense", self._executor, answer)
        return "executor_failed"

    # ---- a batch -------------------------------------------------------------------------------------------

    def begin(self, forward_batch: Any) -> None:
        """Decide what runs sparse in this batch. Never raises: what cannot be served runs dense, counted."""
        if forward_batch.forward_mode.is_decode_or_idle() or forward_batch.extend_seq_lens_cpu is None:
            return
        if getattr(forward_batch, "tbo_children", None):
            return  # two-batch overlap: the backends of the two parts give account
        self._batch = batch = _Batch(forward_batch)
        batch.started = start = self.clock()
        try:
            self._decide(batch, forward_batch)
        except Exception:
            batch.run_dense("internal_error")
            self._failed("planning a prefill batch")
        batch.plan_s = self.clock() - start

    def end(self) -> None:
        """Give account of the batch, if there was one. Without this, a stale plan could outlive its batch."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        again = self._encoder.take()
        if self.trace.enabled or self.metrics is not None or self.observers:
            records = batch.records(again, self._waits)
            self.observers.batch_done(records)
            self.trace.append(records if self.leads else [record for record in records if record.audit])
            if self.metrics is not None:
                self.metrics.add(records)

    def _failed(self, what: str) -> None:
        """Called in the handler of an error of ours: says it once, and turns the sparse path off if it stays."""
        self._failures += 1
        if self._failures == 1:
            logger.exception("mminfer: %s failed; it runs dense", what)
        if self._failures == MOST_FAILURES:
            logger.error("mminfer: %d failures, the last one in %s; everything runs dense now", MOST_FAILURES, what)
            self._unfit = "executor_failed"

    def _decide(self, batch: _Batch, forward_batch: Any) -> None:
        mode = forward_batch.forward_mode
        if mode.name not in ("EXTEND", "MIXED"):
            return batch.run_dense(f"mode_{mode.name.lower()}")
        if getattr(forward_batch, "tbo_parent_token_range", None) is not None:
            return batch.run_dense("two_batch_overlap")  # whose parts are given no media
        media = forward_batch.mm_inputs or [None] * len(batch.requests)
        for request, mm_inputs in zip(batch.requests, media):
            self._read(request, mm_inputs)
        if self.observers:
            for i, request in enumerate(batch.requests):
                request.slots = self._slots(forward_batch, i, request)
        if all(request.dense_reason for request in batch.requests):
            return None
        chunks = []
        for i, request in enumerate(batch.requests):
            # Rows without a map see everything before them: those of a dense request that shares a batch with a
            # sparse one, and generated ones.
            middle = request.prefix_len
            if request.dense_reason is None:
                middle = min(request.prompt_stop, request.seq_len)
            slots = request.slots if request.slots is not None else self._slots(forward_batch, i, request)
            for own_map, start, stop in (
                (request.map, request.prefix_len, middle),
                (None, middle, request.seq_len),
            ):
                if start < stop:
                    row_start = request.row_start + start - request.prefix_len
                    chunks.append(RequestChunk(own_map, start, stop, row_start, slots[:stop]))
        dense_below = self.head_config.defaults.dense_below
        batch.planner = BatchPlanner(chunks, batch.num_rows, dense_below=dense_below)
        return None

    def _slots(self, forward_batch: Any, i: int, request: _Request) -> torch.Tensor:
        """int64 [seq_len]: the cache row of every position."""
        # Indexing with a number on the device would wait for the device.
        row = forward_batch.req_pool_indices[i : i + 1]
        return self.req_to_token[:, : request.seq_len].index_select(0, row)[0].long()

    def _read(self, request: _Request, mm_inputs: Any) -> None:
        """Finds the request's prompt and map, and why it runs dense (None: it runs sparse)."""
        prompt = prompts.length_of(request.rid)
        request.prompt_stop = request.seq_len if prompt is None else prompt
        all_dense = "dense_config" if self._all_dense else self._unfit
        if all_dense is not None and (mm_inputs is None or not self.observers):
            request.dense_reason = all_dense
        elif mm_inputs is None:
            request.dense_reason = "no_media"
        elif prompt is None:
            request.dense_reason = all_dense or "no_prompt_length"
        else:
            request.map, reason = self._map(request, mm_inputs, prompt)
            request.dense_reason = all_dense or reason

    def _map(self, request: _Request, mm_inputs: Any, prompt: int) -> tuple[ModalityMap | None, str | None]:
        """The map of a request whose prompt has `prompt` tokens, and why the request itself asks for dense."""
        try:
            modality_map = cached_map(mm_inputs, prompt, self.reader)
        except GeometryError as error:
            if not error.repeated:
                logger.warning("mminfer: request %s runs dense: %s", request.rid, error)
            return None, error.reason
        if not modality_map.has_vision:
            return modality_map, "no_media"
        if request.prefix_len >= prompt:
            return modality_map, "decode"
        dense_below = self.head_config.defaults.dense_below
        if request.seq_len <= dense_below:
            return modality_map, "short"
        if lacks_raster(modality_map):
            rows = max(request.prefix_len, dense_below), min(prompt, request.seq_len)
            if not any(leaves_out(head, modality_map, *rows) for head in self._patterns):
                return modality_map, "no_raster"
        # All ranks answer alike: the budget counts and has no clock.
        if not self._budget.allows(modality_map, request.prefix_len, min(prompt, request.seq_len), self._line_strides):
            return modality_map, "plan_budget"
        return modality_map, None

    # ---- a layer -------------------------------------------------------------------------------------------

    def takes(self, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], masked: bool = False) -> bool:
        """True if this layer of the current batch runs on a plan; if not, the reason is counted.

        Args:
            masked: whether the dense backend would apply a mask of the model's own.
        """
        batch = self._batch
        if batch is None:
            return False
        batch.masked = masked
        if batch.planner is None:
            return False
        reason = self._layer_reason(q, layer, kwargs, batch)
        if reason is not None:
            batch.layer_reasons[reason] += 1
        return reason is None

    def _layer_reason(self, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], batch: _Batch) -> str | None:
        if layer.is_cross_attention or layer.attn_type.name != "DECODER":
            return "layer_not_causal"
        if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
            return "layer_sliding_window"
        if layer.logit_cap or layer.xai_temperature_len > 0 or kwargs:
            return "layer_modified_softmax"
        if batch.masked:
            return "layer_custom_mask"
        if layer.qk_head_dim != layer.v_head_dim:
            return "layer_unequal_head_dims"
        if not 0 <= layer.layer_id < self._num_layers:
            return "layer_unknown"
        if self.head_config.is_dense(layer.layer_id):
            return "layer_dense_config"
        if self.kv_pool.get_key_buffer(layer.layer_id).dtype != q.dtype:
            return "kv_cache_dtype"
        if q.shape[0] != batch.num_rows:
            return "padded_rows"
        return None

    def save_kv(self, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any) -> None:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        self.kv_pool.set_kv_buffer(layer, KVWriteLoc.for_layer(forward_batch, layer), k, v)

    def run_layer(self, q: torch.Tensor, layer: Any, stock: Callable[..., torch.Tensor]) -> torch.Tensor | None:
        """Attention of one layer over the pool, K and V of the batch already in it. None if that failed.

        Dense heads are run by `stock`(q of these heads, a view of the layer that has only them), where it can.
        """
        batch = self._batch
        assert batch is not None and batch.planner is not None
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k_cache, v_cache = self.kv_pool.get_kv_buffer(layer.layer_id)
        try:
            start, heads = self.clock(), self._heads_of(layer)
            plan = batch.planner.plan(heads.planned, q, k_cache, layer.scaling)
            batch.plan_s += self.clock() - start
            out = q.new_empty(q.shape)
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            executors.EXECUTORS[self._executor](q, k_cache, v_cache, plan, layer.scaling, out, lse)
            if heads.dense is not None:
                heads.dense.run(stock, q, layer, out)
        except Exception:
            batch.layer_reasons["internal_error"] += 1
            self._failed(f"layer {layer.layer_id}")
            if self._unfit is not None:
                batch.planner = None
            return None
        batch.sparse_layers += 1
        batch.ran = plan, lse
        if self._waits and (self.trace.enabled or self.metrics is not None):
            self._note_density(batch, plan, heads)
        return out.flatten(1)

    def layer_done(self, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], o: torch.Tensor, start: float) -> None:
        """The layer's answer `o` [tokens, Hq * D] is there."""
        batch = self._batch
        if batch is None:
            return
        now = self.clock()
        batch.attn_s += now - start
        batch.forward_s = now - batch.started
        if self.observers:
            self.observers.show(lambda: self._view(batch, q, layer, kwargs, o))
        batch.ran = None
        if layer.layer_id == self._last_layer - 1:
            self.end()

    def _view(
        self, batch: _Batch, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], o: torch.Tensor
    ) -> observe.LayerView | None:
        """What observers see of a layer that is plain causal attention over the pool, sparse or not; else None."""
        if self._layer_reason(q, layer, kwargs, batch) not in (None, "layer_dense_config"):
            return None
        requests = tuple(request.view() for request in batch.requests if request.slots is not None)
        if not requests:
            return None
        k_cache, v_cache = self.kv_pool.get_kv_buffer(layer.layer_id)
        count, heads = layer.tp_q_head_num, self._heads_of(layer)
        plan, lse = batch.ran or (None, None)
        first = self.rank * count
        q = q.view(-1, count, layer.qk_head_dim)
        return observe.LayerView(
            layer_id=layer.layer_id,
            first_head=first,
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            sm_scale=layer.scaling,
            requests=requests,
            patterns=tuple(self.head_config.patterns(layer.layer_id)[first : first + count]),
            stock_heads=tuple(h for h, pattern in enumerate(heads.planned) if pattern is None) if plan else (),
            out=o.view(q.shape),
            plan=plan,
            lse=lse,
        )

    def _heads_of(self, layer: Any) -> _LayerHeads:
        """The query heads that this rank holds."""
        count = layer.tp_q_head_num
        name = (layer.layer_id, count)
        if name not in self._heads:
            everything = self.head_config.patterns(layer.layer_id)
            own = tuple(everything[self.rank * count : (self.rank + 1) * count])
            dense = None
            when = settings.dense_heads_on_stock(str(self.device))
            if self._dense_backend in BACKENDS and when != "never":
                limit = math.inf if when == "always" else MOST_REPEATED
                dense = dense_heads(own, layer.tp_k_head_num, self.device, limit)
            given_away = dense.heads if dense is not None else ()
            planned = tuple(None if head in given_away else pattern for head, pattern in enumerate(own))
            self._heads[name] = _LayerHeads(planned, dense)
        return self._heads[name]

    def _note_density(self, batch: _Batch, plan: PrefillPlan, heads: _LayerHeads) -> None:
        visited, elsewhere = plan.visited_by_row, heads.planned.count(None)
        for request in batch.requests:
            if request.dense_reason is None and request.chunk_len:
                rows = visited[request.row_start : request.row_start + request.chunk_len]
                causal = (request.prefix_len + 1 + request.seq_len) * request.chunk_len // 2
                request.densities.append((rows.sum() / causal + elsewhere) / plan.num_heads)

    def clock(self) -> float:
        """Seconds. Launches are asynchronous on a GPU, so a trace costs it one synchronisation for each reading."""
        if self.trace.enabled and self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        return time.perf_counter()
