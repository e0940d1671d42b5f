"""EAGLE3: the target prefills sparsely and verifies drafts densely, and answers are those of a server without drafts.

The draft model knows answers of the server without it, so that some of its proposals are right and some are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from families import eagle3, qwen3_vl
from families_served import DRAFTED_SERVERS
from serving import (
    DENSE_BELOW,
    LAYERS,
    Dialogue,
    Media,
    Served,
    ran_sparse,
    same,
    scripted,
    text,
    user,
    video,
    wait_for,
)

QWEN3_VL = "qwen3_vl_eagle3"
"""A server of `make test-wide`. Its config leaves nothing out."""

NEW_TOKENS = 48
WIDTH = 4
"""Rows that verify the drafts of a request: the token before them, and three proposals, which is SGLang's default."""


@pytest.fixture(scope="module")
def expected(servers: Callable[[str], Served], media: Media) -> Dialogue:
    """The turns of a conversation, and three other conversations, each alone, in one chunk, with nothing cached."""
    one_shot = servers("one_shot")
    prompts = [
        *scripted(media.six_turns()),
        *(scripted(media.conversation(seed, 3), seed)[-1] for seed in (20, 21, 22)),
    ]
    return [(prompt, one_shot.ask(prompt, NEW_TOKENS)) for prompt in prompts]


@pytest.fixture(scope="module")
def speculating(servers: Callable[[str], Served], expected: Dialogue, model: Path, drafts: Path) -> Served:
    if not (drafts / "eagle3").exists():
        eagle3.make(drafts / "eagle3", model, [answer.token_ids for _, answer in expected[:3]], layers=range(LAYERS))
    found = servers("eagle3")
    found.server.flush_cache()
    return found


def counted(served: Served) -> tuple[dict[str, int], dict[str, int]]:
    """Requests and tokens by how they ran."""
    counters = json.loads(served.get("/mminfer"))["counters"]
    return counters["requests"], counters["tokens"]


@pytest.mark.server("eagle3")
def test_every_turn(speculating: Served, expected: Dialogue) -> None:
    """In chunks, over the cached prefix of earlier turns. Verification is counted, and saves steps."""
    requests_before, tokens_before = counted(speculating)
    new_tokens = 0
    for turn, (prompt, answer) in enumerate(expected[:6]):
        got = speculating.ask(prompt, NEW_TOKENS, rid=f"turn-{turn}")
        same(answer, got)
        records = speculating.records(f"turn-{turn}")
        assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW])
        new = len(got.prompt_ids) - (got.cached_tokens or 0)
        assert sum(r.chunk_len for r in records) == new
        assert turn == 0 or new < len(got.prompt_ids)
        new_tokens += new
    requests, tokens = counted(speculating)
    steps = requests["mode_target_verify"] - requests_before.get("mode_target_verify", 0)
    rows = tokens["mode_target_verify"] - tokens_before.get("mode_target_verify", 0)
    assert rows == WIDTH * steps
    assert 6 * NEW_TOKENS / WIDTH < steps < 0.9 * 6 * NEW_TOKENS
    assert sum(tokens.values()) - sum(tokens_before.values()) == new_tokens + rows


@pytest.mark.server("eagle3")
def test_several_at_once(speculating: Served, expected: Dialogue) -> None:
    """Some of them are retracted, and what they had generated is prefilled again."""
    rids = [f"together-{i}" for i in range(len(expected[5:]))]
    answers = speculating.ask_all([prompt for prompt, _ in expected[5:]], NEW_TOKENS, rids=rids)
    for (_, answer), got in zip(expected[5:], answers, strict=True):
        same(answer, got)
    lengths = {rid: len(got.prompt_ids) for rid, got in zip(rids, answers)}
    assert any(record.seq_len > lengths[rid] for rid in rids for record in speculating.records(rid))


@pytest.mark.server("eagle3")
def test_a_client_that_leaves_takes_nothing_along(speculating: Served, expected: Dialogue, media: Media) -> None:
    """Neither KV slots of the prompt nor those of drafts."""
    prompt = [user(video(media.medium_video), text("Where did it go?"))]
    before, _ = counted(speculating)

    def verified() -> bool:
        return counted(speculating)[0].get("mode_target_verify", 0) > before.get("mode_target_verify", 0)

    speculating.ask_and_leave(prompt, 4000, verified, rid="leaves")
    messages, answer = expected[0]
    same(answer, speculating.ask(messages, NEW_TOKENS))
    speculating.server.flush_cache()
    wait_for(lambda: speculating.used_tokens() == 0)


@pytest.mark.wide
@pytest.mark.server(QWEN3_VL)
def test_qwen3_vl(servers: Callable[[str], Served], media: Media, drafts: Path, tmp_path: Path) -> None:
    """Its vision features enter at several layers, and positions of a video are those of its frames."""
    plain = servers(DRAFTED_SERVERS[QWEN3_VL])
    prompts = scripted(media.six_turns())[:4]
    expected = [(prompt, plain.ask(prompt, NEW_TOKENS)) for prompt in prompts]
    answers = [answer.token_ids for _, answer in expected[:2]]
    eagle3.make(drafts / QWEN3_VL, qwen3_vl.make(tmp_path / "target"), answers, layers=range(LAYERS))
    speculating = servers(QWEN3_VL)
    for turn, (prompt, answer) in enumerate(expected):
        same(answer, speculating.ask(prompt, NEW_TOKENS, rid=f"turn-{turn}"))
        assert ran_sparse(speculating.records(f"turn-{turn}"))
    steps = counted(speculating)[0]["mode_target_verify"]
    assert len(expected) * NEW_TOKENS / WIDTH < steps < 0.9 * len(expected) * NEW_TOKENS
