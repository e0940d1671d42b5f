"""The wrapper as a user holds it: what it visits, what it computes from that, and what must make no difference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import (
    AShape,
    Boundary2D,
    Dense,
    Grid,
    QBoundary,
    SparsePrefillWithPagedKVCacheWrapper,
    TriShape,
    VerticalSlash,
)
from sglang_mminfer.kernels.reference import masked_attention
from sglang_mminfer.kernels.torch_gather import merge_state
from sglang_mminfer.patterns.base import fields_of, kinds
from sglang_mminfer.patterns.boundary import patterns_of
from sglang_mminfer.patterns.index import Scope
from sglang_mminfer.patterns.pair import Pair
from sglang_mminfer.planning.tiles import ChunkTiler
from support import (
    EXECUTORS,
    IMAGE,
    REAL,
    TEXT,
    VIDEO,
    VISION,
    Batch,
    D,
    alone,
    any_pattern,
    batches,
    boundary_2d,
    causal,
    check,
    conversation,
    examples,
    growing,
    heads,
    is_estimated,
    maps,
    patterns_of_kind,
    q_boundary,
    static,
    tile_sizes,
)


@settings(max_examples=examples(80))
@given(batches())
def test_every_pattern_is_visited_and_the_result_is_softmax_over_what_is_visited(batch):
    check(batch, EXECUTORS[0])


@settings(max_examples=examples(40))
@given(batches(static))
def test_every_pattern_is_visited_in_float16_too(batch):
    """Static ones: an estimate may fall out otherwise where two columns are as heavy."""
    check(replace(batch, dtype=torch.float16, qs=[], ks=[], vs=[]), EXECUTORS[0])


@settings(max_examples=25)
@given(batches(max_requests=2, max_length=50))
def test_the_same_of_the_reference_executor(batch):
    check(batch, "reference")


PATTERNS = {
    "dense": Dense(),
    "a_shape": AShape(70, 90),
    "tri_shape": TriShape(30, 64, 5),
    "vertical_slash": VerticalSlash(60, 40),
    "grid-frame": Grid("frame", True, True, True, 3, 16, 64),
    "grid-row": Grid("row", False, False, True, 1, 16, 64),
    "q": QBoundary(
        {TEXT: AShape(8, 80), VIDEO: Grid("frame", True, False, True, 0, 8, 30), IMAGE: VerticalSlash(9, 9)}
    ),
    "2d": Boundary2D(
        {
            (VIDEO, VISION): Grid("frame", False, True, True, 2, 8, 30),
            (VIDEO, TEXT): AShape(8, 8),
            (TEXT, VISION): VerticalSlash(20, 10),
            (IMAGE, IMAGE): AShape(1, 70),
        }
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_same_with_real_tile_sizes(name):
    chats = [
        conversation(40, (8, 6, 7), 50, (1, 6, 7), 30, ("video", 60)),
        conversation(9, (11, 5, 7, 3), (1, 9, 9), 100),
    ]
    head = PATTERNS[name]
    kv_lens = [chats[0].length, 513]
    check(Batch(chats, [kv_lens[0] - 130, 513], kv_lens, [head, head], page_size=16, tiles=(128, 64)), EXECUTORS[0])


# ---- no more than the pattern, rounded to tiles ------------------------------------------------------------


def rounded(wanted: torch.Tensor, row_tiles: torch.Tensor, key_tiles: torch.Tensor) -> torch.Tensor:
    """All (row, key) of the (row tile, key tile) pairs in which any row wants any key; a tile of -1 is none."""
    num_rows, num_keys = int(row_tiles.max()) + 2, int(key_tiles.max()) + 2  # the last one takes the -1
    pairs = torch.zeros(num_rows, num_keys, dtype=torch.bool)
    row, key = wanted.nonzero(as_tuple=True)
    pairs[row_tiles[row], key_tiles[key]] = True
    pairs[-1], pairs[:, -1] = False, False
    return pairs[row_tiles][:, key_tiles]


def tile_numbers(members: torch.Tensor, block: int) -> torch.Tensor:
    """The tile of every member, counted among the members; -1 for the others."""
    return torch.where(members, (members.cumsum(0) - 1) // block, -1)


def row_tiles_of(group: torch.Tensor, block: int, far: torch.Tensor) -> torch.Tensor:
    """The tile of every row of a group; -1 for the others. A tile begins anew where more than far[row] positions lie
    between a row and the one before it."""
    tiles, tile, rows, previous = torch.full_like(far, -1), 0, 0, 0
    for row in group.nonzero().flatten().tolist():
        if rows == block or (rows and row - previous - 1 > far[row]):
            tile, rows = tile + 1, 0
        tiles[row], rows, previous = tile, rows + 1, row
    return tiles


def raster_tiles(chat, stride: str, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every token, line by line through each raster: its tile in this order, its line, its segment's shape.
    -1 where there is no raster. Tiles of different segments have different numbers."""
    tiles, lines, shapes = (torch.full((chat.length,), -1) for _ in range(3))
    known, next_tile = {}, 0
    cells = chat.cells(stride)
    for segment in chat.segments:
        if segment.grid is None or not (segment.grid.raster or stride == "frame"):
            continue
        inside = torch.arange(segment.start, segment.stop)
        inside = inside[cells[inside] >= 0]
        order = inside[torch.argsort(cells[inside], stable=True)]
        tiles[order] = next_tile + torch.arange(len(order)) // block
        next_tile = int(tiles.max()) + 1
        lines[order] = cells[order].long()
        shapes[order] = known.setdefault(segment.grid.shape, len(known))
    return tiles, lines, shapes


def pairs_of(chat, head, row_class) -> list[tuple]:
    """(keys of the class, the class or None, pattern) for each pair that rows of one modality run."""
    if not isinstance(head, Boundary2D):
        own = head
        if isinstance(head, QBoundary):
            own = next((p for m, p in head.patterns.items() if m.covers(row_class)), Dense())
        return [(torch.ones(chat.length, dtype=torch.bool), None, own)]
    named = {k: p for (q, k), p in head.patterns.items() if q.covers(row_class)}
    named |= {m: Dense() for m in REAL if not any(k.covers(m) for k in named)}
    return [(chat.members(k), k, p) for k, p in named.items()]


def whole_rows(chat, pattern, keys: torch.Tensor, key_class, text_rule: bool) -> torch.Tensor:
    """The rows that see every key of a pair. For kinds that are not spelled out here, what the pattern itself says."""
    position = torch.arange(chat.length)
    text_after_vision = chat.members(TEXT) & (position > chat.first_vision)
    if isinstance(pattern, TriShape):
        return text_after_vision | (position >= chat.length - pattern.tail)
    whole = torch.full((chat.length,), isinstance(pattern, Dense))
    if isinstance(pattern, Grid):
        whole |= text_after_vision & text_rule
        whole |= (chat.cells(pattern.stride) == pattern.phase) & pattern.h
        for (
            segment
        ) in chat.segments:  # a raster that is not known, or not there, cannot be sparse for the rows after it
            if segment.modality is TEXT or not keys[segment.start]:
                continue
            if segment.grid is None or not (segment.grid.raster or pattern.stride == "frame"):
                whole[segment.start :] = True
    elif not isinstance(pattern, Dense):
        said = pattern.index(Scope(chat, chat.length, keys=key_class, text_rule=text_rule)).whole_rows
        if said is not None:
            whole[torch.from_numpy(said.clip(0, chat.length).members())] = True
    return whole


def single_keys(chat, pattern, rows: torch.Tensor, keys: torch.Tensor, text_rule: bool) -> torch.Tensor:
    """What a pattern asks for, key by key: columns are gathered, so that nothing beside them is visited."""
    n = chat.length
    return pattern.visible(Pair(chat, 0, n, n, rows, keys, text_rule))


def window_of(pattern) -> tuple[int, int]:
    return getattr(pattern, "sink", 0), getattr(pattern, "local", 0)


def windows(window: tuple[int, int], keys: torch.Tensor, row_tiles: torch.Tensor, block: int) -> torch.Tensor:
    """For rows of one tile the tiles of keys that hold the sink, and those from the first key in the window of its
    first row on: a window reaches from a tile's first row to its last, whoever's rows lie between."""
    (sink, local), rank, key_tiles = window, keys.cumsum(0), tile_numbers(keys, block)
    wanted = torch.zeros(len(keys), len(keys), dtype=torch.bool)
    for tile in range(int(row_tiles.max()) + 1):
        rows = row_tiles == tile
        first_key = max(0, int(rank[rows.nonzero()[0]]) - local)
        wanted[rows] = keys & ((key_tiles < -(-sink // block)) | (key_tiles >= first_key // block))
    return wanted


def at_most(chat, head, block_q: int, block_k: int) -> torch.Tensor:
    """What a plan may visit of a whole prompt at most: for each pair of a row and a key modality the pattern,
    rounded to tiles of rows with the same rights and to tiles of keys, in the order in which either is laid out."""
    n = chat.length
    triangle = torch.ones(n, n, dtype=torch.bool).tril()
    allowed = torch.zeros(n, n, dtype=torch.bool)
    for row_class in REAL if isinstance(head, QBoundary | Boundary2D) else (None,):
        rows = torch.ones(n, dtype=torch.bool) if row_class is None else chat.members(row_class)
        pairs = pairs_of(chat, head, row_class)
        rights = torch.zeros(n, dtype=torch.int64)  # bit j: sees all keys of pair j
        text_rule = not isinstance(head, Boundary2D)
        for j, (keys, key_class, pattern) in enumerate(pairs):
            rights |= whole_rows(chat, pattern, keys, key_class, text_rule).long() << j
        for right in rights[rows].unique().tolist():
            group = rows & (rights == right)
            far = torch.full((n,), block_q)  # what one more tile would visit
            for j, (keys, _, pattern) in enumerate(pairs):
                far += keys.cumsum(0) - keys.long() if right >> j & 1 else sum(window_of(pattern))
            row_tiles = row_tiles_of(group, block_q, far)
            for j, (keys, _, pattern) in enumerate(pairs):
                mine = group[:, None] & keys[None, :] & triangle
                if right >> j & 1:
                    allowed |= mine
                    continue
                allowed |= windows(window_of(pattern), keys, row_tiles, block_k) & mine
                allowed |= single_keys(chat, pattern, rows, keys, text_rule) & mine
                if isinstance(pattern, Grid) and pattern.s:
                    tiles_q, lines, shapes = raster_tiles(chat, pattern.stride, block_q)
                    tiles_k, _, _ = raster_tiles(chat, pattern.stride, block_k)
                    same_shape = (shapes[:, None] == shapes[None, :]) & (lines >= 0)[None, :]
                    same_line = same_shape & (lines[:, None] == lines[None, :])
                    allowed |= rounded(same_line, tiles_q, tiles_k) & same_shape & mine
    return allowed


@settings(max_examples=120)
@given(maps(), heads(static), tile_sizes)
def test_nothing_is_visited_beyond_the_pattern_rounded_to_tiles(chat, head, tiles):
    visited = alone(chat, head, tiles=tiles).planned().visited_mask(0, 0)
    beyond = visited & ~at_most(chat, head, *tiles)
    assert not beyond.any(), f"visited for nothing: {beyond.nonzero()[:5].tolist()}"


@settings(max_examples=40)
@given(st.integers(1, 110), st.integers(0, 12), st.integers(1, 12), st.integers(1, 16), tile_sizes, st.integers(0, 99))
def test_vertical_slash_visits_single_columns_and_no_more_than_the_tiles_of_its_diagonals(n, v, s, last_q, tiles, seed):
    chat = conversation(n)
    batch = replace(alone(chat, VerticalSlash(v, s, last_q), tiles=tiles), seed=seed, qs=[], ks=[], vs=[])
    wrapper = batch.planned()
    batch.run(wrapper)
    diagonals_only = replace(batch, heads=[VerticalSlash(0, s, last_q)]).exact_mask(0, 0)
    position = torch.arange(n)
    by_tile = rounded(diagonals_only, position // tiles[0], position // tiles[1])
    assert not (wrapper.visited_mask(0, 0) & ~(by_tile | batch.exact_mask(0, 0))).any()


VIDEO_CHAT = conversation(30, (24, 8, 8), 40)  # 1,606 tokens, 24 frames of 64


@pytest.mark.parametrize(
    ("head", "least", "most"),
    [
        (Dense(), 1.0, 1.0),
        (AShape(64, 128), 0.15, 0.31),
        (TriShape(64, 128, 0), 0.20, 0.35),
        (VerticalSlash(50, 4), 0.10, 0.36),
        (Grid("frame", False, False, True, 99, 16, 64), 0.15, 0.40),
        (Grid("frame", True, False, True, 5, 16, 64), 0.15, 0.41),
        (Grid("frame", True, False, False, 5, 16, 64), 0.15, 0.30),
        (Grid("row", False, False, True, 99, 16, 64), 0.20, 0.43),
        (QBoundary({VIDEO: AShape(64, 128)}), 0.20, 0.39),
        (Boundary2D({(VIDEO, VIDEO): AShape(64, 128), (TEXT, VIDEO): AShape(64, 128)}), 0.15, 0.39),
    ],
    ids=lambda x: getattr(x, "kind", None),
)
def test_density_at_real_tile_sizes_is_that_of_the_pattern(head, least, most):
    batch = alone(VIDEO_CHAT, head, tiles=(128, 64))
    wrapper = batch.planned()
    if is_estimated(head):
        batch.run(wrapper)
    assert least <= float(wrapper.density[0]) <= most
    assert wrapper.density[0] >= batch.exact_mask(0, 0).sum() / causal(batch, 0).sum()


def test_text_on_both_sides_of_a_video_does_not_see_the_video_because_it_shares_a_tile():
    head = Boundary2D({(TEXT, VIDEO): AShape(64, 128), (TEXT, TEXT): AShape(64, 128)})
    batch = alone(VIDEO_CHAT, head, tiles=(128, 64))  # 30 + 40 rows of text: less than a tile
    visited = batch.planned().visited_mask(0, 0)
    asked = visited[30 + 24 * 64 :, 30 : 30 + 24 * 64].sum(1)
    assert asked.max() <= 64 + 128 + 64
    later = replace(alone(VIDEO_CHAT, head, tiles=(128, 64)), q_lens=[12], qs=[], ks=[], vs=[])  # ends in the question
    assert torch.equal(later.planned().visited_mask(0, 0), visited[-12:])


def test_rows_that_are_not_further_apart_than_their_windows_share_tiles():
    chat = conversation(4, *[(1, 8, 8), 4] * 12)  # captions between images: one tile, not twelve
    head = Boundary2D({(TEXT, VISION): AShape(64, 256), (TEXT, TEXT): AShape(64, 256)})
    text, *_ = ChunkTiler(chat, 0, chat.length, 0, 128, 64).tile(head)[0]
    assert text.rows_per_tile.tolist() == [52]


# ---- patterns that cover everything ------------------------------------------------------------------------


def covering(n: int) -> st.SearchStrategy:
    """By hand, and of every kind with a window those whose window is the whole prompt."""
    windows = [cls for cls in kinds().values() if any(field.name == "local" for field in fields_of(cls))]
    return st.one_of(
        st.sampled_from([Dense(), AShape(n, 1), TriShape(0, 1, n), VerticalSlash(n * 2, 1, 3)]),
        st.just(VerticalSlash(0, n * 2, 1)),
        *(patterns_of_kind(cls, local=st.just(n)) for cls in windows),
    )


@settings(max_examples=30)
@given(batches(), st.data())
def test_patterns_that_cover_everything_are_dense(batch, data):
    patterns = covering(max(chat.length for chat in batch.maps))
    batch = replace(batch, heads=[data.draw(heads(patterns)) for _ in batch.heads])
    wrapper = batch.planned()
    out, lse = batch.run(wrapper)
    assert bool((wrapper.density == 1).all())
    dense = replace(batch, heads=[Dense()] * len(batch.heads))
    expected, expected_lse = dense.run(dense.planned())
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=5e-6)
    for i in range(len(batch.maps)):
        if batch.q_lens[i]:
            assert all(torch.equal(wrapper.visited_mask(i, h), causal(batch, i)) for h in range(len(batch.heads)))


# ---- LSE ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(batches(max_requests=1), st.data())
def test_lse_is_base_two_so_that_two_halves_of_the_keys_join_to_the_whole(batch, data):
    wrapper = batch.planned()
    out, lse = batch.run(wrapper)
    if not batch.q_lens[0]:
        return
    cut = data.draw(st.integers(0, batch.kv_lens[0]))
    before = torch.arange(batch.kv_lens[0]) < cut
    for h in range(len(batch.heads)):
        visited, kv = wrapper.visited_mask(0, h), h // batch.group
        q, k, v = batch.qs[0][:, h], batch.ks[0][:, kv], batch.vs[0][:, kv]
        halves = [masked_attention(q, k, v, visited & half, batch.scale) for half in (before, ~before)]
        joined, joined_lse = merge_state(*halves[0], *halves[1])
        torch.testing.assert_close(out[:, h], joined.float(), rtol=2e-5, atol=5e-6)
        torch.testing.assert_close(lse[:, h], joined_lse.float(), rtol=2e-5, atol=5e-6)


# ---- what must make no difference --------------------------------------------------------------------------


@settings(max_examples=30)
@given(batches())
def test_the_same_call_gives_the_same_bits(batch):
    wrapper = batch.planned()
    first = batch.run(wrapper)
    for again in (batch.run(wrapper), batch.run(batch.planned())):
        assert all(map(torch.equal, first, again))


@settings(max_examples=30)
@given(batches(), st.sampled_from([1, 2, 5, 16]), st.sampled_from(["NHD", "HND"]), st.booleans(), st.integers(0, 99))
def test_pages_and_layouts_change_no_bit(batch, page_size, kv_layout, packed, seed):
    """seed deals out other pages: the tensors of the requests stay."""
    other = replace(batch, page_size=page_size, kv_layout=kv_layout, packed=packed, seed=seed)
    assert all(map(torch.equal, batch.run(batch.planned()), other.run(other.planned())))


@settings(max_examples=40)
@given(batches(), st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
def test_a_cache_of_fp8_gives_the_bits_of_the_same_numbers_in_another_dtype(batch, dtype):
    stored = [[x.to(dtype) for x in own] for own in (batch.ks, batch.vs)]
    narrow = replace(batch, ks=stored[0], vs=stored[1])
    wide = replace(batch, ks=[x.float() for x in stored[0]], vs=[x.float() for x in stored[1]])
    assert all(map(torch.equal, narrow.run(narrow.planned()), wide.run(wide.planned())))


@settings(max_examples=20)
@given(batches(max_requests=2))
def test_scales_of_a_cache_are_factors_of_its_keys_and_values(batch):
    """By powers of two, so that nothing is rounded otherwise."""
    larger = replace(batch, ks=[4 * x for x in batch.ks], vs=[x / 8 for x in batch.vs])
    expected = larger.run(larger.planned())
    out, lse = batch.planned().run(batch.q, batch.cache(), k_scale=4.0, v_scale=1 / 8, return_lse=True)
    torch.testing.assert_close((out, lse), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=examples(20))
@given(batches(static, max_requests=2), st.sampled_from([-1.0, -0.1, 0.0]))
def test_a_scale_of_zero_or_below_is_a_factor_like_any_other(batch, scale):
    check(replace(batch, sm_scale=scale), EXECUTORS[0])


@settings(max_examples=20)
@given(maps(max_length=60), heads(any_pattern), st.sampled_from([(4, 1), (4, 2), (6, 3), (8, 1)]), st.integers(0, 99))
def test_one_pattern_for_all_heads_may_be_given_alone_or_once(chat, head, layout, seed):
    num_heads, num_kv_heads = layout
    n = chat.length
    batch = Batch([chat], [n], [n], [head] * num_heads, num_kv_heads, seed=seed)
    everyone = batch.run(batch.planned())
    for short in (head, [head], (head,)):
        assert all(map(torch.equal, everyone, batch.run(batch.planned(heads=short))))


@settings(max_examples=30)
@given(maps(max_length=60), st.lists(heads(static), min_size=2, max_size=4), st.integers(0, 99))
def test_a_head_does_not_depend_on_the_patterns_of_the_others(chat, patterns, seed):
    n = chat.length
    batch = Batch([chat], [n], [n], patterns, 1, seed=seed)
    wrapper = batch.planned()
    out, lse = batch.run(wrapper)
    for h, pattern in enumerate(patterns):
        same = replace(batch, heads=[pattern] * len(patterns))
        uniform = same.planned()
        out_same, lse_same = same.run(uniform)
        assert torch.equal(wrapper.visited_mask(0, h), uniform.visited_mask(0, h))
        torch.testing.assert_close(out[:, h], out_same[:, h], rtol=2e-5, atol=5e-6)
        torch.testing.assert_close(lse[:, h], lse_same[:, h], rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_requests_without_rows_or_without_keys(backend):
    chat = conversation(5, (2, 2, 2), 4)
    n = chat.length
    batch = Batch([chat] * 4, [0, 6, 0, n], [n, n, 0, n], [AShape(2, 3), Dense()], page_size=4)
    wrapper = batch.planned(backend)
    out, lse = batch.run(wrapper)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    assert [wrapper.visited_mask(i, 0).shape for i in range(4)] == [(0, n), (6, n), (0, 0), (n, n)]
    nobody = Batch([chat], [0], [n], [AShape(2, 3)])
    wrapper = nobody.planned(backend)
    out, lse = nobody.run(wrapper)
    assert out.shape == (0, 1, D) and lse.shape == (0, 1) and wrapper.density.tolist() == [1.0]


@pytest.mark.parametrize("backend", EXECUTORS)
def test_a_batch_of_no_requests(backend):
    batch = Batch([], [], [], [Dense(), AShape(1, 1)])
    wrapper = SparsePrefillWithPagedKVCacheWrapper(None, backend=backend)
    none = torch.zeros(0, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    wrapper.plan(zero, zero, none, none, 2, 1, D, 1, modality_maps=[], head_patterns=batch.heads, q_data_type="float32")
    cache = torch.zeros(3, 2, 1, 1, D)
    out, lse = wrapper.run(torch.empty(0, 2, D), cache, return_lse=True)
    assert out.shape == (0, 2, D) and lse.shape == (0, 2) and wrapper.density.tolist() == [1.0, 1.0]


def test_outputs_are_made_where_none_are_given():
    batch = alone(conversation(9, (2, 2, 2)), AShape(2, 4))
    wrapper = batch.planned()
    out, lse = batch.run(wrapper)
    assert torch.equal(wrapper.run(batch.q, batch.cache()), out)
    both = wrapper.run(batch.q, batch.cache(), return_lse=True)
    assert torch.equal(both[0], out) and torch.equal(both[1], lse) and both[1].dtype == torch.float32


@pytest.mark.parametrize("backend", EXECUTORS)
def test_outputs_may_be_parts_of_something_larger(backend):
    batch = alone(conversation(9, (2, 2, 2)), AShape(2, 4))
    wrapper = batch.planned(backend)
    expected, expected_lse = batch.run(wrapper)
    out = torch.full((*expected.shape[:2], 2 * D), torch.nan)
    lse = torch.full((*expected_lse.shape, 2), torch.nan)
    wrapper.run(batch.q, batch.cache(), out=out[..., ::2], lse=lse[..., 1], return_lse=True)
    assert torch.equal(out[..., ::2], expected) and torch.equal(lse[..., 1], expected_lse)
    assert bool(out[..., 1::2].isnan().all()) and bool(lse[..., 0].isnan().all())


def test_a_wrapper_is_planned_again_for_the_next_batch():
    first = alone(conversation(9, (2, 2, 2)), AShape(2, 4))
    second = alone(conversation(3, (3, 2, 2), 5), VerticalSlash(3, 3))
    wrapper = SparsePrefillWithPagedKVCacheWrapper(None, block_q=8, block_k=8)
    for batch in (first, second, first):
        plan_onto(batch, wrapper)
        assert all(map(torch.equal, batch.run(wrapper), batch.run(batch.planned())))


def plan_onto(batch: Batch, wrapper: SparsePrefillWithPagedKVCacheWrapper) -> None:
    tables = (batch.qo_indptr, batch.kv_indptr, batch.page_table, batch.last_page_len)
    wrapper.plan(*tables, 1, 1, D, 1, modality_maps=batch.maps, head_patterns=batch.heads, q_data_type="float32")


def test_cache_and_queries_may_have_different_dtypes():
    exact = alone(conversation(20, (3, 2, 3), 9), AShape(4, 9))
    rounded_cache = replace(exact, ks=[k.bfloat16() for k in exact.ks], vs=[v.bfloat16() for v in exact.vs])
    same_values = replace(exact, ks=[k.float() for k in rounded_cache.ks], vs=[v.float() for v in rounded_cache.vs])
    for backend in EXECUTORS:
        got = rounded_cache.run(rounded_cache.planned(backend))
        expected = same_values.run(same_values.planned(backend))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_strategies_draw_every_kind_of_head():
    """The generators themselves: what they never draw, no test above has seen."""
    seen = set()

    @settings(max_examples=300)
    @given(st.one_of(heads(), q_boundary(growing), boundary_2d(any_pattern)))
    def collect(head):
        seen.add(type(head))
        seen.update(type(p) for p in patterns_of(head))

    collect()
    assert seen == {*kinds().values(), QBoundary, Boundary2D}
