"""The sparse side of the backend: decides which requests and layers of a prefill batch run on a plan, and runs them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_mminfer import releases, settings
from sglang_mminfer.families.maps import GeometryError, cached_map, reader_of
from sglang_mminfer.kernels import executors
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner, is_static, worker
from sglang_mminfer.planning.tiles import BLOCK_K
from sglang_mminfer.serving import (
    basis_choice,
    calibration,
    encoder_watch,
    flags,
    head_config_choice,
    metrics,
    observe,
    prompts,
    self_check,
    telemetry,
)
from sglang_mminfer.serving.audit import Audit
from sglang_mminfer.serving.batch import PrefillBatch, PrefillRequest
from sglang_mminfer.serving.encoder_watch import EncoderWatch
from sglang_mminfer.serving.guard import Guard
from sglang_mminfer.serving.known_shares import KnownShares
from sglang_mminfer.serving.kv_scales import KVScales
from sglang_mminfer.serving.late_records import LateRecords
from sglang_mminfer.serving.served_heads import (
    LayerHeads,
    LayerShape,
    Placement,
    ServedHeads,
    of_request,
    together,
)
from sglang_mminfer.serving.stock_rows import RowRange, StockRows
from sglang_mminfer.serving.trace import PrefillRecord, TraceFile

logger = logging.getLogger(__name__)

MOST_FAILURES = 3
"""After this many failures of plans or layers everything runs dense, so a lasting defect costs few failed layers."""


class SparsePrefill:
    """Plans and runs the sparse layers of one model runner's prefill batches, and records what it did.

    The backend (`backend.sparse_class`) calls, for each batch:
    1. `begin`, while SGLang makes the batch's metadata, because SGLang drops the batch's media before the first layer.
    2. for each layer `takes`; if that is True, `save_kv` and `run_layer`, which makes the plan. All layers whose heads
       have the same patterns share a plan. At last `layer_done`, for dense layers, too.
    3. `end`, which writes the records. `layer_done` of the last layer calls it, and else the next batch does.

    Args:
        runner: SGLang's ModelRunner.
        dense_backend: the name of the dense backend beneath ours.
        second_instance: makes another instance of that backend, or gives None; see `StockRows`.

    Raises:
        HeadConfigError: if the head config does not fit the model.
    """

    def __init__(
        self, runner: Any, dense_backend: str, second_instance: Callable[[], Any | None] = lambda: None
    ) -> None:
        from sglang.srt.runtime_context import get_parallel

        server_args, hf_config = runner.server_args, runner.model_config.hf_config
        head_config, self._config_choice = head_config_choice.load_for_model(server_args, hf_config)
        self.reader = reader_of(hf_config)
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.kv_pool = runner.token_to_kv_pool
        self.device = torch.device(runner.device)

        parallel = get_parallel()
        self.rank, self.ranks = parallel.attn_tp_rank, parallel.attn_tp_size
        # One rank keeps the records of each group of ranks that have the same requests. Tensor-parallel ranks and
        # pipeline stages have the same requests; ranks of data-parallel attention have different ones.
        self.leads = self.rank == 0 and getattr(parallel, "pp_rank", 0) == 0
        self.num_layers = runner.model_config.num_hidden_layers
        stage = getattr(runner, "layer_info", None)
        self._layers = (stage.start_layer, stage.end_layer) if stage is not None else (0, self.num_layers)
        own = range(*self._layers)
        self._last_layer = max((n for n in head_config.full_layers or own if n in own), default=None)
        self._shapes: set[LayerShape] = set()

        audit_rate, guard_error = flags.audit_rate(server_args), flags.guard_error(server_args)
        self.trace = TraceFile(None)
        if self.leads or (audit_rate and self.rank):
            self.trace = TraceFile.from_environment(self.rank, getattr(parallel, "attn_dp_rank", 0))
        self.metrics = metrics.prefill_metrics() if server_args.enable_metrics and self.leads else None
        self.telemetry = telemetry.of_process() if self.leads else None
        self._late = LateRecords(self._tell)
        if self.telemetry is not None:
            self.telemetry.serving, self.telemetry.before_answer = self.serving, self._late.tell_known
        prompts.watch(self._count_verified)
        # Timing a GPU and counting what it visits means waiting for it, so this is done only if a trace is asked for.
        self.waits = self.device.type == "cpu" or self.trace.enabled
        self._encoder = EncoderWatch()
        if self.leads:
            encoder_watch.watch = self._encoder

        head_dim = runner.model_config.head_dim
        names = executors.names_for(settings.executor(), self.device, head_dim, BLOCK_K, runner.dtype)
        self.executor, self.unfit = names[0], None
        if not head_config.all_dense:
            self_check.compile_ahead()
            estimates = not all(is_static(head) for layer in head_config.layers for head in set(layer))
            self.executor, self.unfit = self_check.first_fit(
                runner, names, self.device, self.ranks, dense_backend, estimates
            )
        self.failures = 0
        self.dense_backend = dense_backend
        placement = Placement(self.rank, self.device, head_dim, self.executor, dense_backend)
        self.served = ServedHeads(head_config, placement)
        self._log_shares()
        self.second_instance = None if self.served.all_dense or self.unfit else second_instance()
        self.batch: PrefillBatch | None = None

        self.observers = observe.from_environment(observe.RankInfo(self.rank, self.ranks, self.num_layers, server_args))
        self._calibration: calibration.Calibration | None = None
        if basis_choice.is_awaited(server_args) and head_config.basis_rank:
            stages = getattr(parallel, "pp_size", 1)
            self._await_basis(calibration.Place(server_args, hf_config, self.rank, self.ranks, self._layers, stages))
        self.guard: Guard | None = None
        if guard_error:
            guard_metrics = metrics.guard_metrics() if server_args.enable_metrics else None
            self.guard = Guard(guard_error, self.served, guard_metrics)
            if self.leads:
                logger.info("mminfer: %s; %g of the requests are audited", self.guard, audit_rate)
        if audit_rate:
            audit_metrics = metrics.audit_metrics() if server_args.enable_metrics else None
            self.observers.add(Audit(audit_rate, audit_metrics, self.guard))

    # ---- a batch -------------------------------------------------------------------------------------------

    def begin(self, forward_batch: Any) -> None:
        """Decides what runs sparse in this batch.

        Never raises: a request that cannot run sparse runs dense, and its reason is counted.
        """
        self._late.tell_known()
        if forward_batch.forward_mode.is_decode_or_idle() or forward_batch.extend_seq_lens_cpu is None:
            return
        if getattr(forward_batch, "tbo_children", None):
            return  # two-batch overlap: the backends of the two parts record it
        self.batch = batch = PrefillBatch(forward_batch, self.guard.served if self.guard else self.served)
        batch.started = start = self.clock()
        try:
            self._decide(batch, forward_batch)
        except Exception:
            batch.run_dense("internal_error")
            self._failed("planning a prefill batch")
        batch.plan_s = self.clock() - start

    def _decide(self, batch: PrefillBatch, forward_batch: Any) -> None:
        """Settles for each request whether it runs sparse, and makes the planner if one does."""
        mode = forward_batch.forward_mode
        if mode.name not in ("EXTEND", "MIXED"):
            return batch.run_dense(f"mode_{mode.name.lower()}")
        if getattr(forward_batch, "tbo_parent_token_range", None) is not None:
            return batch.run_dense("two_batch_overlap")  # SGLang gives its parts no media
        media = forward_batch.mm_inputs or [None] * len(batch.requests)
        for request, mm_inputs in zip(batch.requests, media):
            self._read(request, mm_inputs)
        if self.observers:
            for i, request in enumerate(batch.requests):
                request.slots = self._slots(forward_batch, i, request)
        if not all(request.dense_reason for request in batch.requests):
            self._lay_out(batch, forward_batch)
        return None

    def _lay_out(self, batch: PrefillBatch, forward_batch: Any) -> None:
        """Makes the planner: which rows of the batch run on a plan, and which on the stock backend."""
        chunks, on_stock = [], []
        for i, request in enumerate(batch.requests):
            # Rows without a map see everything before them. These are the rows of a dense request that shares a batch
            # with a sparse one, and the rows of generated tokens.
            map_stop = request.prefix_len
            if request.dense_reason is None:
                map_stop = min(request.prompt_stop, request.seq_len)
            for modality_map, start, stop in (
                (request.map, request.prefix_len, map_stop),
                (None, map_stop, request.seq_len),
            ):
                if start == stop:
                    continue
                row_start = request.row_start + start - request.prefix_len
                if modality_map is None and self._stock_takes(start, stop):
                    on_stock.append(RowRange(i, start, stop, row_start))
                else:
                    slots = request.slots if request.slots is not None else self._slots(forward_batch, i, request)
                    chunks.append(RequestChunk(modality_map, start, stop, row_start, slots[:stop]))
                    batch.planned.append(request)
        if on_stock:
            batch.stock_rows = StockRows(self.second_instance, forward_batch, on_stock)
        batch.planner = BatchPlanner(chunks, batch.num_rows, dense_below=self.served.choice.dense_below)
        batch.heads = heads = together([request.served for request in batch.planned])
        # Only layers that ran in an earlier batch have said how many heads they have.
        layers = [heads.of(shape).planned for shape in sorted(self._shapes) if not heads.is_dense(shape.layer_id)]
        batch.planner.prepare(layers, worker() if self.device.type != "cpu" else None)

    def _stock_takes(self, start: int, stop: int) -> bool:
        """Whether the stock backend computes rows [start, stop) of a request, which see everything."""
        return self.second_instance is not None and not self.served.choice.comparison.own_dense_is_faster(start, stop)

    def _slots(self, forward_batch: Any, i: int, request: PrefillRequest) -> torch.Tensor:
        """int64 [seq_len]: the KV slot of each position of request number `i`."""
        # Indexing with a tensor element would make the host wait for the device.
        row = forward_batch.req_pool_indices[i : i + 1]
        return self.req_to_token[:, : request.seq_len].index_select(0, row)[0].long()

    def _read(self, request: PrefillRequest, mm_inputs: Any) -> None:
        """Sets the request's prompt length, its map, and why it runs dense (None: it runs sparse)."""
        prompt = prompts.length_of(request.rid)
        request.prompt_stop = request.seq_len if prompt is None else prompt
        if self.guard is not None and mm_inputs is not None:
            request.served = of_request(mm_inputs, request.rid, request.served)
        all_dense = "dense_config" if request.served.all_dense else self.unfit
        if self._calibration is not None:
            all_dense = all_dense or "no_basis"
        if all_dense is not None and (mm_inputs is None or not self.observers):
            request.dense_reason = all_dense
        elif mm_inputs is None:
            request.dense_reason = "no_media"
        elif prompt is None:
            request.dense_reason = all_dense or "no_prompt_length"
        else:
            request.map, reason = self._map(request, mm_inputs, prompt)
            request.dense_reason = all_dense or reason

    def _map(self, request: PrefillRequest, mm_inputs: Any, prompt: int) -> tuple[ModalityMap | None, str | None]:
        """The modality map of a request, and the reason in the request itself for running dense.

        Args:
            prompt: tokens of the whole prompt.

        Returns:
            (map, dense_reason); the map is None if the media do not add up, the reason None if the request can run
            sparse.
        """
        try:
            modality_map = cached_map(mm_inputs, prompt, self.reader)
        except GeometryError as error:
            if not error.repeated:
                logger.warning("mminfer: request %s runs dense: %s", request.rid, error)
            return None, error.reason
        choice = request.served.choice
        return modality_map, choice.why_dense(modality_map, request.prefix_len, request.seq_len, prompt)

    def end(self) -> None:
        """Ends the current batch, if any, and writes its records. Without this a plan could outlive its batch."""
        batch, self.batch = self.batch, None
        if batch is None:
            return
        encoded_again, encode_ms = self._encoder.take(), self._encoder.milliseconds()
        if self.trace.enabled or self.metrics is not None or self.telemetry is not None or self.observers:
            records = batch.records(encoded_again, encode_ms, self.waits)
            self.observers.batch_done(records)
            self.trace.append(records if self.leads else [r for r in records if r.audit or r.guard])
            self._late.put(records, [request.densities for request in batch.requests])

    def _tell(self, records: list[PrefillRecord]) -> None:
        """Adds the records of one batch to the metrics and the telemetry."""
        if self.metrics is not None:
            self.metrics.add(records)
        if self.telemetry is not None:
            self.telemetry.add(records)

    # ---- a layer -------------------------------------------------------------------------------------------

    def takes(self, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], masked: bool = False) -> bool:
        """Whether this layer of the current batch runs on a plan; if not, the reason is counted.

        Args:
            q: [tokens, Hq * D].
            layer: SGLang's RadixAttention.
            kwargs: further arguments that the model passes to its attention; sparse layers take none.
            masked: whether the dense backend would apply a mask of the model's own.
        """
        batch = self.batch
        if batch is None:
            return False
        batch.masked = masked
        if batch.planner is None:
            return False
        reason = self._layer_reason(q, layer, kwargs, batch)
        if reason is not None:
            batch.layer_reasons[reason] += 1
        return reason is None

    def _layer_reason(self, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], batch: PrefillBatch) -> str | None:
        if layer.is_cross_attention or layer.attn_type.name != "DECODER":
            return "layer_not_causal"
        # A layer with `use_irope` sees the prompt in pieces, in models whose config has a chunk size for attention.
        if layer.use_irope or (layer.sliding_window_size is not None and layer.sliding_window_size > -1):
            return "layer_sliding_window"
        if layer.logit_cap or layer.xai_temperature_len > 0 or kwargs:
            return "layer_modified_softmax"
        if batch.masked:
            return "layer_custom_mask"
        if layer.qk_head_dim != layer.v_head_dim:
            return "layer_unequal_head_dims"
        if not 0 <= layer.layer_id < self.num_layers:
            return "layer_unknown"
        if batch.heads.is_dense(layer.layer_id):
            return "layer_dense_config"
        if self._kv_scales(q, self.kv_pool.get_key_buffer(layer.layer_id), layer) is None:
            return "kv_cache_dtype"
        if q.shape[0] != batch.num_rows:
            return "padded_rows"
        return None

    def _kv_scales(self, q: torch.Tensor, k_cache: torch.Tensor, layer: Any) -> KVScales | None:
        """How the pool stores the layer's keys and values; None if the executors cannot read them."""
        if k_cache.dtype == q.dtype:
            return KVScales()
        if executors.why_unread(k_cache.dtype, self.device) is not None:
            return None
        return KVScales.of(layer, self.dense_backend)

    def save_kv(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any) -> None:
        """Writes the batch's K and V of one layer into the KV pool."""
        scales = self._kv_scales(q, self.kv_pool.get_key_buffer(layer.layer_id), layer)
        assert scales is not None
        if scales.stored is not None:
            k, v = k.clone(), v.clone()  # the pool divides them in place, and the stock rows may need them
        self.kv_pool.set_kv_buffer(
            layer, releases.kv_write_loc(forward_batch, layer), k, v, *(scales.stored or (None, None))
        )

    def run_layer(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        stock: Callable[..., torch.Tensor],
    ) -> torch.Tensor | None:
        """Attention of one layer over the KV pool, which already holds the batch's K and V.

        Args:
            q: [tokens, Hq * D].
            k, v: the batch's keys and values, [tokens, ...]; None if the layer uses another layer's.
            layer: SGLang's RadixAttention.
            stock: stock(q of some heads, a view of the layer with only these heads) runs dense heads on the stock
                backend.

        Returns:
            [tokens, Hq * D], or None if it failed.
        """
        batch = self.batch
        assert batch is not None and batch.planner is not None
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k_cache, v_cache = self.kv_pool.get_kv_buffer(layer.layer_id)
        try:
            scales = self._kv_scales(q, k_cache, layer)
            assert scales is not None
            sm_scale = layer.scaling * scales.k
            start, heads = self.clock(), self._heads_of(layer, batch)
            plan = batch.planner.plan(heads.planned, q, k_cache, sm_scale, heads.basis)
            batch.plan_s += self.clock() - start
            out = q.new_empty(q.shape)
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            executors.EXECUTORS[self.executor](q, k_cache, v_cache, plan, sm_scale, out, lse)
            if scales.v != 1.0:
                out *= scales.v
            if heads.dense is not None:
                heads.dense.run(stock, q, layer, out)
            if batch.stock_rows is not None:
                batch.stock_rows.run(q, k, v, layer, out)
        except Exception:
            batch.layer_reasons["internal_error"] += 1
            self._failed(f"layer {layer.layer_id}")
            if self.unfit is not None:
                batch.planner = None
            return None
        batch.sparse_layers += 1
        batch.ran = plan, lse
        if self.trace.enabled or self.metrics is not None or self.telemetry is not None:
            self._note_density(batch, plan, heads)
        return out.flatten(1)

    def layer_done(self, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], o: torch.Tensor, start: float) -> None:
        """Called when the layer has its output: takes the time, and shows the layer to observers.

        Args:
            q, o: [tokens, Hq * D], the layer's queries and its output.
            start: the clock when the layer's attention began.
        """
        batch = self.batch
        if batch is None:
            return
        now = self.clock()
        batch.attn_s += now - start
        batch.forward_s = now - batch.started
        if self.observers:
            self.observers.show(lambda: self._view(batch, q, layer, kwargs, o))
        batch.ran = None
        if layer.layer_id == self._last_layer:
            self.end()

    def _view(
        self, batch: PrefillBatch, q: torch.Tensor, layer: Any, kwargs: dict[str, Any], o: torch.Tensor
    ) -> observe.LayerView | None:
        """What observers see of a layer of plain causal attention over the pool, sparse or dense; else None."""
        if self._layer_reason(q, layer, kwargs, batch) not in (None, "layer_dense_config"):
            return None
        requests = tuple(request.view() for request in batch.requests if request.slots is not None)
        if not requests:
            return None
        k_cache, v_cache = self.kv_pool.get_kv_buffer(layer.layer_id)
        scales = self._kv_scales(q, k_cache, layer)
        assert scales is not None  # else there is a reason
        count, heads = layer.tp_q_head_num, self._heads_of(layer, batch)
        plan, lse = batch.ran or (None, None)
        first_head = self.rank * count
        q = q.view(-1, count, layer.qk_head_dim)
        return observe.LayerView(
            layer_id=layer.layer_id,
            first_head=first_head,
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            sm_scale=layer.scaling * scales.k,
            v_scale=scales.v,
            requests=requests,
            patterns=heads.patterns,
            stock_heads=tuple(h for h, pattern in enumerate(heads.planned) if pattern is None) if plan else (),
            out=o.view(q.shape),
            plan=plan,
            lse=lse,
        )

    def _heads_of(self, layer: Any, batch: PrefillBatch) -> LayerHeads:
        """The layer's query heads on this rank."""
        shape = LayerShape.of(layer)
        self._shapes.add(shape)
        return batch.heads.of(shape)

    # ---- what is told --------------------------------------------------------------------------------------

    def _count_verified(self, requests: int, rows: int) -> None:
        """Counts a batch that verifies drafts. It is a kind of decoding, so the trace has no record of it."""
        for counters in (self.metrics, self.telemetry):
            if counters is not None:
                counters.count("mode_target_verify", requests, rows)

    def _note_density(self, batch: PrefillBatch, plan: BlockPlan, heads: LayerHeads) -> None:
        """Notes the density of a layer in each sparse request.

        It is counted by what each row sees. If the host does not wait for the device, it is the visited tiles' area,
        a scalar on the device where an estimate picks the tiles. The telemetry alone gets the area, too, because
        counting takes longer.
        """
        if batch.planner is None:
            return
        stock_heads = heads.planned.count(None)
        by_row = self.waits and (self.trace.enabled or self.metrics is not None)
        area: Any = None
        if not by_row:
            requests = len(batch.planned)
            area = plan.visited_area(requests) if heads.static else plan.counted_area(requests)
        for number, (request, chunk) in enumerate(zip(batch.planned, batch.planner.requests)):
            if chunk.map is None:
                continue
            if area is None:
                rows = slice(chunk.row_start, chunk.row_start + chunk.num_rows)
                visited = plan.visited_by_row[rows].sum() / chunk.causal_pairs
            else:
                visited = (area[number] / chunk.causal_pairs).clip(max=plan.num_heads - stock_heads)
            request.densities.append((visited + stock_heads) / plan.num_heads)

    def serving(self) -> telemetry.Serving:
        """How this backend serves now."""
        head_config = self.served.head_config
        all_dense = self.unfit or ("dense_config" if self.served.all_dense else None)
        return telemetry.Serving(
            head_config=self._config_choice.name,
            named_by=self._config_choice.source,
            description=head_config.describe(self._without_basis()),
            provenance=head_config.provenance.note,
            executor=self.executor,
            dense_backend=self.dense_backend,
            dense_reason=all_dense or ("no_basis" if self._calibration is not None else None),
            guarded_heads=self.guard.served.guarded if self.guard is not None else 0,
        )

    def _without_basis(self) -> str:
        """How heads choose keys where the head config brings no basis."""
        if self._calibration is not None:
            return "no basis yet"
        if self.served.bases:
            return f"keys are chosen by a basis of rank {self.served.head_config.basis_rank} from the built-in clip"
        return "no basis: by q . k"

    # ---- the basis -----------------------------------------------------------------------------------------

    def _await_basis(self, place: calibration.Place) -> None:
        """Requests run dense until the clip has given the basis, or somebody says that it will not."""
        rank, rule = self.served.head_config.basis_rank, self.served.head_config.rule
        self._calibration = calibration.Calibration(
            rank,
            rule,
            lambda bases: self._settle_basis(place, rule, bases),
            lambda bases: calibration.keep(place, rank, bases, rule),
        )
        self.observers.add(self._calibration)

    def _settle_basis(self, place: calibration.Place, rule: Adaptive | None, bases: Mapping[int, Basis] | None) -> None:
        """Fixes the basis of this rank's heads for the server's life. None: they choose keys by q . k itself."""
        if self._calibration is not None:
            self.observers.remove(self._calibration)
            self._calibration = None
        shares = None
        if rule is not None:
            shares = KnownShares(rule, calibration.shares_of_all_ranks(place, bases or {}))
        self.served.settle_basis(bases or {}, shares)
        if self.leads:
            rank = self.served.head_config.basis_rank
            how = f"a basis of rank {rank} from the built-in clip" if bases else "q . k itself"
            logger.info("mminfer: heads choose keys by %s.", how)
        self._log_shares()

    def _log_shares(self) -> None:
        if self.leads and (mean := self.served.mean_share) is not None:
            logger.info("mminfer: heads that choose visit %.0f%% of the keys between sink and window.", 100 * mean)

    # ---- failures, and the clock ---------------------------------------------------------------------------

    def _failed(self, what: str) -> None:
        """Counts a failure of ours; called in the handler of its exception.

        Logs the traceback of the first failure. After `MOST_FAILURES` everything runs dense.
        """
        self.failures += 1
        if self.failures == 1:
            logger.exception("mminfer: %s failed; it runs dense", what)
        if self.failures == MOST_FAILURES:
            logger.error("mminfer: %d failures, the last one in %s; everything runs dense now", MOST_FAILURES, what)
            self.unfit = "executor_failed"

    def clock(self) -> float:
        """The host's clock, in seconds.

        A GPU runs kernels asynchronously, so with a trace each reading waits for the GPU once. Outside of a batch
        nothing is timed: SGLang may be capturing a CUDA graph, and a wait would end that with an error.
        """
        if self.batch is not None and self.trace.enabled and self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        return time.perf_counter()
