"""The user's files: what they are, checked before anything is sent."""

from __future__ import annotations

import mimetypes
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from sglang_mminfer.tools import media

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")

MB = 1_000_000


class UploadError(ValueError):
    """A file, or a question, that must not be sent. The message names it and says why."""


@dataclass(frozen=True)
class Upload:
    """A file that a question is about.

    Attributes:
        name: what the user calls it.
        about: its size in frames, seconds and pixels, in words.
        size: bytes.
    """

    kind: Kind
    path: Path
    name: str
    about: str
    size: int

    def part(self, as_file: bool) -> dict[str, Any]:
        """The part of an OpenAI message.

        Args:
            as_file: name the file, for a server on this machine; else its content is in the part. A server makes the
                same tokens and hashes of both.
        """
        url = self.path.as_uri() if as_file else data_url(self)
        return {"type": f"{self.kind}_url", f"{self.kind}_url": {"url": url}}


@lru_cache(maxsize=64)
def data_url(upload: Upload) -> str:
    """A file as a URL. It is read and encoded once, however many turns send it."""
    return media.data_url(upload.path, upload.kind)


@dataclass(frozen=True)
class Limits:
    """What a question may hold.

    Attributes:
        model: the model's name, for messages.
        takes: kinds of media that the model takes.
        most: the most media of a kind in a whole conversation, where the server limits them.
        upload_bytes: the most bytes of one file.
        folder: where all uploads lie. A file elsewhere is no upload, whatever a client says.
    """

    model: str
    takes: frozenset[Kind]
    most: Mapping[Kind, int]
    upload_bytes: int
    folder: Path


def check(paths: Iterable[str | Path], limits: Limits, earlier: Sequence[Upload] = ()) -> list[Upload]:
    """What the files of a question are.

    Args:
        earlier: the uploads of the turns before.

    Raises:
        UploadError: a file is too large, cannot be decoded or is not an upload, the model takes none of its kind, or
            there are too many.
    """
    uploads = [_checked(Path(path), limits) for path in paths]
    before, now = (Counter(upload.kind for upload in group) for group in (earlier, uploads))
    for kind, most in limits.most.items():
        if now[kind] and before[kind] + now[kind] > most:
            have = f"{before[kind]} of earlier turns and {now[kind]} new ones" if before[kind] else f"{now[kind]}"
            raise UploadError(
                f"too many {kind}s: the server takes {most} in a conversation (--limit-mm-data-per-request), and this "
                f"one would have {have}"
            )
    return uploads


def _checked(path: Path, limits: Limits) -> Upload:
    if not path.resolve().is_relative_to(limits.folder.resolve()) or not path.is_file():
        raise UploadError(f"{path.name}: not an uploaded file")
    size = path.stat().st_size
    if size > limits.upload_bytes:
        raise UploadError(
            f"{path.name}: {size / MB:.1f} MB, and the limit is {limits.upload_bytes / MB:g} MB (--max-upload-mb)"
        )
    kind = kind_of(path)
    if kind not in limits.takes:
        raise UploadError(f"{path.name}: {limits.model} takes no {kind}s")
    about = describe_video(path) if kind == "video" else describe_image(path)
    return Upload(kind, path, path.name, about, size)


def kind_of(path: Path) -> Kind:
    """Whether a file's name is that of an image or of a video.

    Raises:
        UploadError: it is neither.
    """
    mime = mimetypes.guess_type(path.name)[0] or ("video/x-matroska" if path.suffix.lower() == ".mkv" else "")
    for kind in KINDS:
        if mime.startswith(f"{kind}/"):
            return kind
    raise UploadError(f"{path.name}: expected an image or a video")


def describe_video(path: Path) -> str:
    """Frames, seconds and size of a video, in words. Decodes its first frame.

    Raises:
        UploadError: it is no video, or cannot be decoded.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        frames, fps = len(reader), reader.get_avg_fps()
        height, width, _ = reader[0].shape
        return f"{frames} frames, {frames / fps:.1f} s, {width} x {height}"
    except Exception:  # decord has error types of its own, also for a picture or a text
        raise UploadError(f"{path.name}: not a video that FFmpeg can decode") from None


def describe_image(path: Path) -> str:
    """The size of an image, in words. Decodes it.

    Raises:
        UploadError: it is no image, or cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return f"{image.width} x {image.height}"
    except Exception:  # decoders raise many things over what is no image
        raise UploadError(f"{path.name}: not an image that can be read") from None
