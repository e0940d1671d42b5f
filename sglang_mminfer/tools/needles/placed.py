"""Conversations with needles at given depths, for a grid of depths and lengths.

`task` places needles at random, which is right for training. A heat map needs the same number of answers at every
depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_mminfer.tools.needles.glyphs import CELL, DIGITS, KEYS
from sglang_mminfer.tools.needles.pictures import TILE_CELLS
from sglang_mminfer.tools.needles.task import Conversation, Needle, Part, Turn, mixed_conversation

NEEDLES = 12
"""How many needles a conversation has at least, asked for or not: as many as in the shipped models' training."""

MAX_DEPTHS = len(KEYS) // 2
"""Each relay names a needle of its own, so depths take two keys each. If relays shared the needles that they name, the
answers in a chat's history would give other answers away."""
SHORTEST = 512
"""The least length in tokens: shorter conversations have no room for so many needles."""


@dataclass(frozen=True)
class Asked:
    """A question that counts.

    turn:  the turn that asks.
    depth: the index of the needle's depth.
    kind:  the kind of the part that shows the needle.
    """

    turn: int
    depth: int
    kind: str


@dataclass(frozen=True)
class Placed:
    """A conversation, and its questions that count."""

    conversation: Conversation
    asked: tuple[Asked, ...]


def video_needles(tokens: int, depths: Sequence[float], random: np.random.Generator, *, relays: bool) -> Placed:
    """V-NIAH: one video of about `tokens` tokens, and a turn for each question.

    Args:
        depths: from 0 (first frames) to 1 (last frames), ascending, at most MAX_DEPTHS.
        relays: whether the needles that are asked for are relays. All other needles are plain.

    Raises:
        ValueError: there are more than MAX_DEPTHS depths.
    """
    video = Part("video", tokens // TILE_CELLS, int(random.integers(1 << 31)))
    return _hide([[video]], depths, random, relays)


def mixed_needles(tokens: int, depths: Sequence[float], random: np.random.Generator, *, relays: bool) -> Placed:
    """MM-NIAH: text (a quarter), images and videos of about `tokens` tokens over several turns.

    A depth is a share of the tokens of the whole conversation. A needle is asked for in the turn that shows it, or in
    a later one. Arguments and errors are those of `video_needles`.
    """
    parts = mixed_conversation(tokens // TILE_CELLS, 1, random, questions=1, turns=int(random.integers(2, 5)))
    turns = [turn.parts for turn in parts.turns if turn.parts]
    for part in parts.parts:
        part.needles.clear()
    return _hide(turns, depths, random, relays)


@dataclass
class _Spot:
    """The place of a needle."""

    part: int
    slot: tuple[int, int]
    depth: int | None = None
    """The index of the needle's depth; None for a needle that nobody asks for."""

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
    plain: list[Needle] = []  # plain needles that no relay names yet
    hidden_needles: list[tuple[_Spot, Needle]] = []
    for spot in sorted(spots, key=lambda spot: spot.order):
        needle = Needle(keys.pop(), DIGITS[random.integers(10)], slot=spot.slot)
        if relays and spot.depth is not None:
            named = plain.pop(random.integers(len(plain)))
            needle.digit, needle.same_as = named.digit, named.key
        else:
            plain.append(needle)
        parts[spot.part].needles.append(needle)
        hidden_needles.append((spot, needle))
    return _ask(
        turns, [(turn_of[spot.part], parts[spot.part].kind, spot.depth, n) for spot, n in hidden_needles], random
    )


def _spots(parts: list[Part], depths: Sequence[float], random: np.random.Generator) -> list[_Spot]:
    """A spot for each depth, a spot before each of those, whose needle a relay can name, and others up to NEEDLES."""
    edges = np.cumsum([part.tokens for part in parts])
    occupied: set[tuple[int, tuple[int, int]]] = set()

    def free_spot(offset: float, depth: int | None = None) -> _Spot:
        while True:
            part_index = int(np.searchsorted(edges, min(offset, edges[-1] - 1), side="right"))
            spot = _Spot(
                part_index,
                _slot(parts[part_index], int(offset) - int(edges[part_index] - parts[part_index].tokens), random),
                depth,
            )
            if spot.order not in occupied:
                occupied.add(spot.order)
                return spot
            offset = random.uniform(max(0, offset - 24), offset + 24)  # the spot is occupied: try near it

    spots: list[_Spot] = []
    for i, depth in enumerate(depths):
        asked = free_spot(depth * (edges[-1] - 1), i)
        named = free_spot(random.uniform(0, depth * (edges[-1] - 1)))
        if named.order > asked.order:  # this can happen within a frame: swap them
            named.part, named.slot, asked.part, asked.slot = asked.part, asked.slot, named.part, named.slot
        spots += [asked, named]
    return spots + [free_spot(random.uniform(0, edges[-1])) for _ in range(NEEDLES - len(spots))]


def _slot(part: Part, token: int, random: np.random.Generator) -> tuple[int, int]:
    if part.kind == "text":
        return min(max(token, 1), part.size - 1), 0  # never the first word, whose space belongs to the line break
    if part.kind == "image":
        return 0, int(random.integers((part.side // CELL) ** 2))
    return min(token // TILE_CELLS, part.size - 1), int(random.integers(TILE_CELLS))


def _ask(
    turns: list[list[Part]], hidden_needles: list[tuple[int, str, int | None, Needle]], random: np.random.Generator
) -> Placed:
    """Spread the questions over the turns, each in the turn that shows its needle or in a later one.

    Each question is a turn of its own. The first question of a turn comes in the message that shows the turn's parts.
    """
    questions_of: list[list[tuple[Needle, int, str]]] = [[] for _ in turns]
    for turn, kind, depth, needle in hidden_needles:
        if depth is not None:
            questions_of[int(random.integers(turn, len(turns)))].append((needle, depth, kind))
    asking_turns: list[Turn] = []
    asked: list[Asked] = []
    unshown: list[Part] = []  # they are shown with the next question, because there is nothing to ask for yet
    for i, parts in enumerate(turns):
        unshown = [*unshown, *parts]
        shown_needles = [needle for turn, _, _, needle in hidden_needles if turn <= i]
        if not questions_of[i] and not shown_needles:
            continue
        for j in random.permutation(len(questions_of[i])):
            needle, depth, kind = questions_of[i][j]
            asked.append(Asked(len(asking_turns), depth, kind))
            asking_turns.append(Turn(unshown, needle.key, needle.digit, needle.same_as is not None))
            unshown = []
        if unshown:  # a question that does not count, so that every turn has one
            unasked = [
                needle for turn, _, depth, needle in hidden_needles if turn <= i and depth is None
            ] or shown_needles
            needle = unasked[random.integers(len(unasked))]
            asking_turns.append(Turn(unshown, needle.key, needle.digit, needle.same_as is not None))
            unshown = []
    return Placed(Conversation(asking_turns), tuple(asked))
