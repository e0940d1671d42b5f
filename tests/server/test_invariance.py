"""With patterns that leave much out, an answer does not depend on how its prompt came to be computed.

Chunks, cached prefixes, batches, pages, mixed chunks and the overlap scheduler change the order in which a prompt
is computed and nothing else. The sparse config of these servers has every static pattern and boundary in some head.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from serving import (
    DENSE_BELOW,
    LAYERS,
    MEDIUM_FRAME,
    MEDIUM_TOKENS,
    ROUNDING,
    Media,
    Message,
    Served,
    difference,
    ran_sparse,
    same,
    scripted,
    text,
    user,
    video,
)

from transformers import AutoConfig

from sglang_mminfer import AShape, Boundary2D, Dense, Grid, QBoundary, TriShape
from sglang_mminfer.evaluation.hf_oracle import OracleAnswer
from sglang_mminfer.head_config import HeadConfig

Expected = list[tuple[list[Message], OracleAnswer]]


@pytest.fixture(scope="module")
def turns(servers: Callable[[str], Served], media: Media) -> Expected:
    """Each turn of a conversation, its prompt computed in one piece from nothing, alone."""
    one_shot = servers("one_shot")
    return [(prompt, one_shot.ask(prompt, rid=f"one-shot-{i}")) for i, prompt in enumerate(scripted(media.six_turns()))]


@pytest.fixture(scope="module")
def others(servers: Callable[[str], Served], media: Media) -> Expected:
    """Seven other conversations, likewise."""
    prompts = [scripted(media.conversation(seed, 3), seed)[-1] for seed in range(20, 27)]
    return [(prompt, servers("one_shot").ask(prompt)) for prompt in prompts]


@pytest.fixture(params=["main", "paged"])
def served(request: pytest.FixtureRequest, servers: Callable[[str], Served]) -> Served:
    """Chunks of 96 with mixed chunks, or chunks of 128 on pages of 16; both with radix cache and overlap."""
    found = servers(request.param)
    found.server.flush_cache()
    return found


def test_config_has_every_static_kind(sparse_config: Path, model: Path) -> None:
    config = HeadConfig.load(str(sparse_config)).bind(AutoConfig.from_pretrained(model))
    kinds = {type(head) for layer in range(LAYERS) for head in config.patterns(layer)}
    assert kinds == {Dense, AShape, TriShape, Grid, QBoundary, Boundary2D}


def test_reference_is_whole_alone_and_sparse(servers: Callable[[str], Served], turns: Expected) -> None:
    for i, (_, answer) in enumerate(turns):
        (record,) = servers("one_shot").records(f"one-shot-{i}")
        assert (record.prefix_len, record.chunk_len) == (0, len(answer.prompt_ids))
        assert record.sparse_layers == LAYERS and record.density < 0.95


def test_answers_are_not_the_dense_ones(servers: Callable[[str], Served], turns: Expected, others: Expected) -> None:
    """Teeth: what all other tests here find equal would differ a thousand times more if a mask were lost."""
    dense = servers("covering_off")
    gaps = [difference(answer, dense.ask(prompt)) for prompt, answer in [*turns, *others]]
    assert min(gaps) > 100 * ROUNDING
    assert fmean(gaps) > 1000 * ROUNDING


def test_chunks_that_cut_frames(served: Served, turns: Expected) -> None:
    for i, (prompt, expected) in enumerate(turns):
        served.server.flush_cache()
        same(expected, served.ask(prompt, rid=f"chunks-{i}"))
        records = served.records(f"chunks-{i}")
        assert len(records) >= 3 and ran_sparse([r for r in records if r.seq_len > DENSE_BELOW])


def test_turn_by_turn_over_the_radix_cache(served: Served, turns: Expected) -> None:
    """One token for each turn, so that the cache holds prompts and nothing that was decoded."""
    for i, (prompt, expected) in enumerate(turns):
        got = served.ask(prompt, 8 if i == len(turns) - 1 else 1)
        page = 16
        assert i == 0 or got.cached_tokens >= len(turns[i - 1][1].prompt_ids) // page * page
        assert difference(expected, got) <= ROUNDING
        assert expected.token_ids[: len(got.token_ids)] == got.token_ids


def test_prefix_that_ends_inside_a_frame(servers: Callable[[str], Served], served: Served, media: Media) -> None:
    """Of a request whose client left after a few chunks; no other kind of prefix is cut within a medium."""
    prompt = [user(video(media.medium_video), text("Where did it go?"))]
    expected = servers("one_shot").ask(prompt)
    rid = f"cut-{served.server.port}"
    served.ask_and_leave(prompt, 8, when=lambda: len(served.records(rid)) > 1, rid=rid)
    got = served.ask(prompt)
    assert 0 < got.cached_tokens < MEDIUM_TOKENS and got.cached_tokens % MEDIUM_FRAME
    same(expected, got)


def test_batch_of_eight(served: Served, turns: Expected, others: Expected) -> None:
    together = [turns[-1], *others]
    answers = served.ask_all(prompt for prompt, _ in together)
    for (_, expected), got in zip(together, answers):
        same(expected, got)


def test_batch_of_eight_without_overlap_and_chunks(
    servers: Callable[[str], Served], turns: Expected, others: Expected
) -> None:
    together = [turns[-1], *others]
    answers = servers("one_shot").ask_all(prompt for prompt, _ in together)
    for (_, expected), got in zip(together, answers):
        same(expected, got)


def test_branches_of_one_conversation(servers: Callable[[str], Served], served: Served, media: Media) -> None:
    """Two conversations that part after the first turn: the second takes over the prefix of the first."""
    left, right = (scripted(media.six_turns(), seed)[3] for seed in (1, 2))
    served.ask(left, 1)
    got = served.ask(right)
    assert 0 < got.cached_tokens < len(got.prompt_ids) - 100
    same(servers("one_shot").ask(right), got)
