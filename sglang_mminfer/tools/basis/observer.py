"""The part of `mminfer basis` that runs in the server: moments of all requests whose ids say that they calibrate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_mminfer.serving.moments import Moments
from sglang_mminfer.serving.observe import LayerView, RankInfo

OBSERVER = "sglang_mminfer.tools.basis.observer:observer"
RID = "mminfer-calibration"
"""With which the ids of requests begin that calibrate."""


def observer(value: str, rank: RankInfo) -> MomentsObserver:
    """The observer's factory for `settings.OBSERVERS`; `value` is a folder for the moments."""
    return MomentsObserver(Path(value))


class MomentsObserver:
    """Sums up the moments of this process's layers and heads, and writes them after each batch that adds to them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"moments-{os.getpid()}.npz"
        self._moments = Moments(by_head=True)
        self._first_head = 0
        self._is_new = False

    def layer(self, view: LayerView) -> None:
        self._first_head = view.first_head
        for request in view.requests:
            if request.rid.startswith(RID):
                self._moments.add(view, request)
                self._is_new = True

    def batch_done(self, records: Sequence[Any]) -> None:
        if not self._is_new:
            return
        self._is_new = False
        layers = sorted(self._moments.layers)
        taken = [self._moments.layers[number] for number in layers]
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            np.savez(
                file,
                layers=np.array(layers),
                first_head=np.array(self._first_head),
                rows=np.array([layer.rows for layer in taken]),
                q=np.stack([layer.q.cpu().numpy() for layer in taken]),
                k=np.stack([layer.k.cpu().numpy() for layer in taken]),
            )
        fresh.replace(self._path)


def read(folder: Path, layers: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The means of all processes' moments.

    Returns:
        float64 [layers, heads, D, D] and [layers, kv_heads, D, D], with 0 for layers that no process showed (those with
        a sliding window and the like); and the rows that were seen.
    """
    q: torch.Tensor | None = None
    k, most = torch.zeros(0), 0
    for path in sorted(folder.glob("moments-*.npz")):
        with np.load(path) as part:
            dim = part["q"].shape[-1]
            if q is None:
                q = torch.zeros(layers, heads, dim, dim, dtype=torch.float64)
                k = torch.zeros(layers, kv_heads, dim, dim, dtype=torch.float64)
            first, count = int(part["first_head"]), part["q"].shape[1]
            first_kv = first * kv_heads // heads
            for number, rows, of_q, of_k in zip(part["layers"], part["rows"], part["q"], part["k"]):
                q[number, first : first + count] = torch.from_numpy(of_q / rows)
                k[number, first_kv : first_kv + len(of_k)] = torch.from_numpy(of_k / rows)
                most = max(most, int(rows))
    if q is None:
        raise FileNotFoundError(f"{folder}: no process wrote moments")
    return q, k, most
