"""a_shape: sink and local window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sglang_mminfer.patterns.base import Count, Pattern, Size
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.ladder import SINK, Prompt
from sglang_mminfer.patterns.pair import Pair


@dataclass(frozen=True)
class AShape(Pattern, kind="a_shape", colour="#4c78a8"):
    """The first `sink` tokens and the last `local` ones (q - k < local).

    StreamingLLM; MMInference table 4.
    """

    sink: Count
    local: Size

    def visible(self, pair: Pair) -> torch.Tensor:
        return pair.window(self.sink, self.local)

    def index(self, scope: Scope) -> PairIndex:
        return PairIndex(sink=self.sink, local=self.local)

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Pattern]]:
        for local in prompt.windows:
            for sink in (SINK, 1024) if local >= 1024 and prompt.tokens > 8192 else (SINK,):
                yield f"a_shape {sink} {local}", cls(sink, local)

    @property
    def label(self) -> str:
        return f"A {self.local}"
