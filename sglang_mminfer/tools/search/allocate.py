"""Spreads one budget over all heads: each head gets the candidate with which the sum of all errors is least.

Rows of different modalities do not mix: what a pattern does to the video rows of a head does not depend on the head's
text rows. So each (head, row modality) chooses for itself, and a head whose modalities choose differently becomes a
Q-Boundary. A candidate that is a boundary already is chosen for all modalities of a head at once; if no Q-Boundary is
allowed, every candidate is.

A Lagrange multiplier ties the choices of all heads together: the price of time, which is raised until the choices fit
the budget. A head's time is the number of its tile visits of each kind times the time of one, so that the quicker of
two candidates with equally many pairs is cheaper. The budget is a density or an error, which depend on no machine.

Heads that share a KV head get one pattern where that is about as good (`SHARING_SLACK`), because a GPU then computes
them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.boundary import UNNAMED, HeadPattern, QBoundary, boundary_of

STEPS = 60  # steps of the bisection: more than the precision of the measurements needs

SHARING_SLACK = 0.01
"""How much worse, in error and in cost, one pattern for all heads of a KV head may be than a pattern for each. Far less
than what two calibration inputs disagree by."""


@dataclass(frozen=True)
class Table:
    """The measurements of all candidates: L layers, H heads, C candidates, M modalities.

    patterns: [C][L][H].
    error:    [C, L, H, M], NaN for modalities that the prompts lack.
    pairs:    [C, L, H, M], visited (row, key) pairs.
    causal:   [M], (row, key) pairs of one head at or below the diagonal.
    time:     [C, L, H, M], as a share of the time of one dense head; None: every pair takes the same time.
    mixes:    whether the modalities of a head may choose differently.
    group:    how many successive heads share a KV head.
    """

    patterns: Sequence[Sequence[Sequence[HeadPattern]]]
    error: np.ndarray
    pairs: np.ndarray
    causal: np.ndarray
    modalities: Sequence[Modality]
    time: np.ndarray | None = None
    mixes: bool = True
    group: int = 1

    @property
    def density(self) -> np.ndarray:
        """[C, L, H, M]: visited over all causal pairs of a head. The sum over modalities is the head's density."""
        return self.pairs / self.causal.sum()

    @property
    def cost(self) -> np.ndarray:
        """[C, L, H, M]: the cost that an error is weighed against; 1 for a dense head."""
        return self.density if self.time is None else self.time

    def only(self, boundaries: Sequence[str]) -> Table:
        """The candidates that some of `search.BOUNDARIES` allow. Dense always stays; "q" mixes single patterns."""

        def allowed(head: HeadPattern) -> bool:
            boundary = boundary_of(head)
            return boundary in boundaries or (boundary == "none" and "q" in boundaries) or head == UNNAMED

        rest = [c for c, rows in enumerate(self.patterns) if all(allowed(head) for row in rows for head in row)]
        return replace(
            self,
            patterns=[self.patterns[c] for c in rest],
            error=self.error[rest],
            pairs=self.pairs[rest],
            time=None if self.time is None else self.time[rest],
            mixes="q" in boundaries,
        )


@dataclass(frozen=True)
class Allocation:
    """A pattern for each head.

    heads:          [L][H].
    error, density: the means over all heads, computed from the candidates' own figures. A measurement of the allocation
                    itself is more exact.
    """

    heads: list[list[HeadPattern]]
    error: float
    density: float
    by_head: np.ndarray
    """float64 [L, H, 2]: error and density of each head."""


def at_price(table: Table, price: float) -> Allocation:
    """The best choice for every head if the cost of a dense head is worth `price` in error."""
    error, cost = np.nan_to_num(table.error), table.cost
    value = error + price * cost  # [C, L, H, M]
    present = ~np.isnan(table.error).all(axis=(0, 1, 2))
    _, layers, heads, modalities = value.shape
    heads_chosen: list[list[HeadPattern]] = []
    by_head = np.zeros((layers, heads, 2))
    for layer in range(layers):
        whole = np.array(
            [[not table.mixes or boundary_of(head) != "none" for head in rows[layer]] for rows in table.patterns]
        )
        picks = [_picks(value[:, layer, head], whole[:, head], table.mixes) for head in range(heads)]
        for first in range(0, heads if table.group > 1 else 0, table.group):
            _share(table, layer, range(first, first + table.group), picks, value, whole, (error, cost))
        row: list[HeadPattern] = []
        for head in range(heads):
            chosen = [table.patterns[c][layer][head] for c in picks[head]]
            row.append(_head(chosen, table.modalities, present))
            index = (picks[head], layer, head, np.arange(modalities))
            by_head[layer, head] = [x[index].sum() for x in (error, table.density)]
        heads_chosen.append(row)
    return Allocation(heads_chosen, float(by_head[..., 0].mean()), float(by_head[..., 1].mean()), by_head)


def _picks(value: np.ndarray, whole: np.ndarray, mixes: bool) -> np.ndarray:
    """int64 [M]: the candidate of least value for each modality of a head.

    Args:
        value: [C, M]. whole: bool [C], candidates that are for all modalities at once.
    """
    whole_value = np.where(whole, value.sum(axis=1), np.inf)
    picks = np.where(whole[:, None], np.inf, value).argmin(axis=0)
    mixed_value = np.where(whole[:, None], np.inf, value).min(axis=0).sum() if mixes else np.inf
    return np.full(value.shape[1], whole_value.argmin()) if whole_value.min() < mixed_value else picks


def _share(
    table: Table,
    layer: int,
    heads: range,
    picks: list[np.ndarray],
    value: np.ndarray,
    whole: np.ndarray,
    sums: tuple[np.ndarray, np.ndarray],
) -> None:
    """Give the heads of one KV head the best pattern that they can share, if it is about as good as one for each."""
    common = [c for c, rows in enumerate(table.patterns) if len({rows[layer][head] for head in heads}) == 1]
    if not common:
        return
    own = slice(heads.start, heads.stop)
    shared = np.array(common)[_picks(value[common, layer, own].sum(axis=1), whole[common, heads.start], table.mixes)]

    def total(x: np.ndarray, of: Sequence[np.ndarray]) -> float:
        return sum(float(x[pick, layer, head, np.arange(x.shape[3])].sum()) for head, pick in zip(heads, of))

    each = [picks[head] for head in heads]
    if all(total(x, [shared] * len(heads)) <= total(x, each) * (1 + SHARING_SLACK) for x in sums):
        picks[own] = [shared] * len(heads)


def _head(picks: list[HeadPattern], modalities: Sequence[Modality], present: np.ndarray) -> HeadPattern:
    """The pattern of a head from the choices of its modalities; only those in the prompts count."""
    patterns = {m: p for m, p, is_present in zip(modalities, picks, present) if is_present}
    plain = {m: _plain(p, m) for m, p in patterns.items()}
    for alone in (*patterns.values(), *plain.values()):
        if all(_plain(alone, m) == p for m, p in plain.items()):
            return alone
    return QBoundary(cast(dict[Modality, Pattern], plain))  # a boundary is chosen for all, so none gets here


def _plain(pattern: HeadPattern, rows: Modality) -> HeadPattern:
    """The simplest pattern that does the same for rows of one modality."""
    return pattern.plain(rows) if isinstance(pattern, Pattern) else pattern


def within_density(table: Table, budget: float) -> Allocation:
    """The least error at a mean density of at most `budget`.

    Raises:
        ValueError: even the cheapest choice is denser.
    """
    cheapest = at_price(replace(table, time=None), 1e9)
    if cheapest.density > budget:
        raise ValueError(f"budget: expected a density of at least {cheapest.density:.3f} here, got {budget}")
    free = at_price(table, 0.0)
    if free.density <= budget:
        return free
    low, high, best = 1e-9, 1e9, cheapest
    for _ in range(STEPS):
        price = float(np.sqrt(low * high))
        allocation = at_price(table, price)
        if allocation.density <= budget:
            high, best = price, allocation
        else:
            low = price
    return best


def within_error(table: Table, budget: float) -> Allocation:
    """The least density at a mean error of at most `budget`."""
    low, high = 0.0, 1e6
    best = at_price(table, low)
    for _ in range(STEPS):
        price = np.sqrt(max(low, 1e-9) * high)
        allocation = at_price(table, price)
        if allocation.error <= budget:
            low, best = price, allocation
        else:
            high = price
    return best


def equal_budget(table: Table, budget: float) -> Allocation:
    """As in MMInference (appendix A): each head alone takes its best candidate with at most `budget` density."""
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
    allocations = [at_price(table, price) for price in np.logspace(4, -4, points)]
    return sorted({(round(a.density, 6), round(a.error, 6)) for a in allocations})
