"""dense: all keys."""

from __future__ import annotations

import torch

from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.patterns.spec import Dense


def pair_index(pattern: Dense, scope: Scope) -> PairIndex:
    return PairIndex(dense_rows=torch.ones(scope.kv_len, dtype=torch.bool))
