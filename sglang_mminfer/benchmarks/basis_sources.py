"""Where the basis of `adaptive` heads may come from: output error and density on conversations that no source has seen.

    python -m sglang_mminfer.benchmarks.basis_sources --model-path examples/needle_vlm/video --kind video

A server computes the conversations densely, and an observer keeps q, k and v of every layer. Then each source gives its
forms, and each layer of the held-out conversations runs through the sparse prefill wrapper with them. Sources: one
other conversation of the same kind; the clip that a server sends itself; the weights alone; the held-out conversation
itself (as good as a basis can be); and the exact q . k.

The error of a row is |o - o_dense| / |o_dense| over all heads of a layer, on the layer's own dense inputs; "mean" is
over rows and layers, "worst" the 99th percentile of rows, mean over layers. Rows that see all by rule (text after
vision) are not among them. Density is visited over causal pairs of all rows, mean over heads and layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from sglang_mminfer import settings
from sglang_mminfer.benchmarks.weight_forms import weight_forms
from sglang_mminfer.head_config import ModelFingerprint, fingerprint_of
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.basis import Basis, basis_of, held, second_moments
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.prefill import SparsePrefillWithPagedKVCacheWrapper
from sglang_mminfer.serving import clip
from sglang_mminfer.serving.observe import LayerView, RankInfo
from sglang_mminfer.tools import machine
from sglang_mminfer.tools.needles import kits, placed
from sglang_mminfer.tools.niah.ask import mm_process_flags
from sglang_mminfer.tools.search.job import map_from_json, map_to_json
from sglang_mminfer.tools.server import Server

CAPTURE = "sglang_mminfer.benchmarks.basis_sources:capture"
RID = "captured-"
MAKE = {"video": placed.video_needles, "mixed": placed.mixed_needles}
SINK, LOCAL = 64, 256
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


# ---- in the server -----------------------------------------------------------------------------------------


def capture(value: str, rank: RankInfo) -> Capture:
    """The observer's factory for `settings.OBSERVERS`; `value` is a folder."""
    return Capture(Path(value))


class Capture:
    """Keeps q, k and v of each layer of requests whose ids say so, which come in one chunk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def layer(self, view: LayerView) -> None:
        for request in view.requests:
            if request.rid.startswith(RID) and request.map is not None:
                own = {
                    "q": view.q[request.rows].cpu(),
                    "k": view.k_cache[request.slots].cpu(),
                    "v": view.v_cache[request.slots].cpu(),
                    "scale": view.sm_scale,
                    "map": map_to_json(request.map),
                }
                torch.save(own, self._folder / f"{request.rid}.{view.layer_id}.pt")

    def batch_done(self, records: Sequence[Any]) -> None:
        pass


# ---- what it gives -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer of one conversation: q [tokens, Hq, D], k and v [tokens, Hkv, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    map: ModalityMap

    @classmethod
    def load(cls, folder: Path, name: str, number: int) -> Layer:
        own = torch.load(folder / f"{RID}{name}.{number}.pt", weights_only=True)
        return cls(own["q"].float(), own["k"].float(), own["v"].float(), own["scale"], map_from_json(own["map"]))

    def basis(self, rank: int) -> Basis:
        """From this layer's own moments."""
        return basis_of(second_moments(self.q), second_moments(self.k), rank)

    def run(self, pattern: Adaptive | Dense, basis: Basis | None) -> tuple[torch.Tensor, float]:
        """The output [tokens, Hq, D] of a pattern in all heads, and its mean density."""
        tokens, heads, dim = self.q.shape
        wrapper = SparsePrefillWithPagedKVCacheWrapper(backend="torch")
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        wrapper.plan(
            ends,
            ends,
            torch.arange(tokens, dtype=torch.int32),
            torch.ones(1, dtype=torch.int32),
            heads,
            self.k.shape[1],
            dim,
            1,
            modality_maps=[self.map],
            head_patterns=pattern,
            sm_scale=self.scale,
            q_data_type=torch.float32,
            basis=basis,
        )
        out = wrapper.run(self.q, (self.k[:, None], self.v[:, None]))
        assert isinstance(out, torch.Tensor)
        return out, float(wrapper.density.mean())

    def choosing_rows(self) -> torch.Tensor:
        """bool [tokens]: rows that see not all by rule, and have keys beyond sink and window."""
        vision = self.map.members(Modality.VISION)[: len(self.q)]
        return vision & (torch.arange(len(self.q)) >= SINK + LOCAL)


def measured(layers: Sequence[Layer], dense: Sequence[torch.Tensor], pattern: Adaptive, bases: Any) -> dict[str, float]:
    """Errors and density of one source on one conversation."""
    means, worst, densities = [], [], []
    for number, layer in enumerate(layers):
        out, density = layer.run(pattern, bases[number] if bases is not None else None)
        o = dense[number]
        error = ((out - o).flatten(1).norm(dim=1) / o.flatten(1).norm(dim=1))[layer.choosing_rows()]
        means.append(float(error.mean()))
        worst.append(float(error.quantile(0.99)))
        densities.append(density)
    return {"error": fmean(means), "worst": fmean(worst), "density": fmean(densities)}


def record(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Has a server compute all conversations. Returns their lengths in tokens."""
    media, lengths = folder / "media", {}
    conversations: dict[str, list[dict[str, Any]]] = {"clip": clip.messages(clip.SIZES[0])}
    names = ["other", *(f"held-out-{i}" for i in range(options.held_out))]
    for i, name in enumerate(names):
        draw = np.random.default_rng([options.seed, i])
        conversation = MAKE[options.kind](options.tokens, DEPTHS, draw, relays=bool(i % 2)).conversation
        conversations[name] = kits.GLYPHS.messages(conversation, media, name)[:-1]
    flags = (
        *("--attention-backend", "mminfer", "--mminfer-config", "dense", "--chunked-prefill-size", "-1"),
        *("--disable-radix-cache", "--skip-server-warmup", "--sleep-on-idle", *mm_process_flags(kits.GLYPHS)),
    )
    env = {settings.OBSERVERS.variable: f"{CAPTURE}={folder}"}
    with Server(options.model_path, *flags, env=env, timeout=3600) as server:
        for name, messages in conversations.items():
            answer = server.client().chat.completions.create(
                model=server.model, messages=messages, max_tokens=1, temperature=0, extra_body={"rid": f"{RID}{name}"}
            )
            lengths[name] = answer.usage.prompt_tokens
    return lengths


def compare(options: argparse.Namespace, model: ModelFingerprint, folder: Path) -> list[dict[str, Any]]:
    """A row for each held-out conversation, source, rank and alpha."""
    rows = []
    numbers = range(model.layers)
    calibrations = {name: [Layer.load(folder, name, n) for n in numbers] for name in ("other", "clip")}
    for i in range(options.held_out):
        layers = [Layer.load(folder, f"held-out-{i}", n) for n in numbers]
        dense = [layer.run(Dense(), None)[0] for layer in layers]
        for rank in (*options.ranks, model.head_dim):
            sources: dict[str, Any] = {"exact q . k": None}
            if rank < model.head_dim:
                sources = {name: [layer.basis(rank) for layer in given] for name, given in calibrations.items()}
                sources["weights"] = weight_forms(Path(options.model_path), model, rank)
                sources["itself"] = [layer.basis(rank) for layer in layers]
            for source, bases in sources.items():
                for alpha in options.alphas:
                    pattern = Adaptive(SINK, LOCAL, rank, alpha)
                    row = {"held_out": i, "source": source, "rank": rank, "alpha": alpha}
                    rows.append({**row, **measured(layers, dense, pattern, bases)})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def shares(model: ModelFingerprint, folder: Path, name: str, ranks: Sequence[int]) -> dict[str, list[float]]:
    """The share of q . k that ranks hold in each layer, mean over KV heads."""
    found: dict[str, list[float]] = {str(rank): [] for rank in ranks}
    for number in range(model.layers):
        layer = Layer.load(folder, name, number)
        of_ranks = held(second_moments(layer.q), second_moments(layer.k)).mean(dim=0)
        for rank in ranks:
            found[str(rank)].append(round(float(of_ranks[rank - 1]), 4))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model-path", required=True, help="a needle model's folder")
    parser.add_argument("--kind", choices=MAKE, default="video", help="the conversations: as the model was trained for")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--held-out", type=int, default=2, help="how many conversations to measure on")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.03, 0.01, 0.003])
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder for q, k and v, from which a second run takes them")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    model = fingerprint_of(AutoConfig.from_pretrained(options.model_path))
    with tempfile.TemporaryDirectory(prefix="mminfer-bench-") as temporary:
        folder = (options.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "lengths.json"
        if not known.exists():
            known.write_text(json.dumps(record(options, folder)))
        rows = compare(options, model, folder)
        report = {
            **machine.describe(),
            "date": date.today().isoformat(),
            "about": __doc__,
            "tokens": json.loads(known.read_text()),
            "pattern": {"sink": SINK, "local": LOCAL, "heads": "all"},
            "held": {name: shares(model, folder, name, [2, *options.ranks]) for name in ("clip", "other")},
            "rows": rows,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
