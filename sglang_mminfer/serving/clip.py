"""The built-in clip: a conversation that every server can make, from which the basis of a model's heads comes.

It shows what conversations show: a video with a cut, in which shapes drift over textures, pictures with words in them,
prose, numbers, code and a few languages. It is the same for every start, and holds no user's data.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sglang_mminfer.serving.scene import Scene

VERSION = 1
"""To be raised with every change of what the clip shows, so that no cache has the basis of another one."""

SIDE = 448
SECONDS_OF_A_SHOT = 6

PROSE = """The harbour was quiet when the first boat came in. A man in a red coat stood at the end of the pier and
counted the crates: twelve of oranges, seven of salt, and one that nobody had asked for. Behind him two children chased
a white dog around the lamp post, past the green door, and back to the water. Nothing moved on the far side of the bay
except a thin line of smoke above the trees. "Is that the train?" asked the smaller one. It was not. The train
had left at half past six, and it would not return before Thursday.

By noon the clouds had grown dark at the edges. Someone closed the shutters of the bakery, first the left one, then the
right one, and hung a card in the window. The man in the red coat read it twice. He took a pencil from his pocket, wrote
a number on the last crate, and drew a circle around it."""

TABLE = """item, count, price, total
oranges, 12, 3.50, 42.00
salt, 7, 1.25, 8.75
rope (20 m), 3, 14.90, 44.70
lamp oil, 24, 0.80, 19.20
sum, 46, , 114.65"""

CODE = """def total(rows):
    \"\"\"Add up the last column; a row without a number counts as 0.\"\"\"
    result = 0.0
    for name, *fields in rows:
        value = fields[-1] if fields else ""
        result += float(value) if value else 0.0
    return round(result, 2)

assert total([("oranges", "42.00"), ("salt", "8.75")]) == 50.75"""

LANGUAGES = """Le bateau est arrivé ce matin. Der Hafen war still, und niemand sprach. El perro blanco corre por el
muelle. 船は朝に着いた。桟橋の端に赤い上着の男が立っていた。港口很安静,孩子们在追一只白色的狗。Лодка пришла утром."""

QUESTIONS = (
    "Describe what moves in the video, where it starts and where it goes, second by second.",
    "What is written in the picture? Which shapes touch each other, and which colour is the largest one?",
    "Compare the picture with the last second of the video. What has changed?",
    "Sum up all of the above: what was seen first, what came last, and which number was in the circle?",
)


@dataclass(frozen=True)
class Size:
    """How much of the clip is sent. frames: of the video, one a second; 0: no video. words: whether prose, table, code
    and languages come with it."""

    frames: int
    pictures: int
    words: bool


SIZES = (Size(12, 2, True), Size(4, 1, True), Size(0, 2, True), Size(0, 1, False))
"""In the order in which they are tried: a model may take no video, no second picture, or no prompt so long."""


def messages(size: Size) -> list[dict[str, Any]]:
    """The clip as OpenAI messages with everything in them."""
    content: list[dict[str, Any]] = []
    if size.words:
        content.append(_text(PROSE))
    if size.frames:
        frames = ",".join(_encoded(_shot(i)) for i in range(size.frames))
        url = f"data:video/jpeg;base64,{frames}"
        content += [_medium("video_url", url), _text(QUESTIONS[0])]
    for number, words in zip(range(size.pictures), (TABLE, CODE)):
        url = f"data:image/jpeg;base64,{_encoded(_page(number))}"
        content += [_medium("image_url", url), _text(QUESTIONS[1 + number])]
        if size.words:
            content.append(_text(words))
    if size.words:
        content += [_text(LANGUAGES), _text(QUESTIONS[3])]
    return [{"role": "user", "content": content}]


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def _medium(kind: str, url: str) -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


def _shot(second: int) -> np.ndarray:
    """A frame of the video: uint8 [SIDE, SIDE, 3]. Every few seconds another scene begins."""
    seed, seconds = divmod(second, SECONDS_OF_A_SHOT)
    return _with_words(_textured(_scene(seed).frame(seconds), seconds, seed), [f"{second} s"])


def _page(number: int) -> np.ndarray:
    """A picture with words: uint8 [SIDE, SIDE, 3]."""
    return _with_words(_textured(_scene(10 + number).frame(1.0), 1.0, 10 + number), (TABLE, CODE)[number].splitlines())


@cache
def _scene(seed: int) -> Scene:
    return Scene(SIDE, SIDE, seed)


def _textured(picture: np.ndarray, seconds: float, seed: int) -> np.ndarray:
    """The picture with waves that move, a board of squares that stands still, and a little noise."""
    draw = np.random.default_rng([seed, round(1000 * seconds)])
    still = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    texture = np.zeros((SIDE, SIDE))
    for frequency in (4, 11, 29):
        angle, phase = still.uniform(0, np.pi), still.uniform(0, 2 * np.pi)
        along = x * np.cos(angle) + y * np.sin(angle)
        texture += 12 * np.sin(2 * np.pi * frequency * along + phase + seconds)
    corner = still.uniform(0.1, 0.6, 2)
    board = (np.abs(x - corner[0]) < 0.15) & (np.abs(y - corner[1]) < 0.15)
    texture += np.where(board, 60 * (((16 * x).astype(int) + (16 * y).astype(int)) % 2) - 30, 0)
    texture += draw.normal(0, 4, (SIDE, SIDE))
    return np.clip(picture + texture[..., None], 0, 255).astype(np.uint8)


def _with_words(picture: np.ndarray, lines: list[str]) -> np.ndarray:
    from PIL import Image, ImageDraw

    drawn = Image.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    for number, line in enumerate(lines):
        pen.text((20, 20 + 22 * number), line, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(drawn)


def _encoded(picture: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()
