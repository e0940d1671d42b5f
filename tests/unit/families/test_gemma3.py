"""Gemma 3 in SGLang's own processing: the map cell by cell against token ids, and which layers stand in configs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from transformers import AutoConfig

from families import gemma3
from families.gemma3 import IMAGE, INTERVAL, SIDE
from processing import Processing, cells_of
from sglang_mminfer.families import family_of
from sglang_mminfer.families.gemma3 import SquareReader
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs
from sglang_mminfer.head_config.fingerprint import fingerprint_of
from sglang_mminfer.tools.media import make_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma3.make(tmp_path_factory.mktemp("gemma3") / "model")


@pytest.fixture(scope="module")
def processing(checkpoint: Path) -> Processing:
    return Processing(checkpoint, "gemma3", enable_multimodal=True)


def test_cells_agree_with_token_ids(processing: Processing, tmp_path: Path) -> None:
    pictures = [make_image(tmp_path / "a.png", 90, 60, seed=1), make_image(tmp_path / "b.png", 40, 200, seed=2)]
    got = processing(f"{IMAGE}What?{IMAGE}Who?", images=pictures)
    runs = got.runs(processing.token("<image_soft_token>"))
    assert len(runs) == 2
    expected: list[tuple[str, int | None, tuple[int, int, int] | None]] = [("text", None, None)] * len(got.ids)
    for medium, (start, stop) in enumerate(runs):
        expected[start:stop] = [("image", medium, (0, cell // SIDE, cell % SIDE)) for cell in range(stop - start)]
    assert cells_of(got.map) == expected


def test_ids_of_an_answer_keep_the_lines_around_a_picture(processing: Processing, tmp_path: Path) -> None:
    """Also where the text itself has line breaks there, as the released chat template writes one."""
    picture = make_image(tmp_path / "a.png", 90, 60, seed=1)
    for text in (f"user\n{IMAGE}What?", f"{IMAGE}", f"a\n\n\n{IMAGE}\n\n{IMAGE}{IMAGE}\nb"):
        pictures = [picture] * text.count(IMAGE)
        first = processing(text, images=pictures)
        again = processing(first.ids, images=pictures)
        assert again.ids == first.ids
        assert [item.offsets for item in again.items] == [item.offsets for item in first.items]


def test_a_picture_cut_short_is_refused(processing: Processing, tmp_path: Path) -> None:
    picture = make_image(tmp_path / "a.png", 90, 60, seed=1)
    ids = processing(f"Look:{IMAGE}What?", images=[picture]).ids
    soft = processing.token("<image_soft_token>")
    for prompt in ([token for i, token in enumerate(ids) if i != ids.index(soft)], f"{IMAGE}<image_soft_token>What?"):
        with pytest.raises(ValueError, match=r"expected one image placeholder for each of the 1 images"):
            processing(prompt, images=[picture])


def test_another_number_of_tokens_is_named() -> None:
    item: Any = MultimodalDataItem(modality=SglModality.IMAGE, offsets=[(3, 17)])
    with pytest.raises(GeometryError, match=r"span 0 at \[3, 17\]: expected 4 x 4 tokens, got 15") as caught:
        map_from_mm_inputs(SimpleNamespace(mm_items=[item]), 40, SquareReader(4))
    assert caught.value.reason == "grid_mismatch"


def test_layers_with_a_window_stand_in_no_config(checkpoint: Path) -> None:
    shape = fingerprint_of(AutoConfig.from_pretrained(checkpoint))
    assert shape.layers == 2 * INTERVAL and shape.full_layers == (INTERVAL - 1, 2 * INTERVAL - 1)
    assert shape.rope_theta == 1e6


def test_what_a_start_says(checkpoint: Path) -> None:
    family = family_of(AutoConfig.from_pretrained(checkpoint))
    assert family is not None
    masked, causal = family.note("triton"), family.note("fa3")
    assert masked is not None and "run dense (layer_custom_mask)" in masked
    assert causal is not None and "SGLang's fa3 does not have that" in causal
