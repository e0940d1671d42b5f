"""The search's observer on one made-up layer, in a process of its own: what it found, and the most memory it took.

usage: search_in_process.py FOLDER LIMIT_IN_BYTES
"""

import json
import sys
from pathlib import Path

import torch

from sglang_mminfer import Adaptive, AShape, Boundary2D, Dense, Grid, Modality, QBoundary, VerticalSlash
from sglang_mminfer.head_config import ModelBasis, ModelFingerprint, Provenance
from sglang_mminfer.serving.observe import LayerView, RequestView
from sglang_mminfer.tools.search import job as jobs
from sglang_mminfer.tools.search.observer import SearchObserver
from support import VIDEO, conversation

CHAT = conversation(200, (48, 6, 6), 150, (30, 6, 6), 90)
HEADS, KV_HEADS, D = 16, 4, 64
MODEL = ModelFingerprint("Made", 1, HEADS, KV_HEADS, D, HEADS * D, 1e4)
BASIS = "made.basis.npz"
CANDIDATES = (
    Dense(),
    AShape(64, 256),
    VerticalSlash(64, 64),
    VerticalSlash(1000, 1024),
    Adaptive(64, 64, 8, 0.1),
    Grid("frame", True, True, True, 3, 64, 64),
    Grid("row", False, False, True, 0, 64, 256),
    QBoundary({VIDEO: Grid("frame", True, False, True, 5, 64, 64), Modality.TEXT: VerticalSlash(256, 64)}),
    Boundary2D({(Modality.VISION, Modality.VISION): VerticalSlash(256, 64), (Modality.VISION, Modality.TEXT): Dense()}),
)


def view(tokens: int) -> LayerView:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, HEADS, D, generator=draw) * 2
    k, v = torch.randn(2, CHAT.length, KV_HEADS, D, generator=draw)
    slots = torch.randperm(CHAT.length, generator=draw)[:tokens]
    own = RequestView("r", 0, tokens, 0, tokens, CHAT, None, slots)
    return LayerView(0, 0, q, k, v, D**-0.5, (own,), (), (), q)


def run(folder: Path, tokens: int, limit: int) -> dict:
    """What a phases job and then a measure job left of the layer."""
    configs = [(str(n), jobs.as_config(str(n), [[head] * HEADS], MODEL)) for n, head in enumerate(CANDIDATES)]
    observer, shown, found = SearchObserver(folder, 0), view(tokens), {}
    for job in (jobs.Job("phases", "phases"), jobs.Job("measure", "measure", configs)):
        job.max_memory = limit
        job.basis = BASIS if (folder / BASIS).exists() else None  # not where the first job was refused
        jobs.write(folder, job)
        observer.layer(shown)
        found |= jobs.load(folder, job.result, [0])[0][0]
        if job.stage == "phases" and jobs.REFUSED not in found:
            moments = [torch.from_numpy(jobs.load_array(folder, job.result, 0, name))[None] for name in ("q", "k")]
            ModelBasis.of_moments(MODEL, Provenance("handwritten", "of a test"), *moments, 8).save(folder / BASIS)
    return found


def resident(what: str) -> int:
    """Bytes: VmRSS is now, VmHWM the most since the mark was taken back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


if __name__ == "__main__":
    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(2)
    with torch.inference_mode():
        run(folder / "warm", 300, 1 << 40)  # threads, code and pools of the libraries are not what is measured
        shown = view(CHAT.length)  # q, K and V are the server's
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        found = run(folder / "real", CHAT.length, limit)
    own = sum(t.numel() * 4 for t in (shown.q, shown.k_cache, shown.v_cache))  # `run` makes them once more
    print(json.dumps({"peak": resident("VmHWM") - before - own, "found": found}))
