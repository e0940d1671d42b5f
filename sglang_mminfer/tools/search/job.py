"""The search's questions to a server and the server's results: files in one folder, so that nothing is lost.

FOLDER/job.json says what to do with prompts. FOLDER/RESULT/layer-LLL-rank-RR.json is the result of one layer of one
rank, with layer-LLL-rank-RR.npz beside it if it has arrays. A result that exists is not made again, so a search that
was cut short continues where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.head_config import Defaults, HeadConfig, ModelFingerprint, Provenance
from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.patterns.boundary import HeadPattern

OBSERVER = "sglang_mminfer.tools.search.observer:observer"
JOB = "job.json"
FORMAT = "4"  # the version of the results' format; part of their folders' names
REFUSED = "refused"  # a result with this key holds only the reason why nothing was measured


class Job(msgspec.Struct, forbid_unknown_fields=True):
    """What a server should do with the next prompt.

    stage:      "phases" reports the map, the attention by cell, and the time of tile visits; "measure" measures every
                candidate.
    result:     the name of the folder for the results.
    candidates: (name, head config as JSON text).
    max_memory: how many bytes measuring may take in each rank, beside the server's own; None: `memory.default_limit`.
    basis:      the file in the folder with the basis of candidates that choose keys; None: there is none.
    """

    stage: Literal["phases", "measure"]
    result: str
    candidates: list[tuple[str, str]] = []
    max_memory: int | None = None
    basis: str | None = None


def write(folder: Path, job: Job) -> None:
    """Write the job where the server looks for it, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{JOB}.new"
    fresh.write_bytes(msgspec.json.encode(job))
    fresh.replace(folder / JOB)


def read(folder: Path) -> Job | None:
    """The job in the folder; None if there is none."""
    try:
        return msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    except FileNotFoundError:
        return None


def result_path(folder: Path, result: str, layer: int, rank: int) -> Path:
    """The file for the result of one layer of one rank."""
    return folder / result / f"layer-{layer:03d}-rank-{rank:02d}.json"


def save(path: Path, result: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
    """Write a result, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    if arrays:
        with fresh.open("wb") as file:
            np.savez(file, **arrays)
        fresh.replace(path.with_suffix(".npz"))
    fresh.write_text(json.dumps(result))
    fresh.replace(path)


def load(folder: Path, result: str, layers: Sequence[int]) -> list[list[dict[str, Any]]]:
    """[layers][ranks] results of the layers with these numbers; a layer without results has no ranks."""
    rows = []
    for layer in layers:
        paths = sorted((folder / result).glob(f"layer-{layer:03d}-rank-*.json"))
        rows.append([json.loads(path.read_text()) for path in paths])
    return rows


def load_array(folder: Path, result: str, layer: int, name: str) -> NDArray[Any]:
    """An array of one layer, that of all ranks along its first dimension."""
    paths = sorted((folder / result).glob(f"layer-{layer:03d}-rank-*.npz"))
    parts = []
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            parts.append(arrays[name])
    return np.concatenate(parts)


def refused(folder: Path, result: str, results: list[list[dict[str, Any]]]) -> str | None:
    """The reason why something was not measured, if there is one. Such results are removed, so that the next run makes
    them again."""
    reasons = [rank[REFUSED] for ranks in results for rank in ranks if REFUSED in rank]
    if reasons:
        shutil.rmtree(folder / result)
    return reasons[0] if reasons else None


def as_config(name: str, heads: Sequence[Sequence[HeadPattern]], model: ModelFingerprint, dense_below: int = 0) -> str:
    """Patterns [layers with attention][heads] as the JSON text of a head config."""
    note = Provenance("handwritten", f"A candidate of a search: {name}.")
    rows = model.in_all_layers(heads)
    return HeadConfig(name, note, "layers", rows, defaults=Defaults(dense_below)).to_json()


def map_to_json(modality_map: ModalityMap) -> list[dict[str, Any]]:
    """The segments of a map as JSON values."""
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
    """The map that `map_to_json` turned into JSON values."""

    def grid(fields: list[Any] | None) -> VisionGrid | None:
        if fields is None:
            return None
        frames, rows, cols, starts, raster = fields
        return VisionGrid(frames, rows, cols, tuple(starts), raster)

    return ModalityMap([Segment(Modality(s["modality"]), s["start"], s["stop"], grid(s["grid"])) for s in segments])
