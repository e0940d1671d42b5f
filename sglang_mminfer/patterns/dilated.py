"""dilated: sink and local window, and every n-th key before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sglang_mminfer.patterns.base import Count, Pattern, Size
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.ladder import SINK, Prompt
from sglang_mminfer.patterns.pair import Pair


@dataclass(frozen=True)
class Dilated(Pattern, kind="dilated"):
    """As `a_shape`, plus every key whose position in the prompt is a multiple of `every`.

    The columns of the fixed pattern of Sparse Transformers (1904.10509), one key wide.
    """

    sink: Count
    local: Size
    every: Size

    def visible(self, pair: Pair) -> torch.Tensor:
        return pair.window(self.sink, self.local) | (pair.k_pos % self.every == 0)

    def index(self, scope: Scope) -> PairIndex:
        multiples = np.arange(0, scope.kv_len, self.every)
        columns = multiples[scope.key_members.has(multiples)]
        return PairIndex(sink=self.sink, local=self.local, columns=columns)

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Pattern]]:
        for local in prompt.windows[:2]:
            for every in (8, 32):
                yield f"dilated {SINK} {local} every {every}", cls(SINK, local, every)

    @property
    def label(self) -> str:
        return f"dil {self.local}/{self.every}"
