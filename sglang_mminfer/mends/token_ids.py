"""Prompts of token ids with media: ids outside the media stay what they are, and expanded media are found again.

SGLang decodes such a prompt and tokenizes the text anew, which need not give the same ids, and takes each of a medium's
tokens for a placeholder if the ids are those of an answer (`prompt_token_ids`) sent back. Here the prompt becomes text
in which everything but media is a mark (`verbatim`), with one placeholder for each medium.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import requests, verbatim

_KINDS = ("image", "video")

_TOKENS_OF_MEDIA = ("vision_start_token_id", "vision_end_token_id", "img_start_token_id", "img_end_token_id")
"""Attributes of SGLang's processors: tokens around a medium, by which they find it."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: ids that are no media's, or `name`, a token or word by which a processor finds media."""

    ids: tuple[int, ...] = ()
    name: str = ""

    def text(self) -> str:
        return self.name or verbatim.ids(self.ids)


def as_text(processor: Any, prompt: Any, request: Any) -> Any:
    """A prompt of ids as text with marks, which the processor's tokenizer turns into the same ids; text as it is.

    Raises:
        ValueError: for an id that is none of the vocabulary, and for placeholders that are not as many as the media.
    """
    prompt = _with_marks_resolved(processor, prompt, request)
    if not isinstance(prompt, list) or not mends.active("token_ids"):
        return prompt
    requests.check_ids(prompt, vocabulary_of(processor))
    media = {kind: requests.media_in(request, kind) for kind in _KINDS}
    if any(processor._is_preprocessed_input(one) for of_kind in media.values() for one in of_kind):
        return prompt  # SGLang takes the ids as they are
    counts = {kind: len(of_kind) for kind, of_kind in media.items()}
    if processor.prefer_tokenized_input:
        return _collapsed_ids(prompt, set(_placeholders(processor)), sum(counts.values()))
    pieces = _split(processor, prompt)
    if hasattr(processor, "collapse_media"):
        return _text(processor.collapse_media(pieces, counts))
    return _text(collapsed(pieces, counts, _kinds_of_names(processor)))


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text() for piece in pieces)


def _with_marks_resolved(processor: Any, prompt: Any, request: Any) -> Any:
    """A prompt that SGLang has tokenized itself, marks and all, for a processor that prefers ids."""
    text = getattr(request, "text", None)
    if not isinstance(prompt, list) or not isinstance(text, str) or not verbatim.has_marks(text):
        return prompt
    return list(processor._tokenizer.encode(text))


def vocabulary_of(processor: Any) -> int:
    """Rows of the model's embedding."""
    text = processor.hf_config.get_text_config() if hasattr(processor.hf_config, "get_text_config") else None
    sizes = [getattr(config, "vocab_size", None) for config in (text, processor.hf_config)]
    return int(next((size for size in sizes if size), len(processor._tokenizer)))


def _placeholders(processor: Any) -> Mapping[int, tuple[str, ...]]:
    """The ids of placeholders, and the kinds of media that each stands for; a processor may say it by `media_tokens`.

    None where placeholders are words. A token that stands around media has no kind.
    """
    own = getattr(processor, "media_tokens", None)
    if own is not None:
        return own
    found: dict[int, tuple[str, ...]] = {}
    for kind in _KINDS:
        token = getattr(processor.mm_tokens, f"{kind}_token_id", None)
        if token is None and kind == "image":
            token = getattr(processor.hf_config, "image_token_index", None)
        if token is not None:
            found[int(token)] = (*found.get(int(token), ()), kind)
    return found


def _kinds_of_names(processor: Any) -> dict[str, tuple[str, ...]]:
    added = processor._tokenizer.added_tokens_decoder
    return {str(added[token]): kinds for token, kinds in _placeholders(processor).items() if token in added}


def _split(processor: Any, prompt: Sequence[int]) -> list[Piece]:
    """The prompt in pieces, one for each token by which the processor finds media."""
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
    """Ordinary ids in pieces, cut at placeholders that are words. A token that is a word's only in part is cut."""
    parts = tokenizer.convert_ids_to_tokens(run) if words else []
    text = "".join(parts)
    if not any(word in text for word in words):
        return [Piece(ids=tuple(run))]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    pieces: list[Piece] = []
    token = at = 0

    def upto(stop: int) -> None:
        """The tokens from `at` to `stop` in the text."""
        nonlocal token, at
        whole: list[int] = []
        while token < len(run) and ends[token + 1] <= stop:
            if at == ends[token]:
                whole.append(run[token])
            else:
                whole += _encoded(tokenizer, text[at : ends[token + 1]])
            at, token = ends[token + 1], token + 1
        if at < stop:
            whole += _encoded(tokenizer, text[at:stop])
            at = stop
        if whole:
            pieces.append(Piece(ids=tuple(whole)))

    while (found := min(((i, w) for w in words if (i := text.find(w, at)) >= 0), default=None)) is not None:
        start, word = found
        upto(start)
        pieces.append(Piece(name=word))
        at = start + len(word)
        while token < len(run) and ends[token + 1] <= at:
            token += 1
    upto(len(text))
    return pieces


def _encoded(tokenizer: Any, part: str) -> list[int]:
    return list(tokenizer.encode(tokenizer.convert_tokens_to_string([part]), add_special_tokens=False))


def collapsed(pieces: Sequence[Piece], counts: Mapping[str, int], kinds: Mapping[str, tuple[str, ...]]) -> list[Piece]:
    """One placeholder for each medium: runs of them, as an answer's ids have, become one.

    Args:
        counts: media of each kind.
        kinds: what each placeholder stands for.
    """
    out: list[Piece] = []
    found = Counter(piece.name for piece in pieces)
    for piece in pieces:
        expected = sum(counts[kind] for kind in kinds.get(piece.name, ()))
        if out and piece.name in kinds and piece == out[-1] and found[piece.name] != expected:
            continue
        out.append(piece)
    return out


def _collapsed_ids(prompt: list[int], placeholders: set[int], media: int) -> list[int]:
    """The same, for a processor that takes ids."""
    if sum(token in placeholders for token in prompt) == media:
        return prompt
    return [token for token, run in groupby(prompt) for token in ([token] if token in placeholders else run)]
