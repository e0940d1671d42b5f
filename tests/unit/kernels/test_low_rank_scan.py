"""The kernels that choose keys by low-rank scores, in Triton's interpreter, against scores that are written out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import Adaptive, Basis
from sglang_mminfer.kernels.triton import low_rank_scan
from sglang_mminfer.kernels.triton.low_rank_scan import ScannedTiles
from sglang_mminfer.patterns import choice
from sglang_mminfer.patterns.choice import MARGIN
from sglang_mminfer.patterns.estimated import Evidence
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from support import INTERPRETED, batches, conversation, examples, patterns_of_kind

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="the GPU kernel: in Triton's interpreter (make test-interpreted)"
)
SM_SCALE = 0.3


@dataclass
class Case:
    """One request: its last rows, cut into query tiles, over a pool whose other slots hold NaN."""

    group: int = 2
    kv_heads: int = 1
    dim: int = 64
    rank: int = 8
    shared: bool = True
    prefix: int = 90
    tile_rows: tuple[int, ...] = (16, 16, 5)
    sink: int = 5
    local: int = 9
    heads: tuple[int, ...] | None = None
    scale_of_basis: float = 1.0
    scale_of_keys: float = 1.0
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    seed: int = 0
    block_k: int = 8

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        rows, hq = sum(self.tile_rows), self.group * self.kv_heads
        self.num_keys = self.prefix + rows
        self.q = torch.randn(rows, hq, self.dim, generator=random).to(self.dtype)
        keys = torch.randn(self.num_keys, self.kv_heads, self.dim, generator=random).to(self.dtype) * self.scale_of_keys
        slots = torch.randperm(self.num_keys + 30, generator=random)[: self.num_keys]
        self.k_cache = torch.full((self.num_keys + 30, self.kv_heads, self.dim), torch.nan, dtype=self.dtype)
        self.k_cache[slots], self.slots = keys, slots.int()
        self.k_cache = self.k_cache.to(self.kv_dtype or self.dtype)
        number = self.kv_heads if self.shared else hq
        a, b = torch.randn(2, number, self.rank + 1, self.dim, generator=random) / self.rank**0.5
        self.basis = Basis(a * self.scale_of_basis, b / self.scale_of_basis)
        self.chosen = tuple(range(hq)) if self.heads is None else self.heads
        self.forms: dict[tuple[int, int], list[int]] = {}
        for head in self.chosen:
            self.forms.setdefault((head // self.group, self.basis.number(head, hq)), []).append(head)

    @property
    def tiles(self) -> ScannedTiles:
        counts = np.array(self.tile_rows)
        first = np.cumsum([0, *counts])[:-1]
        nearest = self.prefix + first + 1  # keys of a tile's first row
        between = choice.Between(
            np.full(len(counts), -(-self.sink // self.block_k)),
            np.maximum((nearest - self.local) // self.block_k - -(-self.sink // self.block_k), 0),
            self.block_k,
        )
        window = np.maximum(nearest - self.local, 0)
        lanes = between.first * self.block_k, between.num_keys, between.before[:-1]
        return ScannedTiles(first, counts, window, nearest + counts - 1, *lanes)

    def scan(self) -> low_rank_scan.Asked:
        forms = list(self.forms)
        low = low_rank_scan.project_keys(self.k_cache, self.slots, forms, self.basis.keys, self.rank)
        rows = torch.arange(len(self.q))
        return low_rank_scan.scan(
            self.q,
            self.k_cache,
            self.slots,
            low,
            forms,
            list(self.forms.values()),
            (self.basis.queries, self.basis.keys),
            self.rank,
            rows,
            (rows + self.prefix + 1).int(),
            self.tiles,
            self.sink,
            self.local,
            SM_SCALE,
            math.log(0.2) - MARGIN,
        )

    def above(self, head: int) -> torch.Tensor:
        """float64 [rows, keys]: scores minus the bounds of the exact rule."""
        q, k = self.q[:, head].double(), self.k_cache[self.slots.long(), head // self.group].double()
        a, b = (part[: self.rank].double() for part in self.basis.of_head(head, self.q.shape[1]))
        position, key = torch.arange(len(q))[:, None] + self.prefix, torch.arange(len(k))[None]
        seen = ((key < self.sink) | (position - key < self.local)) & (key <= position)
        mass = (q @ k.T * SM_SCALE).masked_fill(~seen, -torch.inf).logsumexp(dim=1)
        return (q @ a.T) @ (k @ b.T).T * SM_SCALE - (mass + math.log(0.2))[:, None]

    def assert_right(self, margins: int = 2) -> None:
        """Whatever the exact rule asks for is asked for, nothing lies two margins below it, and the counts count."""
        asked, tiles = self.scan(), self.tiles
        assert asked.keys.shape == (len(self.chosen), tiles.num_keys.sum())
        for h, head in enumerate(h for own in self.forms.values() for h in own):
            above = self.above(head)
            for t in range(len(self.tile_rows)):
                rows = slice(tiles.first_row[t], tiles.first_row[t] + tiles.num_rows[t])
                keys = slice(tiles.first_key[t], tiles.first_key[t] + tiles.num_keys[t])
                best = above[rows, keys].amax(dim=0)
                got = asked.keys[h, tiles.place[t] : tiles.place[t] + tiles.num_keys[t]].bool()
                assert not (got & (best < -margins * MARGIN)).any() and not (~got & (best > 0)).any()
                assert int(asked.counts[h, t].sum()) == int(got.sum())


@interpreted
@pytest.mark.parametrize("group", [1, 2, 3, 7, 9])
def test_triton_any_group(group):
    Case(group=group).assert_right()


@interpreted
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 32, 42])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_triton_any_rank_of_any_head_dim(dim, rank):
    Case(dim=dim, rank=rank, tile_rows=(16, 3), prefix=40).assert_right()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_any_scale_of_a_basis(dtype):
    for scale in (1e-6, 1e-3, 1e4):
        Case(scale_of_basis=scale, dtype=dtype).assert_right()


@interpreted
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_keys_of_fp8(dtype, kv_dtype):
    Case(dtype=dtype, kv_dtype=kv_dtype, group=3, kv_heads=2).assert_right()


@interpreted
def test_triton_scores_of_any_size():
    """Scores of tens and hundreds, where a half alone would be off by a tenth; and all of them small."""
    for scale in (10, 60, 1e-3):
        Case(scale_of_keys=scale, prefix=200).assert_right()
    Case(scale_of_keys=1000, scale_of_basis=30, dim=128, rank=16).assert_right(margins=40)


@interpreted
def test_triton_some_heads_with_forms_of_their_own():
    Case(group=3, kv_heads=2, shared=False, heads=(0, 2, 4)).assert_right()
    Case(group=3, kv_heads=2, heads=(1, 2, 5)).assert_right()


@interpreted
def test_triton_nothing_between_sink_and_window_for_some_tiles_or_for_all():
    Case(prefix=0, tile_rows=(16, 16, 16)).assert_right()
    Case(prefix=0, tile_rows=(9,)).assert_right()
    Case(sink=0, local=1).assert_right()


@interpreted
def test_triton_tiles_of_more_rows_than_a_program_has():
    Case(tile_rows=(40, 7)).assert_right()


@interpreted
@settings(max_examples=examples(64))
@given(
    st.builds(
        Case,
        group=st.sampled_from([1, 2, 3]),
        kv_heads=st.integers(1, 2),
        dim=st.sampled_from([8, 24, 64]),
        rank=st.integers(1, 8),
        shared=st.booleans(),
        prefix=st.integers(0, 200),
        tile_rows=st.lists(st.integers(1, 16), min_size=1, max_size=3).map(tuple),
        sink=st.integers(0, 20),
        local=st.integers(1, 40),
        seed=st.integers(0, 99),
        block_k=st.sampled_from([4, 8, 64]),
    )
)
def test_triton_any_request(case):
    case.assert_right()


# ---- whole plans ---------------------------------------------------------------------------------------------


@interpreted
@settings(max_examples=examples(80))
@given(
    batch=batches(patterns_of_kind(Adaptive)),
    on_host=st.booleans(),
    at_a_time=st.sampled_from([1, 1000, 1 << 28]),
    room=st.sampled_from([40, 1 << 27]),
)
def test_triton_plans_visit_what_those_of_torch_visit(batch, on_host, at_a_time, room):
    """Several requests over pages among others' that hold NaN, any boundary, with bounds in place of sizes as well."""
    if batch.basis is None:
        number = batch.num_kv_heads
        batch.basis = Basis(*torch.randn(2, number, 3, 8, generator=torch.Generator().manual_seed(batch.seed)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "AT_A_TIME", at_a_time)
        patch.setattr(choice, "ROOM", room)
        if not on_host:
            patch.setattr(Evidence, "on_host", False)
        ours = batch.planned()
        got = batch.run(ours)
        patch.setattr(choice, "KERNEL_RANK", 0)
        theirs = batch.planned()
        expected = batch.run(theirs)
    for i in range(len(batch.maps)):
        for h in range(len(batch.heads)):
            visited = ours.visited_mask(i, h)
            assert torch.equal(visited, theirs.visited_mask(i, h))
            assert not (batch.exact_mask(i, h) & ~visited).any()
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=5e-6)


def test_what_finds_no_room_sees_everything_and_is_counted(monkeypatch):
    """As many keys as there is room for are picked, in the order of heads and tiles."""
    chat = conversation((64, 2, 4))
    n, slots = chat.length, torch.arange(chat.length)
    q, k = torch.randn(2, n, 1, 16, generator=torch.Generator().manual_seed(3))
    planner = BatchPlanner([RequestChunk(chat, 0, n, 0, slots)], n, block_q=64, block_k=16)
    heads, everything = [Adaptive(16, 32, 4, 0.2, 1.0)], torch.arange(n) + 1

    def planned(room: int) -> tuple[torch.Tensor, int]:
        monkeypatch.setattr(choice, "ROOM", room)
        before = len(planner.overflow)
        plan = planner.plan(heads, q, k, 0.25)
        return plan.visited_by_row[:, 0], int(sum(planner.overflow[before:]))

    free, none = planned(1 << 27)
    assert none == 0
    for room in (0, 64, 200):
        visited, number = planned(room)
        tiles = (visited == everything).view(-1, 64).all(dim=1)
        beyond = tiles & ~(free == everything).view(-1, 64).all(dim=1)
        assert number == int(beyond.sum()) > 0
        assert torch.equal(visited.view(-1, 64)[~beyond], free.view(-1, 64)[~beyond])
