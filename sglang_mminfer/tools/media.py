"""Files of videos and images: those of moving shapes, for the demo, the tests and the benchmarks, and others.

    make_video("a.mp4", frames=240, width=448, height=252, fps=24, seed=1)

Moving shapes are the same for the same seed. Successive frames resemble each other, as in a real video: grid patterns
depend on it.
"""

from __future__ import annotations

import base64
import mimetypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sglang_mminfer.serving.scene import Scene

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def video_frames(frames: int, width: int, height: int, fps: float, seed: int = 0) -> Iterator[np.ndarray]:
    """The frames that `make_video` encodes: uint8 [height, width, 3] each."""
    _positive(frames=frames, width=width, height=height, fps=fps)
    scene = Scene(width, height, seed)
    for i in range(frames):
        yield scene.frame(i / fps)


def make_video(
    path: str | os.PathLike[str],
    frames: int,
    width: int = 448,
    height: int = 252,
    fps: float = 24.0,
    seed: int = 0,
) -> Path:
    """Encode moving shapes as an mp4 file (H.264) and return its path.

    Raises:
        ValueError: a size is not positive, or odd (H.264 stores colour at half resolution), or the name does not end
            in .mp4.
        OSError: the file cannot be written.
    """
    _positive(frames=frames, width=width, height=height, fps=fps)
    return write_video(path, video_frames(frames, width, height, fps, seed), width, height, fps)


def write_video(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], width: int, height: int, fps: float
) -> Path:
    """Encode frames, uint8 [height, width, 3] each, as an mp4 file (H.264). Raises what `make_video` raises."""
    import imageio_ffmpeg

    target = Path(path)
    _positive(width=width, height=height, fps=fps)
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"{target}: expected a name that ends in .mp4")
    for name, value in (("width", width), ("height", height)):
        if value % 2:
            raise ValueError(f"{target}: {name}: expected an even number (H.264), got {value}")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.stem}.{os.getpid()}.mp4")
    writer = imageio_ffmpeg.write_frames(
        os.fspath(fresh),
        (width, height),
        fps=fps,
        codec="libx264",
        quality=None,
        # A key frame every second, so that sampling far into a long video stays cheap. One thread and "bitexact",
        # so that every run writes the same bytes.
        output_params=[
            *("-preset", "veryfast", "-crf", "18", "-g", str(max(1, round(fps)))),
            *("-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
        ],
        macro_block_size=2,
        ffmpeg_log_level="error",
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        if not fresh.exists() or not fresh.stat().st_size:
            raise OSError(f"{target}: the encoder wrote nothing")
        os.replace(fresh, target)
    finally:
        writer.close()
        fresh.unlink(missing_ok=True)
    return target


def make_image(path: str | os.PathLike[str], width: int = 224, height: int = 224, seed: int = 0) -> Path:
    """Write one frame of moving shapes as a PNG file and return its path.

    Raises:
        ValueError: a size is not positive, or the name does not end in .png.
    """
    from PIL import Image

    target = Path(path)
    _positive(width=width, height=height)
    if target.suffix.lower() != ".png":
        raise ValueError(f"{target}: expected a name that ends in .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(Scene(width, height, seed).frame(1.0)).save(target)
    return target


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """All frames of a video, uint8 [frames, height, width, 3], and its frames per second.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no video that can be decoded.
    """
    import decord

    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected a video (mp4, mkv, webm, ...)")
    try:
        reader = decord.VideoReader(os.fspath(source), ctx=decord.cpu(0), num_threads=1)
        if not len(reader):
            raise ValueError("it has no frames")
        return reader.get_batch(range(len(reader))).asnumpy(), float(reader.get_avg_fps())
    except Exception as error:  # decord raises its own error type, RuntimeError, and others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source}: expected a video file that FFmpeg can decode ({source.stat().st_size} bytes): {reason}"
        ) from error


def data_url(path: Path, kind: str) -> str:
    """A file as a URL that any server can read.

    Args:
        kind: "image" or "video": what it is called where its name does not say more.
    """
    guessed = mimetypes.guess_type(path.name)[0] or ""
    mime = guessed if guessed.startswith(f"{kind}/") else {"image": "image/png", "video": "video/mp4"}[kind]
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
