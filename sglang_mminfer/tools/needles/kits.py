"""Two ways to show the same conversation: `glyphs` for the shipped needle models, `cards` for real ones."""

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
"""Other drawings of the signs than the shipped models were trained with."""


@dataclass(frozen=True)
class Kit:
    """How needles are shown to a model, and when its answer is right."""

    name: str
    messages: Callable[[Conversation, Path, str], list[dict[str, Any]]]
    """(conversation, folder for media, beginning of their names) -> OpenAI messages, right answers between them."""
    is_right: Callable[[str, str], bool]
    """(right answer, what the model said)"""
    raster: Callable[[Part], tuple[int, int, int]]
    """Pairs of frames, rows and columns, in tokens, of an image or a video."""
    mm_process_config: dict[str, dict[str, Any]]
    max_tokens: int


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
    lambda expected, said: said.strip() == expected,
    _glyph_raster,
    media_files.MM_PROCESS_CONFIG,
    2,
)
CARDS = Kit("cards", cards.messages, cards.is_right, _card_raster, cards.MM_PROCESS_CONFIG, 48)
KITS = {kit.name: kit for kit in (GLYPHS, CARDS)}


def knows_glyphs(model: str) -> bool:
    """True if `model` is the folder of a shipped needle model: its tokenizer has words for needles."""
    tokenizer = Path(model) / "tokenizer.json"
    if not tokenizer.is_file():
        return False
    return f'"{NEEDLE_WORDS[-1]}"' in tokenizer.read_text(encoding="utf-8", errors="replace")


def prompt_map(conversation: Conversation, kit: Kit) -> ModalityMap:
    """The modality map of the whole conversation, right to a few tokens of chat template, for any tokenizer."""
    segments: list[Segment] = []
    text, at = 14, 14  # the system prompt; tokens of text that wait for their segment

    def close() -> None:
        nonlocal text
        if text:
            segments.append(Segment(Modality.TEXT, at - text, at))
        text = 0

    for turn in conversation.turns:
        for part in turn.parts:
            if part.kind == "text":
                text, at = text + part.size, at + part.size
                continue
            text, at = text + 1, at + 1  # the brackets around it
            close()
            pairs, rows, columns = kit.raster(part)
            stop = at + pairs * rows * columns
            grid = VisionGrid(pairs, rows, columns, tuple(range(at, stop, rows * columns)))
            segments.append(Segment(Modality(part.kind), at, stop, grid))
            text, at = 1, stop + 1
        text, at = text + 12, at + 12  # the question, its answer and what the template says around them
    close()
    return ModalityMap(segments)
