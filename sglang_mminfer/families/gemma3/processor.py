"""SGLang's processor of Gemma 3, mended."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_mminfer.mends import verbatim
from sglang_mminfer.mends.token_ids import Piece


@functools.cache
def processor_class(base: Any) -> type:
    """SGLang's class `base` with the mend."""

    class MMInferGemma3Processor(base):
        """Gemma 3 with a picture for each placeholder, and pictures that are recognised in ids."""

        def _names(self) -> tuple[str, str, str]:
            """The tokens that open a picture, fill it, and close it."""
            tokenizer = self._tokenizer
            return tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token

        @property
        def media_tokens(self) -> Mapping[int, tuple[str, ...]]:
            """SGLang's class names the token that fills a picture, and a prompt has the one that opens it."""
            opens, fills, closes = map(self._tokenizer.convert_tokens_to_ids, self._names())
            return {opens: ("image",), fills: (), closes: ()}

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            """A token that fills a picture counts as one, because the processor fills pictures itself."""
            opens, fills, _ = self._names()
            return {"image": prompt.count(opens) + prompt.count(fills)}

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """The pieces with one placeholder for each medium, if a client sent back the ids of an answer."""
            return collapsed(pieces, *self._names(), int(self.hf_config.mm_tokens_per_image))

    return MMInferGemma3Processor


def collapsed(pieces: Sequence[Piece], opens: str, fills: str, closes: str, tokens: int) -> list[Piece]:
    """The pieces of a prompt with one placeholder for each picture of `tokens` tokens.

    The processor writes an empty line on either side of a picture. It is in the ids already, so here it is left out.
    """
    picture = [opens, *[fills] * tokens, closes]
    tight = Piece(name=verbatim.TIGHT)
    out: list[Piece] = []
    at = 0
    while at < len(pieces):
        if [piece.name for piece in pieces[at : at + len(picture)]] == picture:
            out += (tight, Piece(name=opens), tight)
            at += len(picture)
        else:
            out.append(pieces[at])
            at += 1
    return out
