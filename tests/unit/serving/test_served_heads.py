"""Heads that choose keys without a basis take as long as dense attention, so their requests run dense; and so do heads
that choose too many."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sglang_mminfer import Adaptive, Dense, HeadConfig, settings
from sglang_mminfer.head_config import ModelBasis, ModelFingerprint, Provenance
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.serving.known_shares import KnownShares
from sglang_mminfer.serving.served_heads import Placement, ServedHeads
from support import conversation

LAYERS, HEADS, DIM = 2, 4, 128
CHAT = conversation(20, (128, 16, 16), 20)
HOW = Provenance("handwritten", "of a test")
CONFIG = HeadConfig("x", HOW, "all", ((Adaptive(64, 256, 8, 0.01),),), num_layers=LAYERS, num_heads=HEADS)
BASIS = Basis(torch.ones(HEADS, 8, DIM), torch.ones(HEADS, 8, DIM))


@pytest.fixture(autouse=True)
def only_if_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.SPARSE.variable, "faster")


def why_dense(served: ServedHeads) -> str | None:
    return served.choice.why_dense(CHAT, 0, CHAT.length, CHAT.length)


def served(config: HeadConfig) -> ServedHeads:
    return ServedHeads(config, Placement(0, torch.device("cpu"), DIM, "torch", "torch_native"))


def test_sparse_with_a_basis_and_dense_without() -> None:
    model = ModelFingerprint("Made", LAYERS, HEADS, HEADS, DIM, HEADS * DIM, 1e4)
    whole = ModelBasis(model, HOW, *torch.ones(2, LAYERS, HEADS, 8, DIM))
    assert why_dense(served(dataclasses.replace(CONFIG, basis=whole))) is None
    heads = served(CONFIG)
    assert why_dense(heads) == "not_faster"
    heads.choose_by({})
    assert why_dense(heads) == "not_faster"
    heads.choose_by({layer: BASIS for layer in range(LAYERS)})
    assert why_dense(heads) is None
    assert why_dense(heads.with_dense([(0, 1)])) is None


def test_sparse_without_a_basis_if_it_is_always_asked_for() -> None:
    heads = served(CONFIG)
    heads.choice.only_if_faster = False
    assert why_dense(heads) is None


# ---- what is known of how many keys they choose ------------------------------------------------------------

RULE = CONFIG.rows[0][0]


def with_shares(config: HeadConfig, shares: list[list[float]]) -> HeadConfig:
    model = ModelFingerprint("Made", LAYERS, HEADS, HEADS, DIM, HEADS * DIM, 1e4)
    basis = ModelBasis(model, HOW, *torch.ones(2, LAYERS, HEADS, 8, DIM), torch.tensor(shares), RULE)
    return dataclasses.replace(config, basis=basis)


def dense(heads: ServedHeads) -> list[tuple[int, int]]:
    rows = [heads.head_config.patterns(layer) for layer in range(LAYERS)]
    return [(layer, head) for layer, row in enumerate(rows) for head, pattern in enumerate(row) if pattern == Dense()]


def test_diffuse_heads_are_dense_from_the_start() -> None:
    heads = served(with_shares(CONFIG, [[0.1, 0.95, 0.2, 0.1], [0.9, 0.1, 0.1, 0.1]]))
    assert dense(heads) == [(0, 1), (1, 0)] and heads.guarded == 0 and heads.head_config.basis is not None
    assert heads.words_of_shares() == (
        "2 of 8 heads are too diffuse to choose and see all keys; the others visit 12% of those between sink and window"
    )
    assert why_dense(heads) is None
    guarded = heads.with_dense([(1, 3)])
    assert dense(guarded) == [(0, 1), (1, 0), (1, 3)] and guarded.guarded == 1 and why_dense(guarded) is None


def test_a_model_of_diffuse_heads_is_all_dense() -> None:
    heads = served(with_shares(CONFIG, [[0.95] * HEADS] * LAYERS))
    assert heads.all_dense and heads.words_of_shares() == (
        "8 of 8 heads are too diffuse to choose and see all keys, so all requests run dense"
    )


def test_heads_that_choose_much_but_not_too_much_are_dense_in_short_prompts() -> None:
    heads = served(with_shares(CONFIG, [[0.7] * HEADS] * LAYERS))
    assert not dense(heads) and why_dense(heads) == "not_faster"


def test_what_the_clip_says_is_as_what_a_file_says() -> None:
    of_heads = [[0.1, 0.95, 0.2, 0.1], [0.9, 0.1, 0.1, 0.1]]
    by_clip, by_file = served(CONFIG), served(with_shares(CONFIG, of_heads))
    by_clip.choose_by({layer: BASIS for layer in range(LAYERS)})
    by_clip.know(KnownShares(RULE, torch.tensor(of_heads)))
    assert dense(by_clip) == dense(by_file) and by_clip.words_of_shares() == by_file.words_of_shares()
    assert why_dense(by_clip) is None
    unknown = served(CONFIG)
    unknown.choose_by({})
    unknown.know(KnownShares(RULE, torch.full((LAYERS, HEADS), torch.nan)))
    assert unknown.words_of_shares() is None and not dense(unknown) and why_dense(unknown) == "not_faster"


def test_shares_say_nothing_of_other_patterns_and_change_nothing_that_a_search_gave() -> None:
    other = dataclasses.replace(CONFIG, rows=((dataclasses.replace(RULE, alpha=0.3),),))
    heads = served(with_shares(other, [[0.95] * HEADS] * LAYERS))
    assert not dense(heads) and heads.words_of_shares() is None and why_dense(heads) is None
    by_search = Provenance("search", "of a test", "one clip", "-", "2026-11-26")
    searched = served(with_shares(dataclasses.replace(CONFIG, provenance=by_search), [[0.95] * HEADS] * LAYERS))
    assert not dense(searched) and why_dense(searched) == "not_faster"


def test_with_sparse_always_no_head_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.SPARSE.variable, "always")
    heads = served(with_shares(CONFIG, [[0.95] * HEADS] * LAYERS))
    assert not dense(heads) and why_dense(heads) is None
    assert heads.words_of_shares() == "heads that choose visit 95% of the keys between sink and window"
