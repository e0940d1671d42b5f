"""Prompts of token ids with media: ids outside media never change, and media that are already expanded are recognised.

SGLang decodes such a prompt and tokenizes the text again, which may give other ids. If a client sends back the ids of
an answer (`prompt_token_ids`), SGLang also takes each token of a medium for a placeholder. Here the prompt becomes a
text with one placeholder for each medium and a mark (see `verbatim`) for everything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import requests, verbatim
from sglang_mminfer.mends.text_config import text_config_of

_KINDS = ("image", "video", "audio")

_TOKENS_OF_MEDIA = ("vision_start_token_id", "vision_end_token_id", "img_start_token_id", "img_end_token_id")
"""Attributes of SGLang's processors that hold the tokens around a medium, by which they find it."""


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
        ids: token ids outside media; () if `name` is set.
        name: a token or word by which the processor finds media; "" if `ids` is set.
    """

    ids: tuple[int, ...] = ()
    name: str = ""

    def text(self) -> str:
        """The name, or a mark for the ids."""
        return self.name or verbatim.ids(self.ids)


def as_text(processor: Any, prompt: Any, request: Any) -> Any:
    """A prompt of ids as a text that the processor's tokenizer turns into the same ids; a text comes back as it is.

    The prompt stays a list of ids if the mend is off, if the client preprocessed the media, or if the processor prefers
    ids.

    Raises:
        ValueError: for an id outside the vocabulary, or for tokens of media that the family cannot tell apart.
    """
    prompt = _with_marks_resolved(processor, prompt, request)
    if not isinstance(prompt, list) or not mends.active("token_ids"):
        return prompt
    requests.check_ids(prompt, vocabulary_of(processor))
    media = {kind: requests.media_in(request, kind) for kind in _KINDS}
    if any(processor._is_preprocessed_input(medium) for media_of_kind in media.values() for medium in media_of_kind):
        return prompt  # SGLang takes the ids as they are
    counts = {kind: len(media_of_kind) for kind, media_of_kind in media.items()}
    if processor.prefer_tokenized_input:
        return _collapsed_ids(prompt, set(_placeholders(processor)), sum(counts.values()))
    pieces = _split(processor, prompt)
    if hasattr(processor, "collapse_media"):
        return _text(processor.collapse_media(pieces, counts))
    return _text(collapsed(pieces, counts, _kinds_of_names(processor)))


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text() for piece in pieces)


def _with_marks_resolved(processor: Any, prompt: Any, request: Any) -> Any:
    """Resolves the marks of a text that SGLang tokenized itself, for a processor that prefers ids."""
    text = getattr(request, "text", None)
    if not isinstance(prompt, list) or not isinstance(text, str) or not verbatim.has_marks(text):
        return prompt
    return list(processor._tokenizer.encode(text))


def vocabulary_of(processor: Any) -> int:
    """Rows of the model's token embedding."""
    sizes = [
        getattr(config, "vocab_size", None) for config in (text_config_of(processor.hf_config), processor.hf_config)
    ]
    return int(next((size for size in sizes if size), len(processor._tokenizer)))


def _placeholders(processor: Any) -> Mapping[int, tuple[str, ...]]:
    """The ids of the processor's placeholders and the kinds of media that each stands for; {} if they are words.

    A processor may say it by `media_tokens`. A token that stands around media has no kind.
    """
    media_tokens = getattr(processor, "media_tokens", None)
    if media_tokens is not None:
        return media_tokens
    kinds: dict[int, tuple[str, ...]] = {}
    for kind in _KINDS:
        token = getattr(getattr(processor, "mm_tokens", None), f"{kind}_token_id", None)
        if token is None and kind == "image":
            token = getattr(processor.hf_config, "image_token_index", None)
        if token is not None:
            kinds[int(token)] = (*kinds.get(int(token), ()), kind)
    return kinds


def _kinds_of_names(processor: Any) -> dict[str, tuple[str, ...]]:
    added = processor._tokenizer.added_tokens_decoder
    return {str(added[token]): kinds for token, kinds in _placeholders(processor).items() if token in added}


def _split(processor: Any, prompt: Sequence[int]) -> list[Piece]:
    """The prompt in pieces, one piece for each token by which the processor finds media."""
    tokenizer = processor._tokenizer
    added = tokenizer.added_tokens_decoder
    around = {int(token) for name in _TOKENS_OF_MEDIA if (token := getattr(processor, name, None)) is not None}
    names = {token: str(added[token]) for token in {*around, *_placeholders(processor)} if token in added}
    words = getattr(processor, "placeholder_words", ())
    pieces: list[Piece] = []
    for is_name, run in groupby(prompt, key=lambda token: token in names):
        if is_name:
            pieces += [Piece(name=names[token]) for token in run]
        else:
            pieces += _with_words(tokenizer, list(run), words)
    return pieces


def _with_words(tokenizer: Any, run: list[int], words: Sequence[str]) -> list[Piece]:
    """Ids in pieces, cut at placeholders that are words. A token that is only partly in a word is encoded again."""
    parts = tokenizer.convert_ids_to_tokens(run) if words else []
    text = "".join(parts)
    if not any(word in text for word in words):
        return [Piece(ids=tuple(run))]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    pieces: list[Piece] = []
    token = position = 0

    def add_until(stop: int) -> None:
        """Adds a piece with the text from `position` to `stop`."""
        nonlocal token, position
        ids: list[int] = []
        while token < len(run) and ends[token + 1] <= stop:
            if position == ends[token]:
                ids.append(run[token])
            else:
                ids += _encoded(tokenizer, text[position : ends[token + 1]])
            position, token = ends[token + 1], token + 1
        if position < stop:
            ids += _encoded(tokenizer, text[position:stop])
            position = stop
        if ids:
            pieces.append(Piece(ids=tuple(ids)))

    while (match := min(((i, w) for w in words if (i := text.find(w, position)) >= 0), default=None)) is not None:
        start, word = match
        add_until(start)
        pieces.append(Piece(name=word))
        position = start + len(word)
        while token < len(run) and ends[token + 1] <= position:
            token += 1
    add_until(len(text))
    return pieces


def _encoded(tokenizer: Any, part: str) -> list[int]:
    return list(tokenizer.encode(tokenizer.convert_tokens_to_string([part]), add_special_tokens=False))


def collapsed(pieces: Sequence[Piece], counts: Mapping[str, int], kinds: Mapping[str, tuple[str, ...]]) -> list[Piece]:
    """The pieces with one placeholder for each medium: a run of equal placeholders becomes one.

    A run stays as it is where the prompt already has as many placeholders as media.

    Args:
        counts: the request's media of each kind.
        kinds: the kinds that each placeholder stands for.
    """
    out: list[Piece] = []
    occurrences = Counter(piece.name for piece in pieces)
    for piece in pieces:
        expected = sum(counts[kind] for kind in kinds.get(piece.name, ()))
        if out and piece.name in kinds and piece == out[-1] and occurrences[piece.name] != expected:
            continue
        out.append(piece)
    return out


def _collapsed_ids(prompt: list[int], placeholders: set[int], media: int) -> list[int]:
    """As `collapsed`, for a processor that takes ids."""
    if sum(token in placeholders for token in prompt) == media:
        return prompt
    return [token for token, run in groupby(prompt) for token in ([token] if token in placeholders else run)]
