"""Options that a request sets for one picture or video: how many frames, how large. Applied, or refused by name.

In chat they stand in the part's `image_url` or `video_url`. For /generate and Engine they stand in a dictionary in
place of the file: {"url": FILE, "fps": 1}; SGLang itself checks such a dictionary first, and takes only a string for
"url" and option names that it knows. SGLang keeps a few of these options, and its processors read none of them.
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
"""Attribute of a loaded picture or video: the options that came with it."""

COUNTS = (
    *("num_frames", "max_frames", "min_frames", "max_long_side_pixel", "max_dynamic_patch", "min_dynamic_patch"),
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    *("max_tokens_per_frame", "max_image_tokens"),
)
RATES = ("fps",)
_OTHER_NAMES = {"nframes": "num_frames", "total_max_pixels": "total_pixels"}
_NAMES = frozenset({*COUNTS, *RATES, *_OTHER_NAMES})

ANY_FAMILY = frozenset({"max_long_side_pixel"})
"""Options that are applied before a family's processor sees the picture or video, so every family has them."""

_SOURCES = ("url", "image", "video")
_NOT_OPTIONS = frozenset({*_SOURCES, "detail", "content_hash", "hash", "format", "type"})


def of(data: Any, family: Any, kind: str) -> tuple[Any, dict[str, Any]]:
    """Splits an entry of a request's media into the file and the checked options.

    Args:
        data: a file, SGLang's ImageData or VideoData, or a dictionary.
        family: the processor's class; its REQUEST_OPTIONS names the options that it applies.
        kind: "image" or "video".

    Returns:
        (file, options). If the mend is off, options is empty and a dictionary comes back as it is.

    Raises:
        ValueError: naming an option that the family does not apply, or one whose value is wrong.
    """
    source, sent = _parts(data)
    if not mends.active("video_options"):
        return (data if isinstance(data, Mapping) else source), {}
    known = ANY_FAMILY | getattr(family, "REQUEST_OPTIONS", {}).get(kind, frozenset())
    options = {}
    for name, value in sent.items():
        name = _OTHER_NAMES.get(name, name)
        if name in known or (kind == "video" and name == "fps" and isinstance(source, list | tuple)):
            options[name] = _checked(kind, name, value)
        elif hasattr(family, "REQUEST_OPTIONS"):
            raise ValueError(f"{kind}: {name}: this model takes {', '.join(sorted(known))}")
        else:
            _warn_once(family.__name__, kind, name)
    if "num_frames" in options and options.keys() & {"fps", "max_frames", "min_frames"}:
        raise ValueError(f"{kind}: expected num_frames, or fps with max_frames and min_frames, got both")
    return source, options


def on(loaded: Any) -> dict[str, Any]:
    """The options that a loaded picture or video carries; {} if it carries none."""
    return dict(getattr(loaded, ATTRIBUTE, {}))


def count_of_frames(options: Mapping[str, Any], usual: int, total: int, rate: float) -> int:
    """How many frames to sample from a video, spread from its first frame to its last.

    Args:
        options: the request's options for this video.
        usual: the number of frames by the operator's setting, else by the family's default.
        total: frames in the file.
        rate: frames per second of the file.

    Raises:
        ValueError: if the request asks for more frames than `within` allows.
    """
    if count := options.get("num_frames"):
        return within(count, usual, "num_frames")
    if fps := options.get("fps"):
        seconds = total / rate if math.isfinite(rate) and rate > 0 else 1.0
        most = within(options.get("max_frames", max(usual, limits.FRAMES)), usual, "max_frames")
        return max(1, min(round(min(seconds * fps, most)), most, total), min(options.get("min_frames", 1), total))
    return min(usual, options.get("max_frames", usual))


def within(count: int, usual: int, name: str) -> int:
    """Returns `count`, the number of frames that a request asks for in its option `name`.

    Raises:
        ValueError: if it exceeds both `limits.FRAMES` and `usual`, the operator's own setting.
    """
    most = max(usual, limits.FRAMES)
    if count > most:
        raise ValueError(f"video: {name}: expected at most {most}, got {count}")
    return count


def _parts(data: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(data, Mapping):
        source = next((data[name] for name in _SOURCES if data.get(name) is not None), data)
        options: dict[str, Any] = {name: value for name, value in data.items() if name not in _NOT_OPTIONS}
        options.update(options.pop("preprocess_kwargs", None) or {})
    elif hasattr(data, "url") and hasattr(data, "preprocess_kwargs"):
        source = data.url
        options = {name: getattr(data, name, None) for name in ("max_long_side_pixel", "max_dynamic_patch")}
        options.update(data.preprocess_kwargs or {})
    else:
        return data, {}
    return source, {name: value for name, value in options.items() if value is not None}


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


def carry(original: Any, self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
    """AROUND OpenAIServingChat._convert_to_internal_request.

    SGLang drops the options that it does not know, and with a conversation template nearly all of them.
    """
    converted = original(self, request, raw_request, *args, **kwargs)
    if mends.wanted(self.tokenizer_manager.server_args) and mends.active("video_options"):
        body = getattr(raw_request, "_json", None)
        chat = body if isinstance(body, Mapping) else request.model_dump(exclude_none=True)
        attach(converted[0], chat.get("messages") or ())
    return converted


def attach(request: Any, messages: Iterable[Any]) -> None:
    """Gives each medium of a GenerateReqInput the options of its part in the chat messages.

    Does nothing for a kind of media whose files are not those of the messages, in the same order.
    """
    from sglang.srt.utils import ImageData, VideoData

    for kind, data_class in (("image", ImageData), ("video", VideoData)):
        media = getattr(request, f"{kind}_data", None)
        parts = list(_asked(messages, kind))
        if not isinstance(media, list) or [_parts(medium)[0] for medium in media] != [url for url, _ in parts]:
            continue  # no media, or a template that leaves some out or changes their order
        sets_patches = False
        for i, (url, options) in enumerate(parts):
            known = _parts(media[i])[1]
            if added := {name: value for name, value in options.items() if name not in known}:
                media[i] = data_class(url=url, **_fields(media[i]), preprocess_kwargs={**known, **added})
            sets_patches = sets_patches or "max_dynamic_patch" in {**known, **options}
        if sets_patches:  # SGLang would apply the smallest of all to each medium
            setattr(request, f"{kind}_max_dynamic_patch", None)


def _fields(medium: Any) -> dict[str, Any]:
    """The fields of an entry that are neither its file nor its options."""
    return {name: getattr(medium, name) for name in ("detail", "content_hash") if getattr(medium, name, None)}


def _asked(messages: Iterable[Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file and the options of each medium of a kind, in the order of the messages."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping) or part.get("type") not in (f"{kind}_url", f"input_{kind}"):
                continue
            value = part.get(f"{kind}_url")
            if not isinstance(value, Mapping):
                yield str(value), {}
                continue
            options = {
                name: setting for name, setting in value.items() if name not in _NOT_OPTIONS and setting is not None
            }
            for name in options.keys() - _NAMES:  # options that other servers, or later ones, may have
                _warn_once("SGLang", kind, str(name)[:100])
            yield str(value.get("url")), {name: setting for name, setting in options.items() if name in _NAMES}
