"""Marked text: a mark holds words that stay words, or token ids that stay these ids.

Processors find media in a prompt by words such as `<|image_pad|>`, and turn token ids into text and back. A mark hides
its content from both. It is made of private-use characters, which processors leave alone, and `aware` tokenizers
resolve it. A mark holds all that it stands for, so nothing else has to travel with a prompt. Its first characters are
drawn at random in each process, so no client can write one.
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

TIGHT = "\U0010fff3" + _NONCE
"""A mark beside a placeholder: line breaks that the processor writes between them are left out."""

RESERVED = "\U00108000-\U0010ffff"
"""The characters of marks, as a range for a regular expression. In a client's words such characters are marked."""

_MARK = re.compile(
    f"{_WORDS}([{chr(_BYTE)}-{chr(_BYTE + 255)}]*){_CLOSE}|{_IDS}([{chr(_DIGIT)}-{chr(_BYTE - 1)}]*){_CLOSE}"
)

_BREAKS = re.compile(f"\n*{TIGHT}\n*")


def words(text: str) -> str:
    """A mark for words that are no placeholders."""
    return _WORDS + "".join(chr(_BYTE + byte) for byte in text.encode()) + _CLOSE


def ids(tokens: Iterable[int]) -> str:
    """A mark for token ids, each from 0 to 2**30 - 1."""
    low = (1 << _BITS) - 1
    return _IDS + "".join(chr(_DIGIT + (token >> _BITS)) + chr(_DIGIT + (token & low)) for token in tokens) + _CLOSE


def has_marks(text: str) -> bool:
    """Whether a text contains a mark of this process."""
    return any(mark in text for mark in (_WORDS, _IDS, TIGHT))


def without_words(text: str) -> str:
    """The text with each mark for words replaced by the words."""
    return _MARK.sub(lambda mark: mark[0] if mark[1] is None else _words_of(mark[1]), text)


def _words_of(content: str) -> str:
    return bytes(ord(char) - _BYTE for char in content).decode()


def _ids_of(content: str) -> list[int]:
    numbers = [ord(char) - _DIGIT for char in content]
    return [high << _BITS | low for high, low in zip(numbers[::2], numbers[1::2])]


def _pieces(text: str, is_special: Any) -> Iterator[tuple[str, Any]]:
    """("text", words), ("words", words that contain a special token's name) and ("ids", token ids), in order."""
    pending, end = "", 0
    for mark in _MARK.finditer(text):
        pending += text[end : mark.start()]
        end = mark.end()
        if mark[1] is not None and not is_special(_words_of(mark[1])):
            pending += _words_of(mark[1])  # no special token in it: tokenize it together with its neighbours
            continue
        if pending:
            yield "text", pending
        pending = ""
        yield ("ids", _ids_of(mark[2])) if mark[1] is None else ("words", _words_of(mark[1]))
    if pending + text[end:]:
        yield "text", pending + text[end:]


def aware(tokenizer: Any) -> Any:
    """A copy of a tokenizer that resolves marks, and treats any other text as before."""
    return _restored(copy.deepcopy(tokenizer))


def aware_processor(processor: Any) -> Any:
    """A copy of the processor with an `aware` tokenizer. A tokenizer gives an `aware` one, None gives None."""
    if processor is None:
        return None
    if not hasattr(processor, "tokenizer"):
        return aware(processor)
    with_marks = copy.copy(processor)
    with_marks.tokenizer = aware(processor.tokenizer)
    return with_marks


def _restored(plain: Any) -> Any:
    kind: Any = type(plain)
    plain.__class__ = _aware_class(kind)
    return plain


def _blank(base: Any) -> Any:
    """An `Aware` tokenizer without state; `pickle` or `copy` fills it."""
    kind: Any = _aware_class(base)
    return kind.__new__(kind)


@functools.cache
def _aware_class(base: Any) -> type:
    class Aware(base):
        """The base tokenizer; `encode` and calls resolve marks."""

        def __reduce_ex__(self, protocol: Any) -> Any:
            # Workers get processors pickled, and pickle cannot find a class that is made at run time by its name.
            return _blank, (base,), self.__dict__

        def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(text, str) or not has_marks(text):
                return super().encode(text, *args, **kwargs)
            return self._resolved(text, kwargs.get("add_special_tokens", True))

        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            many = isinstance(text, list | tuple)
            texts = text if many else [text]
            if not any(isinstance(part, str) and has_marks(part) for part in texts):
                return super().__call__(text, *args, **kwargs)
            rows = [self._resolved(part, kwargs.get("add_special_tokens", True)) for part in texts]
            batched = many or kwargs.get("return_tensors") is not None
            return self.pad(
                {"input_ids": rows if batched else rows[0]},
                padding=kwargs.get("padding") or False,
                return_tensors=kwargs.get("return_tensors"),
            )

        def _resolved(self, text: str, add_special_tokens: bool) -> list[int]:
            names = [str(token) for token in self.added_tokens_decoder.values()]

            def is_special(part: str) -> bool:
                return any(name in part for name in names)

            token_ids: list[int] = []
            for kind, piece in _pieces(_BREAKS.sub("", text), is_special):
                if kind == "ids":
                    token_ids += piece
                elif kind == "text":
                    token_ids += super().encode(piece, add_special_tokens=False)
                else:
                    token_ids += super().encode(piece, add_special_tokens=False, split_special_tokens=True)
            if not add_special_tokens:
                return token_ids
            around = list(super().encode("", add_special_tokens=True))
            first = around[:1] if around and around[0] == self.bos_token_id else []
            last = around[-1:] if len(around) > len(first) and around[-1] == self.eos_token_id else []
            return first + token_ids + last

    Aware.__name__ = Aware.__qualname__ = base.__name__  # processors and SGLang test the class by its name
    return Aware
