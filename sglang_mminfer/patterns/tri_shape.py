"""tri_shape: a_shape, with dense rows for text after vision and for the prompt's tail."""

from __future__ import annotations

from sglang_mminfer.modality.runs import Runs
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.spec import TriShape


def pair_index(pattern: TriShape, scope: Scope) -> PairIndex:
    in_tail = Runs.span(max(0, scope.map.length - pattern.tail), scope.kv_len)
    return PairIndex(sink=pattern.sink, local=pattern.local, dense_rows=scope.text_after_vision | in_tail)
