"""A conversation as the language model gets it: token ids, m-RoPE positions, pixels, and the places of the answers.

Training, and evaluation in this process, need no files and no chat template: this module builds the model's inputs
directly. A test checks that they equal the inputs that the checkpoint's processor makes of `media_files.messages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sglang_mminfer.tools.needles.glyphs import CELL, DIGITS, KEYS, SYMBOLS, draw_card
from sglang_mminfer.tools.needles.pictures import MEAN, STD, TILE, TILE_CELLS, blurred, card_patches, haystack, patches
from sglang_mminfer.tools.needles.task import HAY_WORDS, Conversation, Part

TOKENS_PER_SECOND = 2

Hay = Callable[[Part], np.ndarray]
"""A picture or video -> its windows without needles, uint8 [windows, 64, 1176]."""


def drawn_hay(part: Part) -> np.ndarray:
    """The windows of an image or a video without needles, drawn as for files, which have 2 frames per second."""
    if part.kind == "image":
        return patches(np.repeat(haystack(1, part.side, part.seed), 2, axis=0))
    return patches(haystack(2 * part.size, part.side, part.seed))


class Vocabulary:
    """The token ids of all building blocks of a conversation."""

    def __init__(self, tokenizer: Any) -> None:
        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        def token_id(token: str) -> int:
            return int(tokenizer.convert_tokens_to_ids(token))

        self.start = encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
        self.user = encode("<|im_start|>user\n")
        self.ask = encode("<|im_end|>\n<|im_start|>assistant\n")
        self.done = encode("<|im_end|>\n")
        self.line = encode("\n")
        self.vision_start, self.vision_end = token_id("<|vision_start|>"), token_id("<|vision_end|>")
        self.image_pad, self.video_pad = token_id("<|image_pad|>"), token_id("<|video_pad|>")
        self.key = {key: encode(key)[0] for key in KEYS}
        self.digit = {digit: encode(digit)[0] for digit in DIGITS}
        self.hay = np.array([encode(f" {word}")[0] for word in HAY_WORDS])
        self.pad = token_id("<|endoftext|>")
        self._token_id = token_id

    def needle(self, word: str) -> int:
        return self._token_id(word)


@dataclass
class Sequence:
    """One conversation, answers included: a causal model answers all questions in one pass."""

    ids: np.ndarray
    positions: np.ndarray
    """int64 [3, tokens]: time, row and column by the rule of m-RoPE; text continues after the highest position."""
    windows: np.ndarray
    """uint8 [windows, 64, 1176]: the patches of each window."""
    corners: np.ndarray
    """int64 [windows, 2]: row and column of a window's first patch in its picture."""
    vision: np.ndarray
    """int64 [windows * 16]: the token of each cell, window by window."""
    answers: np.ndarray
    """int64 [questions, 4]: the key's token in the question, the token before the answer, the digit, 1 for a relay."""
    needles: np.ndarray
    """int64 [needles, 5]: token, left sign, right sign (both as indices into SYMBOLS), digit, 1 for a relay."""
    carded: np.ndarray
    """bool [windows]: whether a card is in the window."""


def hay_text(part: Part) -> list[str]:
    """The words of a text part, needles included."""
    words = [HAY_WORDS[i] for i in _hay_words(part)]
    for needle in part.needles:
        words[needle.slot[0]] = needle.word
    return words


def _hay_words(part: Part) -> np.ndarray:
    return np.random.default_rng(part.seed).integers(len(HAY_WORDS), size=part.size)


def build(
    conversation: Conversation,
    vocabulary: Vocabulary,
    hay: Hay = drawn_hay,
    random: np.random.Generator | None = None,
    bank_seed: int = 0,
) -> Sequence:
    """Lay out a conversation as the chat template, the processor and the rule of m-RoPE do.

    Args:
        hay: draws pictures without needles.
        random: draws the variants of cards and the losses of a codec. None: the part's seed draws the variants, and
            there are no losses.
        bank_seed: the seed of the signs' drawings.
    """
    ids: list[int] = list(vocabulary.start)
    spans: list[tuple[int, Part]] = []
    answers: list[tuple[int, int, int, int]] = []
    needles: list[tuple[int, int, int, int, int]] = []
    windows: list[np.ndarray] = []
    corners: list[np.ndarray] = []
    vision: list[np.ndarray] = []
    carded: list[np.ndarray] = []
    for turn in conversation.turns:
        ids += vocabulary.user
        for part in turn.parts:
            first = len(ids)
            if part.kind == "text":
                ids += vocabulary.hay[_hay_words(part)].tolist()
                for needle in part.needles:
                    ids[first + needle.slot[0]] = vocabulary.needle(needle.word)
                needle_tokens = [first + needle.slot[0] for needle in part.needles]
            else:
                ids.append(vocabulary.vision_start)
                spans.append((len(ids), part))
                picture, corner, cell_tokens, cards = _vision(part, len(ids), hay, random, bank_seed)
                ids += [vocabulary.image_pad if part.kind == "image" else vocabulary.video_pad] * part.tokens
                ids.append(vocabulary.vision_end)
                cells = (part.side // CELL) ** 2
                needle_tokens = [first + 1 + needle.slot[0] * cells + needle.slot[1] for needle in part.needles]
                windows.append(picture)
                corners.append(corner)
                vision.append(cell_tokens)
                carded.append(cards)
            for token, needle in zip(needle_tokens, part.needles):
                needles.append(
                    (
                        token,
                        SYMBOLS.index(needle.key),
                        SYMBOLS.index(needle.shown),
                        int(needle.digit),
                        int(needle.same_as is not None),
                    )
                )
        if turn.parts:
            ids += vocabulary.line
        key = len(ids)
        ids += [vocabulary.key[turn.question], *vocabulary.ask]
        answers.append((key, len(ids) - 1, int(turn.answer), int(turn.relay)))
        ids += [vocabulary.digit[turn.answer], *vocabulary.done]
    return Sequence(
        np.array(ids),
        _positions(len(ids), spans),
        np.concatenate(windows) if windows else np.empty((0, 64, 1176), np.uint8),
        np.concatenate(corners) if corners else np.empty((0, 2), np.int64),
        np.concatenate(vision) if vision else np.empty(0, np.int64),
        np.array(answers),
        np.array(needles).reshape(-1, 5),
        np.concatenate(carded) if carded else np.empty(0, bool),
    )


def card_of(part: Part, index: int, bank_seed: int) -> np.ndarray:
    """The card of a part's needle; the same arguments give the same card."""
    needle = part.needles[index]
    return draw_card(needle.key, needle.shown, np.random.default_rng((part.seed, index)), bank_seed)


def _vision(
    part: Part, first: int, hay: Hay, random: np.random.Generator | None, bank_seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    picture = hay(part).copy()
    across = part.side // TILE
    per_frame = across * across
    pairs = len(picture) // per_frame
    side = part.side // CELL
    cells = TILE // CELL
    tile_row, tile_column = np.divmod(np.tile(np.arange(per_frame), pairs), across)
    cell_row, cell_column = np.divmod(np.arange(TILE_CELLS), cells)
    rows = tile_row[:, None] * cells + cell_row
    columns = tile_column[:, None] * cells + cell_column
    frame = np.repeat(np.arange(pairs), per_frame)[:, None]
    tokens = first + frame * side * side + rows * side + columns
    carded = np.zeros(len(picture), bool)
    cards = []
    card_cells = []
    for i, needle in enumerate(part.needles):
        pair, cell = needle.slot
        row, column = divmod(cell, side)
        window = pair * per_frame + row // cells * across + column // cells
        cell_in_window = row % cells * cells + column % cells
        if random is None:
            card = np.repeat(card_of(part, i, bank_seed)[None], 2, axis=0)
        else:
            card = draw_card(needle.key, needle.shown, random, bank_seed)
            card = blurred(np.repeat(card[None], 2, axis=0), random)
        cards.append(card)
        card_cells.append((window, cell_in_window))
        carded[window] = True
    if cards:
        for (window, cell_in_window), patches_of_card in zip(card_cells, card_patches(np.stack(cards))):
            picture[window, 4 * cell_in_window : 4 * cell_in_window + 4] = patches_of_card.round()
    corner = np.stack([tile_row, tile_column], 1) * (TILE // 14)
    return picture, corner, tokens.ravel(), carded


def _positions(length: int, spans: list[tuple[int, Part]]) -> np.ndarray:
    positions = np.empty((3, length), np.int64)
    token, next_position = 0, 0
    for first, part in spans:
        positions[:, token:first] = np.arange(next_position, next_position + first - token)
        next_position += first - token
        side = part.side // CELL
        pairs = part.size if part.kind == "video" else 1
        # In fp32, as in the released code: the product is truncated, so its rounding matters near whole numbers.
        time = (
            (torch.arange(pairs) * torch.tensor(part.interval if part.kind == "video" else 0.0) * TOKENS_PER_SECOND)
            .long()
            .numpy()
        )
        grid = np.stack(
            [
                np.repeat(time, side * side),
                np.tile(np.repeat(np.arange(side), side), pairs),
                np.tile(np.arange(side), side * pairs),
            ]
        )
        token = first + part.tokens
        positions[:, first:token] = grid + next_position
        next_position += int(grid.max()) + 1
    positions[:, token:] = np.arange(next_position, next_position + length - token)
    return positions


def normalized(windows: np.ndarray) -> torch.Tensor:
    """float32 [windows, 64, 1176]: pixels normalised as by the processor."""
    scale = torch.from_numpy(np.repeat(1 / (255 * STD), 2 * 14 * 14).astype(np.float32))
    shift = torch.from_numpy(np.repeat(MEAN / STD, 2 * 14 * 14).astype(np.float32))
    return torch.from_numpy(windows).float().mul_(scale).sub_(shift)
