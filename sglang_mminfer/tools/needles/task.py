"""Conversations with needles: what each turn shows, what it asks, and the right answer.

A needle has a key (a letter) and a digit. A question is a key, and the answer is the key's digit. A plain needle shows
its digit. A relay shows the key of a plain needle before it, in the same turn or an earlier one, and has the digit of
that needle: "the same as needle B". So the relay's row must have read the earlier needle.

* `video_conversation`: videos only (V-NIAH).
* `mixed_conversation`: text, images and videos over several turns, a quarter of the tokens text (MM-NIAH). In text a
  needle is one word, "A7" or the relay "A=B"; in images and videos it is one card (`glyphs`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sglang_mminfer.tools.needles.glyphs import CELL, DIGITS, KEYS
from sglang_mminfer.tools.needles.pictures import TILE, TILE_CELLS

NEEDLE_WORDS = [f"{key}{digit}" for key in KEYS for digit in DIGITS] + [
    f"{key}={other}" for key in KEYS for other in KEYS if key != other
]

_WORDS = """
above after apple arrow autumn basket bear bell bird boat book bottle branch bread bridge bright broad brown brush
cake calm candle card castle chair child circle clay cloud coal coat corner cotton curtain dance deep desk door
dream drum dust early earth east evening fair farm feather field fire fish flame floor flower forest friend garden
gate glass gold grain grass green half hammer harbour heart hill home honey horn house island jar jump kettle kind
kite ladder lake lamp leaf lemon light line lion long market meadow mirror moon morning mountain music narrow nest
night north oak ocean open orange paper path pearl pencil piano plain plant pocket quiet rabbit rain river road roof
root rope round sail salt sand school seed shade sheep ship shore silver sky sleep small snow soap song south spoon
spring star stone storm street summer sun table tall tea thin tiger tower town tree tunnel valley violin wall warm
water wave west wheel white wide wind window winter wood yellow
"""
HAY_WORDS = _WORDS.split()


@dataclass
class Needle:
    """A key and its digit, hidden in a part."""

    key: str
    digit: str
    """The right answer; a plain needle shows it, a relay does not."""
    same_as: str | None = None
    """The key of another needle, which a relay shows instead of its digit."""
    slot: tuple[int, int] = (0, 0)
    """The place in the part: (word, 0) in a text, (pair of frames, cell) in an image or a video."""

    @property
    def shown(self) -> str:
        return self.same_as or self.digit

    @property
    def word(self) -> str:
        return f"{self.key}={self.same_as}" if self.same_as else f"{self.key}{self.digit}"


@dataclass
class Part:
    """A text, an image or a video."""

    kind: Literal["text", "image", "video"]
    size: int
    """The words of a text, the pairs of frames of a video, or the side of an image in pixels."""
    seed: int = 0
    interval: float = 1.0
    """Seconds between pairs of frames of a video."""
    needles: list[Needle] = field(default_factory=list)

    @property
    def side(self) -> int:
        return self.size if self.kind == "image" else TILE

    @property
    def tokens(self) -> int:
        """Tokens of the content, without the vision start and end tokens around it."""
        if self.kind == "text":
            return self.size
        return (self.side // CELL) ** 2 * (self.size if self.kind == "video" else 1)


@dataclass
class Turn:
    """What one message shows and asks."""

    parts: list[Part]
    question: str = ""
    answer: str = ""
    relay: bool = False
    """Whether the question is about a relay."""


@dataclass
class Conversation:
    """All turns, with questions and right answers."""

    turns: list[Turn]

    @property
    def parts(self) -> list[Part]:
        return [part for turn in self.turns for part in turn.parts]

    @property
    def needles(self) -> list[Needle]:
        """All needles in the order of the conversation."""
        return [needle for part in self.parts for needle in part.needles]


def video_conversation(
    pairs: int,
    needles: int,
    random: np.random.Generator,
    *,
    relays: float = 0.4,
    videos: int | None = None,
    interval: float | tuple[float, float] = 1.0,
    questions: int | None = None,
) -> Conversation:
    """A conversation about videos with `pairs` pairs of frames (16 tokens each) in all.

    Args:
        relays: the share of relays among the needles after the first.
        videos: how many videos, each in a turn of its own; None: one, sometimes two.
        interval: seconds between pairs of frames, 1 in files of 2 frames per second. Or a range from which each video
            draws its interval, so that short videos reach the positions of long ones.
        questions: how many needles are asked for; None: every needle.
    """
    count = videos or (2 if pairs >= 4 and random.random() < 0.25 else 1)
    cuts = sorted(random.choice(np.arange(1, pairs), count - 1, replace=False)) if count > 1 else []
    sizes = np.diff([0, *cuts, pairs])
    turns = [Turn([_video(int(size), random, interval)]) for size in sizes]
    return _ask(turns, needles, relays, questions, random)


def mixed_conversation(
    pairs: int,
    needles: int,
    random: np.random.Generator,
    *,
    relays: float = 0.4,
    turns: int | None = None,
    interval: float | tuple[float, float] = 1.0,
    questions: int | None = None,
) -> Conversation:
    """Text, images and videos of about 16 * `pairs` tokens in all, a quarter of them text, over `turns` turns.

    The other arguments are those of `video_conversation`.
    """
    tokens = 16 * pairs
    if tokens < 64:
        kind = random.choice(["text", "image", "video"])
        if kind == "text":
            part = _text(int(random.integers(8, 17)) * pairs, random)
        else:
            part = _image(TILE, random) if kind == "image" and pairs == 1 else _video(pairs, random, interval)
        return _ask([Turn([part])], needles, relays, questions, random)
    count = turns or int(random.integers(1, min(4, pairs // 4) + 1))
    all_turns = []
    for _ in range(count):
        budget = tokens // count
        pictures = max(1, round(budget * 0.75 / 16))
        parts = [_text(max(4, budget // 4), random)]
        if pictures >= 4 and random.random() < 0.7:
            for _ in range(int(random.integers(1, max(2, min(4, pictures // 4))))):
                side = 2 * TILE if pictures >= 8 and random.random() < 0.6 else TILE
                pictures -= (side // TILE) ** 2
                parts.append(_image(side, random))
        if pictures > 0:
            parts.append(_video(pictures, random, interval))
        random.shuffle(parts)
        all_turns.append(Turn(parts))
    return _ask(all_turns, needles, relays, questions, random)


def _video(pairs: int, random: np.random.Generator, interval: float | tuple[float, float]) -> Part:
    low, high = interval if isinstance(interval, tuple) else (interval, interval)
    spacing = low * (high / low) ** random.random()
    return Part("video", pairs, int(random.integers(1 << 31)), float(spacing))


def _image(side: int, random: np.random.Generator) -> Part:
    return Part("image", side, int(random.integers(1 << 31)))


def _text(words: int, random: np.random.Generator) -> Part:
    return Part("text", words, int(random.integers(1 << 31)))


def _slot(part: Part, random: np.random.Generator) -> tuple[int, int]:
    if part.kind == "text":
        return int(random.integers(1, part.size)), 0  # never the first word, whose space belongs to the line break
    if part.kind == "image":
        return 0, int(random.integers((part.side // CELL) ** 2))
    return int(random.integers(part.size)), int(random.integers(TILE_CELLS))


def _ask(
    turns: list[Turn], needles: int, relays: float, questions: int | None, random: np.random.Generator
) -> Conversation:
    """Put needles into the parts and ask for them, each in the turn that shows the needle or in a later one."""
    parts = [part for turn in turns for part in turn.parts]
    index_of = {id(part): i for i, part in enumerate(parts)}
    slots: set[tuple[int, tuple[int, int]]] = set()
    while len(slots) < min(needles, len(KEYS)):
        # The first needle is in the first turn, so that every turn has something to ask for.
        candidates = parts if slots else turns[0].parts
        kinds = sorted({part.kind for part in candidates})
        kind = kinds[random.integers(len(kinds))]
        parts_of_kind = [part for part in candidates if part.kind == kind]
        weight = np.array([part.tokens for part in parts_of_kind], float)
        part = parts_of_kind[random.choice(len(parts_of_kind), p=weight / weight.sum())]
        slots.add((index_of[id(part)], _slot(part, random)))
    keys = [KEYS[i] for i in random.permutation(len(KEYS))]
    plain: list[Needle] = []
    for part_index, slot in sorted(slots):
        needle = Needle(keys.pop(), DIGITS[random.integers(10)], slot=slot)
        if plain and random.random() < relays:
            named = plain[random.integers(len(plain))]
            needle.digit, needle.same_as = named.digit, named.key
        else:
            plain.append(needle)
        parts[part_index].needles.append(needle)
    asked: list[list[Needle]] = []
    all_needles: list[Needle] = []
    for turn in turns:
        all_needles += [needle for part in turn.parts for needle in part.needles]
        asked.append([])
    order = [all_needles[i] for i in random.permutation(len(all_needles))][: questions or None]
    shown_by = {needle.key: i for i, turn in enumerate(turns) for part in turn.parts for needle in part.needles}
    for needle in order:
        asked[int(random.integers(shown_by[needle.key], len(turns)))].append(needle)
    asking_turns: list[Turn] = []
    for i, turn in enumerate(turns):
        shown_needles = [needle for needle in all_needles if shown_by[needle.key] <= i]
        # Every turn that shows something asks a question, if need be one that was asked before.
        for j, needle in enumerate(asked[i] or [shown_needles[random.integers(len(shown_needles))]]):
            asking_turns.append(
                Turn(turn.parts if j == 0 else [], needle.key, needle.digit, needle.same_as is not None)
            )
    return Conversation(asking_turns)
