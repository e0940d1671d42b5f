"""What the oracle reads: pictures as a viewer shows them, videos byte for byte as SGLang's decoder has them."""

from __future__ import annotations

import base64
import functools
import http.server
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sglang_mminfer.testing import qwen_video
from sglang_mminfer.testing.oracle_media import open_video, read_picture
from sglang_mminfer.tools.media import make_image, make_video, video_frames

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
"""3 rows of 4."""


def shown(path: Path) -> np.ndarray:
    picture = read_picture(str(path))
    assert picture.mode == "RGB"
    return np.asarray(picture)


def saved(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


# ---- pictures ----------------------------------------------------------------------------------------------


# What a viewer does with the stored picture, by the value of the EXIF tag.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_photo_is_upright(tmp_path: Path, orientation: int) -> None:
    stored = np.stack([GREY] * 3, axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(stored), tmp_path / "a.png", exif=exif)
    assert np.array_equal(shown(path), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("factor", [256, 257])
def test_sixteen_bits_are_their_high_byte(tmp_path: Path, suffix: str, factor: int) -> None:
    path = saved(Image.fromarray(GREY.astype(np.uint16) * factor), tmp_path / f"a.{suffix}")
    assert np.array_equal(shown(path), np.stack([GREY] * 3, axis=-1))


def test_dark_sixteen_bits_stay_dark(tmp_path: Path) -> None:
    assert not shown(saved(Image.fromarray(GREY.astype(np.uint16)), tmp_path / "a.png")).any()


def test_what_has_no_agreed_look_is_refused(tmp_path: Path) -> None:
    for name, values in (("f", GREY.astype(np.float32)), ("i", GREY.astype(np.int32) * 1_000_000)):
        with pytest.raises(ValueError, match=r"picture: .* expected"):
            read_picture(str(saved(Image.fromarray(values), tmp_path / f"{name}.tiff")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        picture = Image.fromarray((GREY // 20).astype(np.uint8), "P")
        picture.putpalette([40, 0, 0, 0, 80, 0] + [0, 0, 120] * 254)
        path = saved(picture, tmp_path / "a.png", transparency=1)
    else:
        picture = Image.new(mode, (4, 3), (100, 20, 60, 0) if mode == "RGBA" else (100, 0))
        path = saved(picture, tmp_path / "a.png")
    assert shown(path)[0, 1].tolist() == [255] * 3


def test_half_transparent_red_is_pink(tmp_path: Path) -> None:
    path = saved(Image.new("RGBA", (2, 2), (255, 0, 0, 51)), tmp_path / "a.png")
    assert shown(path)[0, 0].tolist() == [255, 204, 204]


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    path = saved(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    assert shown(path)[0, 0].tolist() == [255, 0, 0]


def test_other_modes(tmp_path: Path) -> None:
    assert shown(saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), tmp_path / "a.tiff"))[0, 0].tolist() == [255, 0, 0]
    assert shown(saved(Image.new("1", (4, 4), 1), tmp_path / "b.png"))[0, 0].tolist() == [255] * 3
    assert shown(saved(Image.new("L", (4, 4), 7), tmp_path / "c.png"))[0, 0].tolist() == [7] * 3


# ---- where from --------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls(tmp_path: Path, site: str) -> None:
    picture = make_image(tmp_path / "a b.png", 8, 8)
    film = make_video(tmp_path / "a b.mp4", 4, 32, 32, 2)
    for path, kind in ((picture, "image/png"), (film, "video/mp4")):
        within = base64.b64encode(path.read_bytes()).decode()
        urls = [str(path), path.as_uri(), f"data:{kind};base64,{within}", f"{site}/{path.name.replace(' ', '%20')}"]
        if path is picture:
            read = [np.asarray(read_picture(url)) for url in urls]
        else:
            read = [open_video(url).frames([0, 3]) for url in urls]
        assert all(np.array_equal(read[0], other) for other in read[1:])


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_picture(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="data: URL"):
        read_picture("data:image/png;base64")


# ---- videos ------------------------------------------------------------------------------------------------


ENCODINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "bt709": ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    "full_range": ("-vf", "scale=out_range=full", "-color_range", "pc"),
    "full_chroma": ("-pix_fmt", "yuv444p"),
    "odd_size": ("-vf", "scale=95:63", "-pix_fmt", "yuv444p"),
    "uneven": ("-vf", "select='lt(n,8)+not(mod(n,4))'", "-fps_mode", "vfr"),
    "cut": ("-ss", "0.7", "-c", "copy"),
    "sideways": ("-c", "copy"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_frames_are_those_of_sglangs_decoder_byte_for_byte(tmp_path: Path, encoding: str) -> None:
    import decord
    import imageio_ffmpeg

    source = make_video(tmp_path / "source.mp4", 24, 96, 64, 8, seed=1)
    path = tmp_path / "a.mp4"
    rotated = ("-display_rotation", "90") if encoding == "sideways" else ()
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *rotated, "-i", str(source)]
    subprocess.run([*command, *ENCODINGS[encoding], str(path)], check=True)
    theirs = decord.VideoReader(str(path))
    video = open_video(path)
    assert (len(video), video.fps) == (len(theirs), theirs.get_avg_fps())
    every = list(range(len(video)))
    assert np.array_equal(video.frames(every), theirs.get_batch(every).asnumpy())


def test_frames_are_what_was_encoded_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    drawn = np.stack(list(video_frames(10, 64, 48, 4, seed=2)))
    video = open_video(make_video(tmp_path / "a.mp4", 10, 64, 48, 4, seed=2))
    wanted = [7, 0, 3, 3]
    got = video.frames(wanted)
    assert got.shape == (4, 48, 64, 3) and np.abs(got.astype(int) - drawn[wanted]).mean() < 6
    assert np.array_equal(got[2], got[3])
    with pytest.raises(IndexError, match="no frame 10 in a video of 10 frames"):
        video.frames([0, 10])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fps": 5, "min_pixels": 4 * 784, "max_pixels": 40 * 784},
        {"nframes": 7},
        {"max_frames": 6, "min_frames": 5},
        {"total_pixels": 900 * 784, "min_pixels": 3136},
        {"resized_height": 100, "resized_width": 200},
    ],
)
@pytest.mark.parametrize(("frames", "size", "fps"), [(60, (224, 140), 10), (9, (64, 200), 3), (60, (448, 252), 24)])
def test_frames_for_qwen_are_those_of_the_server(
    tmp_path: Path, options: dict[str, int], frames: int, size: tuple[int, int], fps: float
) -> None:
    """Which frames and how large is SGLang's to say; here it is written anew. Their times are not: see test_mrope."""
    import asyncio

    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.multimodal.processors.qwen_vl import preprocess_video
    from sglang.srt.utils import load_video

    path = make_video(tmp_path / "a.mp4", frames, *size, fps)
    theirs, metadata = asyncio.run(preprocess_video(load_video(str(path), use_gpu=False), video_config=dict(options)))
    got = qwen_video.sample(open_video(path), options)
    assert got.indices == metadata["frames_indices"].tolist()
    assert (got.total, got.fps) == (metadata["total_num_frames"], metadata["fps"])
    assert torch.equal(got.frames, theirs)


def test_a_video_of_one_frame_is_too_short_for_qwen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 2 to 1 frames, got 0"):
        qwen_video.sample(open_video(make_video(tmp_path / "a.mp4", 1, 64, 64, 8)), {})
