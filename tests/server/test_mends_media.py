"""Mends of media on a server: what arrives over HTTP, and what a client is told."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image, ImageOps

from serving import Media, Served, same, text, user
from sglang_mminfer.tools.media import make_video, write_video

pytestmark = pytest.mark.server("main")

STILLS = [np.full((112, 112, 3), 30 * i, np.uint8) for i in range(6)]
PLACEHOLDER = "<|vision_start|><|video_pad|><|vision_end|>"


def coded(picture: Image.Image, form: str = "PNG", **options: Any) -> str:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def picture(url: str, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **options}}


def film(url: Path | str, **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": str(url), **options}}


def decoded(file: Path) -> list[np.ndarray]:
    """The decoded frames of a file, because H.264 is not lossless."""
    import decord

    return [frame.asnumpy() for frame in decord.VideoReader(str(file))]


def generate(served: Served, **body: Any) -> tuple[int, Any]:
    """The status and answer of /generate."""
    request = urllib.request.Request(
        f"{served.server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_photos_stand_upright(main: Served) -> None:
    pixels = np.zeros((56, 112, 3), np.uint8)
    pixels[:28], pixels[28:] = (220, 30, 30), (30, 30, 220)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = coded(Image.fromarray(pixels), "JPEG", exif=exif)
    opened = Image.open(io.BytesIO(base64.b64decode(photo.partition(",")[2])))
    upright = coded(ImageOps.exif_transpose(opened).convert("RGB"))
    first = main.ask([user(picture(photo), text("What is this?"))])
    main.server.flush_cache()
    same(first, main.ask([user(picture(upright), text("What is this?"))]))


@pytest.mark.parametrize(
    "options", [{"fps": 1}, {"max_frames": 8}, {"max_long_side_pixel": 56}, {"total_pixels": 1000}, {"nframes": 6}]
)
def test_options_of_a_video(main: Served, media: Media, tmp_path: Path, options: dict[str, int]) -> None:
    """SGLang's message part has no fields total_pixels and nframes."""
    path = make_video(tmp_path / "a.mp4", 48, 336, 336, 8, seed=6)
    plain = main.ask([user(film(path), text("What?"))], 1)
    asked = main.ask([user(film(path, **options), text("What?"))], 1)
    assert len(asked.prompt_ids) < len(plain.prompt_ids)
    assert main.ask([user(film(path, of_another_server=1), text("What?"))], 1).prompt_ids == plain.prompt_ids


def test_options_of_generate(main: Served, tmp_path: Path) -> None:
    """Under the option names that SGLang accepts in /generate."""
    path = str(make_video(tmp_path / "a.mp4", 48, 336, 336, 8, seed=6))
    lengths = []
    for options in ({}, {"fps": 1}, {"num_frames": 4}, {"total_max_pixels": 1000}):
        entry = {"url": path, **options}
        body = {"text": f"{PLACEHOLDER}What?", "video_data": [entry], "sampling_params": {"max_new_tokens": 1}}
        status, answer = generate(main, **body)
        assert status == 200, answer
        lengths.append(answer["meta_info"]["prompt_tokens"])
    assert lengths[0] > lengths[1] > lengths[2] and lengths[3] < lengths[0]


def test_options_that_cannot_be_had(main: Served, media: Media) -> None:
    for options, told in (
        ({"max_frames": 5000}, "max_frames: expected at most 1024, got 5000"),
        ({"max_dynamic_patch": 2}, "max_dynamic_patch: this model takes"),
        ({"min_pixels": "many"}, "min_pixels: expected a whole number above 0, got 'many'"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            main.ask([user(film(media.videos[0], **options), text("What?"))], 1)


def test_videos_of_frames(main: Served, tmp_path: Path) -> None:
    file = write_video(tmp_path / "stills.mp4", STILLS, 112, 112, 1)
    frames = [coded(Image.fromarray(still)).partition(",")[2] for still in decoded(file)]
    right = main.ask([user(film(file), text("What?"))])
    main.server.flush_cache()
    got = main.ask([user(film("data:video/jpeg;base64," + ",".join(frames)), text("What?"))])
    same(got, right)
    joined = "data:video/jpeg;base64," + ",".join(frames)
    for entry in (frames, [f"data:image/png;base64,{frame}" for frame in frames], {"url": joined, "fps": 1}):
        for samples in (1, 2):
            sampling = {"max_new_tokens": 2, "n": samples}
            status, answer = generate(main, text=f"{PLACEHOLDER}What?", video_data=[entry], sampling_params=sampling)
            assert status == 200, answer
            for one in answer if samples > 1 else [answer]:
                assert one["meta_info"]["prompt_tokens"] == len(right.prompt_ids) - _around(main, right)
    status, answer = generate(main, text=f"{PLACEHOLDER}What?", video_data=[["!!"]], sampling_params={})
    assert status == 400 and "a video is a file, a URL" in answer


def _around(served: Served, answer: Any) -> int:
    """How many tokens the chat template puts around a message."""
    plain = served.ask([user(text("What?"))], 1)
    _, bare = generate(served, text="What?", sampling_params={"max_new_tokens": 1})
    return len(plain.prompt_ids) - bare["meta_info"]["prompt_tokens"]


def test_several_answers_about_several_pictures(main: Served, media: Media) -> None:
    parts = [*(picture(str(path)) for path in media.images[:2]), text("Compare.")]
    alone = main.ask([user(*parts)], 4)
    answer = main.client.chat.completions.create(
        model="default", messages=[user(*parts)], n=2, max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
    )
    assert len({choice.message.content for choice in answer.choices}) == 1
    assert answer.usage.prompt_tokens == len(alone.prompt_ids)


def _in_background(ask: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    return thread, answers


def test_a_picture_that_is_too_large(main: Served, media: Media) -> None:
    neighbour, answers = _in_background(lambda: main.ask([user(picture(str(media.images[0])), text("What?"))], 32))
    huge = coded(Image.new("L", (16_000, 12_000)))
    start = time.monotonic()
    with pytest.raises(openai.BadRequestError, match=r"192\.?0* ?.*100 (megapixels )?are taken|192000000 pixels"):
        main.ask([user(picture(huge), text("What?"))], 1)
    assert time.monotonic() - start < 5
    with pytest.raises(openai.BadRequestError, match="one side is 10000 times the other, and at most 200"):
        main.ask([user(picture(coded(Image.new("RGB", (1, 10_000)))), text("What?"))], 1)
    neighbour.join()
    same(answers[0], main.ask([user(picture(str(media.images[0])), text("What?"))], 32))


@pytest.mark.parametrize("side", [2, 16])
def test_a_small_video(main: Served, tmp_path: Path, side: int) -> None:
    stills = [np.full((side, side, 3), 30 * i, np.uint8) for i in range(6)]
    path = write_video(tmp_path / "small.mp4", stills, side, side, 2)
    assert len(main.ask([user(film(path), text("What?"))], 2).token_ids) == 2
