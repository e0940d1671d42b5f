"""Heads that choose keys without a basis take as long as dense attention, so their requests run dense."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sglang_mminfer import Adaptive, HeadConfig, settings
from sglang_mminfer.head_config import ModelBasis, ModelFingerprint, Provenance
from sglang_mminfer.patterns.basis import Basis
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
