"""Media that SGLang's embedding cache refuses, so that each chunk encodes them again.

The watch counts that, and warns once with a cache size that ends it.

Functions, cache and items are SGLang's; chunks follow one another as in a scheduler. The encoder is a linear layer.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.plugins import load_plugins

import observed
from sglang_mminfer.serving import encoder_watch, hooks

load_plugins()


@pytest.fixture(autouse=True, scope="module")
def hooked() -> None:
    """As a process of a server with mminfer is."""
    hooks.install("mminfer")


HIDDEN = 2048  # 8 KB for each token in fp32
SECONDS = 0.02


class Encoder:
    """A vision tower that records the items it gets."""

    def __init__(self) -> None:
        self.layer = torch.nn.Linear(4, HIDDEN)
        self.seen: list[int] = []

    @torch.no_grad()
    def get_video_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        self.seen += [item.hash for item in items if item.hash is not None]
        time.sleep(SECONDS)
        return self.layer(torch.cat([item.feature for item in items]))


def video(*spans: tuple[int, int], seed: int = 0) -> MultimodalDataItem:
    """A video with a span of tokens [start, stop) for each of `spans`."""
    tokens = sum(stop - start for start, stop in spans)
    feature = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))
    item = MultimodalDataItem(
        modality=Modality.VIDEO, feature=feature, offsets=[(start, stop - 1) for start, stop in spans]
    )
    item.set_pad_value()
    return item


def embed(encoder: Encoder, items: list[MultimodalDataItem], prefix: int, length: int) -> torch.Tensor | None:
    """SGLang's embeddings for one chunk of one request."""
    ids = torch.zeros(prefix + length, dtype=torch.long)
    for item in items:
        for start, last in item.offsets or []:
            ids[start : last + 1] = item.pad_value or 0
    embedding, _, _ = mm_schedule.get_embedding_and_mask(
        data_embedding_func=encoder.get_video_feature,
        embedding_items=items,
        placeholder_tensor=torch.tensor(sorted(v for item in items for v in item.padding_values())),
        input_ids=ids[prefix:],
        items_size=[0, len(items)],
        prefix_length=[prefix],
        extend_length=[length],
        items_offset_list=[[span for item in items for span in item.offsets or []]],
    )
    return embedding


def prompt(encoder: Encoder, items: list[MultimodalDataItem], tokens: int, chunk: int) -> None:
    """Embeds all chunks of a prompt, and asserts that the embeddings are right."""
    parts = [embed(encoder, items, start, min(chunk, tokens - start)) for start in range(0, tokens, chunk)]
    whole = torch.cat([part for part in parts if part is not None])
    assert torch.allclose(whole, encoder.layer(torch.cat([item.feature for item in items])), atol=1e-6)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[encoder_watch.EncoderWatch]:
    found = encoder_watch.EncoderWatch()
    monkeypatch.setattr(encoder_watch, "watch", found)
    monkeypatch.setattr(mm_schedule, "embedding_cache", None)
    yield found
    assert found.active


def cache_of(megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", str(megabytes))
    mm_schedule.init_mm_embedding_cache(megabytes * 2**20)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "encoder runs again" in record.getMessage()]


# 900 and 600 tokens of 8 KB: 7.03 and 4.69 MB
SHAPES = {
    "one_video": [[(10, 910)]],
    "two_videos": [[(10, 910)], [(950, 1550)]],
    "frames_apart": [[(10, 310), (320, 620), (630, 930)], [(950, 1550)]],  # SGLang keeps both videos in one entry
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_refused_video_is_said_once_and_counted_and_the_value_ends_it(
    shape: str, watch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = [video(*spans, seed=seed) for seed, spans in enumerate(SHAPES[shape])]
    encoder = Encoder()
    cache_of(2, monkeypatch)
    prompt(encoder, items, tokens=1600, chunk=200)
    repeats = len(encoder.seen) - len(items)
    again = watch.take()
    # An entry counts once, however many items it has.
    assert again.times == (repeats // 2 if shape == "frames_apart" else repeats) > 3
    assert again.milliseconds >= 0.99 * again.times * 1e3 * SECONDS / len(items)
    assert watch.take() == encoder_watch.EncodedAgain()

    (sentence,) = said(caplog)
    size = sum(len(item.feature) for item in items) * 8192
    one = items if shape == "frames_apart" else items[:1]
    tokens = sum(len(item.feature) for item in one)
    assert f"SGLANG_VLM_CACHE_SIZE_MB=2) could not keep {encoder_watch.named(one)} at token 10" in sentence
    assert f"{tokens} tokens, {tokens * 8192 / 2**20:.1f} MB" in sentence
    took = re.search(r"second time took ([\d.]+) s; (\d+) more", sentence)
    assert took and float(took[1]) >= SECONDS
    last = max(stop for item in one for _, stop in item.offsets or [])
    assert int(took[2]) == len(range(400, last + 1, 200))

    value = int(re.findall(r"SGLANG_VLM_CACHE_SIZE_MB=(\d+)", sentence)[1])
    assert size <= value * 2**20 and value % 64 == 0
    cache_of(value, monkeypatch)
    second = Encoder()
    prompt(second, items, tokens=1600, chunk=200)
    assert sorted(second.seen) == sorted(item.hash for item in items if item.hash is not None)
    prompt(encoder, [video((0, 900), seed=5)], tokens=1000, chunk=200)
    assert watch.take().times == 0
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("chunk", [1600, 200])
def test_nothing_is_said_where_nothing_is_encoded_again(
    chunk: int, watch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A single chunk without a cache, and several chunks with a large enough cache."""
    cache_of(0 if chunk == 1600 else 16, monkeypatch)
    encoder = Encoder()
    for seed in (0, 1, 0):  # the last video was refused before, in another conversation
        prompt(encoder, [video((10, 910), seed=seed)], tokens=1600, chunk=chunk)
    assert watch.take() == encoder_watch.EncodedAgain() and not said(caplog)


def test_the_method_that_sglang_asks_for_its_owner_is_still_one(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some encoders move features to the GPU themselves; SGLang knows them by class and method."""
    cache_of(0, monkeypatch)
    encoder, seen = Encoder(), []
    real = mm_schedule._can_skip_pre_embed_feature_move
    monkeypatch.setattr(mm_schedule, "_can_skip_pre_embed_feature_move", lambda func: seen.append(func) or real(func))
    embed(encoder, [video((0, 50))], 0, 60)
    assert [(func.__self__, func.__name__) for func in seen] == [(encoder, "get_video_feature")]


def test_a_server_without_mminfer_is_not_watched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoder_watch, "watch", None)
    monkeypatch.setattr(mm_schedule, "embedding_cache", None)
    cache_of(0, monkeypatch)
    prompt(Encoder(), [video((10, 910))], tokens=1600, chunk=200)
    assert not said(caplog)


def test_a_defect_of_the_watch_costs_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoder_watch, "watch", encoder_watch.EncoderWatch())
    monkeypatch.setattr(mm_schedule, "embedding_cache", None)
    monkeypatch.setattr(encoder_watch, "tokens_of", lambda items: 1 / 0)
    cache_of(0, monkeypatch)
    with caplog.at_level(logging.ERROR):
        prompt(Encoder(), [video((10, 910))], tokens=1600, chunk=200)
    assert sum("watching the vision encoder failed" in r.getMessage() for r in caplog.records) == 1


class Event:
    """A GPU event: whoever waits for it finds it done, others when `done` is set."""

    done = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None:
        self.done = True

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, other: Event) -> float:
        assert other.done, "not known before"
        return 40.0


def test_time_on_a_gpu_is_waited_for_by_the_warning_alone(
    watch: encoder_watch.EncoderWatch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two videos are encoded together for each chunk. All chunks lie in the first one, which is a quarter of them."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    cache_of(0, monkeypatch)
    encoder, items = Encoder(), [video((10, 310)), video((350, 1250), seed=1)]

    def chunk(prefix: int) -> Event:
        """One chunk; the event behind its encoding."""
        encodings: list[Any] = []
        watch.timed(encoder.get_video_feature, torch.device("cuda"), encodings)(items)
        watch.done(encodings, [(prefix, 100, items)])
        (encoding,) = encodings
        return encoding.span.stop

    chunk(0)
    assert watch.take() == encoder_watch.EncodedAgain()
    chunk(100)
    assert watch.take() == encoder_watch.EncodedAgain(1, pytest.approx(10.0))
    assert "took 0.01 s" in said(caplog)[0]
    stop = chunk(200)
    assert watch.take() == encoder_watch.EncodedAgain(1, 0.0)
    stop.done = True
    assert watch.take() == encoder_watch.EncodedAgain(0, pytest.approx(10.0))
    assert watch.take() == encoder_watch.EncodedAgain()
    assert (watch.milliseconds(), watch.milliseconds()) == (80.0, 0.0), "nobody has seen the end of the first run"


def test_the_trace_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's own watch; embeddings are made between the metadata and the layers of each chunk."""
    monkeypatch.setattr(encoder_watch, "watch", None)
    monkeypatch.setattr(mm_schedule, "embedding_cache", None)
    cache_of(0, monkeypatch)
    kept = observed.Keeps()
    prefill = observed.prefill("dense", monkeypatch, kept)
    encoder, items = Encoder(), [video((100, 484))]
    for start in range(0, observed.LENGTH, 200):
        stop = min(start + 200, observed.LENGTH)
        batch = observed.batch(start, stop)
        prefill.end()
        prefill.begin(batch)
        embed(encoder, items, start, stop - start)
    prefill.end()
    assert [record.encoded_again for record in kept.records] == [0, 1, 1, 0]
    assert [record.encoded_again_ms > 1e3 * SECONDS * 0.99 for record in kept.records] == [False, True, True, False]
    assert [record.encode_ms >= record.encoded_again_ms for record in kept.records] == [True] * 4
    assert [record.encode_ms > 1e3 * SECONDS * 0.99 for record in kept.records] == [True, True, True, False]
