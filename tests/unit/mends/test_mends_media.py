"""Mends of how pictures and videos are loaded, in SGLang's own processors in this process, with and without a mend."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from families import FAMILY
from processing import Processing
from sglang_mminfer import settings
from sglang_mminfer.families import sampling
from sglang_mminfer.families.videochat_flash.sampling import by_clips
from sglang_mminfer.mends import batches, limits, options, pictures
from sglang_mminfer.tools.media import make_video, write_video

MODULES = {
    "qwen2_5_vl": ("qwen_vl", {}),
    "qwen3_vl": ("qwen_vl", {}),
    "internvl": ("internvl", {"num_frames": 6}),
    "nvila_lite": ("nvila", {"num_frames": 6}),
    "llava_onevision": ("transformers_auto", {"num_frames": 6}),
    "llava_onevision_lmms": ("llava", {}),
    "llava_video": ("qwen_vl", {"fps": 1, "max_frames": 16}),
    "longvila": ("qwen_vl", {"num_frames": 6}),
    "videochat_flash": ("qwen_vl", {"min_frames": 4, "max_frames": 16}),
}
"""By family: SGLang's module with its processor, and the server's options for video."""

IMAGES_ONLY = "llava_onevision_lmms"

PLACEHOLDERS = {
    IMAGES_ONLY: ("<image>", ""),
    "qwen2_5_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "nvila_lite": ("<image>", "<vila/video>"),
}
PLACEHOLDERS["qwen3_vl"] = PLACEHOLDERS["qwen2_5_vl"]


class Asked:
    """A family's processor; calls pass any media through it."""

    def __init__(self, name: str, folder: Path) -> None:
        module, video = MODULES[name]
        path = FAMILY[name].make(folder / name)
        self.name = name
        fields = {"model_impl": "transformers"} if module == "transformers_auto" else {}
        self.processing = Processing(path, module, mm_process_config={"video": video}, trust_remote_code=True, **fields)
        tokens = getattr(self.processing.processor, "mm_tokens", None)  # a class of SGLang 0.5.22 has none
        usual = (getattr(tokens, "image_token", None) or "<image>", getattr(tokens, "video_token", None) or "<video>")
        self.image, self.video = PLACEHOLDERS.get(name, usual)

    def __call__(self, *, images=(), videos=()):
        prompt = self.image * len(images) + self.video * len(videos) + "What?"
        request = SimpleNamespace(
            image_data=list(images) or None,
            video_data=list(videos) or None,
            audio_data=None,
            modalities=None,
            rid="test",
        )
        with self.processing.published():
            return asyncio.run(
                self.processing.processor.process_mm_data_async(
                    image_data=request.image_data, audio_data=None, input_text=prompt, request_obj=request
                )
            )


_made: dict[str, Asked] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("media")
    _made.clear()


@pytest.fixture
def family(request, folder) -> Asked:
    if request.param not in _made:
        _made[request.param] = Asked(request.param, folder)
    return _made[request.param]


every_family = pytest.mark.parametrize("family", MODULES, indirect=True)
with_videos = pytest.mark.parametrize("family", [name for name in MODULES if name != IMAGES_ONLY], indirect=True)
qwen = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)


@pytest.fixture
def without(monkeypatch):
    """Switches a mend off, which leaves the behaviour of stock SGLang."""
    return lambda name: monkeypatch.setenv(settings.MENDS.variable, f"-{name}")


def same(a, b, within=0.0):
    """Whether two outputs have the same ids and, within a bound, the same pixels."""
    if list(a.input_ids) != list(b.input_ids) or len(a.mm_items) != len(b.mm_items):
        return False
    pairs = [(x.feature, y.feature) for x, y in zip(a.mm_items, b.mm_items)]
    pairs = [(torch.as_tensor(x).float(), torch.as_tensor(y).float()) for x, y in pairs]
    return all(x.shape == y.shape and float((x - y).abs().max()) <= within for x, y in pairs)


def coded(picture: Image.Image, form: str = "PNG", **options) -> str:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def halves(width=96, height=64) -> Image.Image:
    """Red above blue with a dark left side: every turn and mirror image differs."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2], pixels[height // 2 :] = (220, 30, 30), (30, 30, 220)
    pixels[:, : width // 4] //= 2
    return Image.fromarray(pixels)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    return exif


# ---- picture_orientation -----------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_turned_picture_is_upright(family, form, without):
    options = {} if form == "JPEG" else {"lossless": True}
    for orientation in (2, 3, 6, 8):
        photo = coded(halves(), form, exif=turned(orientation), **options)
        file = base64.b64decode(photo.partition(",")[2])
        upright = coded(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))
        assert same(family(images=[photo]), family(images=[upright])), orientation
    without("picture_orientation")
    assert not same(family(images=[photo]), family(images=[upright]))


@qwen
def test_a_turned_picture_in_every_form(family, tmp_path):
    from sglang.srt.utils import ImageData

    upright = family(images=[ImageOps.exif_transpose(_opened(halves(), turned(6)))])
    path = tmp_path / "turned.png"
    halves().save(path, exif=turned(6))
    base = coded(halves(), exif=turned(6)).partition(",")[2]
    for form in (str(path), f"file://{path}", base, ImageData(url=base), {"url": base}, _opened(halves(), turned(6))):
        assert same(family(images=[form]), upright), form


def _opened(picture, exif):
    out = io.BytesIO()
    picture.save(out, "PNG", exif=exif)
    return Image.open(io.BytesIO(out.getvalue()))


@qwen
def test_base64_of_a_jpeg_is_no_path(family):
    photo = coded(halves(), "JPEG")
    assert same(family(images=[photo.partition(",")[2]]), family(images=[photo]))


@qwen
def test_only_upright_rgb_is_decoded_on_a_gpu(family, monkeypatch):
    """nvJPEG ignores EXIF, and gives grey pictures one channel."""
    from sglang.srt.managers.schedule_batch import Modality
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "is_jpeg_with_cuda", lambda file, decode: file.startswith(b"\xff\xd8") and decode)
    kind = type(family.processing.processor)
    decoded = []

    def on_gpu(data, *_):
        decoded.append(data)
        return "decoded"

    jpegs = {
        "upright": coded(halves(), "JPEG"),
        "turned": coded(halves(), "JPEG", exif=turned(6)),
        "grey": coded(halves().convert("L"), "JPEG"),
        "cmyk": coded(halves().convert("CMYK"), "JPEG"),
    }
    got = {name: pictures.load(on_gpu, kind, jpeg, Modality.IMAGE) for name, jpeg in jpegs.items()}
    assert got["upright"] == "decoded" and len(decoded) == 1
    assert [got[name].mode for name in ("turned", "grey", "cmyk")] == ["RGB"] * 3
    assert got["turned"].size == (64, 96)


# ---- picture_modes -----------------------------------------------------------------------------------------

GREY = np.arange(64 * 96).reshape(64, 96) % 256
SEEN = Image.fromarray(GREY.astype(np.uint8))


def _see_through(mode: str) -> Image.Image:
    """Black, half transparent on the left and fully transparent on the right."""
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[:, :48, 3] = 128
    return Image.fromarray(pixels).convert(mode)


def _palette() -> Image.Image:
    picture = Image.fromarray((np.arange(64 * 96).reshape(64, 96) // 48 % 2).astype(np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 0, 255])
    return picture


def _stripes(first, second) -> Image.Image:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48], pixels[:, 48:] = first, second
    return Image.fromarray(pixels)


def _tiff(array) -> str:
    return coded(Image.fromarray(array), "TIFF")


MODES = {
    "16 bits": (coded(Image.fromarray((GREY * 257).astype(np.uint16))), SEEN),
    "16 bits, TIFF": (_tiff((GREY * 257).astype(np.uint16)), SEEN),
    "32 bits of 16": (_tiff((GREY * 257).astype(np.int32)), SEEN),
    "32 bits of 8": (_tiff(GREY.astype(np.int32)), SEEN),
    "floats to 1": (_tiff((GREY / 255).astype(np.float32)), SEEN),
    "floats to 255": (_tiff(GREY.astype(np.float32)), SEEN),
    "floats to 65,535": (_tiff((GREY * 257).astype(np.float32)), SEEN),
    "RGBA": (coded(_see_through("RGBA")), _stripes((127,) * 3, (255,) * 3)),
    "LA": (coded(_see_through("LA")), _stripes((127,) * 3, (255,) * 3)),
    "palette, transparent": (coded(_palette(), transparency=0), _stripes((255,) * 3, (0, 0, 255))),
    "RGB, transparent colour": (
        coded(_stripes((9, 9, 9), (0, 0, 255)), transparency=(9, 9, 9)),
        _stripes((255,) * 3, (0, 0, 255)),
    ),
}
AS_STOCK = {
    "palette": (coded(_palette()), _stripes((255, 0, 0), (0, 0, 255))),
    "1 bit": (coded(Image.fromarray(GREY > 99)), Image.fromarray(((GREY > 99) * 255).astype(np.uint8))),
    **{
        f"animated {form}": (
            coded(_stripes((255, 0, 0), (0, 0, 255)), form, save_all=True, append_images=[halves()], **lossless),
            _stripes((255, 0, 0), (0, 0, 255)),
        )
        for form, lossless in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}))
    },
}


@qwen
@pytest.mark.parametrize("name", [*MODES, *AS_STOCK])
def test_modes(family, name, without):
    picture, seen = {**MODES, **AS_STOCK}[name]
    right = family(images=[coded(seen.convert("RGB"))])
    # Rounding makes half transparent black 127 or 128.
    assert same(family(images=[picture]), right, within=0.02)
    without("picture_modes")
    stock_is_right = name in AS_STOCK or name in ("32 bits of 8", "floats to 255")
    assert same(family(images=[picture]), right, within=0.02) == stock_is_right


@every_family
@pytest.mark.parametrize("name", ["16 bits", "RGBA"])
def test_modes_in_every_family(family, name):
    picture, seen = MODES[name]
    assert same(family(images=[picture]), family(images=[coded(seen.convert("RGB"))]), within=0.05)


def test_what_is_no_number_is_black():
    values = np.array([[np.nan, -1, 0.5, np.inf]], np.float32)
    assert np.asarray(pictures.eight_bit(Image.fromarray(values))).tolist()[0][:2] == [0, 0]


# ---- odd_sizes ---------------------------------------------------------------------------------------------


def _claims(width: int, height: int) -> str:
    """A PNG of a few bytes whose header claims a size."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


@every_family
@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((16_000, 12_000), r"192000000 pixels|192\.0 megapixels.* 100 "),
        ((11_000, 10_000), r"11000 x 10000 pixels are 110\.0 megapixels, and at most 100 are taken"),
        ((1, 10_000), r"of 1 x 10000 pixels one side is 10000 times the other, and at most 200 times"),
        ((60_000, 200), r"of 60000 x 200 pixels one side is 300 times"),
    ],
)
def test_a_picture_is_measured_before_it_is_decoded(family, size, told, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=told):
        family(images=[_claims(*size)])


@qwen
def test_the_operator_sets_the_limit(family, monkeypatch):
    monkeypatch.setenv(settings.MAX_MEGAPIXELS.variable, "0.001")
    with pytest.raises(ValueError, match=r"96 x 64 pixels are 0\.0 megapixels, and at most 0\.001 are taken"):
        family(images=[coded(halves())])


def test_a_square_is_measured_before_it_is_made(monkeypatch):
    from sglang_mminfer.families.frames import squared

    monkeypatch.setattr(Image, "new", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=r"20000 x 100 pixels, put into a square .* are 400\.0 megapixels"):
        squared(SimpleNamespace(size=(20_000, 100), width=20_000, height=100))


@with_videos
@pytest.mark.parametrize("side", [2, 16])
def test_a_small_video_is_seen(family, side, tmp_path, without):
    frames = [np.full((side, side, 3), 20 * i, np.uint8) for i in range(8)]
    small = str(write_video(tmp_path / "small.mp4", frames, side, side, 4))
    large = [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(8)]
    got, right = family(videos=[small]), family(videos=[str(write_video(tmp_path / "large.mp4", large, 64, 64, 4))])
    assert len(got.input_ids) == len(right.input_ids)
    pairs = zip(got.mm_items, right.mm_items, strict=True)
    for one, other in pairs:
        assert abs(float(one.feature.float().mean()) - float(other.feature.float().mean())) < 0.02 * 255


@with_videos
def test_frames_are_bounded_before_they_are_decoded(family, tmp_path, monkeypatch):
    path = str(make_video(tmp_path / "a.mp4", 16, 96, 64, 4))
    monkeypatch.setattr(limits, "DECODED_BYTES", 1000)
    monkeypatch.setattr(limits, "BATCH_BYTES", 1000)
    with pytest.raises(ValueError, match=r"video: \d+ frames of \d+ x \d+ pixels are .* GiB"):
        family(videos=[path])


@qwen
def test_large_frames_are_resized_as_they_are_decoded(family, tmp_path, monkeypatch):
    path = str(make_video(tmp_path / "a.mp4", 16, 640, 480, 4))
    whole = family(videos=[path])
    monkeypatch.setattr(limits, "BATCH_BYTES", 2 * 640 * 480 * 3)
    assert same(family(videos=[path]), whole)


def test_a_short_file_that_claims_to_be_long():
    """LongVILA's own code makes a list of all its seconds."""
    long = 1 << 40
    assert len(sampling.first_seconds(long, 1e-6, fps=1.0, most=8).indices) == 8
    assert len(sampling.every_second(long, 30.0, fps=1.0, most=8, forced=False).indices) == 8
    assert len(sampling.evenly(long, 1e-6, count=8).indices) == 8
    assert len(by_clips(long, 1e-9, least=4, most=8).indices) == 8


@pytest.mark.parametrize("rate", [7.0, 24.0, 1 / 3])
@pytest.mark.parametrize("fps", [0.5, 1.0, 3.0])
def test_first_seconds_are_the_same_as_before(rate, fps):
    for most in (4, 50, 400):
        seconds = np.arange(0, 100 / rate, 1.0 / fps)[:most]
        assert sampling.first_seconds(100, rate, fps=fps, most=most).seconds == seconds.tolist()


# ---- video_frames ------------------------------------------------------------------------------------------

STILLS = [np.full((64, 96, 3), 30 * i, np.uint8) for i in range(6)]


def _forms():
    files = [coded(Image.fromarray(still)) for still in STILLS]
    return {
        "data:video/jpeg": "data:video/jpeg;base64," + ",".join(file.partition(",")[2] for file in files),
        "base64": [file.partition(",")[2] for file in files],
        "data: URLs": files,
        "JPEG base64": [coded(Image.fromarray(still), "JPEG").partition(",")[2] for still in STILLS],
        "PIL images": [Image.fromarray(still) for still in STILLS],
        "arrays": list(STILLS),
        "array": np.stack(STILLS),
        "tensor, channels first": torch.from_numpy(np.stack(STILLS)).permute(0, 3, 1, 2),
    }


@with_videos
@pytest.mark.parametrize("form", _forms())
def test_frames_are_as_a_file_of_them(family, form, tmp_path):
    file = str(write_video(tmp_path / "stills.mp4", STILLS, 96, 64, 1))
    scale = 6.0 if family.image == "<image>" else 0.1
    assert same(family(videos=[_forms()[form]]), family(videos=[file]), within=scale)


@qwen
def test_frames_in_stock(family, without):
    without("video_frames")
    for form in ("data:video/jpeg", "data: URLs"):
        with pytest.raises((ValueError, RuntimeError)):
            family(videos=[_forms()[form]])


@qwen
def test_frames_at_their_rate(family, tmp_path):
    file = str(write_video(tmp_path / "stills.mp4", STILLS, 96, 64, 2))
    got, right = family(videos=[{"url": _forms()["base64"], "fps": 2}]), family(videos=[file])
    assert same(got, right, within=0.1)
    assert torch.equal(got.mrope_positions, right.mrope_positions)
    assert not torch.equal(got.mrope_positions, family(videos=[_forms()["base64"]]).mrope_positions)


@qwen
def test_frames_of_files(family, tmp_path):
    for i, still in enumerate(STILLS):
        Image.fromarray(still).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(len(STILLS))]
    assert same(family(videos=[paths]), family(videos=[STILLS]))
    assert same(family(videos=[[f"file://{path}" for path in paths]]), family(videos=[STILLS]))


@with_videos
@pytest.mark.parametrize(
    ("frames", "told"),
    [
        ([STILLS[0], STILLS[1][:, :48]], "frames of one size, got 96 x 64 and, as number 2, 48 x 64"),
        ([], "expected 1 to 4096 frames, got 0"),
        ([STILLS[0]] * 4097, "expected 1 to 4096 frames, got 4097"),
        ([1, 2], "got a frame of type int .frame 1.; a video is a file, a URL"),
        (["!!"], "a video is a file, a URL"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"got uint8 \[2, 8, 8, 4\]; a video is"),
        (np.zeros((2, 8, 8, 3), np.float32), r"got float32 \[2, 8, 8, 3\]; a video is"),
        ([_claims(16_000, 11_000)], "176.0 megapixels"),
    ],
    ids=["sizes", "none", "many", "numbers", "no picture", "channels", "floats", "large"],
)
def test_what_are_no_frames(family, frames, told):
    with pytest.raises(ValueError, match=told):
        family(videos=[frames])


# ---- video_options -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film(folder) -> str:
    """A video of 20 seconds at 4 frames a second."""
    return str(make_video(folder / "film.mp4", 80, 96, 64, 4, seed=3))


FRAMES = {  # how many frames of `film` an output has
    "qwen2_5_vl": lambda output: 2 * int(output.mm_items[0].model_specific_data["video_grid_thw"][0][0]),
    "qwen3_vl": lambda output: (
        2 * len(output.mm_items)
        if len(output.mm_items) > 1
        else 2 * int(output.mm_items[0].model_specific_data["video_grid_thw"][0][0])
    ),
    "llava_onevision": lambda output: len(output.mm_items[0].feature[0]),
    "videochat_flash": lambda output: 4 * len(output.mm_items),
}


@with_videos
@pytest.mark.parametrize(
    ("asked", "frames"),
    [
        ({"fps": 0.4}, 8),
        ({"max_frames": 4}, 4),
        ({"fps": 1, "max_frames": 12}, 12),
        ({"num_frames": 8}, 8),
        ({"nframes": 8}, 8),
    ],
)
def test_a_request_says_how_many_frames(family, film, asked, frames, without):
    from sglang.srt.utils import VideoData

    count = FRAMES.get(family.name, lambda output: len(output.mm_items))
    got = family(videos=[{"url": film, **asked}])
    assert count(got) == frames
    assert same(family(videos=[VideoData(film, preprocess_kwargs=asked)]), got)
    without("video_options")
    assert same(family(videos=[VideoData(film, preprocess_kwargs=asked)]), family(videos=[film]))


@with_videos
def test_each_video_of_a_prompt_has_its_own(family, film):
    asked = [{"url": film, "num_frames": 4}, film]
    if family.name == "llava_onevision":
        with pytest.raises(ValueError, match="equally many frames of all videos of a prompt, got 4, 6"):
            family(videos=asked)
        return
    alone = [family(videos=[one]) for one in asked]
    both = family(videos=asked)
    assert len(both.mm_items) == sum(len(one.mm_items) for one in alone)
    features = [item.feature for one in alone for item in one.mm_items]
    assert all(torch.equal(item.feature, feature) for item, feature in zip(both.mm_items, features))


@with_videos
def test_a_request_says_how_large(family, film):
    assert not same(family(videos=[{"url": film, "max_long_side_pixel": 64}]), family(videos=[film]))
    photo = coded(Image.effect_noise((96, 64), 90).convert("RGB"))
    got = family(images=[{"url": photo, "max_long_side_pixel": 56}])
    assert not same(got, family(images=[photo]))


@qwen
def test_pixels_of_qwen(family, film):
    def grid(**asked):
        (item,) = family(videos=[{"url": film, **asked}]).mm_items
        return item.model_specific_data["video_grid_thw"][0][1:].tolist()

    def shape(**asked):
        (item,) = family(images=[{"url": coded(halves(448, 224)), **asked}]).mm_items
        return item.model_specific_data["image_grid_thw"][0][1:].tolist()

    assert grid(max_long_side_pixel=56) == [2, 4]
    assert grid(resized_height=112, resized_width=56) == [8, 4]
    assert grid(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 8) == [4, 6]
    assert shape() == [16, 32] and shape(max_pixels=112 * 224) == [8, 16] and shape(max_long_side_pixel=224) == [8, 16]
    assert shape(resized_height=56, resized_width=84) == [4, 6]


@with_videos
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"bogus": 1}, "video: bogus: this model takes .*max_frames"),
        ({"fps": 0}, "video: fps: expected a number above 0, got 0"),
        ({"fps": float("nan")}, "video: fps: expected a number above 0, got nan"),
        ({"max_frames": "8"}, "video: max_frames: expected a whole number above 0, got '8'"),
        ({"max_frames": True}, "video: max_frames: expected a whole number above 0, got True"),
        ({"num_frames": 100_000}, "video: num_frames: expected at most 1024, got 100000"),
        ({"num_frames": 8, "fps": 1}, "expected num_frames, or fps with max_frames and min_frames, got both"),
    ],
)
def test_options_that_no_one_has(family, film, asked, told):
    with pytest.raises(ValueError, match=told):
        family(videos=[{"url": film, **asked}])


def test_options_of_a_chat():
    """SGLang knows a few options, and a conversation template keeps fewer."""
    from sglang.srt.utils import ImageData, VideoData

    url, other = {"url": "a", "total_pixels": 9, "fps": 2}, {"url": "b"}
    picture = {"url": "c", "max_long_side_pixel": 64, "max_dynamic_patch": 3, "detail": "low"}
    content = [
        {"type": "text", "text": "x"},
        {"type": "video_url", "video_url": url},
        {"type": "image_url", "image_url": picture},
        {"type": "video_url", "video_url": other},
    ]
    request = SimpleNamespace(
        image_data=[ImageData("c", detail="low")],
        video_data=[VideoData("a", preprocess_kwargs={"fps": 2.0}), "b"],
        image_max_dynamic_patch=3,
        video_max_dynamic_patch=None,
    )
    options.attach(request, [{"role": "user", "content": "hello"}, {"role": "user", "content": content}])
    assert request.video_data == [VideoData("a", preprocess_kwargs={"fps": 2.0, "total_pixels": 9}), "b"]
    wanted = {"max_long_side_pixel": 64, "max_dynamic_patch": 3}
    assert request.image_data == [ImageData("c", detail="low", preprocess_kwargs=wanted)]
    assert request.image_max_dynamic_patch is None


# ---- media_order, media_of_samples -------------------------------------------------------------------------


def test_pictures_of_internvl_stand_where_the_message_has_them(monkeypatch):
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.parser.conversation import generate_chat_conv

    from sglang_mminfer.mends import order

    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": "a"}},
        {"type": "text", "text": "two"},
        {"type": "video_url", "video_url": {"url": "b"}},
        {"type": "image_url", "image_url": {"url": "c"}},
    ]
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": parts}])

    def rendered(backend):
        server = SimpleNamespace(
            tokenizer_manager=SimpleNamespace(server_args=SimpleNamespace(_mminfer_wanted=backend)),
            template_manager=SimpleNamespace(chat_template_name=order.STOCK),
        )

        def name_it(self, request, is_multimodal):
            manager = self.template_manager
            return generate_chat_conv(request, getattr(manager, "_chat_template_name", manager.chat_template_name))

        return order.apply_template(name_it, server, request, True).get_prompt()

    image, video = "<IMG_CONTEXT>\n", "<video>"
    assert f"user\none{image}two{video}{image}<|im_end|>" in rendered(True)
    assert f"user\n{image}{image}onetwo{video}<|im_end|>" in rendered(False)
    monkeypatch.setenv(settings.MENDS.variable, "-media_order")
    assert f"user\n{image}{image}onetwo{video}<|im_end|>" in rendered(True)


def test_each_of_several_answers_sees_all_media(monkeypatch):
    from sglang.srt import runtime_context
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.server_args import ServerArgs

    # SGLang reads the server's arguments while it makes a batch.
    monkeypatch.setattr(runtime_context.get_context(), "_server_args", ServerArgs(model_path="none"))

    def normalised(gather, **data):
        request = GenerateReqInput(text="x", sampling_params={"n": 2}, **data)
        if gather:
            batches.gather(request)
        request.normalize_batch_and_arguments()
        return [(request[i].image_data, request[i].video_data) for i in range(2)]

    frames = ["f1", "f2"]
    assert normalised(True, video_data=["a", "b"]) == [(None, ["a", "b"])] * 2
    assert normalised(True, video_data=[frames]) == [(None, [frames])] * 2
    assert normalised(True, image_data=["a", "b"], video_data="c") == [(["a", "b"], ["c"])] * 2
    assert normalised(False, video_data=["a", "b"]) == [(None, "a"), (None, "b")]  # stock: one each
    assert normalised(False, video_data=[frames]) == [(None, frames)] * 2  # two videos
    with pytest.raises(ValueError, match="equal to the batch size"):
        normalised(False, image_data=["a", "b"])


def test_a_batch_of_prompts_is_left_alone():
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(text=["x", "y"], sampling_params={"n": 2}, video_data=[["a"], ["b"]])
    batches.gather(request)
    assert request.video_data == [["a"], ["b"]]
