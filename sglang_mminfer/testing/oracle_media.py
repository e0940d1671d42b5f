"""Media as an oracle reads them: pictures with PIL, videos with PyAV.

No loader here is SGLang's or this plugin's: an oracle that borrows a server's loaders repeats their mistakes. FFmpeg
converts 8-bit video to RGB with its default flags, here as in decord, so the bytes are the same; a test holds this.
"""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TIMEOUT = 30
"""How many seconds a download may take."""


def read_bytes(url: str) -> bytes:
    """The content of an http(s):, file: or data: URL, or of the file with this path.

    Raises:
        OSError: it cannot be read.
        ValueError: a data: URL is not well-formed.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "data":
        head, comma, body = rest.partition(",")
        if not comma:
            raise ValueError(f"data: URL: expected a comma before the content, got {url[:60]!r}")
        if head.endswith(";base64"):
            return base64.b64decode(body, validate=True)
        return urllib.parse.unquote_to_bytes(body)
    if scheme in ("http", "https"):
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            return response.read()
    path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path) if scheme == "file" else url
    with open(path, "rb") as file:
        return file.read()


# ---- pictures ----------------------------------------------------------------------------------------------


def read_picture(url: str) -> Image.Image:
    """A picture as a viewer shows it: RGB, upright (EXIF), the first frame of an animation, white where transparent.

    Raises:
        OSError: it cannot be read, or it is no picture.
        ValueError: its mode has no agreed 8-bit version (32-bit integers above 65,535; floats).
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(read_bytes(url))) as opened:
        opened.seek(0)
        opened.load()
        picture = ImageOps.exif_transpose(opened)
    if picture.mode in (*_SIXTEEN_BITS, "I"):
        return _eight_bits(picture).convert("RGB")
    if picture.mode == "F":
        raise ValueError("picture: a mode with an agreed 8-bit version was expected, got floats (F)")
    if picture.mode in _WITH_ALPHA or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", with_alpha.size, "white"), with_alpha).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The high byte of 16-bit grey. Pillow reads some 16-bit files as 32-bit integers."""
    from PIL import Image

    values = np.asarray(picture)
    largest = int(values.max(initial=0))
    if largest > 0xFFFF or int(values.min(initial=0)) < 0:
        raise ValueError(f"picture: grey values from 0 to 65,535 were expected, got up to {largest}")
    # Integers that fit into a byte are bytes already, unless the file says that it has 16 bits.
    is_16_bit = picture.mode in _SIXTEEN_BITS or largest > 0xFF
    return Image.fromarray((values >> (8 if is_16_bit else 0)).astype(np.uint8))


# ---- videos ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """A video, read from a file or a URL."""

    content: bytes
    """The bytes of the file."""

    @cached_property
    def fps(self) -> float:
        """Frames per second, on average.

        Raises:
            ValueError: the file has no frame rate.
        """
        with self._opened() as container:
            rate = container.streams.video[0].average_rate
        if not rate:
            raise ValueError("video: a frame rate was expected, and the file has none")
        return float(rate)

    def __len__(self) -> int:
        """How many frames can be decoded. The number in the file's header does not count."""
        return self._length

    @cached_property
    def _length(self) -> int:
        return sum(1 for _ in self._decoded())

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [len(indices), height, width, 3], upright, in the order of `indices`, which may repeat.

        Raises:
            IndexError: the video has no such frame.
        """
        needed, last = set(indices), max(indices)
        frames: dict[int, np.ndarray] = {}
        for i, frame in enumerate(self._decoded()):
            if i in needed:
                # A frame filmed sideways has a rotation, in degrees anticlockwise.
                frames[i] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            if i >= last:
                break
        if missing := needed - set(frames):
            raise IndexError(f"video: no frame {min(missing)} in a video of {len(self)} frames")
        return np.stack([frames[i] for i in indices])

    def _opened(self) -> Any:
        import av

        return av.open(io.BytesIO(self.content))

    def _decoded(self) -> Iterator[Any]:
        with self._opened() as container:
            yield from container.decode(video=0)


def open_video(url: str | os.PathLike[str]) -> Video:
    """A video from an http(s):, file: or data: URL, or from a path.

    Raises what `read_bytes` raises; decoding the video later raises PyAV's errors.
    """
    return Video(read_bytes(os.fspath(url)))
