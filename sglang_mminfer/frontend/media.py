"""The images and videos of programs: checked before they are sent, read and encoded once."""

from __future__ import annotations

import base64
import io
import mimetypes
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote, urlparse

Kind = Literal["image", "video"]

KEEP_BYTES = 1 << 30
"""Encoded files that an endpoint keeps, in bytes. The file that was used last is always kept."""

_LOOKED_AT = 4096
"""Bytes at the beginning of a file by which text is told from a video."""

_STILL = ("PNG", "JPEG", "BMP", "TIFF")
"""Formats of PIL's that hold one picture."""

_USUAL_TYPE = {"image": "image/png", "video": "video/mp4"}


class MediaError(RuntimeError):
    """A program cannot go on. The message names the file, the limit, or what the server refused."""


@dataclass(frozen=True)
class Medium:
    """One image or video in the text of a program.

    Attributes:
        kind: "image" or "video".
        name: what errors call it: the path, the URL, or words for one that has neither.
        url: what is sent if there is no file: an http(s) or data: URL.
        file: the file on this machine; None if there is none.
        num_frames: frames that the program asks for; -1 leaves them to the server.
    """

    kind: Kind
    name: str
    url: str = ""
    file: Path | None = None
    num_frames: int = -1


class MediaStore:
    """The files that programs of one endpoint use. Threads may share it.

    Attributes:
        reads: how many files were read and encoded so far.
    """

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self.reads = 0
        self._keep_bytes = keep_bytes
        self._encoded: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._checked: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()

    def medium(self, kind: Kind, source: Any, num_frames: int = -1) -> Medium:
        """What `sgl.image(source)` or `sgl.video(source, num_frames)` stands for.

        Args:
            source: a path, a file:, http(s): or data: URL, the bytes of a file, or for an image a PIL image.

        Raises:
            MediaError: naming a source that cannot be read or that is no image or video.
        """
        if isinstance(source, bytes | bytearray):
            name = f"the {kind} of {len(source):,} bytes"
            check(kind, io.BytesIO(source), name)
            return Medium(kind, name, _data_url(kind, bytes(source)), num_frames=num_frames)
        if kind == "image" and hasattr(source, "save") and hasattr(source, "size"):
            written = io.BytesIO()
            source.save(written, "PNG")
            return Medium(kind, "the PIL image of {} x {}".format(*source.size), _data_url(kind, written.getvalue()))
        if not isinstance(source, str | os.PathLike):
            raise MediaError(f"{kind}: expected a path, a URL or bytes, got {type(source).__name__}")
        text = os.fspath(source)
        if text.startswith("data:"):
            return Medium(kind, f"the {kind} {text[:30]}...", text, num_frames=num_frames)
        if text.startswith(("http://", "https://")):
            return Medium(kind, text, text, num_frames=num_frames)
        path = Path(unquote(urlparse(text).path) if text.startswith("file://") else text).expanduser().absolute()
        self._check_file(kind, path, text)
        return Medium(kind, text, file=path, num_frames=num_frames)

    def data_url(self, medium: Medium) -> str:
        """A medium as a URL that any server can read. A file is read and encoded when it is new or has changed.

        Raises:
            MediaError: naming a file that cannot be read any more.
        """
        if medium.file is None:
            return medium.url
        with self._lock:  # one thread encodes, the others wait for what it makes
            key = _version(medium.kind, medium.file, medium.name)
            if key not in self._encoded:
                self._encoded[key] = _data_url(medium.kind, _read(medium), medium.file.name)
                self.reads += 1
            self._encoded.move_to_end(key)
            while len(self._encoded) > 1 and sum(map(len, self._encoded.values())) > self._keep_bytes:
                self._encoded.popitem(last=False)
            return self._encoded[key]

    def _check_file(self, kind: Kind, path: Path, name: str) -> None:
        key = _version(kind, path, name)
        if key in self._checked:
            return
        try:
            with path.open("rb") as file:
                check(kind, file, name)
        except OSError as error:
            raise MediaError(f"{name}: cannot be read: {error.strerror}") from None
        self._checked.add(key)


def check(kind: Kind, file: BinaryIO, name: str) -> None:
    """Refuse what is certainly no image (its header cannot be read) or no video (it is text, or an image). The server,
    which has the decoders, finds the rest.

    Raises:
        MediaError: naming the file.
    """
    beginning = file.read(_LOOKED_AT)
    if not beginning:
        raise MediaError(f"{name}: is empty")
    image_format = _image_format(file)
    if kind == "image" and image_format is None:
        raise MediaError(f"{name}: not an image that can be read")
    if kind == "video" and image_format in _STILL:
        raise MediaError(f"{name}: not a video, but a {image_format} image")
    if kind == "video" and _is_text(beginning):
        raise MediaError(f"{name}: not a video, but text")


def _image_format(file: BinaryIO) -> str | None:
    from PIL import Image

    file.seek(0)
    try:
        with Image.open(file) as image:  # reads the header alone
            return image.format
    except Exception:  # decoders raise many things over what is no image
        return None


def _is_text(beginning: bytes) -> bool:
    try:
        beginning.decode()
    except UnicodeDecodeError as error:
        if error.start < len(beginning) - 3:  # else a letter is cut in two
            return False
    return b"\0" not in beginning


def _version(kind: Kind, path: Path, name: str) -> tuple[Any, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise MediaError(f"{name}: cannot be read: {error.strerror}") from None
    return kind, path, found.st_mtime_ns, found.st_size


def _read(medium: Medium) -> bytes:
    assert medium.file is not None
    try:
        return medium.file.read_bytes()
    except OSError as error:
        raise MediaError(f"{medium.name}: cannot be read: {error.strerror}") from None


def _data_url(kind: Kind, content: bytes, file_name: str = "") -> str:
    guessed = mimetypes.guess_type(file_name)[0] or ""
    mime = guessed if guessed.startswith(f"{kind}/") else _USUAL_TYPE[kind]
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
