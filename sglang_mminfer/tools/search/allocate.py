"""One budget for all heads: which candidate each head gets so that the errors are least in sum.

Rows of different modalities do not mix: what a pattern does to the video rows of a head is the same whatever the
head's text rows do. So each (head, row modality) chooses for itself, and a head whose modalities choose differently
is a Q-Boundary. A candidate that is a boundary already is taken whole, as all are where no Q-Boundary is wanted.
Lagrange's multiplier makes the choices of all heads one: the price of time, raised until what they buy fits the
budget. A head's time is its tile visits times what a visit of each kind takes, so that of two candidates that visit as
many pairs the quicker one is cheaper; the budget is a density or an error, which no machine changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.boundary import UNNAMED, HeadPattern, QBoundary, boundary_of

STEPS = 60  # of the bisection: beyond the precision of the figures


@dataclass(frozen=True)
class Table:
    """What was measured. L layers, H heads, C candidates, M modalities.

    patterns: [C][L][H]. error: [C, L, H, M], NaN for modalities that are not there. pairs: [C, L, H, M] visited, of
    `causal`: [M], those of one head. time: [C, L, H, M], as a share of what dense takes for one head; None: a pair
    takes what any other takes. mixes: whether modalities of a head may choose differently.
    """

    patterns: Sequence[Sequence[Sequence[HeadPattern]]]
    error: np.ndarray
    pairs: np.ndarray
    causal: np.ndarray
    modalities: Sequence[Modality]
    time: np.ndarray | None = None
    mixes: bool = True

    @property
    def density(self) -> np.ndarray:
        """[C, L, H, M]: of one head; its sum over modalities is the head's."""
        return self.pairs / self.causal.sum()

    @property
    def cost(self) -> np.ndarray:
        """[C, L, H, M]: what an error is weighed against, 1 for a dense head."""
        return self.density if self.time is None else self.time

    def only(self, boundaries: Sequence[str]) -> Table:
        """What there is to choose from among some of `search.BOUNDARIES`. Dense stays; "q" mixes single patterns."""

        def allowed(head: HeadPattern) -> bool:
            boundary = boundary_of(head)
            return boundary in boundaries or (boundary == "none" and "q" in boundaries) or head == UNNAMED

        kept = [c for c, of in enumerate(self.patterns) if all(allowed(head) for row in of for head in row)]
        return replace(
            self,
            patterns=[self.patterns[c] for c in kept],
            error=self.error[kept],
            pairs=self.pairs[kept],
            time=None if self.time is None else self.time[kept],
            mixes="q" in boundaries,
        )


@dataclass(frozen=True)
class Allocation:
    """heads: [L][H]. error, density: their means over heads, as far as single patterns tell (a re-measurement says
    more)."""

    heads: list[list[HeadPattern]]
    error: float
    density: float
    by_head: np.ndarray
    """float64 [L, H, 2]: error and density of each head."""


def at_price(table: Table, price: float) -> Allocation:
    """Every head's best where what dense costs is worth `price` in error."""
    error, density = np.nan_to_num(table.error), table.density
    value = error + price * table.cost  # [C, L, H, M]
    candidates, layers, heads, modalities = value.shape
    present = ~np.isnan(table.error).all(axis=(0, 1, 2))
    heads_chosen: list[list[HeadPattern]] = []
    by_head = np.zeros((layers, heads, 2))
    for layer in range(layers):
        row: list[HeadPattern] = []
        for head in range(heads):
            own = value[:, layer, head]
            is_whole = np.array(
                [not table.mixes or boundary_of(table.patterns[c][layer][head]) != "none" for c in range(candidates)]
            )
            whole = np.where(is_whole, own.sum(axis=1), np.inf)
            picks = np.where(is_whole[:, None], np.inf, own).argmin(axis=0)  # [M]
            parts = own[picks, np.arange(modalities)].sum() if table.mixes else np.inf
            if whole.min() < parts:
                picks = np.full(modalities, whole.argmin())
            row.append(_head([table.patterns[c][layer][head] for c in picks], table.modalities, present))
            by_head[layer, head] = [x[picks, layer, head, np.arange(modalities)].sum() for x in (error, density)]
        heads_chosen.append(row)
    return Allocation(heads_chosen, float(by_head[..., 0].mean()), float(by_head[..., 1].mean()), by_head)


def _head(picked: list[HeadPattern], modalities: Sequence[Modality], present: np.ndarray) -> HeadPattern:
    some = {m: p for m, p, there in zip(modalities, picked, present) if there}
    for named in (some, {m: _plain(p, m) for m, p in some.items()}):
        first = next(iter(named.values()))
        if all(pattern == first for pattern in named.values()):
            return first
    return QBoundary(cast(dict[Modality, Pattern], named))  # boundaries are taken whole, so none is in here


def _plain(pattern: HeadPattern, rows: Modality) -> HeadPattern:
    """The same by its simplest name."""
    return pattern.plain(rows) if isinstance(pattern, Pattern) else pattern


def within_density(table: Table, budget: float) -> Allocation:
    """Least error at a mean density of at most `budget`. Raises ValueError where the cheapest choice is denser."""
    cheapest = at_price(replace(table, time=None), 1e9)
    if cheapest.density > budget:
        raise ValueError(f"budget: expected a density of at least {cheapest.density:.3f} here, got {budget}")
    free = at_price(table, 0.0)
    if free.density <= budget:
        return free
    low, high, best = 1e-9, 1e9, cheapest
    for _ in range(STEPS):
        price = float(np.sqrt(low * high))
        found = at_price(table, price)
        if found.density <= budget:
            high, best = price, found
        else:
            low = price
    return best


def within_error(table: Table, budget: float) -> Allocation:
    """Least density at a mean error of at most `budget`."""
    low, high = 0.0, 1e6
    best = at_price(table, low)
    for _ in range(STEPS):
        price = np.sqrt(max(low, 1e-9) * high)
        found = at_price(table, price)
        if found.error <= budget:
            low, best = price, found
        else:
            high = price
    return best


def equal_budget(table: Table, budget: float) -> Allocation:
    """The paper's way (appendix A): every head by itself takes its best candidate of at most `budget` density."""
    error, density = np.nan_to_num(table.error).sum(axis=3), table.density.sum(axis=3)
    allowed = np.where(density <= budget, error, np.inf)
    cheapest = density.argmin(axis=0)
    picks = np.where(np.isfinite(allowed).any(axis=0), allowed.argmin(axis=0), cheapest)  # [L, H]
    layers, heads = picks.shape
    chosen = [[table.patterns[picks[i, j]][i][j] for j in range(heads)] for i in range(layers)]
    index = (picks, *np.indices(picks.shape))
    by_head = np.stack([error[index], density[index]], axis=-1)
    return Allocation(chosen, float(by_head[..., 0].mean()), float(by_head[..., 1].mean()), by_head)


def frontier(table: Table, points: int = 24) -> list[tuple[float, float]]:
    """(density, error) along falling prices: the Pareto curve that a budget picks from."""
    found = [at_price(table, price) for price in np.logspace(4, -4, points)]
    return sorted({(round(a.density, 6), round(a.error, 6)) for a in found})
