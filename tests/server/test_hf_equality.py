"""With configs that leave nothing out, the sparse path gives the answers of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from serving import LAYERS, ROUNDING, Dialogue, Media, Message, Served, assistant
from sglang_mminfer.serving.clip_sender import CLIP_RID
from sglang_mminfer.testing.oracle import HFOracle, OracleAnswer, compare

WIDE = ("covering_256_no_radix", "covering_256")
SERVERS = [
    pytest.param(name, marks=[pytest.mark.wide] if name in WIDE else [])
    for name in ("covering_64", *WIDE, "covering_off")
]
"""Chunks of 64, of 256, and none; radix cache on and off. The first has all patterns and boundaries, the others one."""


def hold(oracle: HFOracle, turns: list[Message]) -> Dialogue:
    messages: list[Message] = []
    dialogue = []
    for turn in turns:
        messages = [*messages, turn]
        answer = oracle.answer(messages)
        dialogue.append((messages, answer))
        messages = [*messages, assistant(answer.text)]
    return dialogue


@pytest.fixture(scope="module")
def oracle(model: Path) -> HFOracle:
    return HFOracle(model)


@pytest.fixture(scope="module")
def dialogue(oracle: HFOracle, media: Media) -> Dialogue:
    return hold(oracle, media.six_turns())


@pytest.fixture(scope="module")
def batch(oracle: HFOracle, media: Media, dialogue: Dialogue) -> Dialogue:
    """Eight conversations: the long one, and the last turn of each of seven others."""
    others = [media.conversation(seed, 2 + seed % 2) for seed in range(100, 107)]
    return [dialogue[-1], *(hold(oracle, turns)[-1] for turns in others)]


def assert_equal(expected: OracleAnswer, got: OracleAnswer) -> None:
    result = compare(expected, got)
    assert result.prompt_equal and result.tokens_equal and result.max_difference < ROUNDING, str(result)
    assert result.compared_positions == len(expected.token_ids)


def assert_sparse(served: Served, answer: OracleAnswer, rid: str) -> None:
    """Asserts that all uncached tokens of a prompt with media ran through all layers on the sparse path."""
    records = served.records(rid)
    assert sum(r.chunk_len for r in records) == len(answer.prompt_ids) - (answer.cached_tokens or 0)
    assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}


@pytest.mark.parametrize("name", SERVERS)
def test_every_turn_of_a_conversation(served: Served, dialogue: Dialogue, name: str) -> None:
    radix = "no_radix" not in name
    for turn, (prompt, expected) in enumerate(dialogue):
        got = served.ask(prompt, rid=f"turn-{turn}")
        assert_equal(expected, got)
        assert_sparse(served, got, f"turn-{turn}")
        if turn:
            known = dialogue[turn - 1][1].prompt_ids
            assert got.cached_tokens >= len(known) if radix else not got.cached_tokens
        longest = max(r.chunk_len for r in served.records(f"turn-{turn}"))
        assert longest <= {"covering_64": 64, "covering_off": 10**6}.get(name, 256)


@pytest.mark.parametrize("name", SERVERS)
def test_eight_conversations_at_once(served: Served, batch: Dialogue, name: str) -> None:
    rids = [f"batch-{i}" for i in range(len(batch))]
    answers = served.ask_all([prompt for prompt, _ in batch], rids=rids)
    for rid, (prompt, expected), got in zip(rids, batch, answers):
        assert_equal(expected, got)
        if any(not isinstance(message["content"], str) and len(message["content"]) > 1 for message in prompt):
            assert_sparse(served, got, rid)


@pytest.mark.parametrize("name", SERVERS)
def test_nothing_failed_inside(servers: Callable[[str], Served], name: str) -> None:
    reasons = {r.dense_reason for r in servers(name).records() if not r.rid.startswith(CLIP_RID)}
    assert reasons <= {None, "no_media"}
