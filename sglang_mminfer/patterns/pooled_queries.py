"""pooled_queries: sink and local window, and single keys that the mean query of a group of rows scores highest
(VecAttention's idea)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.base import Count, Share, Size
from sglang_mminfer.patterns.choice import AT_A_TIME, MARGIN, PROJECTED, Between, HeadsOfKeys, packed
from sglang_mminfer.patterns.estimated import Added, Estimated, Evidence, Findings, Picked, QueryTiles
from sglang_mminfer.patterns.index import TEXT_AFTER_VISION, PairIndex, Scope
from sglang_mminfer.patterns.pair import Pair
from sglang_mminfer.patterns.pooling import Groups, any_group

EXPECTED = 0.25
"""The share of all keys that tiles of 128 rows pick, about: on the needle models, with alpha 0.1 and one span."""


@dataclass(frozen=True)
class PooledQueries(Estimated, kind="pooled_queries", colour="#e377c2"):
    """Single keys, chosen by `group` rows together: rows whose positions lie between the same multiples of `group`. A
    key scores q . k * sm_scale with q the mean of these rows' queries. Keys before the group's first position are cut
    into spans of `span` keys, and a key is kept if exp(score) is at least `alpha` times the largest one in its span.
    The first `sink` keys, the last `local` keys before the group and all later keys are always seen. A text row that
    has vision before it sees all, and chooses for nobody, unless a boundary says otherwise.

    The idea is VecAttention's (2603.29494), with its groups of 64 rows, its threshold (0.8 to 0.9 there) relative to
    the maximum of each 256 keys, and its first and nearest keys that are always kept. A `span` as long as the prompt
    makes the maximum one of all keys. The paper's kernel compares with a running maximum, so that what it keeps besides
    depends on the order in which it goes through keys; here the maximum is that of the whole span.

    Rows of a group decide together, so a group that a chunk, a cached prefix or a turn cuts is decided in parts, each
    by its own rows. Where every cut lies at a multiple of `group`, cuts change nothing.
    """

    reasons: ClassVar[tuple[str, ...]] = (TEXT_AFTER_VISION,)
    sink: Count
    local: Size
    alpha: Share
    group: Size = 64
    span: Size = 256

    # ---- the exact rule ------------------------------------------------------------------------------------

    def visible(self, pair: Pair) -> torch.Tensor:
        q, k = pair.queries_and_keys(self.kind)
        scale = pair.scale_of(q)
        mask = torch.zeros_like(pair.causal)
        chooses = pair.rows & ~pair.sees_all
        group_of_row = pair.q_pos // self.group
        for group in group_of_row[chooses].unique():
            rows = chooses & (group_of_row == group)
            earlier = pair.keys & (pair.k_pos < group * self.group)
            seen = (pair.key_rank < self.sink) | (pair.key_rank >= int(earlier.sum()) - self.local)
            score = k @ q[rows].mean(dim=0) * scale
            for first in range(0, int(earlier.sum()), self.span):
                span = earlier & (pair.key_rank >= first) & (pair.key_rank < first + self.span)
                seen |= span & (score >= score[span].max() + math.log(self.alpha))
            mask[rows] = seen
        return mask | pair.sees_all[:, None]

    # ---- for planning --------------------------------------------------------------------------------------

    def index(self, scope: Scope) -> PairIndex:
        return PairIndex(sink=self.sink, local=self.local, whole=scope.sees_all, estimated=self)

    def picks(self, tokens: int) -> int:
        return tokens

    def expected(self, keys: Ints) -> NDArray[np.float64]:
        return EXPECTED * keys.astype(np.float64)

    def looks_at(self, rows: int, keys: int, head_dim: int) -> float:
        return 2 * rows * (2 * keys - rows) / 2 / self.group  # scores are computed for the maxima, and once more

    def estimate(self, evidence: Evidence) -> Findings:
        """float32 [H, G, D], the mean queries, scaled; and [H, G, spans], the largest score in each span."""
        groups, device = Groups.of(evidence, self.group), evidence.q.device
        num_keys, dim = len(evidence.key_slots), evidence.q.shape[2]
        shape = len(evidence.heads), len(groups.number)
        pooled = torch.empty(*shape, dim, device=device)
        largest = torch.full((*shape, -(-num_keys // self.span)), -torch.inf, device=device)
        (before,) = Between.upload(device, groups.keys_before)
        for heads in HeadsOfKeys.of(evidence):
            own = torch.stack([q.mean(dim=1) for q in groups.queries(evidence, heads)], dim=1)
            pooled[heads.index] = own
            for begin in range(0, num_keys, PROJECTED):
                keys = heads.keys(evidence, slice(begin, begin + PROJECTED))
                number = torch.arange(begin, begin + len(keys), device=device)
                scores = (own @ keys.T).masked_fill_(number >= before[:, None], -torch.inf)
                span = (number // self.span).expand_as(scores)
                largest[heads.index] = largest[heads.index].scatter_reduce(2, span, scores, "amax")
        return pooled, largest

    def select(self, evidence: Evidence, findings: Findings, tiles: QueryTiles) -> Picked:
        groups, block_k = Groups.of(evidence, self.group), tiles.block_k
        room = Between.of(self.sink, self.local, tiles)
        lanes, firsts, counts, key_tiles = [], [], [], 0
        for part in tiles.parts(room.num_keys * len(evidence.heads), AT_A_TIME):
            between = Between.of(self.sink, self.local, part)
            chosen, count = self._choose(evidence, findings, groups, part, between)
            picked, first = packed(evidence, chosen, count, between, between.num_keys)
            lanes.append(picked)
            firsts.append(first + key_tiles)
            counts.append(count)
            key_tiles += len(picked) // block_k
        first, count = torch.cat(firsts, dim=1)[..., None], torch.cat(counts, dim=1)[..., None]
        whole, rest = count // block_k, (count % block_k > 0).long()
        added = (
            Added("full", True, first, whole, room.num_tiles),
            Added("partial", True, first + whole, rest, np.minimum(room.num_tiles, 1)),
        )
        return Picked(added, torch.cat(lanes))

    def _choose(
        self, evidence: Evidence, findings: Findings, groups: Groups, tiles: QueryTiles, between: Between
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [H, N], which keys each query tile picks, those of all query tiles one after the other
        (`Between.before`); and int64 [H, T], how many."""
        device, first_lane = evidence.q.device, between.before
        chosen = torch.zeros(len(evidence.heads), int(first_lane[-1]), dtype=torch.bool, device=device)
        count = torch.zeros(len(evidence.heads), len(between.first), dtype=torch.int64, device=device)
        of_tiles, before = groups.of_tiles(tiles), Between.upload(device, groups.keys_before)[0][:, None]
        first_key, stop_key = (x * tiles.block_k for x in (between.first, between.first + between.num_tiles))
        for heads in HeadsOfKeys.of(evidence):
            pooled, largest = (x[heads.index] for x in findings)
            for begin in range(0, int(stop_key.max(initial=0)), PROJECTED):
                end = min(begin + PROJECTED, int(stop_key.max()))
                number = torch.arange(begin, end, device=device)
                scores = pooled @ heads.keys(evidence, slice(begin, end)).T
                asked = scores >= largest[:, :, number // self.span] + (math.log(self.alpha) - MARGIN)
                asked = (asked & (number < before)) | (number >= before - self.local)
                wanted = any_group(of_tiles, asked)
                for t in np.flatnonzero((first_key < end) & (stop_key > begin)).tolist():
                    low, high = max(int(first_key[t]), begin), min(int(stop_key[t]), end)
                    own, lane = wanted[:, t, low - begin : high - begin], int(first_lane[t] + low - first_key[t])
                    chosen[heads.index, lane : lane + high - low] = own
                    count[heads.index, t] += own.sum(dim=1)
        return chosen, count

    # ---- for reports ---------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return f"pq {self.group},{self.alpha:g}"
