"""The cache of decoded and preprocessed videos: what it is asked again it gives unchanged, and nothing else."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from families import FAMILY
from processing import Processing
from sglang_mminfer import settings
from sglang_mminfer.mends import asked, decoders, media_cache, video_features
from sglang_mminfer.mends.media_cache import FEATURES, FRAMES, MediaCache
from sglang_mminfer.tools.media import make_image, make_video

MB = 2**20

# ---- the cache alone -------------------------------------------------------------------------------------------


def ones(count: int, value: int = 1) -> tuple[torch.Tensor, ...]:
    """A tensor of `count` bytes."""
    return (torch.full((count,), value, dtype=torch.uint8),)


@hypothesis_settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([FRAMES, FEATURES]), st.integers(0, 9), st.integers(1, 60)), max_size=60),
    st.integers(0, 100),
)
def test_any_sequence_gets_what_it_asks_for_within_the_bound(asked_for: Any, limit: int) -> None:
    cache, made = MediaCache(limit), 0
    for kind, value, size in asked_for:

        def make(size: int = size, value: int = value) -> tuple[torch.Tensor, ...]:
            nonlocal made
            made += 1
            return ones(size, value)

        (got,) = cache.get((kind, value, size), make)
        assert torch.equal(got, *ones(size, value))
        report = cache.report()
        assert report.bytes <= limit and report.misses == made and report.hits + made > 0
    assert cache.report().hits + made == len(asked_for)
    cache.clear()
    assert (cache.report().entries, cache.report().bytes) == (0, 0)


def test_what_was_not_used_for_the_longest_time_goes_first_and_features_before_frames() -> None:
    cache = MediaCache(40)

    def has(kind: str, number: int) -> bool:
        before = cache.report().hits
        cache.get((kind, number), lambda: ones(0))  # nothing of this size takes another's place
        return cache.report().hits > before

    for kind, number in ((FRAMES, 1), (FRAMES, 2), (FEATURES, 1), (FRAMES, 1)):
        cache.get((kind, number), lambda: ones(10))
    cache.get((FRAMES, 3), lambda: ones(20))
    assert [has(FRAMES, 1), has(FRAMES, 2), has(FRAMES, 3), has(FEATURES, 1)] == [True, True, True, False]
    cache.get((FRAMES, 1), lambda: ones(10))
    cache.get((FRAMES, 3), lambda: ones(20))
    cache.get((FRAMES, 4), lambda: ones(10))
    assert [has(FRAMES, 1), has(FRAMES, 2), has(FRAMES, 3)] == [True, False, True]
    cache.get((FEATURES, 9), lambda: ones(10))
    assert not has(FEATURES, 9), "features take no frames' place"


def test_threads_that_want_the_same_at_once_make_it_once() -> None:
    cache, made, begun = MediaCache(MB), [], threading.Event()

    def make() -> tuple[torch.Tensor, ...]:
        made.append(1)
        begun.wait(10)
        return ones(8, 7)

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(cache.get, (FRAMES, 1), make) for _ in range(8)]
        while not made:
            time.sleep(0.001)
        begun.set()
        results = [one.result(10)[0] for one in waiting]
    assert len(made) == 1 and all(torch.equal(result, *ones(8, 7)) for result in results)
    assert (cache.report().hits, cache.report().misses) == (7, 1)


def test_errors_and_what_became_invalid_are_not_kept() -> None:
    cache = MediaCache(MB)

    def fails() -> tuple[torch.Tensor, ...]:
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            cache.get((FRAMES, 1), fails)
    assert torch.equal(*cache.get((FRAMES, 1), lambda: ones(3), lambda: False), *ones(3))
    assert cache.report().entries == 0
    cache.get((FRAMES, 1), lambda: (cache.clear(), ones(3))[1])
    assert cache.report().entries == 0, "what was begun before a flush is not kept after it"


# ---- which files are known -------------------------------------------------------------------------------------


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    one, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (one, other):
        path.write_bytes(b"\0video" * 500_000)
    origins = [media_cache.origin_of(str(path)) for path in (one, other)] + [media_cache.origin_of(one.read_bytes())]
    assert all(origin is not None for origin in origins)
    assert len({origin.digest for origin in origins if origin}) == 1
    assert all(origin.unchanged() for origin in origins if origin)
    stamp = one.stat()
    one.write_bytes(b"\0video" * 499_999 + b"\0Video")  # of the same length, at the same time
    os.utime(one, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [origin.unchanged() for origin in origins if origin] == [False, True, True]


def test_texts_patterns_and_files_that_cannot_be_read_are_not_known(tmp_path: Path) -> None:
    playlist, pattern = tmp_path / "a.m3u8", tmp_path / "%03d.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nsecret.ts\n")
    pattern.write_bytes(b"\0")
    os.mkfifo(tmp_path / "pipe.mp4")
    odd = ("/dev/zero", *(str(tmp_path / name) for name in ("pipe.mp4", "none.mp4", ".")), "a\0b", b"", 3)
    for source in (str(playlist), playlist.read_bytes(), str(pattern), *odd):
        assert media_cache.origin_of(source) is None


# ---- with real files and SGLang's processors --------------------------------------------------------------------

MODULES = {
    "qwen2_5_vl": ("qwen_vl", {}, "<|vision_start|><|video_pad|><|vision_end|>"),
    "qwen3_vl": ("qwen_vl", {}, "<|vision_start|><|video_pad|><|vision_end|>"),
    "glm4v": ("glm4v", {}, "<|begin_of_video|><|video|><|end_of_video|>"),
    "internvl": ("internvl", {"num_frames": 6}, "<video>"),
    "nvila_lite": ("nvila", {"num_frames": 6}, "<vila/video>"),
    "llava_onevision": ("transformers_auto", {"num_frames": 6}, "<video>"),
    "llava_video": ("qwen_vl", {"fps": 1, "max_frames": 16}, "<video>"),
    "longvila": ("qwen_vl", {"num_frames": 6}, "<video>"),
    "videochat_flash": ("qwen_vl", {"min_frames": 4, "max_frames": 16}, "<video>"),
}
"""By family: SGLang's module with its processor, the server's options for video, and the placeholder."""

QWEN = "qwen2_5_vl"


class Turns:
    """A family's processor, which gets one video after the other."""

    def __init__(self, name: str, folder: Path) -> None:
        module, video, self.placeholder = MODULES[name]
        fields = {"model_impl": "transformers"} if module == "transformers_auto" else {}
        path = FAMILY[name].make(folder / name)
        self.processing = Processing(path, module, mm_process_config={"video": video}, trust_remote_code=True, **fields)

    def __call__(self, *videos: Any) -> Any:
        return self.processing("Clip: ".join(["", *[self.placeholder] * len(videos)]) + "What?", videos=videos)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def files(folder: Path) -> tuple[Path, Path]:
    return make_video(folder / "a.mp4", 40, 112, 84, seed=1), make_video(folder / "b.mp4", 40, 112, 84, seed=2)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[MediaCache]:
    media_cache.of_process.cache_clear()
    monkeypatch.setenv(settings.MEDIA_CACHE_MB.variable, "64")
    yield media_cache.of_process()
    media_cache.of_process.cache_clear()


@pytest.fixture
def qwen(cache: MediaCache, folder: Path) -> Turns:
    made = Turns(QWEN, folder)
    cache.clear()
    return made


def told(output: Any) -> list[Any]:
    """All that decides what a model sees and what SGLang's caches know: ids, features, grids, times and hashes."""
    values: list[Any] = [output.ids, output.output.mrope_positions, output.output.mrope_position_delta]
    for item in output.items:
        item.set_pad_value()
        data = {name: value for name, value in item.model_specific_data.items() if name != "mminfer"}
        values += [item.feature, item.hash, item.pad_value, item.offsets, *sorted(data.items())]
    return values


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return bool(a == b)


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of frames of each later call of SGLang's decoder."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    counts: list[int] = []
    for name in ("get_frames_as_tensor", "get_frames_at"):
        original = getattr(VideoDecoderWrapper, name)

        def counted(self: Any, indices: Any, original: Any = original) -> Any:
            if not isinstance(self, decoders.Bounded):
                counts.append(len(indices))
            return original(self, indices)

        monkeypatch.setattr(VideoDecoderWrapper, name, counted)
    return counts


@pytest.mark.parametrize("name", MODULES)
def test_a_kept_video_is_the_same_to_the_bit_in_every_family(
    name: str, cache: MediaCache, folder: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Turns(name, folder)
    cache.limit = 0  # nothing is kept
    plain = told(family(*files))
    assert cache.report().entries == 0
    cache.limit = 64 * MB
    first = told(family(files[0]))
    turns, counts = told(family(*files)), decoded(monkeypatch)
    again = told(family(*files))
    assert counts == [] and cache.report().hits > 0
    assert same(turns, plain) and same(again, plain)
    assert len(first[0]) < len(plain[0])


def test_with_the_cache_off_a_server_does_as_without_it(
    folder: Path, files: tuple[Path, Path], cache: MediaCache, qwen: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = told(qwen(*files))
    media_cache.of_process.cache_clear()
    monkeypatch.setenv(settings.MEDIA_CACHE_MB.variable, "0")
    off = Turns(QWEN, folder)
    for _ in range(2):
        counts = decoded(monkeypatch)
        assert same(told(off(*files)), kept)
        assert counts[:1], "decoded anew"
    assert media_cache.of_process().report().misses == 0


SIZES = [
    *({}, {"total_pixels": 1000}, {"total_pixels": 700_000}, {"min_pixels": 784, "max_pixels": 784}),
    *({"min_pixels": 784, "max_pixels": 3136}, {"max_pixels": 90_000}, {"max_long_side_pixel": 28}),
]


def test_no_option_of_a_size_means_another_one_where_frames_are_kept(
    folder: Path, qwen: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames get their size as they are decoded, and SGLang, which looks at them next, must not size them again: its
    rule is not one to be applied twice."""
    path = make_video(folder / "square.mp4", 48, 336, 336, 8, seed=6)
    asked_for = [SimpleNamespace(url=str(path), preprocess_kwargs=dict(size)) for size in SIZES]
    kept = [told(qwen(video)) for video in asked_for]
    media_cache.of_process.cache_clear()
    monkeypatch.setenv(settings.MEDIA_CACHE_MB.variable, "0")
    off = Turns(QWEN, folder)
    for size, video, expected in zip(SIZES, asked_for, kept):
        assert same(told(off(video)), expected), size


def test_what_comes_out_may_be_changed(qwen: Turns, files: tuple[Path, Path]) -> None:
    first = qwen(files[0])
    expected = told(first)
    expected[3] = expected[3].clone()
    first.items[0].feature.zero_()
    again = qwen(files[0])
    assert same(told(again), expected)
    again.items[0].feature.fill_(7)
    assert same(told(qwen(files[0])), expected)


def test_the_same_bytes_are_known_however_they_come(
    qwen: Turns, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, counts = told(qwen(files[0])), decoded(monkeypatch)
    (tmp_path / "c.mp4").write_bytes(files[0].read_bytes())
    text = base64.b64encode(files[0].read_bytes()).decode()
    for form in (tmp_path / "c.mp4", files[0].as_uri(), f"data:video/mp4;base64,{text}", text, files[0].read_bytes()):
        assert same(told(qwen(form)), expected)
    assert counts == []


def test_a_changed_file_is_decoded_anew(qwen: Turns, files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "c.mp4"
    answers = []
    for source in (*files, files[0]):
        path.write_bytes(source.read_bytes())
        os.utime(path, (1, 1))
        answers.append(told(qwen(path)))
    assert same(answers[0], answers[2]) and answers[0][0] == answers[1][0]
    assert not same(answers[0], answers[1]) and same(answers[1], told(qwen(files[1])))


@pytest.mark.parametrize(
    "option",
    [
        *({"fps": 4.0}, {"max_frames": 2}, {"num_frames": 8}, {"max_long_side_pixel": 56}),
        *({"resized_height": 56, "resized_width": 56}, {"max_pixels": 56 * 56}),
    ],
    ids=lambda option: next(iter(option)),
)
def test_other_options_make_another_entry(
    option: dict[str, Any], qwen: Turns, files: tuple[Path, Path], cache: MediaCache
) -> None:
    plain = told(qwen(files[0]))
    asked_for = SimpleNamespace(url=str(files[0]), preprocess_kwargs=option)
    kept = told(qwen(asked_for))
    assert not same(kept[3], plain[3])
    cache.clear()
    assert same(told(qwen(asked_for)), kept)
    assert same(told(qwen(files[0])), plain)


@pytest.mark.parametrize("setting", [{"do_normalize": False}, {"do_resize": False}, {"rescale_factor": 0.5}])
def test_other_settings_of_the_processor_make_other_features(setting: dict[str, Any], cache: MediaCache) -> None:
    size = {"shortest_edge": 112 * 112, "longest_edge": 10**6}  # more than the frames have
    video_processor = transformers.Qwen2VLVideoProcessor(size=size)
    video_features.keep(SimpleNamespace(video_processor=video_processor))
    frames = torch.arange(4 * 3 * 56 * 84, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(4, 3, 56, 84)

    def processed(**settings: Any) -> torch.Tensor:
        made = video_processor([frames], return_tensors="pt", do_sample_frames=False, **settings)
        return made["pixel_values_videos"]

    plain = processed()
    assert torch.equal(processed(), plain) and (cache.report().hits, cache.report().misses) == (1, 1)
    other = processed(**setting)
    assert other.shape != plain.shape or not torch.equal(other, plain)
    for name, value in setting.items():
        setattr(video_processor, name, value)
    assert torch.equal(processed(), other)
    cache.clear()
    assert torch.equal(processed(), other)


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(
    qwen: Turns, files: tuple[Path, Path], tmp_path: Path, cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    path = tmp_path / "c.mp4"
    path.write_bytes(files[0].read_bytes())
    original = VideoDecoderWrapper.get_frames_as_tensor

    def changes(self: Any, indices: Any) -> Any:
        frames = original(self, indices)
        if not isinstance(self, decoders.Bounded):
            path.write_bytes(files[1].read_bytes())
        return frames

    with monkeypatch.context() as patch:
        patch.setattr(VideoDecoderWrapper, "get_frames_as_tensor", changes)
        qwen(path)
    before = cache.report().misses
    told(qwen(files[0]))
    assert cache.report().misses > before, "nothing was kept under the content of before"


def test_a_broken_file_fails_every_time(qwen: Turns, tmp_path: Path, cache: MediaCache) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 4000)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"video|VIDEO"):
            qwen(path)
    assert cache.report().entries == 0


def test_a_flush_of_sglangs_cache_empties_it(qwen: Turns, files: tuple[Path, Path], cache: MediaCache) -> None:
    qwen(files[0])
    assert cache.report().entries > 0
    qwen.processing.processor.clear_preprocess_cache()
    assert cache.report().entries == 0


def test_videos_that_come_as_frames_keep_their_features(qwen: Turns, tmp_path: Path, cache: MediaCache) -> None:
    frames = [str(make_image(tmp_path / f"{i}.png", 84, 56, seed=i)) for i in range(4)]
    expected = told(qwen(frames))
    assert cache.report().hits == 0
    assert same(told(qwen(frames)), expected)
    assert (cache.report().hits, cache.report().entries) == (1, 1)


def test_other_servers_keep_nothing(
    files: tuple[Path, Path], cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    monkeypatch.setattr(asked, "for_mminfer", lambda: False)
    assert not hasattr(VideoDecoderWrapper(str(files[0])), media_cache.ORIGIN)
    monkeypatch.setattr(asked, "for_mminfer", lambda: True)
    assert hasattr(VideoDecoderWrapper(str(files[0])), media_cache.ORIGIN)
