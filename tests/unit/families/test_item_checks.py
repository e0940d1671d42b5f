"""Media that a client sends preprocessed: taken if they fit prompt and model, and refused with a sentence if not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import MultimodalInputs

from families import internvl
from processing import Processing
from sglang_mminfer import settings
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_5_vl
from sglang_mminfer.tools.media import make_image, make_video

BEFORE, PAD, AFTER = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def processing(tmp_path_factory: pytest.TempPathFactory) -> Processing:
    path = tmp_path_factory.mktemp("qwen") / "model"
    return Processing(make_tiny_qwen2_5_vl(path, layers=2, heads=8, kv_heads=2, head_dim=16), "qwen_vl")


@pytest.fixture(scope="module")
def picture(processing: Processing, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A picture as the processor makes it, and the number of its tokens."""
    path = make_image(tmp_path_factory.mktemp("pictures") / "a.png", 84, 56)
    (item,) = processing(BEFORE + PAD + AFTER, images=[path]).items
    ((first, last),) = item.offsets
    data = {"pixel_values": item.feature, "image_grid_thw": item.model_specific_data["image_grid_thw"]}
    return {**data, "tokens": last - first + 1}


def take(processing: Processing, data: Any, tokens: int, prompt: str = "") -> Any:
    """What the tokenizer's process makes of a prompt with `tokens` placeholders and one preprocessed picture."""
    prompt = prompt or "Look: " + BEFORE + PAD * tokens + AFTER + " What is it?"
    request = SimpleNamespace(image_data=[data], video_data=None, audio_data=None, modalities=None, rid="test")
    with processing.published():
        return asyncio.run(
            processing.processor.process_mm_data_async(
                image_data=request.image_data, audio_data=None, input_text=prompt, request_obj=request
            )
        )


def width(processing: Processing) -> int:
    return processing.hf_config.get_text_config().hidden_size


def good(picture: dict[str, Any]) -> dict[str, Any]:
    data = {key: value for key, value in picture.items() if key != "tokens"}
    return {"format": "processor_output", "modality": "IMAGE", **data}


def embedded(picture: dict[str, Any], processing: Processing, rows: int = 0, **changes: Any) -> dict[str, Any]:
    feature = torch.zeros(picture["tokens"] + rows, width(processing))
    grid = {key: value for key, value in picture.items() if key == "image_grid_thw"}
    return {"format": "precomputed_embedding", "feature": feature, **grid, **changes}


def test_what_fits_is_taken(processing: Processing, picture: dict[str, Any]) -> None:
    for data in (good(picture), embedded(picture, processing)):
        output = take(processing, data, picture["tokens"])
        media = MultimodalInputs.from_processor_output(output)
        ((first, last),) = media.mm_items[0].offsets
        assert last - first + 1 == picture["tokens"]


def without(*names: str) -> Change:
    return lambda data: {key: value for key, value in data.items() if key not in names}


def with_(**changes: Any) -> Change:
    return lambda data: {**data, **{k: v(data) if callable(v) else v for k, v in changes.items()}}


def rows(count: int) -> Change:
    return with_(pixel_values=lambda data: data["pixel_values"][:count])


BAD: dict[str, tuple[Change, str]] = {
    "no grid": (without("image_grid_thw"), r"image_grid_thw"),
    "a grid of lists": (with_(image_grid_thw=lambda data: data["image_grid_thw"].tolist()), r"image_grid_thw"),
    "a grid of two": (with_(image_grid_thw=torch.tensor([[1, 4]])), r"image_grid_thw|media"),
    "a flat grid": (with_(image_grid_thw=torch.tensor([1, 4, 4])), r"image_grid_thw|media"),
    "a grid of floats": (with_(image_grid_thw=lambda data: data["image_grid_thw"].float()), r"image_grid_thw"),
    "a negative grid": (with_(image_grid_thw=lambda data: -data["image_grid_thw"]), r"media|mm_items"),
    "a larger grid": (with_(image_grid_thw=lambda data: data["image_grid_thw"] * 2), r"media|mm_items"),
    "no features": (without("pixel_values"), r"feature"),
    "fewer rows": (rows(3), r"feature"),
    "no rows": (rows(0), r"feature"),
    "features in a list": (with_(pixel_values=lambda data: data["pixel_values"].tolist()), r"feature"),
    "features of integers": (with_(pixel_values=lambda data: data["pixel_values"].long()), r"feature"),
    "narrow features": (with_(pixel_values=lambda data: data["pixel_values"][:, :7]), r"feature"),
    "no numbers": (with_(pixel_values=lambda data: data["pixel_values"] * float("nan")), r"finite"),
    "offsets behind the prompt": (with_(offsets=[(5000, 5005)]), r"offset"),
    "negative offsets": (with_(offsets=[(-4, 1)]), r"offset"),
    "offsets the wrong way": (with_(offsets=[(9, 3)]), r"offset"),
    "overlapping offsets": (with_(offsets=[(2, 8), (4, 9)]), r"overlap|offset|media"),
    "offsets that are short": (with_(offsets=[(3, 4)]), r"placeholder|mm_items|media"),
    "words for offsets": (with_(offsets="all"), r"."),
    "a pad value that is a word's": (with_(hash=7, pad_value=11), r"pad_value"),
    "pad values that are words'": (with_(hash=7, pad_value=1 << 40, pad_values=(1, 2)), r"pad_value"),
    "a key of ours": (with_(mminfer=[(0, 0, 1, 1, 1, 0)]), r"mminfer is no field"),
    "nothing": (lambda data: {"format": "processor_output"}, r"."),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(processing: Processing, picture: dict[str, Any], name: str) -> None:
    change, said = BAD[name]
    with pytest.raises(ValueError, match=said):
        take(processing, change(good(picture)), picture["tokens"])


@pytest.mark.parametrize("rows_more", [-1, 1, -1000])
def test_embeddings_are_as_many_as_placeholders(
    processing: Processing, picture: dict[str, Any], rows_more: int
) -> None:
    rows_more = max(rows_more, -picture["tokens"])
    with pytest.raises(ValueError, match=r"expected embeddings of \d+ x \d+ for its \d+ tokens"):
        take(processing, embedded(picture, processing, rows_more), picture["tokens"])


@pytest.mark.parametrize(
    "feature", [torch.zeros(6, 5), torch.zeros(6), torch.full((6, 128), torch.inf), [[0.0] * 128] * 6, "x", None, 3]
)
def test_embeddings_are_the_models(processing: Processing, picture: dict[str, Any], feature: Any) -> None:
    with pytest.raises(ValueError, match=r"feature|embeddings"):
        take(processing, embedded(picture, processing, feature=feature), picture["tokens"])


def test_switched_off_all_of_it_goes_to_the_scheduler(
    processing: Processing, picture: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As stock SGLang has it: the scheduler would end there."""
    monkeypatch.setenv(settings.MENDS.variable, "-item_checks")
    output = take(processing, embedded(picture, processing, -1), picture["tokens"])
    assert len(output.mm_items[0].feature) < picture["tokens"]


def test_pictures_and_videos_are_as_before(processing: Processing, tmp_path: Path) -> None:
    picture, video = make_image(tmp_path / "a.png", 84, 56), make_video(tmp_path / "a.mp4", 8, 84, 56, 4)
    prompt = BEFORE + PAD + AFTER + "<|vision_start|><|video_pad|><|vision_end|>?"
    found = processing(prompt, images=[picture], videos=[video])
    assert {item.modality.name for item in found.items} == {"IMAGE", "VIDEO"}


def test_a_family_that_takes_pictures_only_says_so(tmp_path: Path) -> None:
    own = Processing(internvl.make(tmp_path / "model"), "internvl")
    for shape in ((1, 3, 56, 56), (2, 5), ()):
        data = {"format": "processor_output", "modality": "IMAGE", "pixel_values": torch.zeros(shape)}
        for prompt in ("<image>?", "<img>" + "<IMG_CONTEXT>" * 16 + "</img>?"):
            with pytest.raises(ValueError, match=r"mm_items\[0\] \(image\)|expected media for every image placeholder"):
                take(own, data, 16, prompt)
