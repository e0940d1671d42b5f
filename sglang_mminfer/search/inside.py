"""The search's part that runs in the server, inside each layer of the calibration prompt's own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_mminfer import config, executors
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.observe import LayerView, Place
from sglang_mminfer.patterns.plan import RequestChunk
from sglang_mminfer.search import job as jobs
from sglang_mminfer.search.measure import LayerProbe, cell_masses

logger = logging.getLogger(__name__)

MOST_PHASES = 3


def observer(value: str, place: Place) -> SearchObserver:
    """For `observe.BY_ENVIRONMENT`: the value is the folder of the search."""
    return SearchObserver(Path(value), place.rank)


class SearchObserver:
    """Does what the job in the folder says with every prompt that comes whole: one request, nothing of it cached."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._configs: tuple[str, list[HeadConfig]] = ("", [])

    def layer(self, view: LayerView) -> None:
        job = jobs.read(self.folder)
        if job is None or len(view.requests) != 1:
            return
        (request,) = view.requests
        path = jobs.result_path(self.folder, job.result, view.layer_id, self.rank)
        if request.map is None or request.prefix_len or request.chunk_len < 2 or path.exists():
            return
        chunk = RequestChunk(request.map, 0, request.seq_len, 0, request.slots)
        q = view.q[request.rows]
        if job.stage == "phases":
            k = view.k_cache[request.slots]
            masses = {s: cell_masses(request.map, q, k, view.sm_scale, s) for s in ("frame", "row")}
            found: dict[str, Any] = {
                "map": jobs.map_to_json(request.map),
                "phases": [{s: _heaviest(mass[head]) for s, mass in masses.items()} for head in range(q.shape[1])],
            }
        else:
            found = self._measured(job, view, chunk, q)
        jobs.save(path, found)

    def batch_done(self, records: Sequence[Any]) -> None:
        pass

    def _measured(self, job: jobs.Job, view: LayerView, chunk: RequestChunk, q: torch.Tensor) -> dict[str, Any]:
        execute = executors.EXECUTORS[executors.name_for(config.executor(), q.device)]
        probe = LayerProbe(chunk, q, view.k_cache, view.v_cache, view.sm_scale, execute)
        heads = slice(view.first_head, view.first_head + q.shape[1])
        measured = []
        for candidate in self._parsed(job):
            patterns = candidate.patterns(view.layer_id)[heads]
            measured.append(probe.measure(patterns, candidate.defaults.dense_below))
        return {
            "error": [m.error.tolist() for m in measured],
            "visited": [m.visited.tolist() for m in measured],
            "ms": [m.ms for m in measured],
            "dense_ms": probe.dense_ms,
            "causal": probe.causal.tolist(),
        }

    def _parsed(self, job: jobs.Job) -> list[HeadConfig]:
        """The candidates, read once for all layers."""
        if self._configs[0] != job.result:
            self._configs = (job.result, [HeadConfig.from_json(text, name) for name, text in job.candidates])
        return self._configs[1]


def _heaviest(mass: torch.Tensor) -> list[int]:
    return mass.topk(min(MOST_PHASES, len(mass))).indices.tolist()
