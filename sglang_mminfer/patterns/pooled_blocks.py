"""pooled_blocks: sink and local window, and the key blocks whose mean key weighs enough for a group of rows
(FlashPrefill V2's rule)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.base import Count, Share, Size
from sglang_mminfer.patterns.choice import MARGIN, PROJECTED, Between, HeadsOfKeys
from sglang_mminfer.patterns.estimated import Added, Estimated, Evidence, Findings, Picked, QueryTiles
from sglang_mminfer.patterns.index import TEXT_AFTER_VISION, PairIndex, Scope
from sglang_mminfer.patterns.pair import Pair
from sglang_mminfer.patterns.pooling import Groups, any_group

EXPECTED = 0.8
"""The share of all keys that tiles of 128 rows pick, about: on the needle models, with alpha 0.1 and blocks of 64."""


@dataclass(frozen=True)
class PooledBlocks(Estimated, kind="pooled_blocks", colour="#8c564b"):
    """Blocks of `block` keys, chosen by `group` rows together: rows whose positions lie between the same multiples of
    `group`. A block weighs the sum over these rows of exp(q . k * sm_scale), with k the mean of its keys. Blocks that
    end before the group's first position are kept if they weigh at least `alpha` times as much as the heaviest of them.
    Those that hold the first `sink` keys, those that hold the last `local` keys before the group, and all later keys
    are always seen. A text row that has vision before it sees all, and chooses for nobody, unless a boundary says
    otherwise.

    The rule is FlashPrefill V2's (2608.19758), with these differences: each query head chooses for itself, where the
    paper packs the heads of a KV head into one choice; a block that is not complete before the group is always seen,
    where the paper pools what there is of it; and rows of a prompt's end choose as all others do. The paper lets every
    pruned block enter the softmax with its mean key and value and the weight of its keys (mean correction). That
    changes what a row gets, not what is chosen; plans have no such keys, so it is not done here.

    Rows of a group decide together, so a group that a chunk, a cached prefix or a turn cuts is decided in parts, each
    by its own rows. Where every cut lies at a multiple of `group`, cuts change nothing.
    """

    reasons: ClassVar[tuple[str, ...]] = (TEXT_AFTER_VISION,)
    sink: Count
    local: Size
    alpha: Share
    group: Size = 128
    block: Size = 64

    # ---- the exact rule ------------------------------------------------------------------------------------

    def visible(self, pair: Pair) -> torch.Tensor:
        q, k = pair.queries_and_keys(self.kind)
        scale = pair.scale_of(q)
        mask = torch.zeros_like(pair.causal)
        chooses = pair.rows & ~pair.sees_all
        group_of_row, block_of_key = pair.q_pos // self.group, pair.key_rank.div(self.block, rounding_mode="floor")
        for group in group_of_row[chooses].unique():
            rows = chooses & (group_of_row == group)
            before = int((pair.keys & (pair.k_pos < group * self.group)).sum())
            window = max(before - self.local, 0) // self.block
            seen = (block_of_key * self.block < self.sink) | (block_of_key >= window)
            blocks = [pair.keys & (block_of_key == number) for number in range(before // self.block)]
            if blocks:
                means = torch.stack([k[block].mean(dim=0) for block in blocks])
                weight = (q[rows] @ means.T * scale).logsumexp(dim=0)
                for number in (weight >= weight.max() + math.log(self.alpha)).nonzero().flatten().tolist():
                    seen |= blocks[number]
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
        return rows * (2 * keys - rows) / 2 / self.block

    def estimate(self, evidence: Evidence) -> Findings:
        """bool [H, G, blocks of the class]: what each group asks for, always and by choice."""
        groups, device = Groups.of(evidence, self.group), evidence.q.device
        num_blocks = -(-len(evidence.key_slots) // self.block)
        window = np.maximum(groups.keys_before - self.local, 0) // self.block
        (first_of_window,) = Between.upload(device, window)
        number = torch.arange(num_blocks, device=device)
        always = (number * self.block < self.sink) | (number >= first_of_window[:, None])
        asked = always.repeat(len(evidence.heads), 1, 1)
        for heads in HeadsOfKeys.of(evidence):
            means = self._means(evidence, heads)
            for group, q in enumerate(groups.queries(evidence, heads)):
                complete = int(groups.keys_before[group]) // self.block
                if complete:
                    weight = (q @ means[:complete].T).logsumexp(dim=1)
                    least = weight.amax(dim=1, keepdim=True) + (math.log(self.alpha) - MARGIN)
                    asked[heads.index, group, :complete] |= weight >= least
        return (asked,)

    def _means(self, evidence: Evidence, heads: HeadsOfKeys) -> torch.Tensor:
        """float32 [complete blocks, D]: the mean key of each."""
        stop, size = len(evidence.key_slots) // self.block * self.block, -(-PROJECTED // self.block) * self.block
        parts = [heads.keys(evidence, slice(begin, min(begin + size, stop))) for begin in range(0, stop, size)]
        means = [part.unflatten(0, (-1, self.block)).mean(dim=1) for part in parts]
        return torch.cat(means) if means else evidence.k_cache.new_zeros(0, evidence.k_cache.shape[2]).float()

    def select(self, evidence: Evidence, findings: Findings, tiles: QueryTiles) -> Picked:
        wanted = any_group(Groups.of(evidence, self.group).of_tiles(tiles), findings[0])
        between = Between.of(self.sink, self.local, tiles)
        first, num_tiles = Between.upload(wanted.device, between.first, between.num_tiles)
        number = torch.arange(int(between.num_tiles.max(initial=0)), device=wanted.device)
        key = (first[:, None] + number) * tiles.block_k  # int64 [T, most], the first key of each key tile
        ends = (key // self.block, -((-key - tiles.block_k) // self.block))
        before = torch.nn.functional.pad(wanted.long().cumsum(dim=2), (1, 0))
        begin, end = (before.gather(2, x.clamp_max(wanted.shape[2]).expand(len(wanted), -1, -1)) for x in ends)
        visited = (end > begin) & (number < num_tiles[:, None])
        start = (first[:, None] + number).expand_as(visited)
        lanes = torch.zeros(0, dtype=torch.int64, device=wanted.device)
        return Picked((Added("full", False, start, visited.long(), between.num_tiles),), lanes)

    # ---- for reports ---------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return f"pb {self.block},{self.alpha:g}"
