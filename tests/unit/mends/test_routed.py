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

from families import FAMILY, Prompt
from processing import Processing
from sglang_mminfer import settings
from sglang_mminfer.tools.media import make_image, make_video


def served(name: str, folder: Path) -> tuple[Prompt, Processing]:
    """How the prompts of a family are written, and its processor."""
    family = FAMILY[name]
    assert family.prompt is not None
    return family.prompt, Processing(family.make(folder / "model"), family.prompt.module)


def compute(processing: Processing, request: SimpleNamespace) -> None:
    """What the scheduler does with a request whose media have no positions."""
    with processing.published():
        Scheduler._maybe_compute_mrope_positions(SimpleNamespace(_mm_processor=processing.processor), request)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_positions_are_those_of_the_tokenizer_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, processing = served(name, tmp_path)
    picture = make_image(tmp_path / "a.png", 112, 84)
    film = make_video(tmp_path / "a.mp4", 8, 112, 84, 4)
    words = f"{prompt.image}{prompt.video}What came first?"
    got = processing(words, images=[picture], videos=[film])
    expected = got.output.mrope_positions
    assert len({tuple(axis) for axis in expected.tolist()}) == 3

    media = MultimodalInputs.from_processor_output(got.output)
    media.mrope_positions = media.mrope_position_delta = None
    padded = MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens(array("q", got.ids), media)
    assert min(len(item.offsets) for item in media.mm_items) > 0 and list(padded) != got.ids
    request = SimpleNamespace(multimodal_inputs=media, origin_input_ids=padded)

    def positions() -> torch.Tensor:
        media.mrope_positions = None
        compute(processing, request)
        assert request.origin_input_ids is padded
        return media.mrope_positions

    assert torch.equal(positions(), expected)
    assert media.mrope_position_delta.tolist() == got.output.mrope_position_delta.tolist()
    monkeypatch.setenv(settings.MENDS.variable, "-router_positions")
    assert not torch.equal(positions(), expected)


def test_media_that_cannot_be_placed_are_the_requests_error(tmp_path: Path) -> None:
    prompt, processing = served("qwen2_5_vl", tmp_path)
    pictures = [make_image(tmp_path / "a.png", 112, 84), make_image(tmp_path / "b.png", 84, 112)]
    got = processing(prompt.image * 2, images=pictures)
    media = MultimodalInputs.from_processor_output(got.output)
    media.mrope_positions = None
    del media.mm_items[1].model_specific_data["image_grid_thw"]
    said: list[str] = []
    ids = array("q", got.ids)
    request = SimpleNamespace(multimodal_inputs=media, origin_input_ids=ids, set_finish_with_abort=said.append)
    compute(processing, request)
    assert said and said[0].startswith("media: cannot be placed in the prompt: ") and request.origin_input_ids is ids


def test_models_without_such_positions_are_left_alone(tmp_path: Path) -> None:
    prompt, processing = served("internvl", tmp_path)
    got = processing(prompt.image, images=[make_image(tmp_path / "a.png", 112, 84)])
    media = MultimodalInputs.from_processor_output(got.output)
    request = SimpleNamespace(multimodal_inputs=media, origin_input_ids=array("q", got.ids))
    compute(processing, request)
    assert media.mrope_positions is None and list(request.origin_input_ids) == got.ids
