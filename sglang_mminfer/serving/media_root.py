"""Which local files a client may name as media: those in one directory, if the operator names one.

SGLang opens whatever file a request names. All requests come through TokenizerManager.generate_request, so names are
checked there, before anything is opened. A client could also send a playlist, a text that names files which a decoder
then opens, so with a directory playlists are refused as well.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlparse

from sglang_mminfer import mends, settings
from sglang_mminfer.mends import asked, videos
from sglang_mminfer.serving import flags

KINDS = ("image", "video", "audio")

_URLS = ("http://", "https://", "data:")
"""With which a text begins that SGLang takes for no local file. It does not fold their case either."""

_FILE = "file:"

_JPEG = "/9j/"
"""How the base64 of a JPEG file begins, which looks like a path."""

_MOST_BYTES = 4096
"""A path has fewer bytes on Linux, and base64 of a file mostly has more. A text that is longer is looked up only if it
has a scheme, which base64 has not."""

_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<")
"""How files begin that name other files and that FFmpeg recognises by their content: HLS, concat, and XML (DASH, IMF).
"""

_BLANKS = b"\xef\xbb\xbf \t\r\n"
"""A byte order mark and white space, which may stand before them."""


class ForbiddenFile(ValueError):
    """A request names a local file outside the media root. SGLang answers a ValueError with status 400."""


def refused(server_args: Any, request: Any) -> AsyncIterator[Any] | None:
    """What generate_request answers to a request that names a local file outside the media root.

    Args:
        server_args: SGLang's ServerArgs.
        request: a GenerateReqInput or EmbeddingReqInput, of one prompt or several.

    Returns:
        An iterator that raises ForbiddenFile, as SGLang's own refusals come; None if nothing is wrong.
    """
    root = flags.media_root(server_args) if mends.wanted(server_args) else None
    if root is None:
        return None
    try:
        for kind in KINDS:
            check(kind, getattr(request, f"{kind}_data", None), root)
    except ForbiddenFile as error:
        return _raising(error)
    return None


async def _raising(error: ForbiddenFile) -> AsyncIterator[Any]:
    raise error
    yield  # makes it an iterator


def before_decision(index: int, image: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE systemone.serving._read_image, which reads a picture before there is a request.

    Raises:
        ForbiddenFile: if the picture is a local file outside the media root.
    """
    if asked.for_mminfer() and (root := flags.media_root(asked.server_args())):
        check("image", image, root)


def before_video(source: Any) -> None:
    """Checks what a video decoder is about to open, in a server with a media root.

    Args:
        source: a path, or the bytes of a file; anything else is not looked at.

    Raises:
        ForbiddenFile: if it is a playlist.
    """
    if not asked.for_mminfer() or not flags.media_root(asked.server_args()):
        return
    if isinstance(source, bytes):
        _check_head("video", source[:_MOST_BYTES])
    elif isinstance(source, str):
        try:
            with open(source, "rb") as file:
                head = file.read(_MOST_BYTES)
        except (OSError, ValueError):
            return  # the decoder says what is wrong
        _check_head("video", head)


def before_audio(data: bytes, *args: Any, **kwargs: Any) -> None:
    """BEFORE audio_from_video.is_audio_container, to which SGLang shows the first bytes of each sound.

    Raises:
        ForbiddenFile: if they begin a playlist, in a server with a media root.
    """
    if asked.for_mminfer() and flags.media_root(asked.server_args()):
        _check_head("audio", bytes(data))


def _check_head(kind: str, head: bytes) -> None:
    text = head.lstrip(_BLANKS)
    if text.startswith(_PLAYLISTS) or (head and not text):
        raise ForbiddenFile(
            f"{kind}: it is a playlist or another text that may name files, and with {settings.MEDIA_ROOT.flag} this "
            "server takes none"
        )


def check(kind: str, media: Any, root: str) -> None:
    """Checks every name of a local file in media, in whatever lists and dictionaries they come.

    Args:
        kind: "image", "video" or "audio", for the error.
        media: one medium or several, in the forms that SGLang and this package take.
        root: the directory.

    Raises:
        ForbiddenFile: naming the first file that lies outside.
    """
    root = os.path.realpath(root)
    for text in _texts(media):
        for path in _paths(text):
            if not _is_inside(path, root):
                name = text if len(text) <= 200 else f"{text[:200]}..."
                raise ForbiddenFile(
                    f"{kind}: {name!r} does not lie in {root}, the only directory from which this server reads local "
                    f"files ({settings.MEDIA_ROOT.flag})"
                )


def _texts(media: Any) -> Iterator[str]:
    """Every text in media. Bytes, pictures and arrays are contents and name nothing."""
    waiting = [media]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            frames = videos.frames_in(item)  # each frame of data:video/jpeg may be a path of its own
            if frames is None:
                yield item
            else:
                yield from frames
        elif isinstance(item, os.PathLike):
            yield os.fspath(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(entry for entry in item if not isinstance(entry, int | float))
        elif isinstance(url := getattr(item, "url", None), str | list | tuple | Mapping):  # SGLang's ImageData
            waiting.append(url)


def _paths(text: str) -> list[str]:
    """The paths at which SGLang, a decoder or this package may open what a text names; none if it names no local file.

    A text without a scheme may be a path or base64. It is a path if it looks like one or if something exists there; a
    path that looks like one gets the same answer whether it exists or not.
    """
    is_file_url = text[: len(_FILE)].lower() == _FILE
    is_long = len(text) >= _MOST_BYTES and ":" not in text[:64]
    if text.startswith(_URLS) or is_long:
        return []
    try:
        parsed = unquote(urlparse(text).path)  # SGLang looks for a video there, whatever the scheme
    except ValueError:
        parsed = text
    if is_file_url:
        return [parsed]
    looks_like_one = (text.startswith("/") and not text.startswith(_JPEG)) or ".." in text.split("/")
    return [text, parsed] if looks_like_one or _exists(text) or _exists(parsed) else []


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a null byte
        return False


def _is_inside(path: str, root: str) -> bool:
    if len(path) >= _MOST_BYTES:
        return False
    try:
        return os.path.commonpath([os.path.realpath(path), root]) == root
    except ValueError:  # a null byte
        return False
