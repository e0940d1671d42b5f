"""With patterns that leave much out, an answer does not depend on how its prompt is computed.

Chunks, cached prefixes, batches, pages, mixed chunks and the overlap scheduler change the order in which a prompt
is computed, and nothing else. Each static pattern and boundary has a head in these servers' sparse config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoConfig

from serving import (
    DENSE_BELOW,
    LAYERS,
    MEDIUM_FRAME,
    MEDIUM_TOKENS,
    PAGE,
    ROUNDING,
    References,
    Served,
    difference,
    ran_sparse,
    same,
)
from sglang_mminfer import AShape, Boundary2D, Dense, Grid, QBoundary, TriShape
from sglang_mminfer.head_config import HeadConfig

SERVERS = ["paged", "main"]
"""Chunks of 128 on pages of 16; chunks of 96, mixed with decoding. Both use the radix cache and overlap scheduler."""


def test_config_has_every_static_kind(sparse_config: Path, model: Path) -> None:
    config = HeadConfig.load(str(sparse_config)).bind(AutoConfig.from_pretrained(model))
    kinds = {type(head) for layer in range(LAYERS) for head in config.patterns(layer)}
    assert kinds == {Dense, AShape, TriShape, Grid, QBoundary, Boundary2D}


@pytest.mark.server("covering_off")
def test_answers_are_not_the_dense_ones(servers: Callable[[str], Served], references: References) -> None:
    """Shows that the other tests here can fail: without a mask answers differ by a thousand times what those allow."""
    dense = servers("covering_off")
    gaps = [difference(answer, dense.ask(prompt)) for prompt, answer in [*references.turns, *references.others]]
    assert min(gaps) > 100 * ROUNDING
    assert fmean(gaps) > 1000 * ROUNDING


@pytest.mark.server("one_shot")
def test_reference_is_whole_alone_and_sparse(servers: Callable[[str], Served], references: References) -> None:
    for i, (_, answer) in enumerate(references.turns):
        (record,) = servers("one_shot").records(f"reference-turn-{i}")
        assert (record.prefix_len, record.chunk_len) == (0, len(answer.prompt_ids))
        assert record.sparse_layers == LAYERS and record.density < 0.95


@pytest.mark.server("one_shot")
def test_batch_of_eight_without_chunks_and_overlap(servers: Callable[[str], Served], references: References) -> None:
    answers = servers("one_shot").ask_all(prompt for prompt, _ in references.batch)
    for (_, expected), got in zip(references.batch, answers):
        same(expected, got)


@pytest.mark.parametrize("name", SERVERS)
def test_chunks_that_cut_frames(served: Served, references: References) -> None:
    for i, (prompt, expected) in enumerate(references.turns):
        served.server.flush_cache()
        same(expected, served.ask(prompt, rid=f"chunks-{i}"))
        records = served.records(f"chunks-{i}")
        assert len(records) >= 3 and ran_sparse([r for r in records if r.seq_len > DENSE_BELOW])


@pytest.mark.parametrize("name", SERVERS)
def test_turn_by_turn_over_the_radix_cache(served: Served, references: References) -> None:
    """Each turn generates one token, so that the cache holds prompts and no decoded tokens."""
    known = 0
    for i, (prompt, expected) in enumerate(references.turns):
        got = served.ask(prompt, 8 if i == len(references.turns) - 1 else 1)
        assert got.cached_tokens >= known
        known = len(got.prompt_ids) // PAGE * PAGE
        assert difference(expected, got) <= ROUNDING
        assert expected.token_ids[: len(got.token_ids)] == got.token_ids


@pytest.mark.parametrize("name", SERVERS)
def test_prefix_that_ends_inside_a_frame(served: Served, references: References) -> None:
    """The request's client disconnected after a few chunks. No other kind of prefix ends within a medium."""
    prompt, expected = references.medium
    for attempt in range(5):  # the client may disconnect too late: the prefill takes a fraction of a second
        served.server.flush_cache()
        rid = f"cut-{served.server.port}-{attempt}"
        served.ask_and_leave(prompt, 8, when=lambda rid=rid: len(served.records(rid)) > 1, rid=rid)
        got = served.ask(prompt)
        same(expected, got)
        if 0 < got.cached_tokens < MEDIUM_TOKENS and got.cached_tokens % MEDIUM_FRAME:
            return
    pytest.skip("no client left in time for a prefix that ends inside a frame")


@pytest.mark.parametrize("name", SERVERS)
def test_branches_of_one_conversation(served: Served, references: References) -> None:
    """The second conversation reuses the cached prefix of the first."""
    (left, _), (right, expected) = references.branches
    served.ask(left, 1)
    got = served.ask(right)
    assert 0 < got.cached_tokens < len(got.prompt_ids) - 100
    same(expected, got)


@pytest.mark.parametrize("name", SERVERS)
def test_batch_of_eight(served: Served, references: References) -> None:
    answers = served.ask_all(prompt for prompt, _ in references.batch)
    for (_, expected), got in zip(references.batch, answers):
        same(expected, got)
