"""a_shape: sink and local window."""

from __future__ import annotations

from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.spec import AShape


def pair_index(pattern: AShape, scope: Scope) -> PairIndex:
    return PairIndex(sink=pattern.sink, local=pattern.local)
