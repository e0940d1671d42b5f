"""Mends of the prompt, in SGLang's own processor of each family: words stay words, and token ids stay token ids.

The expected ids come from the tokenizer alone, or are the ids of the prompt.
"""

from __future__ import annotations

import copy
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from PIL import Image

from families import FAMILIES, FAMILY, Prompt
from processing import Processed, Processing
from sglang_mminfer import mends, settings
from sglang_mminfer.mends import verbatim
from sglang_mminfer.mends.words import PLACEHOLDERS, pattern_of
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.tools.media import make_image, make_video

QWEN_IMAGE, QWEN_VIDEO = tiny_model.PLACEHOLDERS
SERVED = {family.name: family.prompt for family in FAMILIES if family.prompt}


def make_still(path: Path, frames: int, width: int, height: int, fps: float = 4) -> Path:
    """A black video: frames of any shape have equal pixels."""
    import imageio_ffmpeg
    import numpy as np

    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, codec="libx264", macro_block_size=1)
    writer.send(None)
    for _ in range(frames):
        writer.send(np.zeros((height, width, 3), np.uint8))
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("media")
    return make_image(root / "a.png", 96, 64, seed=1), make_video(root / "a.mp4", 8, 96, 64, 4, seed=2)


@pytest.fixture(scope="module", params=SERVED)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prompt, Processing]:
    own = FAMILY[request.param]
    path = own.make(tmp_path_factory.mktemp(own.name) / "model")
    served = SERVED[own.name]
    fields: dict[str, Any] = {"trust_remote_code": "--trust-remote-code" in own.flags}
    if "--enable-multimodal" in own.flags:
        fields["enable_multimodal"] = True
    options = {"mm_process_config": {"video": {**own.video_options}}} if own.video_options else {}
    if own.name == "llava_onevision":
        fields["model_impl"] = "transformers"
        options = {"mm_process_config": {"video": {"num_frames": 4}}}
    return served, Processing(path, served.module, **fields, **options)


def guarded(processing: Processing, words: str) -> str:
    """Words as they are in a chat request's finished prompt."""
    return pattern_of(processing.processor).sub(lambda word: verbatim.words(word[0]), words)


def outside(got: Processed) -> list[int]:
    """The ids outside media."""
    inside = {i for item in got.items for first, last in item.offsets for i in range(first, last + 1)}
    return [token for i, token in enumerate(got.ids) if i not in inside]


# ---- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["<image>", "<video>", "<img>", "</img>", "<|image_pad|>", "<|video_pad|>"])
def test_words_that_look_like_placeholders_stay_words(
    family: tuple[Prompt, Processing], files: tuple[Path, Path], word: str
) -> None:
    served, processing = family
    image, video = files
    media = [(served.image, {"images": [image]})] + ([(served.video, {"videos": [video]})] if served.video else [])
    for placeholder, arguments in media:
        before, behind = "Show: ", f"What does {word} mean?{word}"
        got = processing(before + placeholder + guarded(processing, behind), **arguments)
        spoken = _spoken(processing, behind, word)
        assert got.ids[-len(spoken) :] == spoken
        quiet = processing(before + placeholder + "What?", **arguments)
        assert [item.offsets for item in got.items] == [item.offsets for item in quiet.items]


def _spoken(processing: Processing, text: str, word: str) -> list[int]:
    """The ids of a text in which `word` is only a word. If it is a special token's name, it is encoded by itself."""
    encode = processing.tokenizer.encode
    if word not in {str(token) for token in processing.tokenizer.added_tokens_decoder.values()}:
        return list(encode(text, add_special_tokens=False))
    ids: list[int] = []
    for i, part in enumerate(text.split(word)):
        ids += encode(word, add_special_tokens=False, split_special_tokens=True) if i else []
        ids += encode(part, add_special_tokens=False) if part else []
    return ids


# ---- token ids ---------------------------------------------------------------------------------------------


def unusual(processing: Processing, words: str) -> list[int]:
    """The ids of words with one token for each character, which no tokenizer would give."""
    ids = [token for char in words for token in processing.tokenizer.encode(char, add_special_tokens=False)]
    assert ids != list(processing.tokenizer.encode(words, add_special_tokens=False))
    return ids


def test_ids_outside_media_are_never_changed(family: tuple[Prompt, Processing], files: tuple[Path, Path]) -> None:
    served, processing = family
    image, video = files
    before, behind = unusual(processing, "Look at what is shown:"), unusual(processing, "What is it?")
    placeholders = [(served.image, {"images": [image]}, "image")]
    placeholders += [(served.video, {"videos": [video]}, "video")] if served.video else []
    for placeholder, arguments, kind in placeholders:
        middle = list(processing.tokenizer.encode(placeholder, add_special_tokens=False))
        got = processing([*before, *middle, *behind], **arguments)
        assert got.ids[: len(before)] == before and got.ids[-len(behind) :] == behind
        text = processing("Look" + placeholder + "What", **arguments)
        spans = [[last - first for first, last in item.offsets] for item in got.items]
        assert spans == [[last - first for first, last in item.offsets] for item in text.items]
        assert all(item.modality.name.lower() == kind for item in got.items)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_ids_of_an_answer_are_found_again_or_refused(
    family: tuple[Prompt, Processing], files: tuple[Path, Path], kind: str
) -> None:
    served, processing = family
    image, video = files
    placeholder = served.image if kind == "image" else served.video
    if not placeholder:
        pytest.skip("this family takes images only")
    arguments = {"images": [image]} if kind == "image" else {"videos": [video]}
    first = processing(f"Look:{placeholder}What?", **arguments)
    if kind not in served.expanded:
        with pytest.raises(ValueError, match=r"expected"):
            processing(first.ids, **arguments)
        return
    again = processing(first.ids, **arguments)
    assert again.ids == first.ids
    assert [item.offsets for item in again.items] == [item.offsets for item in first.items]


def test_an_id_that_is_none_is_refused(family: tuple[Prompt, Processing], files: tuple[Path, Path]) -> None:
    _, processing = family
    with pytest.raises(ValueError, match=r"input_ids\[1\]: expected a token id from 0 to \d+, got -5"):
        processing([1, -5, 2], images=[files[0]])


def test_more_placeholders_than_media_are_refused(family: tuple[Prompt, Processing], files: tuple[Path, Path]) -> None:
    served, processing = family
    with pytest.raises(ValueError, match=r"placeholder|<image>"):
        processing(f"{served.image}and{served.image}What?", images=[files[0]])


def test_fewer_placeholders_than_media_are_refused_or_added(
    family: tuple[Prompt, Processing], files: tuple[Path, Path]
) -> None:
    """No medium is dropped silently."""
    _, processing = family
    if getattr(processing.processor, "adds_placeholders", False):
        assert len(processing("What?", images=[files[0]]).items) == 1
        return
    with pytest.raises(ValueError, match=r"placeholder|<image>"):
        processing("What?", images=[files[0]])


# ---- stock beside mended -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY["qwen2_5_vl"].make(tmp_path_factory.mktemp("qwen") / "model")


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.MENDS.variable, f"-{name}")


def blank(path: Path, width: int, height: int) -> Path:
    Image.new("RGB", (width, height), "white").save(path)
    return path


def identities(got: Processed) -> list[int]:
    for item in got.items:
        item.set_pad_value()
    return [item.hash for item in got.items]


def test_media_of_equal_pixels_in_another_shape_are_two(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processing = Processing(qwen, "qwen_vl")
    upright, lying = blank(tmp_path / "a.png", 112, 224), blank(tmp_path / "b.png", 224, 112)
    still = make_still(tmp_path / "a.mp4", 8, 112, 224, 2), make_still(tmp_path / "b.mp4", 8, 224, 112, 2)
    slow = make_still(tmp_path / "c.mp4", 8, 112, 224, 1)

    def all_hashes() -> tuple[list[int], list[int]]:
        pictures = [identities(processing(QWEN_IMAGE, images=[path]))[0] for path in (upright, lying)]
        films = [identities(processing(QWEN_VIDEO, videos=[path]))[0] for path in (*still, slow)]
        return pictures, films

    pictures, films = all_hashes()
    assert len(set(pictures)) == 2
    assert len(set(films)) == 3, "another shape, and another time, is another video"
    assert all_hashes() == (pictures, films), "and the same one is the same"
    without("hash_of_arrangement", monkeypatch)
    assert [len(set(hashes)) for hashes in all_hashes()] == [1, 1]


@pytest.mark.parametrize(
    "frames, fps, times", [(32, 2, range(0, 32, 2)), (240, 24, range(0, 20, 2)), (60, 1, range(0, 120, 4))]
)
def test_frames_stand_at_their_time(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, fps: int, times: range
) -> None:
    """A temporal patch is two frames: one second at 2 frames a second, so 2 positions at 2 tokens_per_second."""
    path = make_still(tmp_path / "a.mp4", frames, 56, 56, fps=fps)
    processing = Processing(qwen, "qwen_vl")

    def temporal() -> list[int]:
        got = processing(QWEN_VIDEO + "What?", videos=[path])
        (item,) = got.items
        ((first, last),) = item.offsets
        positions = got.output.mrope_positions[:, first : last + 1]
        steps = int(item.model_specific_data["video_grid_thw"][0][0])
        behind = int(got.output.mrope_positions[0, last + 1])
        assert behind == int(positions.max()) + 1, "text goes on behind the highest position"
        return (positions[0] - positions[0, 0]).view(steps, -1)[:, 0].tolist()

    assert temporal() == list(times)
    without("video_seconds", monkeypatch)
    assert temporal()[-1] <= times[-1] / 6


def test_without_the_mends_words_and_ids_are_lost(
    qwen: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    processing = Processing(qwen, "qwen_vl")
    with pytest.raises(ValueError, match="expected one image placeholder for each of the 1 images given, found 2"):
        processing(QWEN_IMAGE + "What is <|image_pad|>?", images=[files[0]])
    odd = unusual(processing, "What is it?")
    prompt = [*processing.tokenizer.encode(QWEN_VIDEO), *odd]
    assert processing(prompt, videos=[files[1]]).ids[-len(odd) :] == odd
    without("token_ids", monkeypatch)
    assert processing(prompt, videos=[files[1]]).ids[-len(odd) :] != odd


def test_media_at_both_ends_of_a_prompt(family: tuple[Prompt, Processing], files: tuple[Path, Path]) -> None:
    """They have as many tokens as in the midst of one."""
    prompt, processing = family
    pictures = [files[0], files[0]]

    def lengths(before: str, behind: str) -> list[int]:
        got = processing(f"{before}{prompt.image.strip()} or {prompt.image.strip()}{behind}", images=pictures)
        return [last + 1 - first for item in got.items for first, last in item.offsets]

    assert lengths("", "") == lengths("Is it ", "?")


def test_without_the_mend_media_at_both_ends_are_misplaced(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILY["llava_onevision"]
    assert family.prompt is not None
    processing = Processing(family.make(tmp_path / "model"), family.prompt.module, model_impl="transformers")
    prompt = family.prompt.image.strip() + " or " + family.prompt.image.strip()
    assert processing(prompt, images=[files[0]] * 2)
    without("media_at_both_ends", monkeypatch)
    with pytest.raises(ValueError, match="expected offsets in a prompt"):
        processing(prompt, images=[files[0]] * 2)


# ---- marks -------------------------------------------------------------------------------------------------


def test_marks_survive_tokenization_and_copies() -> None:
    tokenizer = tiny_model.make_tokenizer()
    aware = verbatim.aware(tokenizer)
    marked = "a " + verbatim.words("<|image_pad|>") + verbatim.ids([5, 70_000, 3]) + " b"
    assert tokenizer.decode(tokenizer.encode(marked)) == marked
    expected = [*tokenizer.encode("a "), *tokenizer.encode("<|image_pad|>", split_special_tokens=True)]
    expected += [5, 70_000, 3, *tokenizer.encode(" b")]
    for own in (aware, copy.deepcopy(aware), pickle.loads(pickle.dumps(aware))):
        assert own.encode(marked) == expected
        assert own([marked], return_tensors="pt", padding=True)["input_ids"][0].tolist() == expected
        assert own.encode("a <|image_pad|> b") == tokenizer.encode("a <|image_pad|> b")
    assert verbatim.without_words("x" + verbatim.words("<video>")) == "x<video>"


def test_no_client_can_write_a_mark() -> None:
    """Characters of marks in a client's words are marked, and marks of another process are plain characters."""
    tokenizer = tiny_model.make_tokenizer()
    forged = "\U0010fff1\U00108000\U00108005\U0010fff2"
    assert verbatim.aware(tokenizer).encode(forged) == tokenizer.encode(forged)
    own = verbatim.ids([7])
    marked = pattern_of(None).sub(lambda word: verbatim.words(word[0]), own)
    assert verbatim.aware(tokenizer).encode(marked) == tokenizer.encode(own)


# ---- the registry ------------------------------------------------------------------------------------------


def test_every_mend_is_told_and_tested() -> None:
    names = [mend.name for mend in mends.MENDS]
    assert len(set(names)) == len(names)
    root = Path(__file__).parents[3]
    for mend in mends.MENDS:
        assert mend.stock.endswith(".") and mend.right.endswith(".")
        assert (root / mend.test.split("::")[0]).exists(), mend


@pytest.mark.parametrize(
    "said, left",
    [
        ("", None),
        ("all", None),
        ("none", set()),
        ("token_ids", {"token_ids"}),
        ("token_ids, video_seconds", {"token_ids", "video_seconds"}),
    ],
)
def test_the_setting(said: str, left: set[str] | None) -> None:
    every = {mend.name for mend in mends.MENDS if version("sglang") in SpecifierSet(mend.versions)}
    on = {mend.name for mend in mends.MENDS if mends.active(mend.name, {settings.MENDS.variable: said})}
    assert on == (every if left is None else left)
    without = {mend.name for mend in mends.MENDS if mends.active(mend.name, {settings.MENDS.variable: "-token_ids"})}
    assert without == every - {"token_ids"}


@pytest.mark.parametrize("said", ["tokenids", "-tokenids", "token_ids,-video_seconds"])
def test_a_setting_that_names_nothing_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.MENDS.variable, said)
    assert settings.MENDS.variable in str(mends.why_bad())
    from sglang_mminfer.serving import launch

    refusal = next(refusal for refusal in launch.REFUSALS if refusal.name == "mends")
    assert refusal.applies(None)


def test_placeholders_of_all_families_are_words() -> None:
    assert all(pattern_of(None).fullmatch(word) for word in PLACEHOLDERS)


def test_the_page_of_mends_is_of_this_list() -> None:
    page = Path(__file__).parents[3] / "docs" / "mends.md"
    assert page.read_text() == mends.page(), "make it anew: python -m sglang_mminfer.mends > docs/mends.md"
