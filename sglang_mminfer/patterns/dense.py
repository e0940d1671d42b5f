"""dense: all keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_mminfer.modality.runs import Runs
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.ladder import Prompt
from sglang_mminfer.patterns.pair import Pair

BY_CONFIG = "dense by config"


@dataclass(frozen=True)
class Dense(Pattern, kind="dense", colour="#9aa0a6"):
    """Every key."""

    reasons: ClassVar[tuple[str, ...]] = (BY_CONFIG,)

    def visible(self, pair: Pair) -> torch.Tensor:
        return pair.everything()

    def index(self, scope: Scope) -> PairIndex:
        return PairIndex(whole={BY_CONFIG: Runs.span(0, scope.kv_len)})

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Pattern]]:
        yield "dense", cls()

    @property
    def label(self) -> str:
        return "dense"
