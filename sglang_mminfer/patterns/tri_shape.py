"""tri_shape: a_shape, with whole rows for text after vision and for the prompt's tail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_mminfer.modality.runs import Runs
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.base import Count, Pattern, Size
from sglang_mminfer.patterns.index import TEXT_AFTER_VISION, PairIndex, Scope
from sglang_mminfer.patterns.ladder import SINK, Prompt
from sglang_mminfer.patterns.pair import Pair

TAIL = "tail of tri_shape"


@dataclass(frozen=True)
class TriShape(Pattern, kind="tri_shape", colour="#72b7b2"):
    """As `a_shape`; all keys for text rows that have vision before them and for the prompt's last `tail` rows.

    MMInference table 3. `tail` is the one rule that looks ahead: it holds for one prompt cut in any way, not
    for a prompt that grows by a turn.
    """

    reasons: ClassVar[tuple[str, ...]] = (TEXT_AFTER_VISION, TAIL)
    looks_ahead: ClassVar[tuple[str, ...]] = ("tail",)
    sink: Count
    local: Size
    tail: Count

    def visible(self, pair: Pair) -> torch.Tensor:
        whole = pair.text_after_vision | (pair.q_pos >= pair.map.length - self.tail)
        return pair.window(self.sink, self.local) | whole[:, None]

    def index(self, scope: Scope) -> PairIndex:
        in_tail = Runs.span(max(0, scope.map.length - self.tail), scope.kv_len)
        whole = {TEXT_AFTER_VISION: scope.text_after_vision, TAIL: in_tail}
        return PairIndex(sink=self.sink, local=self.local, whole=whole)

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Pattern]]:
        for local in prompt.windows:
            yield f"tri_shape {SINK} {local}", cls(SINK, local, 0)

    @property
    def label(self) -> str:
        return f"tri {self.local}"

    def plain(self, rows: Modality) -> Pattern:
        """Without a tail, what a tri-shape adds to an A-shape is for rows of text only."""
        return self if self.tail or rows is Modality.TEXT else AShape(self.sink, self.local)
