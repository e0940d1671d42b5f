"""A server whose KV cache is fp8 runs sparse, and answers as transformers does over keys and values of fp8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serving import LAYERS, Dialogue, Media, Served
from sglang_mminfer.testing.oracle import HFOracle, compare
from test_hf_equality import hold

pytestmark = pytest.mark.server("fp8")

ROUNDED = 2e-3
"""The most that a log-probability may differ. Where rounding in fp32 tips a key over to the next fp8 number, answers
differ by more than that rounding does."""


@pytest.fixture(scope="module")
def dialogue(model: Path, media: Media) -> Dialogue:
    return hold(HFOracle(model, kv_dtype=torch.float8_e4m3fn), media.six_turns())


def test_every_turn_of_a_conversation(
    servers: Callable[[str], Served], dialogue: Dialogue, model: Path, media: Media
) -> None:
    """In chunks, over cached prefixes, with every pattern; and it is fp8 that makes the difference."""
    served, wide, gaps = servers("fp8"), HFOracle(model), []
    for turn, (prompt, expected) in enumerate(dialogue):
        got = served.ask(prompt, rid=f"turn-{turn}")
        result = compare(expected, got)
        assert result.prompt_equal and result.tokens_equal and result.max_difference < ROUNDED, f"{turn}: {result}"
        records = served.records(f"turn-{turn}")
        assert sum(r.chunk_len for r in records) == len(got.prompt_ids) - (got.cached_tokens or 0)
        assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
        assert all(layer.error_max < 1e-4 for r in records for layer in r.audit or [])
        assert (got.cached_tokens or 0) >= (len(dialogue[turn - 1][1].prompt_ids) if turn else 0)
        gaps.append(compare(wide.answer(prompt), got).max_difference)
    print("XX", gaps)
    assert min(gaps) > 50 * ROUNDED
