"""Heads that choose keys without a basis take as long as dense attention, so their requests run dense; and so do heads
that choose too many."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from sglang_mminfer import Adaptive, HeadConfig, settings
from sglang_mminfer.head_config import ModelBasis, ModelFingerprint, Provenance
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.serving.known_shares import KnownShares
from sglang_mminfer.serving.served_heads import LayerShape, Placement, ServedHeads
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
    heads.settle_basis({})
    assert why_dense(heads) == "not_faster"
    heads.settle_basis({layer: BASIS for layer in range(LAYERS)})
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


def test_heads_that_choose_many_keys_are_dense_in_short_prompts() -> None:
    for share, reason in ((0.05, None), (0.7, "not_faster")):
        heads = served(with_shares(CONFIG, [[share] * HEADS] * LAYERS))
        assert heads.mean_share == pytest.approx(share) and why_dense(heads) == reason
        assert heads.with_dense([(1, 3)]).mean_share == pytest.approx(share), "known of the others still"


def test_what_the_clip_says_is_as_what_a_file_says() -> None:
    for of_heads, reason in (
        ([[0.1, 0.02, 0.03, 0.1]] * LAYERS, None),
        ([[0.1, 0.95, 0.9, 0.1]] * LAYERS, "not_faster"),
    ):
        by_clip, by_file = served(CONFIG), served(with_shares(CONFIG, of_heads))
        by_clip.settle_basis({layer: BASIS for layer in range(LAYERS)}, KnownShares(RULE, torch.tensor(of_heads)))
        assert by_clip.mean_share == by_file.mean_share
        assert why_dense(by_clip) == why_dense(by_file) == reason
    unknown = served(CONFIG)
    unknown.settle_basis({}, KnownShares(RULE, torch.full((LAYERS, HEADS), torch.nan)))
    assert unknown.mean_share is None and why_dense(unknown) == "not_faster", "there is no basis"


def test_shares_say_nothing_of_other_patterns() -> None:
    other = dataclasses.replace(CONFIG, rows=((dataclasses.replace(RULE, alpha=0.3),),))
    heads = served(with_shares(other, [[0.95] * HEADS] * LAYERS))
    assert heads.mean_share is None and why_dense(heads) is None


def test_with_sparse_always_shares_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.SPARSE.variable, "always")
    assert why_dense(served(with_shares(CONFIG, [[0.95] * HEADS] * LAYERS))) is None


def test_layers_without_attention_count_nowhere() -> None:
    """A model of twice the layers, every second of which has attention."""
    config = dataclasses.replace(CONFIG, num_layers=2 * LAYERS, full_layers=tuple(range(1, 2 * LAYERS, 2)))
    shares = torch.tensor([[math.nan] * HEADS, [0.2] * HEADS] * LAYERS)
    hybrid, plain = served(config), served(CONFIG)
    hybrid.settle_basis({layer: BASIS for layer in config.full_layers or ()}, KnownShares(RULE, shares))
    plain.settle_basis({layer: BASIS for layer in range(LAYERS)}, KnownShares(RULE, shares[1::2]))
    assert hybrid.mean_share == plain.mean_share == pytest.approx(0.2)
    assert hybrid.choice.dense_below == plain.choice.dense_below
    assert hybrid.of(LayerShape(1, HEADS, HEADS)).patterns == plain.of(LayerShape(0, HEADS, HEADS)).patterns
