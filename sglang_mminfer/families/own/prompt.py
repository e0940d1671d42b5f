"""Turns a prompt with `<image>` and `<video>` in it into token ids, and says where each medium's tokens stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sglang_mminfer.modality.items import KEY, Place, fresh_numbers

IMAGE, VIDEO = "<image>", "<video>"
_PLACEHOLDER = re.compile(f"({re.escape(IMAGE)}|{re.escape(VIDEO)})")


@dataclass(frozen=True)
class Raster:
    """One frame, clip or view, which the language model sees as `rows * cols + tail` tokens.

    Attributes:
        pixels: uint8, in the shape that the family's encoder takes.
        rows, cols: the shape of the raster, newline column included; (1, n) for n tokens without rows and columns.
        tail: tokens behind the raster that have no cell.
        separator: text behind the raster, tokenized by itself.
        values: further numbers that the family's encoder reads.
    """

    pixels: torch.Tensor
    rows: int
    cols: int
    tail: int = 0
    separator: str = ""
    values: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.rows * self.cols + self.tail


@dataclass(frozen=True)
class Medium:
    """A picture or a video as rasters of one shape in a row, and the text that its processor adds behind it."""

    kind: Literal["image", "video"]
    rasters: Sequence[Raster]
    text: str = ""


@dataclass(frozen=True)
class Placed:
    """A raster at tokens [start, start + raster.tokens) of the prompt, number `frame` of the `frames` of its medium."""

    raster: Raster
    kind: Literal["image", "video"]
    start: int
    medium: int
    frame: int
    frames: int

    def data(self) -> dict[str, Any]:
        """The item's `model_specific_data`: what the map and the family's encoder read."""
        raster = self.raster
        place = Place(self.medium, self.frame, self.frames, raster.rows, raster.cols, raster.tail)
        return {KEY: [tuple(place)], **raster.values}


def fill_id(config: Any, tokenizer: Any) -> int:
    """The id of media tokens: the model's own if the vocabulary has it, else the padding or end-of-sequence token.

    The id is never embedded, but SGLang wants ids of the vocabulary, and some of these models name one outside it.

    Raises:
        ValueError: if the vocabulary has none of them.
    """
    vocabulary = config.text_config.vocab_size
    for candidate in (getattr(config, "image_token_index", None), tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and 0 <= candidate < vocabulary:
            return int(candidate)
    raise ValueError(f"the tokenizer has no padding token within the model's vocabulary of {vocabulary}")


def split(text: str, images: int, videos: int) -> list[str]:
    """The prompt in pieces: text, and `IMAGE` or `VIDEO` where a medium belongs.

    Raises:
        ValueError: if there is not one placeholder for each medium.
    """
    pieces = [piece for piece in _PLACEHOLDER.split(text) if piece]
    for placeholder, given in ((IMAGE, images), (VIDEO, videos)):
        found = pieces.count(placeholder)
        if found != given:
            raise ValueError(
                f"prompt: expected one {placeholder} for each of the {given} given, found {found} "
                f"(the words {IMAGE} and {VIDEO} stand for media and cannot be part of a text that comes with some)"
            )
    return pieces


def lay_out(
    pieces: Sequence[str | Medium], encode: Callable[[str], list[int]], fill: int
) -> tuple[list[int], list[Placed]]:
    """Token ids of the whole prompt, and every raster in it.

    Args:
        pieces: text and media in the order of the prompt.
        encode: turns text into ids, and adds no special tokens.
        fill: the id of media tokens.
    """
    ids: list[int] = []
    placed: list[Placed] = []
    numbers = iter(fresh_numbers(len(pieces)))
    for run in _runs(pieces):
        if isinstance(run, str):
            ids.extend(encode(run))
            continue
        medium = next(numbers)
        for frame, raster in enumerate(run.rasters):
            placed.append(Placed(raster, run.kind, len(ids), medium, frame, len(run.rasters)))
            ids.extend([fill] * raster.tokens)
            if raster.separator:
                ids.extend(encode(raster.separator))
    return ids, placed


def _runs(pieces: Sequence[str | Medium]) -> Iterator[str | Medium]:
    """Joins text between media, a medium's own text included, so that it is tokenized in one go."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        yield piece
        text = piece.text
    if text:
        yield text
