"""Words of a conversation that look like placeholders of media stay words.

A chat template writes a placeholder for each medium, and SGLang then looks for placeholders in the finished prompt.
There a user's "how do I use the <video> tag?" looks the same. So such words are marked before the template runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import verbatim

PLACEHOLDERS = (
    *("<image>", "<video>", "<audio>", "<image_placeholder>", "<video_placeholder>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<vid>", "</vid>", "<vila/video>", "<vila/sentinel>"),
    *("<|image_pad|>", "<|video_pad|>", "<|audio_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image|>", "<|video|>", "<|audio|>", "<|media_pad|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<<<__IMG_PLACEHOLDER__>>>", "<<<__VID_PLACEHOLDER__>>>", "<<<__IMG_CONTEXT_PLACEHOLDER__>>>"),
)
"""Words that families or SGLang itself take for media. A mark too many does no harm: a marked word that is no special
token gives the same ids as without the mark, and a special token's name gives the ids of its letters."""

_MEDIA_PARTS = frozenset({"image_url", "video_url", "audio_url", "input_audio", "input_image", "input_video"})


def guard_messages(
    original: Callable[..., Any], self: Any, request: Any, is_multimodal: bool, *args: Any, **kwargs: Any
) -> Any:
    """AROUND OpenAIServingChat._process_messages."""
    manager = self.tokenizer_manager
    if (
        not is_multimodal
        or not mends.wanted(manager.server_args)
        or not mends.active("placeholder_words")
        or not any(_has_media(message) for message in request.messages)
    ):
        return original(self, request, is_multimodal, *args, **kwargs)
    pattern = pattern_of(getattr(manager, "mm_processor", None))
    messages = request.messages
    request.messages = [_guarded(message, pattern) for message in messages]
    try:
        return original(self, request, is_multimodal, *args, **kwargs)
    finally:
        request.messages = messages


def _has_media(message: Any) -> bool:
    content = getattr(message, "content", None)
    return isinstance(content, list) and any(_type_of(part) in _MEDIA_PARTS for part in content)


def _type_of(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else getattr(part, "type", None)


def pattern_of(processor: Any) -> re.Pattern[str]:
    """Matches what is marked: all families' placeholders, the processor's media tokens, and the characters of marks."""
    tokens = getattr(processor, "mm_tokens", None)
    media_tokens = [getattr(tokens, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
    names: list[str] = []
    tokenizer = getattr(processor, "_tokenizer", None)
    if tokenizer is not None:
        added = tokenizer.added_tokens_decoder
        names = [str(added[token]) for token in media_tokens if token in added]
    return _compiled(tuple(sorted(set(names))))


@functools.lru_cache
def _compiled(names: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted({*PLACEHOLDERS, *names}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) + f"|[{verbatim.RESERVED}]+")


def _guarded(value: Any, pattern: re.Pattern[str]) -> Any:
    """A copy of a message, or of a part of one, in which words are marked and media stay as they are."""
    if isinstance(value, str):
        return pattern.sub(lambda word: verbatim.words(word[0]), value)
    if isinstance(value, list | tuple):
        return [_guarded(item, pattern) for item in value]
    if isinstance(value, dict):
        if value.get("type") in _MEDIA_PARTS:
            return value
        return {key: _guarded(item, pattern) for key, item in value.items()}
    fields = getattr(type(value), "model_fields", None)
    if fields is None or _type_of(value) in _MEDIA_PARTS:
        return value
    return value.model_copy(update={name: _guarded(getattr(value, name), pattern) for name in fields if name != "role"})
