"""Conversations over a paged cache: every key that a head wants is visited, and the result is softmax over these."""

from __future__ import annotations

from hypothesis import strategies as st

from support import Batch, batches
from support import check as check_batch

CASES = batches(max_requests=2, max_length=64)


def cases() -> st.SearchStrategy[Batch]:
    return CASES


def check(batch: Batch) -> str:
    check_batch(batch, "torch")
    return "right"
