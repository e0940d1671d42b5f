"""Needles that a real vision-language model can read: cards with a sentence, over the same smooth haystack.

A card says "The secret number of ANCHOR is 4217"; a relay says "... is the same as that of RIVER". `placed` or `task`
make the conversation; here its sixteen keys become sixteen words, and each digit becomes a number of four digits.
Every part is shown at a size that real models are used to, and keeps about its number of tokens (in Qwen2.5-VL).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang_mminfer.tools.media import Scene, write_video
from sglang_mminfer.tools.needles.glyphs import KEYS
from sglang_mminfer.tools.needles.media_files import FPS
from sglang_mminfer.tools.needles.pictures import TILE_CELLS
from sglang_mminfer.tools.needles.sequence import hay_text
from sglang_mminfer.tools.needles.task import Conversation, Needle, Part

WIDTH, HEIGHT = 448, 252
ROWS, COLUMNS = HEIGHT // 28, WIDTH // 28
"""Rows and columns of tokens of a pair of frames, in Qwen2-VL and its successors."""
STRIPS = 3
"""How many cards fit in a frame, one below the other."""

WORDS = dict(
    zip(
        KEYS,
        [
            "ANCHOR",
            "BRIDGE",
            "CASTLE",
            "DRAGON",
            "EAGLE",
            "FOREST",
            "GUITAR",
            "HAMMER",
            "ISLAND",
            "JUNGLE",
            "KETTLE",
            "LADDER",
            "MARKET",
            "NEEDLE",
            "OCEAN",
            "PEPPER",
        ],
    )
)

MM_PROCESS_CONFIG: dict[str, dict[str, Any]] = {
    "video": {"min_pixels": WIDTH * HEIGHT - 28 * 28, "max_pixels": WIDTH * HEIGHT, "fps": FPS, "max_frames": 8192}
}
"""The server's --mm-process-config with which the model sees every frame of a file, at its own size."""


def pairs_of(part: Part) -> int:
    """How many pairs of frames a video gets: fewer than with the small frames of `task`, for as many tokens."""
    return max(1, round(part.size * TILE_CELLS / (ROWS * COLUMNS)))


def numbers_of(conversation: Conversation) -> dict[str, str]:
    """Key -> a number of four digits. A relay has the number of the needle that it names; all other numbers differ."""
    random = np.random.default_rng((conversation.parts[0].seed, len(conversation.needles), 0xCA2D))
    drawn = iter(random.choice(np.arange(1000, 10000), len(conversation.needles), replace=False))
    numbers: dict[str, str] = {}
    for needle in conversation.needles:
        numbers[needle.key] = numbers[needle.same_as] if needle.same_as else str(next(drawn))
    return numbers


def sentence(needle: Needle, numbers: dict[str, str]) -> tuple[str, str]:
    """The two lines of a card."""
    value = f"the same as that of {WORDS[needle.same_as]}" if needle.same_as else numbers[needle.key]
    return f"The secret number of {WORDS[needle.key]}", f"is {value}."


def question(key: str) -> str:
    return (
        f"What is the secret number of {WORDS[key]}? If it was said to be the same as that of another word, give that "
        "one's number. Answer with the four digits only."
    )


def is_right(expected: str, answer: str) -> bool:
    """Whether the answer names the expected number, and no other number of four digits."""
    return set(re.findall(r"(?<!\d)\d{4}(?!\d)", re.sub(r"(?<=\d)[,\s](?=\d{3})", "", answer))) == {expected}


def draw_card(lines: tuple[str, str]) -> np.ndarray:
    """uint8 [HEIGHT / STRIPS, WIDTH, 3]: two lines of dark text on a bright plate, as large as they fit."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (WIDTH, HEIGHT // STRIPS), (250, 246, 225))
    pen = ImageDraw.Draw(picture)
    size = 32
    while max(pen.textlength(line, font=ImageFont.load_default(size)) for line in lines) > WIDTH - 16:
        size -= 1
    for i, line in enumerate(lines):
        pen.text(
            (WIDTH / 2, (0.28 + 0.44 * i) * picture.height), line, (20, 20, 40), ImageFont.load_default(size), "mm"
        )
    return np.asarray(picture)


def frames_of(part: Part, numbers: dict[str, str]) -> np.ndarray:
    """The frames of an image or a video: uint8 [frames, HEIGHT, WIDTH, 3]. A card lasts for a pair of frames.

    Raises:
        ValueError: the part is too short for its cards.
    """
    pairs = pairs_of(part) if part.kind == "video" else 1
    scene = Scene(WIDTH, HEIGHT, part.seed)
    frames = np.stack([scene.frame(i / FPS) for i in range(2 * pairs)])
    free_spots = {(pair, strip) for pair in range(pairs) for strip in range(STRIPS)}
    if len(part.needles) > len(free_spots):
        raise ValueError(f"a {part.kind} of {pairs} pairs of frames has no room for {len(part.needles)} cards")
    for needle in part.needles:
        wanted_spot = (
            needle.slot[0] * pairs // max(part.size, 1) if part.kind == "video" else 0,
            needle.slot[1] % STRIPS,
        )
        pair, strip = min(
            free_spots, key=lambda spot: (abs(spot[0] - wanted_spot[0]), abs(spot[1] - wanted_spot[1]), spot)
        )
        free_spots.remove((pair, strip))
        top = strip * (HEIGHT // STRIPS)
        frames[2 * pair : 2 * pair + 2, top : top + HEIGHT // STRIPS] = draw_card(sentence(needle, numbers))
    return frames[:1] if part.kind == "image" else frames


def text_of(part: Part, numbers: dict[str, str]) -> str:
    """The text of a text part: words of haystack with the sentences of the needles between them."""
    words = hay_text(replace(part, needles=[]))
    for needle in part.needles:
        words[needle.slot[0]] = " ".join(sentence(needle, numbers))
    return " ".join(words)


def messages(conversation: Conversation, folder: str | os.PathLike[str], name: str = "cards") -> list[dict[str, Any]]:
    """All turns as OpenAI messages, with the right answers between them, as in `media_files.messages`."""
    from PIL import Image

    numbers = numbers_of(conversation)
    chat: list[dict[str, Any]] = []
    for i, turn in enumerate(conversation.turns):
        content: list[dict[str, Any]] = []
        for j, part in enumerate(turn.parts):
            if part.kind == "text":
                content.append({"type": "text", "text": text_of(part, numbers)})
                continue
            target = Path(folder) / f"{name}-{i}-{j}.{'png' if part.kind == 'image' else 'mp4'}"
            target.parent.mkdir(parents=True, exist_ok=True)
            frames = frames_of(part, numbers)
            if part.kind == "image":
                Image.fromarray(frames[0]).save(target)
            else:
                write_video(target, frames, WIDTH, HEIGHT, FPS)
            content.append({"type": f"{part.kind}_url", f"{part.kind}_url": {"url": os.fspath(target.resolve())}})
        content.append({"type": "text", "text": question(turn.question)})
        chat.append({"role": "user", "content": content})
        chat.append({"role": "assistant", "content": numbers[turn.question]})
    return chat
