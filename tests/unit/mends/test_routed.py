"""Media of a prompt that a router made have the positions that they have in a prompt of SGLang's own tokenizer."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens
from sglang.srt.managers.schedule_batch import MultimodalInputs
from sglang.srt.managers.scheduler import Scheduler

from families import FAMILIES
from processing import Processing
from sglang_mminfer import settings
from sglang_mminfer.tools.media import make_image, make_video


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_positions_are_those_of_the_tokenizer_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = next(one for one in FAMILIES if one.name == name)
    assert family.prompt is not None
    processing = Processing(family.make(tmp_path / "model"), family.prompt.module)
    picture = make_image(tmp_path / "a.png", 112, 84)
    film = make_video(tmp_path / "a.mp4", 8, 112, 84, 4)
    words = f"{family.prompt.image}{family.prompt.video}What came first?"
    got = processing(words, images=[picture], videos=[film])
    expected = got.output.mrope_positions
    assert len({tuple(axis) for axis in expected.tolist()}) == 3

    media = MultimodalInputs.from_processor_output(got.output)
    media.mrope_positions = media.mrope_position_delta = None
    padded = MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens(array("q", got.ids), media)
    assert min(len(item.offsets) for item in media.mm_items) > 0 and list(padded) != got.ids
    request = SimpleNamespace(multimodal_inputs=media, origin_input_ids=padded)
    scheduler = SimpleNamespace(_mm_processor=processing.processor)

    def positions() -> torch.Tensor:
        media.mrope_positions = None
        with processing.published():
            Scheduler._maybe_compute_mrope_positions(scheduler, request)
        assert request.origin_input_ids is padded
        return media.mrope_positions

    assert torch.equal(positions(), expected)
    assert media.mrope_position_delta.tolist() == got.output.mrope_position_delta.tolist()
    monkeypatch.setenv(settings.MENDS.variable, "-router_positions")
    assert not torch.equal(positions(), expected)


def test_media_that_cannot_be_placed_are_the_requests_error(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "qwen2_5_vl")
    assert family.prompt is not None
    processing = Processing(family.make(tmp_path / "model"), family.prompt.module)
    pictures = [make_image(tmp_path / "a.png", 112, 84), make_image(tmp_path / "b.png", 84, 112)]
    got = processing(family.prompt.image * 2, images=pictures)
    media = MultimodalInputs.from_processor_output(got.output)
    media.mrope_positions = None
    del media.mm_items[1].model_specific_data["image_grid_thw"]
    said: list[str] = []
    ids = array("q", got.ids)
    request = SimpleNamespace(multimodal_inputs=media, origin_input_ids=ids, set_finish_with_abort=said.append)
    with processing.published():
        Scheduler._maybe_compute_mrope_positions(SimpleNamespace(_mm_processor=processing.processor), request)
    assert said and said[0].startswith("media: cannot be placed in the prompt: ") and request.origin_input_ids is ids


def test_models_without_such_positions_are_left_alone(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "internvl")
    assert family.prompt is not None
    processing = Processing(family.make(tmp_path / "model"), family.prompt.module)
    got = processing(family.prompt.image, images=[make_image(tmp_path / "a.png", 112, 84)])
    media = MultimodalInputs.from_processor_output(got.output)
    request = SimpleNamespace(multimodal_inputs=media, origin_input_ids=array("q", got.ids))
    with processing.published():
        Scheduler._maybe_compute_mrope_positions(SimpleNamespace(_mm_processor=processing.processor), request)
    assert media.mrope_positions is None and list(request.origin_input_ids) == got.ids
