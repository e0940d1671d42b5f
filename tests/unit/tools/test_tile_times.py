"""The time of a tile visit, how visits are counted, and how weighing by time changes a choice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_mminfer import AShape, Dense, Grid, Modality, QBoundary, VerticalSlash
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.executors import EXECUTORS
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.planning.row_loops import FULL, GATHERED, PARTIAL
from sglang_mminfer.planning.tiles import BLOCK_K, BLOCK_Q
from sglang_mminfer.tools.search import tile_times
from sglang_mminfer.tools.search.allocate import Table, within_density
from sglang_mminfer.tools.search.measure import MODALITIES, LayerProbe, visits_by_modality
from sglang_mminfer.tools.search.run import Scores
from sglang_mminfer.tools.search.tile_times import KINDS, TileTimes
from support import TEXT, VIDEO, conversation

CHAT = conversation(150, (12, 4, 4), 90, (10, 4, 4), 100)
CPU = torch.device("cpu")


def visited_plan(heads: list) -> tuple[BlockPlan, torch.Tensor]:
    """A plan, and the modality of each row."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(CHAT.length, len(heads), 32, generator=draw), torch.randn(CHAT.length, 1, 32, generator=draw)
    chunk = RequestChunk(CHAT, 0, CHAT.length, 0, torch.arange(CHAT.length))
    rows = torch.zeros(CHAT.length, dtype=torch.int64)
    for number, modality in enumerate(MODALITIES):
        rows[CHAT.members(modality)] = number
    return BatchPlanner([chunk], CHAT.length).plan(heads, q, k, 0.2), rows


def test_visits_are_those_of_the_plan_tile_by_tile() -> None:
    heads = [
        *(Dense(), AShape(64, 128), VerticalSlash(100, 64), Grid("frame", True, False, True, 2, 64, 64)),
        *(Dense(), QBoundary({VIDEO: Grid("row", False, False, True, 0, 64, 64), Modality.TEXT: AShape(64, 64)})),
    ]
    plan, modality_of_row = visited_plan(heads)
    found = visits_by_modality(plan, modality_of_row)
    expected = np.zeros(found.shape)
    for tile in range(plan.num_tiles):
        rows = plan.q_rows[plan.q_indptr[tile] : plan.q_indptr[tile + 1]].long()
        visits, full, gathered = (
            int(x) for x in (plan.block_indptr.diff()[tile], plan.num_full[tile], plan.num_gathered[tile])
        )
        for head in plan.head_groups[plan.q_heads[tile]]:
            for row in rows.tolist():
                kinds = np.array([full, visits - full - gathered, gathered])
                expected[head, modality_of_row[row]] += kinds / len(rows)
    np.testing.assert_allclose(found, expected)
    assert (found[0] == found[4]).all() and found[0, :, GATHERED].sum() == 0
    assert found[3, :, GATHERED].sum() > 0, "no tile was gathered: the case shows too little"
    tiles = -(-CHAT.length // BLOCK_Q)
    whole = sum(-(-min((t + 1) * BLOCK_Q, CHAT.length) // BLOCK_K) for t in range(tiles))
    assert float(found[0].sum()) == pytest.approx(whole), "dense visits every key tile up to the diagonal"


def test_an_estimate_counts_as_full_visits() -> None:
    chunk = RequestChunk(CHAT, 0, CHAT.length, 0, torch.arange(CHAT.length))
    q, k, v = torch.randn(3, CHAT.length, 1, 32, generator=torch.Generator().manual_seed(1))
    probe = LayerProbe(chunk, q, k, v, 0.2, EXECUTORS["torch"])
    pattern = VerticalSlash(64, 64)
    measured = probe.measure([pattern])
    _, rows = visited_plan([pattern])
    more = 2 * pattern.last_q * CHAT.length / (BLOCK_Q * BLOCK_K)
    extra = measured.visits.sum() - visits_by_modality(probe.plan([pattern]), rows).sum()
    assert float(extra) == pytest.approx(more)


@pytest.mark.parametrize("kind", range(3))
def test_a_made_up_plan_is_of_one_kind_and_runs(kind: int) -> None:
    plan = tile_times.made_up_plan(kind, 8, 3, CPU)
    found = visits_by_modality(plan, torch.zeros(3 * BLOCK_Q, dtype=torch.int64))
    assert found[:, 0].tolist() == [[24.0 if k == kind else 0.0 for k in range(3)]] * tile_times.HEADS
    visited = plan.visited_by_row.double() / (8 * BLOCK_K)
    low, high = {FULL: (1, 1), PARTIAL: (0.4, 0.6), GATHERED: (7 / 8, 7 / 8)}[kind]
    assert low <= float(visited.mean()) <= high and float(visited.max()) == (7 / 8 if kind == GATHERED else 1)
    q, k, v = torch.randn(3, 3 * BLOCK_Q, tile_times.HEADS, 32, generator=torch.Generator().manual_seed(2))
    k, v = (t.repeat(11, 1, 1)[: 2 * tile_times.MANY * BLOCK_K, :1].contiguous() for t in (k, v))
    outs = []
    for name in ("torch", "reference"):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        EXECUTORS[name](q, k, v, plan, 0.2, out, lse)
        outs.append(out)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_a_dearer_kind_measures_dearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that is slow on gathered tiles, by a clock of its own: a busy machine changes nothing."""
    clock = [0.0]

    def execute(q, k, v, plan: BlockPlan, *rest) -> None:
        visits = int(plan.block_indptr[-1])
        clock[0] += 2e-3 + visits * (30e-6 if int(plan.num_gathered.sum()) else 10e-6)

    monkeypatch.setattr(tile_times.time, "perf_counter", lambda: clock[0])
    found = tile_times.agreed([tile_times.measured(execute, 16, torch.float32, CPU) for _ in range(3)], "slow")
    assert found.full == pytest.approx(10, rel=0.02) and found.partial == pytest.approx(10, rel=0.02)
    assert found.picked == pytest.approx(30, rel=0.02)


def test_times_agree_to_two_digits_and_are_read_as_they_were_written(tmp_path: Path) -> None:
    import msgspec

    stretched = [[10.04, 20.2, 15.1], [30.1, 60.3, 45.2], [10.1, 20.1, 44.0]]  # a busy machine; one odd value
    found = tile_times.agreed(stretched, "torch")
    assert found == TileTimes(10.0, 20.0, 15.0, "torch")
    path = tmp_path / tile_times.FILE
    path.write_bytes(msgspec.json.encode(found))
    assert tile_times.load(path) == found and "full 10, partial 20, gathered 15 µs (torch)" in str(found)
    for broken in ("{", '{"full": 1}', '{"full": 0, "partial": 1, "picked": 1, "executor": "torch"}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"tile_times.json: expected times of tile visits"):
            tile_times.load(path)


def scores(visits: np.ndarray) -> Scores:
    """The scores of 2 candidates and dense. [3, L, H, M] pairs are the pairs of the tiles."""
    pairs = visits.sum(axis=-1) * BLOCK_Q * BLOCK_K
    return Scores(["a", "b", "dense"], np.zeros(pairs.shape), pairs, visits, pairs[2, 0, 0], np.zeros((3, 1)))


def test_of_as_many_pairs_the_quicker_one_is_taken_where_time_counts() -> None:
    """Two candidates of equal density and nearly equal error: full tiles, or gathered tiles that take twice as long."""
    visits = np.zeros((3, 1, 2, 2, len(KINDS)))
    visits[0, ..., FULL] = 10  # a
    visits[1, ..., GATHERED] = 10  # b, a little better
    visits[2, ..., FULL] = 40  # dense
    own = scores(visits)
    error = np.zeros((3, 1, 2, 2))
    error[0], error[1] = 0.50, 0.45
    patterns = [[[head] * 2] for head in (AShape(1, 1), VerticalSlash(1, 1), Dense())]
    by_pairs = Table(patterns, error, own.visited, own.causal, (TEXT, VIDEO))
    times = TileTimes(5.0, 5.0, 10.0, "torch")
    by_time = replace(by_pairs, time=own.time(times))
    assert by_time.cost[2].sum(axis=-1) == pytest.approx(1) and by_time.cost[1].sum(axis=-1) == pytest.approx(0.5)
    assert within_density(by_pairs, 0.25).heads == [[VerticalSlash(1, 1)] * 2]
    found = within_density(by_time, 0.25)
    assert found.heads == [[AShape(1, 1)] * 2]
    assert found.density == pytest.approx(0.25), "the budget is a density, whatever it takes"
    alike = replace(by_pairs, time=own.time(TileTimes(5.0, 5.0, 5.0, "torch")))
    assert within_density(alike, 0.25).heads == [[VerticalSlash(1, 1)] * 2], "all kinds alike: time is density"
