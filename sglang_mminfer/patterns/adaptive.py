"""adaptive: sink and local window, and every key that a low-rank score says the row cannot do without."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.base import Count, Share, Size
from sglang_mminfer.patterns.choice import Between, Rule, pick, project
from sglang_mminfer.patterns.estimated import Added, Estimated, Evidence, Findings, Picked, QueryTiles
from sglang_mminfer.patterns.index import TEXT_AFTER_VISION, PairIndex, Scope
from sglang_mminfer.patterns.ladder import SINK, Prompt
from sglang_mminfer.patterns.pair import Pair

QUERY_ROWS = 64
"""Rows of a query tile. All of them visit what any of them asks for, so fewer rows visit less; the matrix unit of a GPU
multiplies 64 at a time."""

EXPECTED = 0.12
"""The share of all keys that query tiles pick where nothing was measured, about: what they do on the video needle model
at 8K tokens, with alpha 0.01 and the clip's basis."""

ALPHAS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""What a search tries. 0.01 keeps every answer on the needle models."""

OF_A_SCORE = 4
"""What comparing a score with its bound costs, in dimensions of a product. A score of rank 8 then costs 0.09 of a pair
of attention at 128 dimensions, which is what a CPU takes for it at 32K keys."""


@dataclass(frozen=True)
class Adaptive(Estimated, kind="adaptive", colour="#1f77b4"):
    """As `a_shape`, plus every key whose score weighs more than `alpha` times all that the row sees in the sink and the
    window together: (A q) . (B k) * sm_scale > ln(alpha) + log-sum-exp of their q . k * sm_scale. A and B, of `rank`
    rows, belong to the head; where there are none, the score is q . k. A text row that has vision before it sees all
    with `text` "all", unless a boundary says otherwise; with "chosen" it chooses as every other row.

    Under a 2D-Boundary sink, window and scores are those of a pair's own keys. What a row asks for depends on the row
    and the keys before it alone, so it is the same however a prompt is cut. A query tile visits what any of its rows
    asks for, or everything if that is more than `budget` of the keys between the sink and the window, or if there is no
    room left (`choice.ROOM`).

    Scores are rounded. Planning keeps a key whose score lies below the bound by no more than `choice.MARGIN`, so
    that its float32 visits whatever the exact rule's float64 asks for.
    """

    reasons: ClassVar[tuple[str, ...]] = (TEXT_AFTER_VISION,)
    sink: Count
    local: Size
    rank: Size
    alpha: Share
    budget: Share = 0.5
    text: Literal["all", "chosen"] = "all"

    # ---- the exact rule ------------------------------------------------------------------------------------

    def visible(self, pair: Pair) -> torch.Tensor:
        q, k = pair.queries_and_keys(self.kind)
        scale = pair.scale_of(q)
        window = pair.window(self.sink, self.local)
        scores = q @ k.T * scale
        mass = scores.masked_fill(~(window & pair.causal & pair.keys), -torch.inf).logsumexp(dim=1)
        if pair.basis is not None:
            a, b = (part[: self.rank].double() for part in pair.basis)
            scores = (q @ a.T) @ (k @ b.T).T * scale
        mask = window | (scores > (mass + math.log(self.alpha))[:, None])
        return mask | pair.sees_all[:, None] if self.text == "all" else mask

    # ---- for planning --------------------------------------------------------------------------------------

    def index(self, scope: Scope) -> PairIndex:
        whole = scope.sees_all if self.text == "all" else {}
        return PairIndex(sink=self.sink, local=self.local, whole=whole, estimated=self, query_rows=QUERY_ROWS)

    def picks(self, tokens: int) -> int:
        return math.ceil(self.budget * tokens)

    def expected(self, keys: Ints) -> NDArray[np.float64]:
        return keys.astype(np.float64) * EXPECTED

    def looks_at(self, rows: int, keys: int, head_dim: int) -> float:
        scores = rows * (2 * keys - rows) / 2 * (min(self.rank, head_dim) + OF_A_SCORE) / head_dim
        mass = rows * min(keys, self.sink + self.local) / 2  # of sink and window takes q . k once more
        return scores + mass

    def estimate(self, evidence: Evidence) -> Findings:
        """The low-rank form of the keys of the class."""
        return project(evidence, self.rank)

    def select(self, evidence: Evidence, findings: Findings, tiles: QueryTiles) -> Picked:
        between = Between.of(self.sink, self.local, tiles)
        lanes, first, count, overflow = pick(evidence, findings, tiles, between, self._rule)
        first_between, tiles_between = between.upload(evidence.q.device, between.first, between.num_tiles)
        # A query tile visits either all key tiles between sink and window, or those that were picked: whole ones, and
        # one that is filled in part.
        whole, part = count // tiles.block_k, (count % tiles.block_k > 0).long()
        room = between.num_tiles
        added = (
            Added("full", False, *_ranges(first_between.expand_as(first), tiles_between * overflow), room),
            Added("full", True, *_ranges(first, whole), np.zeros_like(room)),
            Added("partial", True, *_ranges(first + whole, part), np.minimum(room, 1)),
        )
        return Picked(added, lanes, overflow.sum())

    def shares(self, evidence: Evidence, findings: Findings, tiles: QueryTiles) -> torch.Tensor:
        """float32 [H, T]: the share of the keys between sink and window that each query tile visits; NaN where there
        are none. It is 1 for a tile that asks for more than the budget."""
        between = Between.of(self.sink, self.local, tiles)
        _, _, count, overflow = pick(evidence, findings, tiles, between, self._rule)
        (keys,) = between.upload(count.device, between.num_keys)
        return (count + overflow * keys) / keys

    @property
    def _rule(self) -> Rule:
        return Rule(self.sink, self.local, self.rank, math.log(self.alpha), self.budget)

    # ---- for search and reports ----------------------------------------------------------------------------

    @classmethod
    def ladder(cls, prompt: Prompt) -> Iterator[tuple[str, Adaptive]]:
        local = prompt.windows[min(1, len(prompt.windows) - 1)]
        for rank, alpha in product(prompt.ranks, ALPHAS):
            yield f"adaptive {rank},{alpha:g}", cls(SINK, local, rank, alpha)
            yield f"adaptive {rank},{alpha:g} text chosen", cls(SINK, local, rank, alpha, text="chosen")

    @property
    def label(self) -> str:
        return f"ad {self.rank},{self.alpha:g}{'' if self.text == 'all' else ',t'}"

    @property
    def basis_rank(self) -> int:
        return self.rank

    def plain(self, rows: Modality) -> Adaptive:
        """`text` is for rows of text only."""
        return self if rows is Modality.TEXT else replace(self, text="all")


def _ranges(start: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One range for each head and query tile: int64 [H, T] -> [H, T, 1]."""
    return start[..., None], count[..., None]
