"""How many keys the heads of a model choose, as far as it is known: see `shares.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import torch

from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.patterns.adaptive import Adaptive


@dataclass(frozen=True, eq=False)
class KnownShares:
    """The shares of a model's heads, as far as they are known. They are those of heads that choose by `rule`, so they
    say nothing of heads with other patterns.

    of_heads: float32 [layers, query heads], see `Basis.shares`; NaN where it is not known.
    """

    rule: Adaptive
    of_heads: torch.Tensor

    @classmethod
    def of(cls, head_config: HeadConfig) -> KnownShares | None:
        """Those of the config's basis; None: it has none."""
        basis = head_config.basis
        if basis is None or basis.shares is None or basis.rule is None:
            return None
        unknown = torch.full((basis.model.heads,), math.nan)
        by_layer = (basis.shares_of(layer) for layer in range(basis.model.layers))
        return cls(basis.rule, torch.stack([unknown if shares is None else shares for shares in by_layer]))

    def mean(self, head_config: HeadConfig) -> float | None:
        """The mean over the heads that choose by the rule; None: none does whose share is known."""
        by_head = (
            (pattern, share)
            for layer, shares in enumerate(self.of_heads.tolist())
            if (patterns := head_config.patterns(layer))
            for pattern, share in zip(patterns, shares, strict=True)
        )
        known = [share for pattern, share in by_head if pattern == self.rule and not math.isnan(share)]
        return fmean(known) if known else None
