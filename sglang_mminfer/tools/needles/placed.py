"""Conversations whose needles lie at wished depths, for a depth x length grid.

`task` draws needles at random, which is right for training; a heat map wants as many answers at every depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_mminfer.tools.needles.glyphs import CELL, DIGITS, KEYS
from sglang_mminfer.tools.needles.pictures import TILE_CELLS
from sglang_mminfer.tools.needles.task import Conversation, Needle, Part, Turn, mixed_conversation

NEEDLES = 12
"""Hidden in a conversation, asked for or not, if no more are needed: what the shipped models were trained with."""

MAX_DEPTHS = len(KEYS) // 2
"""Each relay names a needle of its own: with few that all name, the answers in a chat's history give the rest away."""
SHORTEST = 512
"""Tokens: below that so many needles have no room."""


@dataclass(frozen=True)
class Asked:
    """A question that counts: asked in `turn`, its needle in a part of `kind` at `depth` (an index)."""

    turn: int
    depth: int
    kind: str


@dataclass(frozen=True)
class Placed:
    conversation: Conversation
    asked: tuple[Asked, ...]


def video_needles(tokens: int, depths: Sequence[float], random: np.random.Generator, *, relays: bool) -> Placed:
    """V-NIAH: one video of about `tokens` tokens, a turn for each question.

    Args:
        depths: 0 (first frames) to 1 (last ones), ascending, at most MAX_DEPTHS.
        relays: the needles that are asked for show another needle's key in place of a digit; else all show their own.
    """
    video = Part("video", tokens // TILE_CELLS, int(random.integers(1 << 31)))
    return _hide([[video]], depths, random, relays)


def mixed_needles(tokens: int, depths: Sequence[float], random: np.random.Generator, *, relays: bool) -> Placed:
    """MM-NIAH: text (a quarter), images and videos of about `tokens` tokens over several turns. Depth counts tokens of
    the whole conversation; a needle is asked for in the turn that shows it, or a later one. Arguments: see above."""
    parts = mixed_conversation(tokens // TILE_CELLS, 1, random, questions=1, turns=int(random.integers(2, 5)))
    turns = [turn.parts for turn in parts.turns if turn.parts]
    for part in parts.parts:
        part.needles.clear()
    return _hide(turns, depths, random, relays)


@dataclass
class _Spot:
    part: int
    slot: tuple[int, int]
    depth: int | None = None
    """None for needles that nobody asks for."""

    @property
    def order(self) -> tuple[int, tuple[int, int]]:
        return self.part, self.slot


def _hide(turns: list[list[Part]], depths: Sequence[float], random: np.random.Generator, relays: bool) -> Placed:
    if len(depths) > MAX_DEPTHS:
        raise ValueError(f"depths: expected at most {MAX_DEPTHS}, got {len(depths)}")
    parts = [part for turn in turns for part in turn]
    spots = _spots(parts, depths, random)
    turn_of = [i for i, turn in enumerate(turns) for _ in turn]
    keys = [KEYS[i] for i in random.permutation(len(KEYS))]
    plain: list[Needle] = []  # and not yet named by a relay
    hidden: list[tuple[_Spot, Needle]] = []
    for spot in sorted(spots, key=lambda spot: spot.order):
        needle = Needle(keys.pop(), DIGITS[random.integers(10)], slot=spot.slot)
        if relays and spot.depth is not None:
            other = plain.pop(random.integers(len(plain)))
            needle.digit, needle.same_as = other.digit, other.key
        else:
            plain.append(needle)
        parts[spot.part].needles.append(needle)
        hidden.append((spot, needle))
    return _ask(turns, [(turn_of[spot.part], parts[spot.part].kind, spot.depth, n) for spot, n in hidden], random)


def _spots(parts: list[Part], depths: Sequence[float], random: np.random.Generator) -> list[_Spot]:
    """One for each depth, and one somewhere before each of those, which a relay can name; then any more."""
    edges = np.cumsum([part.tokens for part in parts])
    taken: set[tuple[int, tuple[int, int]]] = set()

    def place(offset: float, depth: int | None = None) -> _Spot:
        while True:
            at = int(np.searchsorted(edges, min(offset, edges[-1] - 1), side="right"))
            spot = _Spot(at, _slot(parts[at], int(offset) - int(edges[at] - parts[at].tokens), random), depth)
            if spot.order not in taken:
                taken.add(spot.order)
                return spot
            offset = random.uniform(max(0, offset - 24), offset + 24)  # taken: somewhere near

    spots: list[_Spot] = []
    for i, depth in enumerate(depths):
        asked = place(depth * (edges[-1] - 1), i)
        named = place(random.uniform(0, depth * (edges[-1] - 1)))
        if named.order > asked.order:  # in the same frame, or nearly
            named.part, named.slot, asked.part, asked.slot = asked.part, asked.slot, named.part, named.slot
        spots += [asked, named]
    return spots + [place(random.uniform(0, edges[-1])) for _ in range(NEEDLES - len(spots))]


def _slot(part: Part, token: int, random: np.random.Generator) -> tuple[int, int]:
    if part.kind == "text":
        return min(max(token, 1), part.size - 1), 0  # never the first word: its space stands for the line break
    if part.kind == "image":
        return 0, int(random.integers((part.side // CELL) ** 2))
    return min(token // TILE_CELLS, part.size - 1), int(random.integers(TILE_CELLS))


def _ask(
    turns: list[list[Part]], hidden: list[tuple[int, str, int | None, Needle]], random: np.random.Generator
) -> Placed:
    """Turns that show something and then ask for it, in random order; a turn shows and asks in one message."""
    due: list[list[tuple[Needle, int, str]]] = [[] for _ in turns]
    for turn, kind, depth, needle in hidden:
        if depth is not None:
            due[int(random.integers(turn, len(turns)))].append((needle, depth, kind))
    said: list[Turn] = []
    asked: list[Asked] = []
    waiting: list[Part] = []  # shown with the next question, as there is nothing to ask for yet
    for i, parts in enumerate(turns):
        waiting = [*waiting, *parts]
        known = [needle for turn, _, _, needle in hidden if turn <= i]
        if not due[i] and not known:
            continue
        for j in random.permutation(len(due[i])):
            needle, depth, kind = due[i][j]
            asked.append(Asked(len(said), depth, kind))
            said.append(Turn(waiting, needle.key, needle.digit, needle.same_as is not None))
            waiting = []
        if waiting:  # a question that does not count, so that every turn has one
            spare = [needle for turn, _, depth, needle in hidden if turn <= i and depth is None] or known
            needle = spare[random.integers(len(spare))]
            said.append(Turn(waiting, needle.key, needle.digit, needle.same_as is not None))
            waiting = []
    return Placed(Conversation(said), tuple(asked))
