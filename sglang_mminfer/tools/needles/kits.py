"""Two ways to show the same conversation: `glyphs` for the shipped needle models, `cards` for real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_mminfer.modality.segments import Modality, ModalityMap, Segment, VisionGrid
from sglang_mminfer.tools.needles import cards, media_files, pictures
from sglang_mminfer.tools.needles.glyphs import CELL
from sglang_mminfer.tools.needles.task import NEEDLE_WORDS, Conversation, Part

EVALUATION_BANK = 1001
"""The seed of the signs' drawings: not those that the shipped models were trained with."""


@dataclass(frozen=True)
class Kit:
    """How needles are shown to a model, and when its answer is right."""

    name: str
    messages: Callable[[Conversation, Path, str], list[dict[str, Any]]]
    """(conversation, folder for media, prefix of their names) -> OpenAI messages, right answers between them."""
    is_right: Callable[[str, str], bool]
    """(right answer, the model's answer) -> whether the latter is right."""
    raster: Callable[[Part], tuple[int, int, int]]
    """An image or a video -> (pairs of frames, rows, columns), rows and columns in tokens."""
    mm_process_config: dict[str, dict[str, Any]]
    """The server's --mm-process-config with which the model sees every frame."""
    max_tokens: int
    """How many tokens an answer may have."""


def _glyph_messages(conversation: Conversation, folder: Path, name: str) -> list[dict[str, Any]]:
    return media_files.messages(conversation, folder, name, EVALUATION_BANK)


def _glyph_raster(part: Part) -> tuple[int, int, int]:
    side = (part.size if part.kind == "image" else pictures.TILE) // CELL
    return (part.size if part.kind == "video" else 1), side, side


def _card_raster(part: Part) -> tuple[int, int, int]:
    return (cards.pairs_of(part) if part.kind == "video" else 1), cards.ROWS, cards.COLUMNS


GLYPHS = Kit(
    "glyphs",
    _glyph_messages,
    lambda expected, answer: answer.strip() == expected,
    _glyph_raster,
    media_files.MM_PROCESS_CONFIG,
    2,
)
CARDS = Kit("cards", cards.messages, cards.is_right, _card_raster, cards.MM_PROCESS_CONFIG, 48)
KITS = {kit.name: kit for kit in (GLYPHS, CARDS)}


def knows_glyphs(model: str) -> bool:
    """Whether `model` is the folder of a shipped needle model, whose tokenizer has words for needles."""
    tokenizer = Path(model) / "tokenizer.json"
    if not tokenizer.is_file():
        return False
    return f'"{NEEDLE_WORDS[-1]}"' in tokenizer.read_text(encoding="utf-8", errors="replace")


def prompt_map(conversation: Conversation, kit: Kit) -> ModalityMap:
    """The modality map of the whole conversation, for any tokenizer: exact but for a few tokens of chat template."""
    segments: list[Segment] = []
    pending_text, position = 14, 14  # the system prompt; these tokens are not in a segment yet

    def close_text() -> None:
        nonlocal pending_text
        if pending_text:
            segments.append(Segment(Modality.TEXT, position - pending_text, position))
        pending_text = 0

    for turn in conversation.turns:
        for part in turn.parts:
            if part.kind == "text":
                pending_text, position = pending_text + part.size, position + part.size
                continue
            pending_text, position = pending_text + 1, position + 1  # the start token of vision
            close_text()
            pairs, rows, columns = kit.raster(part)
            stop = position + pairs * rows * columns
            grid = VisionGrid(pairs, rows, columns, tuple(range(position, stop, rows * columns)))
            segments.append(Segment(Modality(part.kind), position, stop, grid))
            pending_text, position = 1, stop + 1
        pending_text, position = (
            pending_text + 12,
            position + 12,
        )  # the question, the answer, and the template's tokens around them
    close_text()
    return ModalityMap(segments)
