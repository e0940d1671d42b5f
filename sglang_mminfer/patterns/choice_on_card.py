"""Choosing keys row by row, as `choice.py` says, by the kernels of a GPU: all heads and query tiles at once."""

from __future__ import annotations

import numpy as np
import torch

from sglang_mminfer.kernels.triton.low_rank_scan import Asked, ScannedTiles, project_keys, scan, side_by_side
from sglang_mminfer.modality.runs import Ints
from sglang_mminfer.patterns.choice import MARGIN, Between, HeadsOfKeys, Rule, first_key_tiles, keys_of_rows
from sglang_mminfer.patterns.estimated import Evidence, Findings, QueryTiles


def project(evidence: Evidence, rank: int) -> Findings:
    """What `choose` needs of the keys of the class: float16 [forms, keys, columns], and int32, their cache rows."""
    assert evidence.basis is not None
    request = evidence.request
    slots = request.slots32 if evidence.keys is None else request.slots32[evidence.keys]
    forms, basis = _forms(HeadsOfKeys.of(evidence)), evidence.basis.keys.contiguous()
    return project_keys(evidence.k_cache, slots, forms, basis, _rank(evidence, rank)), slots


def choose(
    evidence: Evidence, findings: Findings, tiles: QueryTiles, between: Between, rule: Rule
) -> tuple[Asked, torch.Tensor]:
    """What the rows of each query tile ask for; and int64 [H, T], how many keys that are."""
    assert evidence.basis is not None
    by_form, (low_keys, slots) = HeadsOfKeys.of(evidence), findings
    scanned = ScannedTiles(
        first_row=np.concatenate([[0], tiles.rows_per_tile.cumsum()])[:-1],
        num_rows=tiles.rows_per_tile.astype(np.int64),
        window_start=np.maximum(tiles.keys_of_first_row - rule.local, 0),
        window_stop=tiles.keys_of_last_row,
        first_key=between.first * between.block_k,
        num_keys=between.num_keys,
        place=between.before[:-1],
    )
    asked = scan(
        evidence.q if evidence.q.stride(2) == 1 else evidence.q.contiguous(),
        evidence.k_cache,
        slots,
        low_keys,
        _forms(by_form),
        [own.heads for own in by_form],
        (evidence.basis.queries.contiguous(), evidence.basis.keys.contiguous()),
        _rank(evidence, rule.rank),
        tiles.rows,
        keys_of_rows(evidence, tiles),
        scanned,
        rule.sink,
        rule.local,
        evidence.sm_scale,
        rule.ln_alpha - MARGIN,
    )
    return asked, asked.counts.sum(dim=2)


def packed(
    evidence: Evidence, asked: Asked, count: torch.Tensor, between: Between, most: Ints, most_tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key tiles of the keys that are asked for, as `choice.pick` packs them."""
    first, room = first_key_tiles(evidence, count, between, most, most_tiles)
    lanes = torch.full((room * between.block_k,), -1, dtype=torch.int32, device=count.device)
    side_by_side(asked, first * between.block_k, count > 0, lanes)
    return lanes, first


def _forms(by_form: list[HeadsOfKeys]) -> list[tuple[int, int]]:
    return [(own.kv_head, own.form) for own in by_form if own.form is not None]


def _rank(evidence: Evidence, rank: int) -> int:
    """The rank that there is: a basis may have less than a pattern asks for."""
    return rank if evidence.basis is None else min(rank, evidence.basis.rank)
