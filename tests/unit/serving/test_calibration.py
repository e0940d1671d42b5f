"""A server without a basis: requests run dense until the built-in clip has given one, or until none will come."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import observed
from observed import HEADS, KV_HEADS, LENGTH, D
from sglang_mminfer import Adaptive, HeadConfig, ModalityMap, settings
from sglang_mminfer.head_config import Provenance
from sglang_mminfer.patterns.basis import Basis, basis_of, second_moments
from sglang_mminfer.serving import basis_cache, basis_choice, calibration
from sglang_mminfer.serving.clip_sender import CLIP_RID, NO_CLIP_RID
from sglang_mminfer.serving.moments import Moments
from sglang_mminfer.serving.shares import sampled, shares
from support import conversation

RANK = 4
RULE = Adaptive(16, 48, RANK, 0.5)
AWAITED = {basis_choice.BASIS_ATTRIBUTE: basis_choice.AWAITED}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sglang_mminfer" / "basis"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with weights, as far as the cache looks at them."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "adaptive.json"
    path.write_text(HeadConfig("x", Provenance("handwritten", "of a test"), "all", ((RULE,),)).to_json())
    return str(path)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are taken of conversations as short as those of these tests."""
    monkeypatch.setattr("sglang_mminfer.serving.shares.LEAST", 64)


def prefill(config: str, monkeypatch: pytest.MonkeyPatch, **of_runner: Any) -> Any:
    monkeypatch.setenv(settings.SPARSE.variable, of_runner.pop("sparse", "always"))
    return observed.prefill(config, monkeypatch, **of_runner)


def reasons(prefill: Any, *batches: Any) -> list[str | None]:
    watch = observed.Keeps()
    prefill.observers.add(watch)
    for batch in batches:
        observed.run(prefill, batch)
    prefill.observers.remove(watch)
    return [record.dense_reason for record in watch.records]


def chunks(rid: str, *ends: int) -> list[tuple[int, int, str]]:
    return [(start, stop, rid) for start, stop in zip((0, *ends), ends)]


def send(prefill: Any, *of_batches: tuple[int, int, str]) -> list[str | None]:
    """Batches are made one after the other: each sets the prompt lengths of its requests."""
    return [reason for batch in of_batches for reason in reasons(prefill, observed.batch(*batch))]


def modality_map() -> ModalityMap:
    first, last = observed.VIDEO
    return conversation(first, (24, 4, 4), LENGTH - last - 1)


def expected(pool: observed.Pool, layer: int, first: int = 0, heads: int = HEADS) -> Basis:
    """The basis of some heads, from all rows at once."""
    q = pool.q[layer].view(LENGTH, HEADS, D)[:, first : first + heads]
    k = pool.layers[layer, 0][pool.slots]
    return basis_of(second_moments(q), second_moments(k), RANK)


def test_dense_until_the_clip_is_complete(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prefill(config, monkeypatch, **AWAITED)
    assert send(found, (0, LENGTH, "early"), *chunks(f"{CLIP_RID}-0-0", 300, 512, LENGTH)) == ["no_basis"] * 4
    assert send(found, (0, LENGTH, "user")) == [None]
    assert found.serving().description.endswith(f"keys are chosen by a basis of rank {RANK} from the built-in clip")
    for number in range(observed.LAYERS):
        own, whole = found.served.bases[number], expected(found.kv_pool, number)
        torch.testing.assert_close(own.queries, whole.queries, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.keys, whole.keys, atol=1e-5, rtol=1e-4)


def test_it_answers_as_a_server_that_has_the_basis_beside_its_config(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, by_products = prefill(config, monkeypatch, **AWAITED), prefill(config, monkeypatch)
    send(first, (0, LENGTH, f"{CLIP_RID}-0-0"))
    basis, _ = calibration.as_part(
        calibration.Place(None, observed_model(monkeypatch), 0, 1, (0, 2), 1), first.served.bases
    )
    basis.save(Path(config).with_suffix(".basis.npz"))
    second = prefill(config, monkeypatch)
    answers = [observed.run(server, observed.batch()) for server in (first, second, by_products)]
    for own, beside, without in zip(*answers):
        assert torch.equal(own, beside) and not torch.allclose(own, without, atol=1e-3)


def test_what_comes_after_changes_nothing(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prefill(config, monkeypatch, **AWAITED)
    send(found, (0, LENGTH, f"{CLIP_RID}-0-0"))
    before = found.served.bases[0]
    assert send(found, (0, LENGTH, f"{CLIP_RID}-1-0"), (0, 1, f"{NO_CLIP_RID}-0")) == [None] * 2
    assert found.served.bases[0] is before and not found.observers


def test_a_smaller_clip_begins_anew(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed of the size that failed is not in the basis."""
    found = prefill(config, monkeypatch, **AWAITED)
    send(found, (0, 300, f"{CLIP_RID}-0-0"), *chunks(f"{CLIP_RID}-1-0", 400, LENGTH))
    own, whole = found.served.bases[0], expected(found.kv_pool, 0)
    torch.testing.assert_close(own.queries, whole.queries, atol=1e-5, rtol=1e-4)


def test_without_a_clip_heads_choose_by_products(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, other = prefill(config, monkeypatch, **AWAITED), prefill(config, monkeypatch)
    assert found.serving().description.endswith("no basis yet")
    assert send(found, (0, LENGTH, "early"), (0, 1, f"{NO_CLIP_RID}-0"), (0, LENGTH, "user")) == ["no_basis"] * 2 + [
        None
    ]
    assert found.serving().description.endswith("no basis: by q . k")
    for own, by_products in zip(observed.run(found, observed.batch()), observed.run(other, observed.batch())):
        assert torch.equal(own, by_products)


def test_a_failure_ends_the_wait(
    config: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = prefill(config, monkeypatch, **AWAITED)
    with monkeypatch.context() as broken:
        broken.setattr(Moments, "add", lambda *_: 1 / 0)
        send(found, (0, LENGTH, f"{CLIP_RID}-0-0"))
    assert "Calibration failed" in caplog.text
    assert send(found, (0, LENGTH, "user")) == [None] and not found.served.bases


def test_shares_that_fail_leave_the_basis(
    config: str, short: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = prefill(config, monkeypatch, **AWAITED)
    with monkeypatch.context() as broken:
        broken.setattr("sglang_mminfer.serving.shares.shares", lambda *_: 1 / 0)
        send(found, (0, LENGTH, f"{CLIP_RID}-0-0"))
    assert "Calibration failed" in caplog.text and found.served.mean_share is None
    assert send(found, (0, LENGTH, "user")) == [None] and found.served.bases[0].shares is None


@pytest.mark.parametrize("slab", [64, 100, 10_000])
@pytest.mark.parametrize("by_head", [False, True])
def test_moments_of_chunks_are_those_of_all_rows(slab: int, by_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_mminfer.serving.moments.SLAB", slab)
    watch = observed.Keeps()
    found = observed.prefill("dense", monkeypatch, watch)
    moments = Moments(by_head)
    for start, stop in ((0, 150), (150, 151), (151, LENGTH)):
        observed.run(found, observed.batch(start, stop))
    for view in watch.views:
        moments.add(view, view.requests[0])
    assert sorted(moments.layers) == list(range(observed.LAYERS))
    for number, layer in moments.layers.items():
        q = found.kv_pool.q[number].view(LENGTH, HEADS, D)
        k = found.kv_pool.layers[number, 0][found.kv_pool.slots]
        of_heads = second_moments(q)
        if not by_head:
            of_heads = of_heads.unflatten(0, (KV_HEADS, -1)).sum(1)
        assert layer.rows == LENGTH and layer.q.dtype == layer.k.dtype == torch.float64
        torch.testing.assert_close(layer.q / layer.rows, of_heads)
        torch.testing.assert_close(layer.k / layer.rows, second_moments(k))


# ---- the shares --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(LENGTH,), (300, 420, 600, LENGTH)])
def test_the_clip_gives_the_shares(
    ends: tuple[int, ...], config: str, short: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that the finished basis gives, however the clip is cut."""
    found = prefill(config, monkeypatch, **AWAITED)
    chat = modality_map()
    with caplog.at_level(logging.INFO):
        send(found, *chunks(f"{CLIP_RID}-0-0", *ends))
    pool, stretches = found.kv_pool, sampled(RULE, chat, LENGTH)
    assert stretches
    for number in range(observed.LAYERS):
        q = pool.q[number].view(LENGTH, HEADS, D)
        tiles = [(start, q[start:stop]) for start, stop in stretches]
        made = shares(RULE, tiles, chat, pool.layers[number, 0], pool.slots, observed.SCALE, found.served.bases[number])
        torch.testing.assert_close(found.served.bases[number].shares, made)
        torch.testing.assert_close(found.served.shares.of_heads[number], made)
        assert made.amax() > 0
    mean = found.served.shares.of_heads.mean()
    assert f"mminfer: heads that choose visit {mean:.0%} of the keys between sink and window." in caplog.text


def test_a_clip_that_is_too_short_gives_a_basis_without_shares(
    config: str, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = prefill(config, monkeypatch, model_path=str(model), **AWAITED)
    with caplog.at_level(logging.INFO):
        send(found, (0, LENGTH, f"{CLIP_RID}-0-0"))
    assert found.served.bases[0].shares is None and "heads that choose visit" not in caplog.text
    later = prefill(config, monkeypatch, model_path=str(model))
    assert later.served.head_config.basis.shares is None and later.served.shares is None


def test_later_starts_know_what_the_clip_said(
    config: str, model: Path, short: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = prefill(config, monkeypatch, model_path=str(model), **AWAITED)
    send(first, (0, LENGTH, f"{CLIP_RID}-0-0"))
    later = prefill(config, monkeypatch, model_path=str(model))
    assert later.served.mean_share == pytest.approx(first.served.mean_share)
    of_first, of_later = [record.message for record in caplog.records if "heads that choose visit" in record.message]
    assert of_first == of_later
    for own, before in zip(observed.run(later, observed.batch()), observed.run(first, observed.batch())):
        assert torch.equal(own, before)


def test_ranks_tell_each_other_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    of_heads = torch.rand(observed.LAYERS, HEADS, generator=torch.Generator().manual_seed(3))
    count, hf_config, told = HEADS // 2, observed_model(monkeypatch), []
    for rank in (0, 1):
        own = {n: replace(b, shares=of_heads[n, rank * count :][:count]) for n, b in bases(rank, 1).items()}
        if rank:
            del own[1]  # a layer that this rank could not measure
        told.append(calibration.own_shares(calibration.Place(None, hf_config, rank, 2, (0, 2), 1), own))
    group = SimpleNamespace(all_gather_object=lambda own: told)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: SimpleNamespace(attn_tp_group=group))
    all_shares = calibration.shares_of_all_ranks(calibration.Place(None, hf_config, 0, 2, (0, 2), 1), {})
    assert torch.equal(all_shares[0], of_heads[0]) and torch.equal(all_shares[1, :count], of_heads[1, :count])
    assert all_shares[1, count:].isnan().all()


# ---- the cache ---------------------------------------------------------------------------------------------


def place(model: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> calibration.Place:
    fields: dict[str, Any] = {
        "server_args": server_args(model),
        "hf_config": observed_model(monkeypatch),
        "rank": 0,
        "ranks": 1,
        "layers": (0, observed.LAYERS),
        "stages": 1,
    }
    return calibration.Place(**(fields | changed))


def server_args(model: Path, **fields: Any) -> Any:
    return SimpleNamespace(model_path=str(model), **fields)


def observed_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    return observed.runner("dense", monkeypatch).model_config.hf_config


def bases(
    seed: int, forms: int, layers: Mapping[int, Any] | range = range(observed.LAYERS), heads: int = HEADS
) -> dict[int, Basis]:
    draw = torch.Generator().manual_seed(seed)
    return {
        n: Basis(*torch.randn(2, forms, RANK, D, generator=draw), torch.rand(heads, generator=draw)) for n in layers
    }


def test_an_earlier_start_gives_the_basis(
    config: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prefill(config, monkeypatch, model_path=str(model), **AWAITED)
    send(first, (0, LENGTH, f"{CLIP_RID}-0-0"))
    (kept,) = cache.glob("*")
    later = prefill(config, monkeypatch, model_path=str(model))
    assert later.served.head_config.basis.provenance.how == "calibration"
    assert send(later, (0, LENGTH, "user")) == [None]
    for own, before in zip(observed.run(later, observed.batch()), observed.run(first, observed.batch())):
        assert torch.equal(own, before)
    assert kept.exists()


def test_a_broken_file_is_made_anew(
    config: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hf_config = observed_model(monkeypatch)
    entry = basis_cache.entry_of(server_args(model), hf_config, RANK)
    assert entry is not None and entry.load() is None
    calibration.keep(place(model, monkeypatch), RANK, bases(1, KV_HEADS))
    good = entry.path.read_bytes()
    entry.path.write_bytes(good[: len(good) // 2])
    with caplog.at_level(logging.WARNING):
        assert entry.load() is None
    assert caplog.text.count("made anew") == 1 and not entry.path.exists()
    calibration.keep(place(model, monkeypatch), RANK, bases(1, KV_HEADS))
    assert entry.path.read_bytes() == good
    assert [path.name for path in cache.iterdir()] == [entry.path.name]


@pytest.mark.parametrize("ranks, forms", [(2, 1), (4, 1), (8, 1)])
@pytest.mark.parametrize("stages", [1, 2])
def test_ranks_put_their_parts_together(
    ranks: int, forms: int, stages: int, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = basis_cache.entry_of(server_args(model), observed_model(monkeypatch), RANK, RULE)
    assert entry is not None
    own = {}
    for stage in range(stages):
        layers = (stage, stage + 1) if stages == 2 else (0, observed.LAYERS)
        for rank in range(ranks):
            assert entry.load() is None
            own[stage, rank] = bases(10 * stage + rank, forms, range(*layers), HEADS // ranks)
            here = place(model, monkeypatch, rank=rank, ranks=ranks, layers=layers, stages=stages)
            calibration.keep(here, RANK, own[stage, rank], RULE)
    whole = entry.load()
    assert whole is not None and whole.queries.shape[1] == (KV_HEADS if ranks <= KV_HEADS else HEADS)
    count = HEADS // ranks
    assert whole.rule == RULE and whole.shares is not None
    for (_, rank), its_bases in own.items():
        for number, basis in its_bases.items():
            assert torch.equal(whole.shares[number, rank * count : (rank + 1) * count], basis.shares)
            part = whole.layer(number, rank * count, count, torch.device("cpu"))
            for head in range(count):
                for a, b in zip(part.of_head(head, count), basis.of_head(head, count)):
                    assert torch.equal(a, b)
    assert [path.name for path in cache.iterdir()] == [entry.path.name]


def test_parts_of_another_layout_are_left_alone(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.keep(place(model, monkeypatch, ranks=2), RANK, bases(1, 1))
    for rank in range(4):
        calibration.keep(place(model, monkeypatch, rank=rank, ranks=4), RANK, bases(rank, 1))
    entry = basis_cache.entry_of(server_args(model), observed_model(monkeypatch), RANK)
    assert entry is not None and (whole := entry.load()) is not None
    assert torch.equal(whole.queries[0, 0], bases(0, 1)[0].queries[0])


def changed_size(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"other weights")


def another_file(model: Path) -> None:
    (model / "more.safetensors").write_bytes(b"more")


def touched(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


@pytest.mark.parametrize("change", [changed_size, another_file, touched])
def test_the_key_covers_the_weights(change: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = observed_model(monkeypatch)
    before = basis_cache.entry_of(server_args(model), hf_config, RANK)
    (model / "notes.txt").write_text("no weights")
    assert basis_cache.entry_of(server_args(model), hf_config, RANK) == before
    change(model)
    assert basis_cache.entry_of(server_args(model), hf_config, RANK) != before


def test_the_key_covers_model_clip_rank_and_rule(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = observed_model(monkeypatch)

    def name(rank: int = RANK, rule: Adaptive | None = None, **fields: Any) -> basis_cache.Entry | None:
        return basis_cache.entry_of(server_args(model, **fields), hf_config, rank, rule)

    names = [
        name(rule=RULE),
        name(rule=replace(RULE, alpha=0.1)),
        name(),
        name(rank=RANK + 1),
        name(revision="main"),
        name(json_model_override_args='{"a": 1}'),
    ]
    monkeypatch.setattr("sglang_mminfer.serving.clip.VERSION", 99)
    names.append(name())
    hf_config.get_text_config().rope_parameters = {"rope_theta": 5.0}
    names.append(name())
    assert len({entry.path for entry in names if entry}) == 8


def test_weights_that_nobody_can_tell_are_not_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_config = observed_model(monkeypatch)
    assert basis_cache.entry_of(server_args(model, load_format="dummy"), hf_config, RANK) is None
    assert basis_cache.entry_of(server_args(tmp_path / "nothing"), hf_config, RANK) is None
    assert basis_cache.entry_of(server_args(Path("nobody/has-this-model")), hf_config, RANK) is None
    assert basis_cache.entry_of(object(), hf_config, RANK) is None


def test_a_folder_that_cannot_be_written_is_no_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "config.json"))
    calibration.keep(place(model, monkeypatch), RANK, bases(1, KV_HEADS))
    assert "the basis is not kept" in caplog.text
