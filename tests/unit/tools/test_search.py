"""The search on heads whose pattern is known, and its allocation against every other choice."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from sglang_mminfer import Adaptive, AShape, Boundary2D, Dense, Grid, Modality, QBoundary, TriShape, VerticalSlash
from sglang_mminfer.head_config import HeadConfig, ModelFingerprint, Provenance
from sglang_mminfer.kernels.executors import EXECUTORS
from sglang_mminfer.patterns.base import Pattern
from sglang_mminfer.patterns.basis import basis_of, second_moments
from sglang_mminfer.patterns.ladder import RANKS
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.tools.search import BOUNDARIES
from sglang_mminfer.tools.search import job as jobs
from sglang_mminfer.tools.search.allocate import (
    Table,
    at_price,
    boundary_of,
    equal_budget,
    within_density,
    within_error,
)
from sglang_mminfer.tools.search.candidates import candidates
from sglang_mminfer.tools.search.measure import LayerProbe, cell_masses
from sglang_mminfer.tools.search.run import Calibration, Prober
from support import IMAGE, TEXT, VIDEO, VISION, conversation

CHAT = conversation(260, (28, 4, 4), 260, (20, 4, 4), 150)  # 1438 tokens: two videos of 16 cells among text
CELLS = CHAT.cells("frame")
D = 64
LOUD = 14.0  # the score of a key that a row looks for; other scores are about 0
KINDS = ("grid v", "grid s", "a_shape", "vertical_slash", "q-boundary", "2d-boundary")


def planted(kind: str, seed: int, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [tokens, 1, D] of a head that looks for one thing. The dims are cells, then flags, then noise."""
    random = torch.Generator().manual_seed(seed)
    n = CHAT.length
    q, k = torch.zeros(2, n, D)
    q[:, 40:], k[:, 40:] = torch.randn(2, n, D - 40, generator=random) * 0.3
    vision, place = CELLS >= 0, torch.arange(n) / n
    k[vision, CELLS[vision].long()] = 1.0  # dims 0 .. 15
    columns = torch.randperm(n - 200, generator=random)[:20]
    if kind == "grid v":
        q[:, phase] = LOUD
    elif kind == "grid s":
        q[vision, CELLS[vision].long()] = LOUD
    elif kind == "a_shape":
        sharp = 4000.0  # a window of a few dozen tokens: -sharp * (i - j)^2, written as a product
        q[:, 22], k[:, 22] = 1.0, -sharp * place.square()
        q[:, 23], k[:, 23] = 2 * sharp * place, place
    elif kind == "vertical_slash":
        k[columns, 24], q[:, 24] = 1.0, LOUD
    elif kind == "q-boundary":  # text rows look for columns, rows of a video for their own cell
        k[columns, 24], q[~vision, 24] = 1.0, LOUD
        q[vision, CELLS[vision].long()] = LOUD
    elif kind == "2d-boundary":  # rows of a video look for one cell of the videos, and at all of the text
        q[vision, phase], q[vision, 25] = LOUD, LOUD
        k[~vision, 25] = 1.0
    return q[:, None], k[:, None]


def rows_see(head, modality: Modality):
    return head.patterns[modality] if isinstance(head, QBoundary) else head


def named(kind: str, head, phase: int) -> bool:
    """Whether the found head is the planted head. Text rows that a grid leaves dense by its own rule may get any
    pattern."""
    of_video, of_text = rows_see(head, VIDEO), rows_see(head, TEXT)
    if kind == "grid v":
        return isinstance(of_video, Grid) and (of_video.v, of_video.stride, of_video.phase) == (True, "frame", phase)
    if kind == "grid s":
        return isinstance(of_video, Grid) and (of_video.s, of_video.v, of_video.stride) == (True, False, "frame")
    if kind == "a_shape":
        return isinstance(of_video, AShape) and isinstance(of_text, AShape)
    if kind == "vertical_slash":
        return isinstance(of_video, VerticalSlash) and isinstance(of_text, VerticalSlash)
    if kind == "q-boundary":
        return isinstance(of_video, Grid) and of_video.s and isinstance(of_text, VerticalSlash)
    pair = head.patterns.get((VISION, VISION)) if isinstance(head, Boundary2D) else None
    return isinstance(pair, Grid) and (pair.v, pair.phase) == (True, phase)


def table_of(q: torch.Tensor, k: torch.Tensor, seed: int) -> tuple[Table, list[str]]:
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(seed + 1))
    chunk = RequestChunk(CHAT, 0, CHAT.length, 0, torch.arange(CHAT.length))
    probe = LayerProbe(chunk, q, k, v, 1.0, EXECUTORS["torch"])
    phases = [
        [
            {s: cell_masses(CHAT, q, k, 1.0, s)[head].topk(3).indices.tolist() for s in ("frame", "row")}
            for head in range(q.shape[1])
        ]
    ]
    names, patterns, measured = [], [], []
    for name, heads in candidates(CHAT, phases):
        names.append(name)
        patterns.append(heads)
        measured.append(probe.measure(heads[0]))
    error = torch.stack([m.error for m in measured])[:, None].double().numpy()
    cost = torch.stack([m.visited for m in measured])[:, None].numpy()
    return Table(patterns, error, cost, probe.causal.numpy(), (TEXT, IMAGE, VIDEO)), names


@pytest.mark.parametrize("seed", range(10))
def test_every_planted_head_is_named(seed):
    phases = [(3 * seed + head) % 16 for head in range(len(KINDS))]
    q, k = (torch.cat(x, dim=1) for x in zip(*(planted(*of, p) for of, p in zip(product(KINDS, [seed]), phases))))
    table, _ = table_of(q, k, seed)
    (found,) = at_price(table, 1.0).heads
    wrong = {kind: head for kind, head, phase in zip(KINDS, found, phases) if not named(kind, head, phase)}
    assert not wrong


@pytest.mark.parametrize("words_after", [20, 2000])
def test_a_head_whose_rows_look_for_single_keys_chooses_them(words_after: int) -> None:
    """Neighbouring rows look for one key before them, by its code: no line, column or diagonal holds these keys."""
    chat, random = conversation(20, (170, 5, 5), words_after), torch.Generator().manual_seed(3)
    n = chat.length
    codes = torch.nn.functional.normalize(torch.randn(n, 12, generator=random), dim=1)
    first = torch.arange(n) // 64 * 64
    target = (torch.rand(n, generator=random)[first] * first).long()
    q, k = torch.zeros(2, n, 1, D)
    q[:, 0, :12], k[:, 0, :12] = LOUD * codes[target], 0.1 * codes
    k[target, 0, :12] = codes[target]
    v, basis = torch.randn(n, 1, D, generator=random), basis_of(second_moments(q), second_moments(k), max(RANKS))
    probe = LayerProbe(RequestChunk(chat, 0, n, 0, torch.arange(n)), q, k, v, 1.0, EXECUTORS["torch"], basis)
    tried = {
        name: heads
        for name, heads in candidates(chat, [[{"frame": [3, 1, 0]}]], RANKS)
        if name == "dense" or name.split()[0] in ("adaptive", "a_shape", "vertical_slash") or "grid frame" in name
    }
    measured = [probe.measure(heads[0]) for heads in tried.values()]
    error, pairs = (
        torch.stack(rows)[:, None].double().numpy()
        for rows in ([m.error for m in measured], [m.visited for m in measured])
    )
    table = Table(list(tried.values()), error, pairs, probe.causal.numpy(), (TEXT, IMAGE, VIDEO))
    ((found,),) = at_price(table, 1.0).heads
    assert isinstance(rows_see(found, VIDEO), Adaptive)
    if words_after > 1000:  # enough of them that it pays
        of_text = rows_see(found, TEXT)
        assert isinstance(of_text, Adaptive) and of_text.text == "chosen"
    others = [number for number, name in enumerate(tried) if not name.startswith("adaptive")]
    without = replace(table, patterns=[table.patterns[i] for i in others], error=error[others], pairs=pairs[others])
    assert within_density(table, 0.5).error < 0.1 * within_density(without, 0.5).error


# ---- the allocation ----------------------------------------------------------------------------------------


def small_table(seed: int, candidates: int = 4, layers: int = 2, heads: int = 2) -> Table:
    random = np.random.default_rng(seed)
    patterns = [[[AShape(0, 1 + c)] * heads] * layers for c in range(candidates)]
    shape = (candidates, layers, heads, 2)
    cost = np.sort(random.random(shape), axis=0)
    error = -np.sort(-random.random(shape), axis=0)  # a higher cost has a lower error
    cost[-1], error[-1] = 1.0, 0.0
    return Table(patterns, error, cost, np.ones(2), (TEXT, VIDEO))


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_of_the_same_density_errs_less(seed):
    """Against all 4^4 choices for two heads and two modalities: an allocation on the price curve is the best."""
    table = small_table(seed, layers=1)
    for price in (0.05, 0.3, 1.0, 3.0):
        found = at_price(table, price)
        density = table.pairs[:, 0] / table.causal.sum()
        for picks in product(range(4), repeat=4):
            index = (np.array(picks).reshape(2, 2), *np.indices((2, 2)))
            error, dense = table.error[:, 0][index].sum() / 2, density[index].sum() / 2
            assert not (error < found.error - 1e-12 and dense <= found.density + 1e-12)


def test_heads_of_one_kv_head_share_a_pattern_where_it_is_as_good():
    patterns = [[[AShape(0, 1 + c)] * 4] for c in range(3)]
    error = np.array([[1.0, 1.004, 1.0, 5.0], [1.004, 1.0, 5.0, 1.0], [0.0] * 4]).reshape(3, 1, 4, 1)
    cost = np.array([0.1, 0.1, 4.0])[:, None, None, None] * np.ones((3, 1, 4, 1))
    table = Table(patterns, error, cost, np.ones(1), (VIDEO,), group=2)
    assert at_price(replace(table, group=1), 1.0).heads == [[AShape(0, 1), AShape(0, 2), AShape(0, 1), AShape(0, 2)]]
    found = at_price(table, 1.0)
    assert found.heads == [[AShape(0, 1), AShape(0, 1), AShape(0, 1), AShape(0, 2)]]
    assert found.error == pytest.approx((1.0 + 1.004 + 1.0 + 1.0) / 4)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 1.0])
def test_budgets_are_kept_and_one_for_all_heads_is_no_worse_than_one_for_each(budget):
    for seed in range(20):
        table = small_table(seed)
        cheapest = at_price(table, 1e9).density
        if cheapest > budget:
            with pytest.raises(ValueError, match="budget: expected a density of at least"):
                within_density(table, budget)
            continue
        whole, equal = within_density(table, budget), equal_budget(table, budget)
        assert whole.density <= budget + 1e-9
        bound = within_error(table, whole.error + 1e-9)
        assert bound.error <= whole.error + 1e-6 and bound.density <= whole.density + 1e-6
        if equal.density <= budget:
            spent = within_density(table, equal.density) if equal.density >= cheapest else whole
            assert spent.error <= equal.error + 0.15, "far worse than a budget for each head"


def test_modalities_that_choose_differently_make_a_q_boundary_and_missing_ones_do_not_matter():
    patterns = [[[Dense()]], [[AShape(1, 1)]], [[TriShape(1, 2, 0)]]]
    error = np.array([[[[0.0, np.nan, 0.0]]], [[[0.0, np.nan, 5.0]]], [[[9.0, np.nan, 0.0]]]])
    cost = np.array([[[[5.0, 0.0, 5.0]]], [[[1.0, 0.0, 1.0]]], [[[1.0, 0.0, 1.0]]]])
    found = at_price(Table(patterns, error, cost, np.array([5.0, 0.0, 5.0]), (TEXT, IMAGE, VIDEO)), 1.0)
    # For rows of a video a tri-shape is only its A-shape.
    assert found.heads == [[QBoundary({TEXT: AShape(1, 1), VIDEO: AShape(1, 2)})]]
    assert found.error == 0 and found.density == pytest.approx(0.2)


@pytest.mark.parametrize(
    "of_text, of_video",
    [
        (Adaptive(64, 256, 8, 0.01, text="chosen"), Adaptive(64, 256, 8, 0.01)),
        (TriShape(1, 2, 0), AShape(1, 2)),
        (TriShape(1, 2, 0), TriShape(1, 2, 0)),
    ],
)
def test_choices_that_are_one_pattern_need_no_boundary(of_text: Pattern, of_video: Pattern) -> None:
    """What distinguishes the two choices is for rows of text alone."""
    error = np.array([[[[0.0, np.nan, 9.0]]], [[[9.0, np.nan, 0.0]]]])
    table = Table([[[of_text]], [[of_video]]], error, np.ones((2, 1, 1, 3)), np.ones(3), (TEXT, IMAGE, VIDEO))
    assert at_price(table, 1.0).heads == [[of_text]]


# ---- one budget among some boundaries ----------------------------------------------------------------------


def kinds(found) -> set[str]:
    return {boundary_of(head) for row in found.heads for head in row}


def test_only_the_boundaries_asked_for_are_found():
    """On planted heads, one for each boundary: without its boundary a head gets another one, and a larger error."""
    made = [planted(kind, 1, 5) for kind in ("grid v", "q-boundary", "2d-boundary")]
    table, _ = table_of(*(torch.cat(x, dim=1) for x in zip(*made)), 1)
    free = at_price(table, 1.0)
    assert kinds(free) >= {"q", "2d"}
    for some in (("none",), ("q",), ("2d",), ("none", "q"), ("none", "2d"), ("q", "2d")):
        within = table.only(some)
        found = at_price(within, 1.0)
        assert kinds(found) <= {*some, "none"}
        if "none" not in some and "q" not in some:
            single = {head for head in found.heads[0] if boundary_of(head) == "none"}
            assert single <= {Dense()}, "2D-Boundaries alone leave dense as the only pattern without one"
        assert found.error + found.density >= free.error + free.density - 1e-9
    assert at_price(table.only(BOUNDARIES), 1.0).heads == free.heads
    bare = at_price(table.only(("none",)), 1.0)
    assert bare.error + bare.density > free.error + free.density + 0.01


# Models in which some layers have no attention

HYBRID = ModelFingerprint("Made", 4, 2, 1, 8, 16, 1e4, (1, 3))


def test_candidates_are_numbered_as_in_the_model():
    text = jobs.as_config("made", [[AShape(1, 2), Dense()], [Dense(), Dense()]], HYBRID)
    config = HeadConfig.from_json(text)
    assert config.patterns(1) == [AShape(1, 2), Dense()] and config.patterns(3) == [Dense(), Dense()]
    assert config.patterns(0) == config.patterns(2) == []


def test_what_a_server_measured_is_read_by_the_models_numbers(tmp_path):
    """The search sees the layers with attention alone, and its basis has all layers, with 0 for the others."""
    prober = Prober(None, tmp_path, HYBRID, print)
    calibration = Calibration("made", [])
    draw = torch.Generator().manual_seed(0)
    for layer in HYBRID.full_layers:
        q, k = (torch.randn(heads, 8, 8, generator=draw).double() for heads in (2, 1))
        arrays = {"q": (q @ q.mT).numpy(), "k": (k @ k.mT).numpy(), "shares": np.full(2, layer / 10)}
        result = {"map": jobs.map_to_json(CHAT), "phases": [{"frame": [layer], "row": []}] * 2}
        path = jobs.result_path(tmp_path, f"made-phases-{jobs.FORMAT}", layer, 0)
        jobs.save(path, result, arrays)
    _, phases = prober.phases(calibration)
    assert [[head["frame"] for head in row] for row in phases] == [[[1], [1]], [[3], [3]]]
    basis = prober.basis([calibration], HYBRID, Provenance("search", "of a test", "made", "none", "2026-01-01"))
    assert [bool(basis.queries[layer].any()) for layer in range(4)] == [False, True, False, True]
    assert basis.shares.tolist() == [[0, 0], pytest.approx([0.1] * 2), [0, 0], pytest.approx([0.3] * 2)]
