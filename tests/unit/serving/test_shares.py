"""The shares of a basis: what query tiles of a conversation visit by the exact rule, and however it is cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sglang_mminfer import Adaptive, ModalityMap, pattern_mask
from sglang_mminfer.patterns.adaptive import QUERY_ROWS
from sglang_mminfer.patterns.basis import Basis, basis_of, second_moments
from sglang_mminfer.patterns.choice import MARGIN
from sglang_mminfer.planning.tiles import BLOCK_K
from sglang_mminfer.serving.observe import LayerView, RequestView
from sglang_mminfer.serving.shares import LEAST, TILES, LayerSample, sampled, shares
from support import VISION, conversation

HEADS, KV_HEADS, D = 4, 2, 16
SCALE = D**-0.5
RULE = Adaptive(64, 256, 8, 0.01, 0.5)
CHATS = {
    "one video": conversation(20, (16, 10, 10), 200),
    "frames between words": conversation(300, (10, 8, 12, 5), 30, (1, 20, 20), 10),
}


def heads(tokens: int, size: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """q [tokens, HEADS, D] and k: larger ones make more peaked heads."""
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(tokens, HEADS, D, generator=draw), torch.randn(tokens, KV_HEADS, D, generator=draw)
    return q * size * torch.logspace(0, -1.5, D), k * torch.logspace(0.3, -1, D)


def basis_for(q: torch.Tensor, k: torch.Tensor) -> Basis:
    return basis_of(second_moments(q), second_moments(k), 8)


def asked(rule: Adaptive, chat: ModalityMap, q: torch.Tensor, k: torch.Tensor, basis: Basis) -> torch.Tensor:
    """float64 [HEADS, tiles]: the share of the keys between sink and window that any row of a tile asks for."""
    by_head = []
    for head in range(HEADS):
        a, b = (part.double() for part in basis.of_head(head, HEADS))
        by_head.append([])
        for start, stop in sampled(rule, chat, chat.length):
            own = q[start:stop, head], k[:stop, head // (HEADS // KV_HEADS)]
            mask = pattern_mask(chat, rule, start, stop, stop, *own, sm_scale=SCALE, basis=(a, b))
            rows = chat.members(VISION)[start:stop]
            window = (start + int(rows.nonzero()[0]) + 1 - rule.local) // BLOCK_K * BLOCK_K
            by_head[-1].append(mask[rows][:, rule.sink : window].any(dim=0).double().mean())
    return torch.tensor(by_head)


@pytest.mark.parametrize("size", [0.5, 1, 2, 6])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_a_share_is_what_the_exact_rule_says(chat: ModalityMap, size: float) -> None:
    q, k = heads(chat.length, size)
    basis, slots = basis_for(q, k), torch.randperm(chat.length, generator=torch.Generator().manual_seed(1))
    cache = torch.full_like(k, torch.nan)
    cache[slots] = k
    tiles = [(start, q[start:stop]) for start, stop in sampled(RULE, chat, chat.length)]
    least = asked(RULE, chat, q, k, basis)
    most = asked(replace(RULE, alpha=RULE.alpha * math.exp(-2 * MARGIN)), chat, q, k, basis)
    assert (most - least).amax() < 0.01
    shares_asked = least.flatten().sort().values
    gap = shares_asked.diff().argmax()
    between = float(shares_asked[gap : gap + 2].mean())
    for budget in (1.0, max(between, 0.01)):  # no tile is near it
        found = shares(replace(RULE, budget=budget), tiles, chat, cache, slots, SCALE, basis)
        assert found.shape == (HEADS,) and found.dtype == torch.float32
        first, last = (torch.where(x > budget, 1.0, x).mean(dim=1) for x in (least, most))
        assert (found >= first - 1e-6).all() and (found <= last + 1e-6).all()


def test_a_peaked_head_has_a_small_share_and_a_diffuse_one_a_large_one() -> None:
    chat = CHATS["one video"]
    q, k = heads(chat.length, 2)
    q[:, 0] *= 30  # of two heads that share their keys, one looks at few of them
    tiles = [(start, q[start:stop]) for start, stop in sampled(RULE, chat, chat.length)]
    found = shares(RULE, tiles, chat, k, torch.arange(chat.length), SCALE, basis_for(q, k))
    assert found[0] < 0.2 and found[1] > 0.8


@pytest.mark.parametrize("ends", [(2000,), (700, 1300, 1350, 1700, 2000), tuple(range(100, 2001, 100))])
def test_chunks_give_what_the_whole_gives(ends: tuple[int, ...]) -> None:
    """A tile may lie in several chunks, and a chunk may hold none."""
    chat = conversation(20, (16, 10, 10), 380)
    assert chat.length == 2000
    q, k = heads(chat.length, 1)
    slots = torch.arange(chat.length)
    sample = None
    for start, stop in zip((0, *ends), ends):
        own = RequestView("clip", start, stop - start, 3, chat.length, chat, "no_basis", slots[:stop])
        rows = torch.cat([torch.full((3, HEADS, D), 9.0), q[start:stop]])  # behind those of another request
        view = LayerView(0, 0, rows, k, k, SCALE, (own,), (), (), rows)
        sample = sample or LayerSample.of(RULE, view, own)
        sample.add(view, own)
        rows.fill_(torch.nan)  # the next batch writes there
    assert sample is not None
    basis, tiles = basis_for(q, k), [(a, q[a:b]) for a, b in sampled(RULE, chat, chat.length)]
    found = sample.shares(basis)
    assert found is not None and torch.equal(found, shares(RULE, tiles, chat, k, slots, SCALE, basis))


def test_tiles_lie_where_rows_choose_among_enough_keys() -> None:
    for chat in CHATS.values():
        stretches = sampled(RULE, chat, chat.length)
        assert 1 < len(stretches) <= TILES
        for start, stop in stretches:
            assert stop - start == QUERY_ROWS and start - RULE.local - RULE.sink >= LEAST
            assert chat.members(VISION)[stop - 1]
    assert stretches[-1][1] == chat.length - 10, "the last vision row is among them"


@pytest.mark.parametrize(
    "chat", [conversation(5000), conversation(20, (8, 10, 10), 4000)], ids=["words", "a short video"]
)
def test_where_nobody_chooses_shares_are_unknown(chat: ModalityMap) -> None:
    q, k = heads(chat.length, 1)
    own = RequestView("clip", 0, chat.length, 0, chat.length, chat, "no_basis", torch.arange(chat.length))
    view = LayerView(0, 0, q, k, k, SCALE, (own,), (), (), q)
    sample = LayerSample.of(RULE, view, own)
    sample.add(view, own)
    assert sample.shares(basis_for(q, k)) is None
