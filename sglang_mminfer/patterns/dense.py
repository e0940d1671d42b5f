"""dense: all keys."""

from __future__ import annotations

from sglang_mminfer.modality.runs import Runs
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.spec import Dense


def pair_index(pattern: Dense, scope: Scope) -> PairIndex:
    return PairIndex(dense_rows=Runs.span(0, scope.kv_len))
