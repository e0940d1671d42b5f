"""What a request asks of one picture or video: how many frames, how large. Honoured, or refused by name.

In chat they stand in the part's `image_url` or `video_url`; for /generate and Engine in a dictionary in place of the
file: {"url": FILE, "fps": 1}. SGLang keeps the few that it knows and its processors read none of them. What /generate
takes in such a dictionary is checked by SGLang itself, before: a string for "url", and names that it knows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import limits

logger = logging.getLogger(__name__)

ATTRIBUTE = "mminfer_options"
"""On what SGLang loads: the options that came with it."""

COUNTS = (
    *("num_frames", "max_frames", "min_frames", "max_long_side_pixel", "max_dynamic_patch", "min_dynamic_patch"),
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    *("max_tokens_per_frame", "max_image_tokens"),
)
RATES = ("fps",)
_OTHER_NAMES = {"nframes": "num_frames", "total_max_pixels": "total_pixels"}
_NAMES = frozenset({*COUNTS, *RATES, *_OTHER_NAMES})

ANY_FAMILY = frozenset({"max_long_side_pixel"})
"""What is done to a picture or a video before its family sees it."""

_SOURCES = ("url", "image", "video")
_NOT_OPTIONS = frozenset({*_SOURCES, "detail", "content_hash", "hash", "format", "type"})


def of(data: Any, family: Any, kind: str) -> tuple[Any, dict[str, Any]]:
    """The file of an entry of a request, and what is asked of it.

    Args:
        data: a file, SGLang's ImageData or VideoData, or a dictionary.
        family: the processor's class.
        kind: "image" or "video".

    Raises:
        ValueError: for an option that the family does not have, or a value that is none, by name.
    """
    source, given = _parts(data)
    if not mends.active("video_options"):
        return (data if isinstance(data, Mapping) else source), {}
    known = ANY_FAMILY | getattr(family, "REQUEST_OPTIONS", {}).get(kind, frozenset())
    wanted = {}
    for name, value in given.items():
        name = _OTHER_NAMES.get(name, name)
        if name in known or (kind == "video" and name == "fps" and isinstance(source, list | tuple)):
            wanted[name] = _checked(kind, name, value)
        elif hasattr(family, "REQUEST_OPTIONS"):
            raise ValueError(f"{kind}: {name}: this model takes {', '.join(sorted(known))}")
        else:
            _warn_once(family.__name__, kind, name)
    if "num_frames" in wanted and wanted.keys() & {"fps", "max_frames", "min_frames"}:
        raise ValueError(f"{kind}: expected num_frames, or fps with max_frames and min_frames, got both")
    return source, wanted


def on(loaded: Any) -> dict[str, Any]:
    """The options that a loaded picture or video carries."""
    return dict(getattr(loaded, ATTRIBUTE, {}))


def count_of_frames(wanted: Mapping[str, Any], usual: int, total: int, rate: float) -> int:
    """How many frames to take of a video, from its first to its last.

    Args:
        usual: what the operator says, or the family.
        total, rate: frames of the file, and frames a second.

    Raises:
        ValueError: for more than the server takes.
    """
    if count := wanted.get("num_frames"):
        return within(count, usual, "num_frames")
    if fps := wanted.get("fps"):
        seconds = total / rate if math.isfinite(rate) and rate > 0 else 1.0
        most = within(wanted.get("max_frames", max(usual, limits.FRAMES)), usual, "max_frames")
        return max(1, min(round(min(seconds * fps, most)), most, total), min(wanted.get("min_frames", 1), total))
    return min(usual, wanted.get("max_frames", usual))


def within(count: int, usual: int, name: str) -> int:
    """A number of frames that a request asks for.

    Raises:
        ValueError: for more than `limits.FRAMES` and the operator's own setting.
    """
    most = max(usual, limits.FRAMES)
    if count > most:
        raise ValueError(f"video: {name}: expected at most {most}, got {count}")
    return count


def _parts(data: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(data, Mapping):
        source = next((data[name] for name in _SOURCES if data.get(name) is not None), data)
        given: dict[str, Any] = {name: value for name, value in data.items() if name not in _NOT_OPTIONS}
        given.update(given.pop("preprocess_kwargs", None) or {})
    elif hasattr(data, "url") and hasattr(data, "preprocess_kwargs"):
        source = data.url
        given = {name: getattr(data, name, None) for name in ("max_long_side_pixel", "max_dynamic_patch")}
        given.update(data.preprocess_kwargs or {})
    else:
        return data, {}
    return source, {name: value for name, value in given.items() if value is not None}


def _checked(kind: str, name: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in RATES:
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{kind}: {name}: expected a number above 0, got {value!r}")
    elif not number or value != int(value) or value < 1:
        raise ValueError(f"{kind}: {name}: expected a whole number above 0, got {value!r}")
    return value if name in RATES else int(value)


_warned: set[tuple[str, str, str]] = set()


def _warn_once(family: str, kind: str, name: str) -> None:
    if (family, kind, name) not in _warned and len(_warned) < 1000:
        _warned.add((family, kind, name))
        logger.warning("mminfer: %s: %r is left out: %s has no such option.", kind, name, family)


# ---- chat --------------------------------------------------------------------------------------------------


def carry(original: Any, self: Any, request: Any, raw_request: Any = None) -> Any:
    """AROUND OpenAIServingChat._convert_to_internal_request: SGLang drops the options that it does not know, and with
    a conversation template nearly all."""
    converted = original(self, request, raw_request)
    if mends.wanted(self.tokenizer_manager.server_args) and mends.active("video_options"):
        body = getattr(raw_request, "_json", None)
        given = body if isinstance(body, Mapping) else request.model_dump(exclude_none=True)
        attach(converted[0], given.get("messages") or ())
    return converted


def attach(request: Any, messages: Iterable[Any]) -> None:
    """Gives the media of a request for generation the options that stand in the messages it was made of."""
    from sglang.srt.utils import ImageData, VideoData

    for kind, made in (("image", ImageData), ("video", VideoData)):
        media = getattr(request, f"{kind}_data", None)
        asked = list(_asked(messages, kind))
        if not isinstance(media, list) or [_parts(one)[0] for one in media] != [url for url, _ in asked]:
            continue  # none, or a template that leaves some out or puts them in another order
        moved = False
        for i, (url, given) in enumerate(asked):
            before = _parts(media[i])[1]
            if extra := {name: value for name, value in given.items() if name not in before}:
                media[i] = made(url=url, **_fields(media[i]), preprocess_kwargs={**before, **extra})
            moved = moved or "max_dynamic_patch" in {**before, **given}
        if moved:  # SGLang takes the least of all for each
            setattr(request, f"{kind}_max_dynamic_patch", None)


def _fields(medium: Any) -> dict[str, Any]:
    """What an entry has beside its file and its options."""
    return {name: getattr(medium, name) for name in ("detail", "content_hash") if getattr(medium, name, None)}


def _asked(messages: Iterable[Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file and the options of each medium of a kind, in order."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping) or part.get("type") not in (f"{kind}_url", f"input_{kind}"):
                continue
            value = part.get(f"{kind}_url")
            if not isinstance(value, Mapping):
                yield str(value), {}
                continue
            given = {name: one for name, one in value.items() if name not in _NOT_OPTIONS and one is not None}
            for name in given.keys() - _NAMES:  # of other servers, or of those to come
                _warn_once("SGLang", kind, str(name)[:100])
            yield str(value.get("url")), {name: one for name, one in given.items() if name in _NAMES}
