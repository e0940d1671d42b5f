"""Media as an oracle sees them: pictures by PIL, videos by PyAV.

Nothing here is SGLang's, or this plugin's own: an oracle that borrows a server's loaders repeats their mistakes.
FFmpeg converts 8-bit video to RGB with its default flags, here as in decord, and the bytes are the same (a test).
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
"""Seconds for a download."""


def read_bytes(url: str) -> bytes:
    """The content of an http(s):, file: or data: URL, or of the file with this path.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a data: URL is not well-formed.
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
    """A picture as a viewer shows it: RGB, upright (EXIF), the first frame of an animation, white
    where it is transparent.

    Raises:
        OSError: if it cannot be read, or is no picture.
        ValueError: if its mode has no agreed 8-bit version (32-bit integers above 65,535; floats).
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
        shown = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The high byte of 16-bit grey. Pillow has some 16-bit files as 32-bit integers."""
    from PIL import Image

    values = np.asarray(picture)
    most = int(values.max(initial=0))
    if most > 0xFFFF or int(values.min(initial=0)) < 0:
        raise ValueError(f"picture: grey values from 0 to 65,535 were expected, got up to {most}")
    # Integers that fit into a byte are one already, unless the file says that it has 16 bits.
    wide = picture.mode in _SIXTEEN_BITS or most > 0xFF
    return Image.fromarray((values >> (8 if wide else 0)).astype(np.uint8))


# ---- videos ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """A video of a file or a URL."""

    content: bytes
    """The file."""

    @cached_property
    def fps(self) -> float:
        """Frames a second, on average."""
        with self._opened() as container:
            rate = container.streams.video[0].average_rate
        if not rate:
            raise ValueError("video: a frame rate was expected, and the file has none")
        return float(rate)

    def __len__(self) -> int:
        """Frames that can be decoded; what a header says about their number does not count."""
        return self._length

    @cached_property
    def _length(self) -> int:
        return sum(1 for _ in self._decoded())

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [len(indices), height, width, 3], upright, in the order of `indices`, which may repeat.

        Raises:
            IndexError: if the video has no such frame.
        """
        wanted, last = set(indices), max(indices)
        found: dict[int, np.ndarray] = {}
        for i, frame in enumerate(self._decoded()):
            if i in wanted:
                # A frame that was filmed sideways says so; rotation is in degrees against the clock.
                found[i] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            if i >= last:
                break
        if missing := wanted - set(found):
            raise IndexError(f"video: no frame {min(missing)} in a video of {len(self)} frames")
        return np.stack([found[i] for i in indices])

    def _opened(self) -> Any:
        import av

        return av.open(io.BytesIO(self.content))

    def _decoded(self) -> Iterator[Any]:
        with self._opened() as container:
            yield from container.decode(video=0)


def open_video(url: str | os.PathLike[str]) -> Video:
    """A video of an http(s):, file: or data: URL, or a path. Errors: as `read_bytes`; PyAV's when it is decoded."""
    return Video(read_bytes(os.fspath(url)))
