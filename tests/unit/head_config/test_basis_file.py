"""The basis beside a head config: read back as it was written, it belongs to the model; anything else is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

import observed
from sglang_mminfer import Adaptive, HeadConfig
from sglang_mminfer.head_config import HeadConfigError, ModelBasis, ModelFingerprint, Provenance
from sglang_mminfer.patterns.basis import second_moments
from sglang_mminfer.serving import head_config_choice

LAYERS, HEADS, KV_HEADS, DIM, RANK = 2, 8, 2, 16, 5
MODEL = ModelFingerprint("Qwen2_5_VLForConditionalGeneration", LAYERS, HEADS, KV_HEADS, DIM, 128, 1e6)
HF_CONFIG = SimpleNamespace(
    architectures=[MODEL.architecture],
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    num_hidden_layers=LAYERS,
    hidden_size=128,
    rope_theta=1e6,
)
HOW = Provenance("search", "of a test", "one clip", "-", "2026-11-26")
CHOOSES = Adaptive(16, 48, 4, 1.0)


RULE = Adaptive(64, 256, 4, 0.01)


def shares(seed: int = 0) -> torch.Tensor:
    return torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(seed))


def drawn(forms: int = KV_HEADS, seed: int = 0) -> ModelBasis:
    numbers = 0.3 * torch.randn(2, LAYERS, forms, RANK, DIM, generator=torch.Generator().manual_seed(seed))
    return ModelBasis(MODEL, HOW, *numbers)


def config(folder: Path, pattern: Adaptive = CHOOSES) -> Path:
    path = folder / "mine.json"
    path.write_text(HeadConfig("mine", Provenance("handwritten", "of a test"), "all", ((pattern,),)).to_json())
    return path


@pytest.mark.parametrize("forms", [KV_HEADS, HEADS])
def test_it_is_read_back_as_it_was_written(forms: int, tmp_path: Path) -> None:
    written = drawn(forms)
    written.save(tmp_path / "mine.basis.npz")
    read = ModelBasis.load(tmp_path / "mine.basis.npz")
    assert (read.model, read.provenance, read.rank, read.digest) == (MODEL, HOW, RANK, written.digest)
    assert torch.equal(read.queries, written.queries) and torch.equal(read.keys, written.keys)
    assert drawn(forms, seed=1).digest != written.digest


def test_shares_are_read_back_with_their_rule(tmp_path: Path) -> None:
    written = drawn().with_shares(shares(), RULE)
    written.save(tmp_path / "mine.basis.npz")
    read = ModelBasis.load(tmp_path / "mine.basis.npz")
    assert read.shares is not None and torch.equal(read.shares, shares()) and read.rule == RULE
    assert read.digest == written.digest == drawn().digest, "rows choose by the forms alone"
    own = read.layer(1, 2, 4, torch.device("cpu"))
    assert own.shares is not None and torch.equal(own.shares, shares()[1, 2:6])


def test_a_file_without_shares_has_no_rule(tmp_path: Path) -> None:
    """As files were before there were shares."""
    path = tmp_path / "mine.basis.npz"
    np.savez(path, **GOOD | {"header": header_with({})})
    read = ModelBasis.load(path)
    assert read.shares is None and read.rule is None and read.layer(0, 0, 4, torch.device("cpu")).shares is None
    assert read.digest == drawn().digest


def test_shares_are_left_out_where_they_say_nothing() -> None:
    unknown = shares()
    unknown[0, 3] = torch.nan
    assert drawn().with_shares(unknown, RULE).shares is None
    assert drawn().with_shares(shares(), dataclasses.replace(RULE, rank=RANK + 1)).shares is None
    not_shown = drawn().with_shares(shares(), RULE)
    not_shown.queries[1] = 0
    assert not_shown.shares_of(1) is None and not_shown.shares_of(0) is not None


@pytest.mark.parametrize("shared", [True, False])
def test_it_is_made_of_the_moments_of_every_layer(shared: bool) -> None:
    x = torch.randn(LAYERS, 64, HEADS + KV_HEADS, DIM, generator=torch.Generator().manual_seed(2))
    x[..., RANK:] = 0  # the heads' queries and keys lie in RANK dimensions, so the forms are exact
    moments = torch.stack([second_moments(layer) for layer in x])
    made = ModelBasis.of_moments(MODEL, HOW, moments[:, :HEADS], moments[:, HEADS:], RANK, shared=shared)
    for layer in range(LAYERS):
        own = made.layer(layer, 0, HEADS, torch.device("cpu"))
        for head in range(HEADS):
            (a, b), q, k = own.of_head(head, HEADS), x[layer, :, head], x[layer, :, HEADS + head * KV_HEADS // HEADS]
            torch.testing.assert_close((q @ a.T) @ (k @ b.T).T, q @ k.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("forms", [KV_HEADS, HEADS])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_gets_the_forms_of_its_heads(forms: int, ranks: int) -> None:
    whole, count = drawn(forms), HEADS // ranks
    for rank in range(ranks):
        own = whole.layer(1, rank * count, count, torch.device("cpu"))
        for head in range(count):
            number = (rank * count + head) * forms // HEADS
            a, b = own.of_head(head, count)
            assert torch.equal(a, whole.queries[1, number]) and torch.equal(b, whole.keys[1, number])


def test_a_config_brings_the_basis_that_lies_beside_it(tmp_path: Path) -> None:
    path = config(tmp_path)
    alone = HeadConfig.load(path)
    assert alone.basis is None and alone.describe().endswith("no basis: by q . k")
    drawn().save(tmp_path / "mine.basis.npz")
    both = HeadConfig.load(path).bind(HF_CONFIG)
    assert both.basis is not None and both.basis.digest == drawn().digest
    assert both.describe().endswith("keys are chosen by a basis of rank 5")


def test_a_basis_of_another_model_or_of_too_low_a_rank_is_refused(tmp_path: Path) -> None:
    drawn().save(tmp_path / "mine.basis.npz")
    other = SimpleNamespace(**vars(HF_CONFIG) | {"rope_theta": 5e5})
    with pytest.raises(HeadConfigError, match=r"mine\.json: model of the basis: was made for another .*rope_theta"):
        HeadConfig.load(config(tmp_path)).bind(other)
    with pytest.raises(HeadConfigError, match=r"mine\.json: heads: expected a rank of at most 5, .* got 6"):
        HeadConfig.load(config(tmp_path, dataclasses.replace(CHOOSES, rank=6)))


GOOD = {
    "header": np.array(json.dumps({"schema": 1, "model": None, "provenance": None})),
    "queries": drawn().queries.numpy(),
    "keys": drawn().keys.numpy(),
}
BAD_ARRAYS = {
    "keys of another shape": (
        {"keys": GOOD["keys"][:, :, :4]},
        r"keys: expected the shape of queries \[2, 2, 5, 16\],",
    ),
    "layers": (
        {"queries": GOOD["queries"][:1]},
        r"queries: expected float32 \[2, 2 or 8, rank, 16\] .*\[1, 2, 5",
    ),
    "forms": ({"queries": GOOD["queries"][:, :1]}, r"queries: expected .*, got float32 \[2, 1, 5, 16\]"),
    "float64": ({"keys": GOOD["keys"].astype(np.float64)}, r"keys: expected float32 .*, got float64"),
    "infinite": ({"keys": GOOD["keys"] * np.float32(np.inf)}, "keys: expected finite numbers"),
    "one more": ({"more": GOOD["keys"]}, "expected the arrays header, queries, keys, and perhaps shares, got .*more"),
    "shares without a rule": ({"shares": shares().numpy()}, "shares: expected together with header.rule"),
    "objects": ({"queries": np.array([None])}, "not a NumPy archive of plain arrays"),
    "no text": ({"header": np.array(3)}, r"header: expected one text, got int64 \[\]"),
    "no JSON": ({"header": np.array("{")}, "header: .*truncated"),
}
BAD_HEADERS = {
    "another schema": ({"schema": 2}, "header.schema: expected 1, got 2"),
    "one more key": ({"more": 2}, "header: .*more"),
    "no model": ({"model": None}, r"header: .*\$\.model"),
    "no note": ({"provenance": {"how": "handwritten", "note": ""}}, "header: note: expected some words"),
}


BAD_SHARES = {
    "heads": (shares()[:, :2].numpy(), r"shares: expected float32 \[2, 8\] as in header.model, got float32 \[2, 2\]"),
    "float64": (shares().double().numpy(), r"shares: expected float32 .*, got float64 \[2, 8\]"),
    "above 1": (shares().numpy() + np.float32(1), "shares: expected numbers from 0 to 1"),
    "below 0": (-shares().numpy(), "shares: expected numbers from 0 to 1"),
    "NaN": (shares().numpy() * np.float32(np.nan), "shares: expected numbers from 0 to 1"),
}
RULE_JSON = {"kind": "adaptive", **dataclasses.asdict(RULE)}
BAD_RULES = {
    "another kind": ({"kind": "dense"}, r"header\.rule: expected a pattern that chooses keys by a basis, got dense"),
    "a bad bound": (RULE_JSON | {"alpha": 2}, r"header\.rule\.alpha: expected a number above 0 and at most 1, got 2"),
    "no text": ([], "header: Expected `object"),
}


@pytest.mark.parametrize(("array", "words"), BAD_SHARES.values(), ids=BAD_SHARES)
def test_bad_shares_are_refused_by_their_place(array: np.ndarray, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.basis.npz"
    np.savez(path, **GOOD | {"header": header_with({"rule": RULE_JSON}), "shares": array})
    with pytest.raises(HeadConfigError, match=rf"mine\.basis\.npz: {words}"):
        ModelBasis.load(path)


@pytest.mark.parametrize(("rule", "words"), BAD_RULES.values(), ids=BAD_RULES)
def test_bad_rules_are_refused_by_their_place(rule: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.basis.npz"
    np.savez(path, **GOOD | {"header": header_with({"rule": rule}), "shares": shares().numpy()})
    with pytest.raises(HeadConfigError, match=rf"mine\.basis\.npz: {words}"):
        ModelBasis.load(path)


def header_with(changed: dict) -> np.ndarray:
    whole = {"schema": 1, "model": msgspec.to_builtins(MODEL), "provenance": msgspec.to_builtins(HOW)}
    return np.array(json.dumps(whole | changed))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [({"header": header_with({})} | arrays, words) for arrays, words in BAD_ARRAYS.values()]
    + [({"header": header_with(changed)}, words) for changed, words in BAD_HEADERS.values()],
    ids=[*BAD_ARRAYS, *BAD_HEADERS],
)
def test_what_does_not_belong_is_refused_by_its_place(arrays: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.basis.npz"
    np.savez(path, **GOOD | arrays, allow_pickle=True)
    with pytest.raises(HeadConfigError, match=rf"mine\.basis\.npz: {words}"):
        ModelBasis.load(path)


def test_a_broken_file_is_refused_whatever_broke(tmp_path: Path) -> None:
    path = tmp_path / "mine.basis.npz"
    drawn().save(path)
    whole = path.read_bytes()
    for stop in [0, 3, *range(7, len(whole), 97)]:
        path.write_bytes(whole[:stop])
        with pytest.raises(HeadConfigError, match=r"mine\.basis\.npz: "):
            ModelBasis.load(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name, words in (("one.npy", "not a NumPy archive"), ("none.npz", "no such file"), ("", "not a NumPy archive")):
        with pytest.raises(HeadConfigError, match=words):
            ModelBasis.load(tmp_path / name)


def test_layers_are_served_with_their_basis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the plans of a server's own prefill: what is visited holds what rows ask for by the basis, in all layers."""
    from sglang_mminfer import pattern_mask
    from sglang_mminfer.kernels.reference import visited_mask

    path = config(tmp_path)
    basis = dataclasses.replace(drawn(), model=msgspec.structs.replace(MODEL, architecture="qwen2_5_vl"))
    basis.save(tmp_path / "mine.basis.npz")
    watch = observed.Keeps()
    prefill = observed.prefill(str(path), monkeypatch, watch)
    observed.run(prefill, observed.batch())
    assert [view.layer_id for view in watch.views] == [0, 1] and not watch.records[-1].dense_reason
    for view in watch.views:
        chat, slots = view.requests[0].map, prefill.kv_pool.slots
        for head in (0, 3, 7):
            keys = view.k_cache[slots, head // (HEADS // KV_HEADS)]
            own = basis.layer(view.layer_id, 0, HEADS, torch.device("cpu")).of_head(head, HEADS)
            n = observed.LENGTH
            asked = pattern_mask(chat, CHOOSES, 0, n, n, view.q[:, head], keys, sm_scale=observed.SCALE, basis=own)
            seen = visited_mask(view.plan, head, slice(0, n), n)
            assert not (asked & ~seen).any() and float(seen.sum()) < 0.95 * n * (n + 1) / 2
    assert watch.records[-1].overflowing_tiles == 0
    config(tmp_path, dataclasses.replace(CHOOSES, budget=1e-6))
    stingy = observed.prefill(str(path), monkeypatch, watch)
    observed.run(stingy, observed.batch())
    assert watch.records[-1].overflowing_tiles > 0


def test_what_is_cached_has_another_name_with_another_basis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sglang_mminfer.mends import asked

    args = SimpleNamespace()
    monkeypatch.setattr(asked, "for_mminfer", lambda: True)
    monkeypatch.setattr(asked, "server_args", lambda: args)
    model = SimpleNamespace(hf_config=HF_CONFIG, num_hidden_layers=LAYERS)
    monkeypatch.setattr("sglang.srt.arg_groups.model_override_base.model_config_of", lambda _: model)
    monkeypatch.setenv("SGLANG_MMINFER_CONFIG", str(config(tmp_path)))
    names = [head_config_choice.storage_model_name("m")]
    for seed in (0, 1, 1):
        drawn(seed=seed).save(tmp_path / "mine.basis.npz")
        names.append(head_config_choice.storage_model_name("m"))
    assert len(set(names)) == 3 and names[2] == names[3]
