"""Text in which some stretches are marked: words that stay words, and token ids that stay these ids.

Processors find media in a prompt by words such as `<|image_pad|>`, and turn token ids into text and back. A mark hides
a stretch from both: it is made of private-use characters, which processors pass on, and `aware` tokenizers resolve.
A mark says all by itself, so nothing has to travel beside a prompt; its first characters are drawn anew in each
process, so no client can write one.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

_DIGIT = 0x108000  # 15 bits of a token id each, two for an id
_BYTE = 0x10F000  # one byte of a word's UTF-8
_BITS = 15
_NONCE = "".join(chr(_BYTE + byte) for byte in os.urandom(4))
_WORDS, _IDS, _CLOSE = "\U0010fff0" + _NONCE, "\U0010fff1" + _NONCE, "\U0010fff2"

RESERVED = "\U00108000-\U0010ffff"
"""The characters that marks are made of, as a range of a regular expression: in a client's words these are marked."""

_MARK = re.compile(
    f"{_WORDS}([{chr(_BYTE)}-{chr(_BYTE + 255)}]*){_CLOSE}|{_IDS}([{chr(_DIGIT)}-{chr(_BYTE - 1)}]*){_CLOSE}"
)


def words(text: str) -> str:
    """A mark for words that are only words."""
    return _WORDS + "".join(chr(_BYTE + byte) for byte in text.encode()) + _CLOSE


def ids(tokens: Iterable[int]) -> str:
    """A mark for token ids, each from 0 to 2**30 - 1."""
    low = (1 << _BITS) - 1
    return _IDS + "".join(chr(_DIGIT + (token >> _BITS)) + chr(_DIGIT + (token & low)) for token in tokens) + _CLOSE


def has_marks(text: str) -> bool:
    return _WORDS in text or _IDS in text


def without_words(text: str) -> str:
    """The text with marked words as words."""
    return _MARK.sub(lambda mark: mark[0] if mark[1] is None else _words_of(mark[1]), text)


def _words_of(inside: str) -> str:
    return bytes(ord(char) - _BYTE for char in inside).decode()


def _ids_of(inside: str) -> list[int]:
    numbers = [ord(char) - _DIGIT for char in inside]
    return [high << _BITS | low for high, low in zip(numbers[::2], numbers[1::2])]


def _pieces(text: str, is_special: Any) -> Iterator[tuple[str, Any]]:
    """("text", words), ("words", words that hold a special token's name) and ("ids", token ids), in order."""
    before, last = "", 0
    for mark in _MARK.finditer(text):
        before += text[last : mark.start()]
        last = mark.end()
        if mark[1] is not None and not is_special(_words_of(mark[1])):
            before += _words_of(mark[1])  # as its neighbours are tokenized: in one go with them
            continue
        if before:
            yield "text", before
        before = ""
        yield ("ids", _ids_of(mark[2])) if mark[1] is None else ("words", _words_of(mark[1]))
    if before + text[last:]:
        yield "text", before + text[last:]


def aware(tokenizer: Any) -> Any:
    """A copy of a tokenizer that resolves marks; any other text it treats as before."""
    return _restored(copy.deepcopy(tokenizer))


def aware_processor(processor: Any) -> Any:
    """The processor with such a tokenizer; one that is a tokenizer itself becomes one."""
    if processor is None:
        return None
    if not hasattr(processor, "tokenizer"):
        return aware(processor)
    own = copy.copy(processor)
    own.tokenizer = aware(processor.tokenizer)
    return own


def _restored(plain: Any) -> Any:
    kind: Any = type(plain)
    plain.__class__ = _aware_class(kind)
    return plain


def _blank(base: Any) -> Any:
    """An `Aware` without its state, which the unpickler or `copy` puts in."""
    kind: Any = _aware_class(base)
    return kind.__new__(kind)


@functools.cache
def _aware_class(base: Any) -> type:
    class Aware(base):
        """Resolves marks."""

        def __reduce_ex__(self, protocol: Any) -> Any:
            # A class made at run time cannot be found by its name: processors are pickled and copied for workers.
            return _blank, (base,), self.__dict__

        def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(text, str) or not has_marks(text):
                return super().encode(text, *args, **kwargs)
            return self._resolved(text, kwargs.get("add_special_tokens", True))

        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            many = isinstance(text, list | tuple)
            texts = text if many else [text]
            if not any(isinstance(one, str) and has_marks(one) for one in texts):
                return super().__call__(text, *args, **kwargs)
            rows = [self._resolved(one, kwargs.get("add_special_tokens", True)) for one in texts]
            batched = many or kwargs.get("return_tensors") is not None
            return self.pad(
                {"input_ids": rows if batched else rows[0]},
                padding=kwargs.get("padding") or False,
                return_tensors=kwargs.get("return_tensors"),
            )

        def _resolved(self, text: str, add_special_tokens: bool) -> list[int]:
            names = [str(token) for token in self.added_tokens_decoder.values()]

            def is_special(one: str) -> bool:
                return any(name in one for name in names)

            found: list[int] = []
            for kind, piece in _pieces(text, is_special):
                if kind == "ids":
                    found += piece
                elif kind == "text":
                    found += super().encode(piece, add_special_tokens=False)
                else:
                    found += super().encode(piece, add_special_tokens=False, split_special_tokens=True)
            if not add_special_tokens:
                return found
            around = list(super().encode("", add_special_tokens=True))
            first = around[:1] if around and around[0] == self.bos_token_id else []
            last = around[-1:] if len(around) > len(first) and around[-1] == self.eos_token_id else []
            return first + found + last

    Aware.__name__ = Aware.__qualname__ = base.__name__  # processors and SGLang ask for it by name
    return Aware
