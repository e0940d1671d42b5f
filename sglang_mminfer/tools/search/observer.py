"""The part of the search that runs in the server, in each layer of the calibration prompt's forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_mminfer import settings
from sglang_mminfer.head_config import HeadConfig, ModelBasis
from sglang_mminfer.kernels import executors
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.tiles import BLOCK_K
from sglang_mminfer.serving.moments import Moments
from sglang_mminfer.serving.observe import LayerView, RankInfo, RequestView
from sglang_mminfer.tools.basis.observer import default_rule
from sglang_mminfer.tools.search import job as jobs
from sglang_mminfer.tools.search import memory, tile_times
from sglang_mminfer.tools.search.measure import LayerProbe, Measured, cell_masses
from sglang_mminfer.tools.search.memory import Piece

logger = logging.getLogger(__name__)

MOST_PHASES = 3


def observer(value: str, rank: RankInfo) -> SearchObserver:
    """The observer's factory for `settings.OBSERVERS`; `value` is the folder of the search."""
    return SearchObserver(Path(value), rank.rank, rank.ranks)


def executor_for(q: torch.Tensor) -> str:
    """The name of the executor that the server runs for queries [tokens, heads, D]."""
    return executors.name_for(settings.executor(), q.device, q.shape[2], BLOCK_K, q.dtype)


class SearchObserver:
    """Runs FOLDER/job.json on each batch that is a single request without a cached prefix."""

    def __init__(self, folder: Path, rank: int, ranks: int = 1) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self._configs: tuple[str, list[HeadConfig]] = ("", [])
        self._bases: tuple[str, ModelBasis] | None = None

    def layer(self, view: LayerView) -> None:
        job = jobs.read(self.folder)
        if job is None or len(view.requests) != 1:
            return
        (request,) = view.requests
        path = jobs.result_path(self.folder, job.result, view.layer_id, self.rank)
        if request.map is None or request.prefix_len or request.chunk_len < 2 or path.exists():
            return
        measure_layer = self._phases if job.stage == "phases" else self._measured
        arrays: dict[str, np.ndarray] = {}
        try:
            result = measure_layer(job, view, request, request.map)
            if job.stage == "phases":
                arrays = _moments(view, request)
        except MemoryError as too_little:
            result = {jobs.REFUSED: str(too_little)}
        jobs.save(path, result, arrays)

    def batch_done(self, records: Sequence[Any]) -> None:
        pass

    def _pieces(self, job: jobs.Job, view: LayerView, tokens: int, patterns: Iterable[HeadPattern]) -> list[Piece]:
        """The heads in pieces, each of which fits into the memory that the job allows."""
        limit = job.max_memory
        if limit is None:
            limit = memory.default_limit(view.q.device, self.ranks)
        threads = 1 if view.q.is_cuda else torch.get_num_threads()
        itemsize = max(view.q.element_size(), view.k_cache.element_size())
        picked = memory.most_picked(patterns, tokens)
        footprint = memory.Footprint(tokens, view.q.shape[2], itemsize, threads, picked)
        return memory.pieces(view.num_heads, view.k_cache.shape[1], footprint, limit)

    def _phases(
        self, job: jobs.Job, view: LayerView, request: RequestView, modality_map: ModalityMap
    ) -> dict[str, Any]:
        q, phases = view.q[request.rows], []
        for piece in self._pieces(job, view, len(q), []):
            k = view.k_cache[request.slots, piece.kv_heads]
            masses = {s: cell_masses(modality_map, q[:, piece.heads], k, view.sm_scale, s) for s in ("frame", "row")}
            heads = range(piece.heads.stop - piece.heads.start)
            phases += [{s: _heaviest(mass[head]) for s, mass in masses.items()} for head in heads]
        name = executor_for(q)
        times = tile_times.measured(executors.EXECUTORS[name], q.shape[2], q.dtype, q.device)
        return {"map": jobs.map_to_json(modality_map), "phases": phases, "tile_us": times, "executor": name}

    def _measured(
        self, job: jobs.Job, view: LayerView, request: RequestView, modality_map: ModalityMap
    ) -> dict[str, Any]:
        execute = executors.EXECUTORS[executor_for(view.q)]
        own_heads = slice(view.first_head, view.first_head + view.num_heads)
        candidates = [(c.patterns(view.layer_id)[own_heads], c.defaults.dense_below) for c in self._parsed(job)]
        chunk = RequestChunk(modality_map, 0, request.seq_len, 0, request.slots)
        q = view.q[request.rows]
        basis = None
        if job.basis is not None:
            basis = self._basis(job.basis).layer(view.layer_id, view.first_head, view.num_heads, q.device)
        by_piece: list[list[Measured]] = []
        for piece in self._pieces(job, view, len(q), chain.from_iterable(heads for heads, _ in candidates)):
            caches = view.k_cache[:, piece.kv_heads], view.v_cache[:, piece.kv_heads]
            own_basis = None if basis is None else basis.part(piece.heads, view.num_heads)
            probe = LayerProbe(chunk, q[:, piece.heads], *caches, view.sm_scale, execute, own_basis)
            by_piece.append([probe.measure(heads[piece.heads], dense_below) for heads, dense_below in candidates])
        by_candidate = list(zip(*by_piece))
        return {
            "error": [torch.cat([m.error for m in parts]).tolist() for parts in by_candidate],
            "visited": [torch.cat([m.visited for m in parts]).tolist() for parts in by_candidate],
            "visits": [torch.cat([m.visits for m in parts]).tolist() for parts in by_candidate],
            "ms": [sum(m.ms for m in parts) for parts in by_candidate],
            "causal": probe.causal.tolist(),
        }

    def _basis(self, file: str) -> ModelBasis:
        """The basis of the job, read once for all layers."""
        if self._bases is None or self._bases[0] != file:
            self._bases = file, ModelBasis.load(self.folder / file)
        return self._bases[1]

    def _parsed(self, job: jobs.Job) -> list[HeadConfig]:
        """The candidates of the job, parsed once for all layers."""
        if self._configs[0] != job.result:
            self._configs = (job.result, [HeadConfig.from_json(text, name) for name, text in job.candidates])
        return self._configs[1]


def _moments(view: LayerView, request: RequestView) -> dict[str, np.ndarray]:
    """What is measured of the heads of this rank. float32 [heads, D, D], "q" and "k": the second moments of the
    request's queries and keys. float32 [heads], "shares": those of `default` by a basis of these; NaN where the request
    is too short."""
    rule = default_rule()
    moments = Moments(by_head=True, rule=rule)
    moments.add(view, request)
    layer = moments.layers[view.layer_id]
    arrays = {name: (sums / layer.rows).float().cpu().numpy() for name, sums in (("q", layer.q), ("k", layer.k))}
    shares = moments.with_shares(view.layer_id, layer.basis(min(rule.rank, view.q.shape[2]))).shares
    unknown = torch.full((view.num_heads,), torch.nan)
    return arrays | {"shares": (unknown if shares is None else shares).numpy()}


def _heaviest(mass: torch.Tensor) -> list[int]:
    return mass.topk(min(MOST_PHASES, len(mass))).indices.tolist()
