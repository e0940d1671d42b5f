"""What the search asks of a server, and what it gets back: files in one folder, so that nothing is lost in between.

FOLDER/job.json says what to do with the prompts that come; FOLDER/RESULT/layer-LLL-rank-RR.json is what one layer of
one rank found. A result that is there is not made again, so a search that was cut short goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from sglang_mminfer.head_config import Defaults, HeadConfig, Provenance
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.boundary import HeadPattern

OBSERVER = "sglang_mminfer.tools.search.observer:observer"
JOB = "job.json"
FORMAT = "2"  # of results, in their folders' names
REFUSED = "refused"  # the key, in a result, of why there is none


class Job(msgspec.Struct, forbid_unknown_fields=True):
    """stage "phases": the map, the attention by cell, and what visits of tiles take. "measure": every candidate, each a
    head config as JSON text.

    result: the name of the folder that the prompt's results go to. max_memory: bytes that measuring may take in each
    rank, beside what the server has; None: as `memory.default_limit` says.
    """

    stage: Literal["phases", "measure"]
    result: str
    candidates: list[tuple[str, str]] = []
    max_memory: int | None = None


def write(folder: Path, job: Job) -> None:
    """Put the job where the server looks for it, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{JOB}.new"
    fresh.write_bytes(msgspec.json.encode(job))
    fresh.replace(folder / JOB)


def read(folder: Path) -> Job | None:
    try:
        return msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    except FileNotFoundError:
        return None


def result_path(folder: Path, result: str, layer: int, rank: int) -> Path:
    return folder / result / f"layer-{layer:03d}-rank-{rank:02d}.json"


def save(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(found))
    fresh.replace(path)


def load(folder: Path, result: str, layers: int) -> list[list[dict[str, Any]]]:
    """[layers][ranks] of what was found; layers that are missing have no ranks."""
    rows = []
    for layer in range(layers):
        paths = sorted((folder / result).glob(f"layer-{layer:03d}-rank-*.json"))
        rows.append([json.loads(path.read_text()) for path in paths])
    return rows


def refused(folder: Path, result: str, found: list[list[dict[str, Any]]]) -> str | None:
    """Why something was not measured, if so; such results are taken away, so that they are made again."""
    reasons = [rank[REFUSED] for ranks in found for rank in ranks if REFUSED in rank]
    if reasons:
        shutil.rmtree(folder / result)
    return reasons[0] if reasons else None


def as_config(name: str, heads: Sequence[Sequence[HeadPattern]], dense_below: int = 0) -> str:
    """[layers][heads] patterns as the text of a head config."""
    note = Provenance("handwritten", f"A candidate of a search: {name}.")
    rows = tuple(map(tuple, heads))
    return HeadConfig(name, note, "layers", rows, defaults=Defaults(dense_below)).to_json()


def map_to_json(modality_map: ModalityMap) -> list[dict[str, Any]]:
    return [
        {
            "modality": s.modality.value,
            "start": s.start,
            "stop": s.stop,
            "grid": s.grid and [s.grid.frames, s.grid.rows, s.grid.cols, list(s.grid.frame_starts), s.grid.raster],
        }
        for s in modality_map.segments
    ]


def map_from_json(segments: list[dict[str, Any]]) -> ModalityMap:
    def grid(of: list[Any] | None) -> VisionGrid | None:
        if of is None:
            return None
        frames, rows, cols, starts, raster = of
        return VisionGrid(frames, rows, cols, tuple(starts), raster)

    return ModalityMap([Segment(Modality(s["modality"]), s["start"], s["stop"], grid(s["grid"])) for s in segments])
