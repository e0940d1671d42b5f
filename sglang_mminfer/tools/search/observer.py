"""The search's part that runs in the server, inside each layer of the calibration prompt's own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sglang_mminfer import settings
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.kernels import executors
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.planning.planner import RequestChunk
from sglang_mminfer.serving.observe import LayerView, RankInfo, RequestView
from sglang_mminfer.tools.search import job as jobs
from sglang_mminfer.tools.search import memory, tile_times
from sglang_mminfer.tools.search.measure import LayerProbe, Measured, cell_masses
from sglang_mminfer.tools.search.memory import Piece

logger = logging.getLogger(__name__)

MOST_PHASES = 3


def observer(value: str, rank: RankInfo) -> SearchObserver:
    """For `settings.OBSERVERS`: the value is the folder of the search."""
    return SearchObserver(Path(value), rank.rank, rank.ranks)


class SearchObserver:
    """Does what the job in the folder says with every prompt that comes whole: one request, nothing of it cached."""

    def __init__(self, folder: Path, rank: int, ranks: int = 1) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self._configs: tuple[str, list[HeadConfig]] = ("", [])

    def layer(self, view: LayerView) -> None:
        job = jobs.read(self.folder)
        if job is None or len(view.requests) != 1:
            return
        (request,) = view.requests
        path = jobs.result_path(self.folder, job.result, view.layer_id, self.rank)
        if request.map is None or request.prefix_len or request.chunk_len < 2 or path.exists():
            return
        look = self._phases if job.stage == "phases" else self._measured
        try:
            found = look(job, view, request, request.map)
        except MemoryError as refused:
            found = {jobs.REFUSED: str(refused)}
        jobs.save(path, found)

    def batch_done(self, records: Sequence[Any]) -> None:
        pass

    def _pieces(self, job: jobs.Job, view: LayerView, tokens: int, patterns: Iterable[HeadPattern]) -> list[Piece]:
        """The heads in pieces that fit into the memory that the job allows."""
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
        name = executors.name_for(settings.executor(), q.device)
        times = tile_times.measured(executors.EXECUTORS[name], q.shape[2], q.dtype, q.device)
        return {"map": jobs.map_to_json(modality_map), "phases": phases, "tile_us": times, "executor": name}

    def _measured(
        self, job: jobs.Job, view: LayerView, request: RequestView, modality_map: ModalityMap
    ) -> dict[str, Any]:
        execute = executors.EXECUTORS[executors.name_for(settings.executor(), view.q.device)]
        own = slice(view.first_head, view.first_head + view.num_heads)
        tried = [(c.patterns(view.layer_id)[own], c.defaults.dense_below) for c in self._parsed(job)]
        chunk = RequestChunk(modality_map, 0, request.seq_len, 0, request.slots)
        q = view.q[request.rows]
        of_pieces: list[list[Measured]] = []
        for piece in self._pieces(job, view, len(q), chain.from_iterable(heads for heads, _ in tried)):
            caches = view.k_cache[:, piece.kv_heads], view.v_cache[:, piece.kv_heads]
            probe = LayerProbe(chunk, q[:, piece.heads], *caches, view.sm_scale, execute)
            of_pieces.append([probe.measure(heads[piece.heads], dense_below) for heads, dense_below in tried])
        candidates = list(zip(*of_pieces))
        return {
            "error": [torch.cat([m.error for m in parts]).tolist() for parts in candidates],
            "visited": [torch.cat([m.visited for m in parts]).tolist() for parts in candidates],
            "visits": [torch.cat([m.visits for m in parts]).tolist() for parts in candidates],
            "ms": [sum(m.ms for m in parts) for parts in candidates],
            "causal": probe.causal.tolist(),
        }

    def _parsed(self, job: jobs.Job) -> list[HeadConfig]:
        """The candidates, read once for all layers."""
        if self._configs[0] != job.result:
            self._configs = (job.result, [HeadConfig.from_json(text, name) for name, text in job.candidates])
        return self._configs[1]


def _heaviest(mass: torch.Tensor) -> list[int]:
    return mass.topk(min(MOST_PHASES, len(mass))).indices.tolist()
