"""The part of `mminfer basis` that runs in the server: moments of all requests whose ids say that they calibrate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.serving.moments import Moments
from sglang_mminfer.serving.observe import LayerView, RankInfo

OBSERVER = "sglang_mminfer.tools.basis.observer:observer"
RID = "mminfer-calibration"
"""With which the ids of requests begin that calibrate."""


def observer(value: str, rank: RankInfo) -> MomentsObserver:
    """The observer's factory for `settings.OBSERVERS`; `value` is a folder for the moments."""
    return MomentsObserver(Path(value))


class MomentsObserver:
    """Sums up the moments of this process's layers and heads, and writes them after each batch that adds to them.

    Shares are those of the built-in config `default`. They are taken of each request by the basis of the requests so
    far, because in the end the keys are gone.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"moments-{os.getpid()}.npz"
        self._rule = default_rule()
        self._moments = Moments(by_head=True, rule=self._rule)
        self._shares: dict[int, list[torch.Tensor]] = {}
        self._first_head = 0
        self._is_new = self._is_complete = False

    def layer(self, view: LayerView) -> None:
        self._first_head = view.first_head
        for request in view.requests:
            if request.rid.startswith(RID):
                self._moments.add(view, request)
                self._is_new, self._is_complete = True, request.seq_len >= request.prompt_stop

    def batch_done(self, records: Sequence[Any]) -> None:
        if not self._is_new:
            return
        self._is_new = False
        layers = sorted(self._moments.layers)
        taken = [self._moments.layers[number] for number in layers]
        for number in layers if self._is_complete else ():
            basis = self._moments.layers[number].basis(min(self._rule.rank, taken[0].q.shape[-1]))
            if (shares := self._moments.with_shares(number, basis).shares) is not None:
                self._shares.setdefault(number, []).append(shares)
        unknown = torch.full((len(taken[0].q),), torch.nan)
        means = [torch.stack(self._shares.get(number, [unknown])).mean(dim=0).numpy() for number in layers]
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            np.savez(
                file,
                layers=np.array(layers),
                first_head=np.array(self._first_head),
                rows=np.array([layer.rows for layer in taken]),
                q=np.stack([layer.q.cpu().numpy() for layer in taken]),
                k=np.stack([layer.k.cpu().numpy() for layer in taken]),
                shares=np.stack(means),
            )
        fresh.replace(self._path)


@cache
def default_rule() -> Adaptive:
    """How heads of the built-in config choose: the rule of shares where no config is known."""
    rule = HeadConfig.load("default").rule
    assert rule is not None
    return rule


def read(folder: Path, layers: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The means of all processes' moments and shares.

    Returns:
        float64 [layers, heads, D, D] and [layers, kv_heads, D, D], with 0 for layers that no process showed (those with
        a sliding window and the like); float32 [layers, heads], the shares, NaN where no request was long enough; and
        the rows that were seen.
    """
    q: torch.Tensor | None = None
    k, shares, most = torch.zeros(0), torch.zeros(layers, heads), 0
    for path in sorted(folder.glob("moments-*.npz")):
        with np.load(path) as part:
            dim = part["q"].shape[-1]
            if q is None:
                q = torch.zeros(layers, heads, dim, dim, dtype=torch.float64)
                k = torch.zeros(layers, kv_heads, dim, dim, dtype=torch.float64)
            first, count = int(part["first_head"]), part["q"].shape[1]
            first_kv = first * kv_heads // heads
            shares[part["layers"], first : first + count] = torch.from_numpy(part["shares"])
            for number, rows, of_q, of_k in zip(part["layers"], part["rows"], part["q"], part["k"]):
                q[number, first : first + count] = torch.from_numpy(of_q / rows)
                k[number, first_kv : first_kv + len(of_k)] = torch.from_numpy(of_k / rows)
                most = max(most, int(rows))
    if q is None:
        raise FileNotFoundError(f"{folder}: no process wrote moments")
    return q, k, shares, most
