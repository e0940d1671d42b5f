"""Media that SGLang's processor leaves out without a word: the client is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import gemma3
from families.gemma3 import IMAGE
from processing import Processing
from sglang_mminfer import settings
from sglang_mminfer.families import item_checks
from sglang_mminfer.tools.media import make_image, make_video


@pytest.fixture(scope="module")
def processing(tmp_path_factory: pytest.TempPathFactory) -> Processing:
    path = gemma3.make(tmp_path_factory.mktemp("gemma3") / "model")
    return Processing(path, "gemma3", enable_multimodal=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("pictures") / "a.png", 90, 60, seed=1)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("films") / "a.mp4", 4, 64, 64, 2, seed=1)


def test_a_video_is_refused(processing: Processing, picture: Path, film: Path) -> None:
    for images, prompt in (([], "What?"), ([picture], f"{IMAGE}What?")):
        with pytest.raises(ValueError, match=r"video: expected none, .* for Gemma3.*, got 1"):
            processing(prompt, images=images, videos=[film])


def test_pictures_alone_are_taken(processing: Processing, picture: Path) -> None:
    assert len(processing(f"{IMAGE}What?", images=[picture]).items) == 1


def test_without_the_mend_the_video_is_left_out(
    processing: Processing, picture: Path, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(settings.MENDS.variable, "-unread_media")
    shown = processing(f"{IMAGE}What?", images=[picture], videos=[film])
    assert shown.ids == processing(f"{IMAGE}What?", images=[picture]).ids
    assert [item.modality.name for item in shown.items] == ["IMAGE"]


def test_a_class_that_mentions_a_kind_of_media_is_believed() -> None:
    """A model without a family has its class alone, and the class may make pictures of a video."""
    from sglang.srt.multimodal.processors.gemma3 import Gemma3SGLangImageProcessor
    from sglang.srt.multimodal.processors.moss_vl import MossVLImageProcessor
    from sglang.srt.multimodal.processors.pixtral import PixtralProcessor
    from sglang.srt.multimodal.processors.qwen_audio import Qwen2AudioMultimodalProcessor

    videos = {
        kind.__name__: item_checks.mentions(kind, "video_data") for kind in (MossVLImageProcessor, PixtralProcessor)
    }
    assert videos == {"MossVLImageProcessor": True, "PixtralProcessor": False}
    assert item_checks.mentions(Qwen2AudioMultimodalProcessor, "audio_data")
    assert not item_checks.mentions(Gemma3SGLangImageProcessor, "audio_data")
