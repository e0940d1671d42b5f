"""`pattern_mask` against masks drawn by hand: '#' is a key the row may see. One drawing for every rule of the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import (
    Adaptive,
    AShape,
    Boundary2D,
    Dense,
    Grid,
    ModalityMap,
    PooledBlocks,
    PooledQueries,
    QBoundary,
    TriShape,
    VerticalSlash,
    pattern_mask,
)
from support import IMAGE, TEXT, VIDEO, VISION, conversation, growing, heads, maps


def drawn(mask: torch.Tensor) -> str:
    """Rows of '#' and '.', cut after the diagonal."""
    assert not mask.triu(1).any(), "a row sees a key that comes after it"
    return " ".join("".join("#" if x else "." for x in row[: i + 1]) for i, row in enumerate(mask.tolist()))


def mask_of(conversation_: ModalityMap, pattern, **estimate) -> str:
    n = conversation_.length
    return drawn(pattern_mask(conversation_, pattern, 0, n, n, **estimate))


def lines(stride, v=False, h=False, s=False, phase=0, sink=0, local=1) -> Grid:
    return Grid(stride, v, h, s, phase, sink, local)


ALL_7 = "# ## ### #### ##### ###### #######"
FRAMES = conversation(2, (2, 1, 2), 1)  # t t | v v | v v | t
LONGER = conversation(2, (3, 1, 2), 1)  # three frames of two cells
COLUMNS = conversation(2, (1, 3, 2), 1)  # the same tokens as one image of three rows and two columns

SAME_LINE = "# ## #.# #..# #.#.# #..#.# #.#.#.# #..#.#.# #########"
PHASE_1_KEYS = "# ## #.# #..# #..## #..#.# #..#.## #..#.#.# #########"
PHASE_1_ROWS = "# ## #.# #### #...# ###### #.....# ######## #########"
ONLY_SINK_AND_SELF = "# ## #.# #..# #...# #....# #.....# #......# #########"


@pytest.mark.parametrize(
    ("conversation_", "pattern", "drawing"),
    [
        pytest.param(FRAMES, Dense(), ALL_7, id="dense"),
        pytest.param(FRAMES, AShape(1, 2), "# ## ### #.## #..## #...## #....##", id="a_shape"),
        pytest.param(FRAMES, AShape(0, 1), "# .# ..# ...# ....# .....# ......#", id="a_shape-no-sink"),
        pytest.param(FRAMES, AShape(3, 1), "# ## ### #### ###.# ###..# ###...#", id="a_shape-sink"),
        pytest.param(FRAMES, AShape(0, 7), ALL_7, id="a_shape-all"),
        pytest.param(FRAMES, TriShape(1, 2, 0), "# ## ### #.## #..## #...## #######", id="tri_shape-text-after-vision"),
        pytest.param(FRAMES, TriShape(1, 2, 2), "# ## ### #.## #..## ###### #######", id="tri_shape-tail"),
        pytest.param(FRAMES, TriShape(0, 1, 99), ALL_7, id="tri_shape-tail-longer-than-the-prompt"),
        pytest.param(
            conversation(4, (1, 1, 2), 2),
            TriShape(0, 1, 0),
            "# .# ..# ...# ....# .....# ####### ########",
            id="tri_shape-text-before-vision-is-sparse",
        ),
        pytest.param(conversation(4), TriShape(0, 1, 1), "# .# ..# ####", id="tri_shape-text-only"),
        pytest.param(LONGER, lines("frame", s=True, phase=9, sink=1), SAME_LINE, id="grid-frame-s"),
        pytest.param(LONGER, lines("frame", v=True, phase=1, sink=1), PHASE_1_KEYS, id="grid-frame-v"),
        pytest.param(LONGER, lines("frame", h=True, phase=1, sink=1), PHASE_1_ROWS, id="grid-frame-h"),
        pytest.param(COLUMNS, lines("row", s=True, phase=9, sink=1), SAME_LINE, id="grid-row-s"),
        pytest.param(COLUMNS, lines("row", v=True, phase=1, sink=1), PHASE_1_KEYS, id="grid-row-v"),
        pytest.param(COLUMNS, lines("row", h=True, phase=1, sink=1), PHASE_1_ROWS, id="grid-row-h"),
        pytest.param(COLUMNS, lines("frame", s=True, sink=1), ONLY_SINK_AND_SELF, id="grid-frame-s-of-one-frame"),
        pytest.param(LONGER, lines("row", s=True, sink=1), SAME_LINE, id="grid-row-s-across-frames"),
        pytest.param(LONGER, lines("frame", sink=1), ONLY_SINK_AND_SELF, id="grid-sink-and-local-only"),
        pytest.param(
            LONGER, lines("frame", v=True, h=True, phase=2, sink=1), ONLY_SINK_AND_SELF, id="grid-no-such-cell"
        ),
        pytest.param(
            LONGER,
            lines("frame", v=True, h=True, s=True, phase=0, sink=0, local=2),
            "# ## ### ..## ##### ..#### ####### ..###### #########",
            id="grid-v-h-s-local",
        ),
        pytest.param(
            conversation((2, 2, 2)),
            lines("frame", s=True),
            "# .# ..# ...# #...# .#...# ..#...# ...#...#",
            id="grid-frame-is-the-index-in-the-frame",
        ),
        pytest.param(
            conversation((2, 2, 2)),
            lines("row", s=True),
            "# .# #.# .#.# #.#.# .#.#.# #.#.#.# .#.#.#.#",
            id="grid-row-is-the-column",
        ),
        pytest.param(
            conversation(1, (2, 1, 2, 1), 1),
            lines("frame", s=True),
            "# .# ..# ...# .#..# ..#..# #######",
            id="grid-frames-apart-s",
        ),
        pytest.param(
            conversation(1, (2, 1, 2, 1), 1),
            lines("frame", v=True),
            "# .# .## .#.# .#..# .#..## #######",
            id="grid-frames-apart-v",
        ),
        pytest.param(
            conversation(1, (2, 1, 2, 1), 1),
            lines("frame", h=True),
            "# ## ..# ...# ##### .....# #######",
            id="grid-frames-apart-h",
        ),
        pytest.param(
            conversation((1, 1, 2), (2, 1, 2), (1, 2, 1), (1, 1, 2)),
            lines("frame", s=True),
            "# .# #.# .#.# #.#.# .#.#.# ......# .......# #.#.#...# .#.#.#...#",
            id="grid-s-joins-segments-of-one-shape-only",
        ),
        pytest.param(
            conversation((1, 1, 2), (1, 2, 1)),
            lines("frame", v=True),
            "# ## #.# #.##",
            id="grid-v-runs-through-all-shapes",
        ),
        pytest.param(
            conversation(("video", 3), (1, 1, 2)),
            lines("frame", v=True, h=True, s=True),
            "# .# ..# #### ...##",
            id="grid-without-a-raster",
        ),
        pytest.param(
            conversation(2, ("image", 2), 2),
            lines("row", s=True),
            "# .# ..# ...# ##### ######",
            id="grid-text-after-vision-without-a-raster",
        ),
    ],
)
def test_a_pattern_alone(conversation_, pattern, drawing):
    assert mask_of(conversation_, pattern) == drawing


# t t | v v | v v | t t | i i | t
TURNS = conversation(2, (2, 1, 2), 2, (1, 1, 2), 1)


@pytest.mark.parametrize(
    ("conversation_", "head", "drawing"),
    [
        pytest.param(
            FRAMES, QBoundary({TEXT: AShape(1, 1)}), "# ## ### #### ##### ###### #.....#", id="q-not-named-is-dense"
        ),
        pytest.param(
            FRAMES,
            QBoundary({VISION: AShape(1, 1)}),
            "# ## #.# #..# #...# #....# #######",
            id="q-vision-is-image-and-video",
        ),
        pytest.param(
            FRAMES,
            QBoundary({TEXT: lines("frame")}),
            "# .# ### #### ##### ###### #######",
            id="q-keeps-text-after-vision",
        ),
        pytest.param(
            FRAMES,
            QBoundary({TEXT: AShape(0, 2), VIDEO: AShape(1, 1), IMAGE: Dense()}),
            "# ## #.# #..# #...# #....# .....##",
            id="q-each-modality-over-all-keys",
        ),
        pytest.param(
            TURNS,
            Boundary2D(
                {
                    (TEXT, TEXT): AShape(1, 2),
                    (TEXT, VISION): AShape(1, 1),
                    (VIDEO, TEXT): AShape(0, 1),
                    (IMAGE, VIDEO): AShape(1, 1),
                }
            ),
            "# ## .## .### .#### .##### ###..## #.#..### ###..#### ###..##### #.#....#.##",
            id="2d-sink-and-local-count-in-the-key-modality",
        ),
        pytest.param(
            TURNS,
            Boundary2D({(TEXT, IMAGE): AShape(0, 1), (TEXT, VIDEO): AShape(0, 1), (TEXT, TEXT): AShape(0, 1)}),
            "# .# ### #### ##### ###### .....## .....#.# ######### ########## .....#...##",
            id="2d-image-and-video-apart",
        ),
        pytest.param(
            TURNS,
            Boundary2D({(TEXT, VISION): AShape(0, 1), (TEXT, TEXT): AShape(0, 1)}),
            "# .# ### #### ##### ###### .....## .....#.# ######### ########## .........##",
            id="2d-image-and-video-as-vision",
        ),
        pytest.param(
            TURNS,
            Boundary2D({(VISION, TEXT): AShape(0, 1)}),
            "# ## .## .### .#### .##### ####### ######## ..####.## ..####.### ###########",
            id="2d-vision-rows-and-unnamed-pairs",
        ),
        pytest.param(
            TURNS,
            Boundary2D({(TEXT, VISION): lines("frame", v=True), (TEXT, TEXT): AShape(0, 1)}),
            "# .# ### #### ##### ###### ..#.### ..#.##.# ######### ########## ..#.#...###",
            id="2d-grid-gives-text-no-special-right",
        ),
        pytest.param(
            TURNS,
            Boundary2D({(TEXT, VISION): TriShape(0, 1, 0), (TEXT, TEXT): AShape(0, 1)}),
            "# .# ### #### ##### ###### ..##### ..####.# ######### ########## ..####..###",
            id="2d-tri_shape-sees-all-of-the-pair",
        ),
        pytest.param(
            TURNS,
            Boundary2D({(IMAGE, VISION): lines("frame", s=True)}),
            "# ## ### #### ##### ###### ####### ######## ###.#.### ##.#.###.# ###########",
            id="2d-grid-lines-across-image-and-video",
        ),
        pytest.param(
            TURNS,
            Boundary2D({(IMAGE, VIDEO): lines("frame", v=True, phase=1, sink=0)}),
            "# ## ### #### ##### ###### ####### ######## ##.#.#### ##.#.##### ###########",
            id="2d-grid-columns-of-the-pair-only",
        ),
    ],
)
def test_a_boundary(conversation_, head, drawing):
    assert mask_of(conversation_, head) == drawing


def attending(n: int, rows: dict[int, list[int]]) -> dict:
    """q and k where row i spreads its attention evenly over `rows[i]`, and the other rows over everything."""
    q = torch.zeros(n, n)
    for row, keys in rows.items():
        q[row, keys] = 30.0
    return {"q": q, "k": torch.eye(n), "sm_scale": 1.0}


# The column 5 and the diagonal 4 back stand out; key 7 is after row 6 and must not count.
PLANTED = attending(8, {6: [2, 5, 7], 7: [3, 5]})


@pytest.mark.parametrize(
    ("pattern", "drawing"),
    [
        pytest.param(VerticalSlash(2, 2, 2), "# ## #.# #..# #...# ##...# #.#..## #..#.#.#", id="planted"),
        pytest.param(
            VerticalSlash(3, 3, 2), "# ## ### #### ##.## ##..## ###..## ##.#.###", id="forced-first-and-nearest"
        ),
        pytest.param(VerticalSlash(0, 2, 2), "# .# ..# ...# #...# .#...# ..#...# ...#...#", id="no-columns"),
        pytest.param(
            VerticalSlash(2, 1, 2), "# ## #.# #..# #...# #....# #....## #....#.#", id="nearest-diagonal-is-kept"
        ),
        pytest.param(
            VerticalSlash(9, 1, 2), "# ## ### #### ##### ###### ####### ########", id="more-columns-than-keys"
        ),
        pytest.param(
            VerticalSlash(0, 9, 2), "# ## ### #### ##### ###### ####### ########", id="more-diagonals-than-keys"
        ),
    ],
)
def test_vertical_slash_keeps_the_heaviest_columns_and_diagonals(pattern, drawing):
    assert mask_of(conversation(8), pattern, **PLANTED) == drawing


def test_vertical_slash_looks_at_the_last_queries_only():
    estimate = attending(8, {5: [1], 6: [2], 7: [3]})
    assert mask_of(conversation(8), VerticalSlash(2, 1, 1), **estimate) == "# ## #.# #..# #..## #..#.# #..#..# #..#...#"


def test_vertical_slash_forces_at_most_thirty_columns_and_a_hundred_diagonals():
    assert (VerticalSlash(100, 400).forced_columns, VerticalSlash(100, 400).forced_diagonals) == (30, 100)
    assert (VerticalSlash(5, 5).forced_columns, VerticalSlash(5, 5).forced_diagonals) == (3, 3)


def test_vertical_slash_scales_the_scores_by_one_over_root_d_unless_told():
    n = 40
    q, k = torch.randn(n, 16, generator=torch.Generator().manual_seed(0)), torch.randn(n, 16)
    pattern, chat = VerticalSlash(6, 6, 8), conversation(n)
    assert mask_of(chat, pattern, q=q, k=k) == mask_of(chat, pattern, q=q, k=k, sm_scale=0.25)


def test_q_boundary_estimates_each_modality_from_its_own_last_queries():
    chat = conversation(4, (1, 1, 2), 2)
    head = QBoundary({TEXT: VerticalSlash(2, 1, 1), IMAGE: VerticalSlash(2, 1, 1)})
    estimate = attending(8, {5: [1], 7: [2]})
    assert mask_of(chat, head, **estimate) == "# ## #.# #.## ##..# ##...# #.#...# #.#....#"


def test_2d_boundary_counts_columns_and_diagonals_in_the_key_modality():
    chat = conversation(1, (1, 1, 4), 3)
    estimate = attending(8, {7: [2]})
    columns_and_diagonals = Boundary2D({(TEXT, IMAGE): VerticalSlash(1, 2, 1)})
    expected = "# ## ### #### ##### ###.## ###.### ###.####"  # the first image key, the nearest, and 2 back from it
    assert mask_of(chat, columns_and_diagonals, **estimate) == expected


def test_2d_boundary_softmax_of_the_estimate_runs_over_all_keys():
    """Row 5 looks at key 2 alone among the images, but hardly at all beside text; row 6 looks at keys 3 and 4."""
    chat = conversation(1, (1, 1, 4), 2)
    q, k = torch.zeros(7, 7), torch.eye(7)
    q[5, [0, 1, 2, 3]] = torch.tensor([40.0, 20.0, 30.0, 20.0])
    q[6, [0, 3, 4]] = torch.tensor([20.0, 20.0, 19.0])
    head = Boundary2D({(TEXT, IMAGE): VerticalSlash(2, 1, 2)})
    assert mask_of(chat, head, q=q, k=k, sm_scale=1.0) == "# ## ### #### ##### ##.### ##.####"


# Rows 8 to 11 share a group. One of them decides for all.
FIRST_ROWS = "# ## ### ####"
EQUAL_ROWS = "##### ###### ####### ########"  # rows 4 to 7 look at nothing more than at anything else


@pytest.mark.parametrize(
    ("alpha", "sink", "local", "drawing"),
    [
        pytest.param(0.5, 0, 1, "..##..### ..##..#### ..##..##### ..##..######", id="the-heaviest-and-the-window"),
        pytest.param(0.5, 1, 1, "####..### ####..#### ####..##### ####..######", id="whole-blocks-of-the-sink"),
        pytest.param(0.5, 0, 3, "..####### ..######## ..######### ..##########", id="whole-blocks-of-the-window"),
        pytest.param(1e-7, 0, 1, "######### ########## ########### ############", id="light-blocks-weigh-enough"),
    ],
)
def test_pooled_blocks_keep_what_weighs_enough_beside_the_heaviest(alpha, sink, local, drawing):
    """Key 3 shares its weight of 30 with key 2: exp(15) for the block, where others have 4 for four rows."""
    pattern = PooledBlocks(sink, local, alpha, group=4, block=2)
    assert mask_of(conversation(12), pattern, **attending(12, {9: [3]})) == f"{FIRST_ROWS} {EQUAL_ROWS} {drawing}"


def test_a_block_that_is_not_complete_before_the_group_is_seen():
    pattern = PooledBlocks(0, 1, 0.5, group=4, block=3)
    assert mask_of(conversation(12), pattern, **attending(12, {9: [1]})).split()[8:] == [
        "###...###",
        "###...####",
        "###...#####",
        "###...######",
    ]


@pytest.mark.parametrize(
    ("span", "alpha", "drawing"),
    [
        pytest.param(8, 0.5, "...#...## ...#...### ...#...#### ...#...#####", id="one-maximum"),
        pytest.param(4, 0.5, "...#.#.## ...#.#.### ...#.#.#### ...#.#.#####", id="a-maximum-of-each-span"),
        pytest.param(8, 1e-4, "...#.#.## ...#.#.### ...#.#.#### ...#.#.#####", id="exp(-7.5)-is-enough"),
    ],
)
def test_pooled_queries_keep_single_keys_that_the_mean_query_scores_highest(span, alpha, drawing):
    """The mean of four queries scores key 3 with 15, key 5 with 7.5."""
    pattern, estimate = PooledQueries(0, 1, alpha, group=4, span=span), attending(12, {8: [3], 9: [3], 10: [5]})
    assert mask_of(conversation(12), pattern, **estimate) == f"{FIRST_ROWS} {EQUAL_ROWS} {drawing}"


def test_2d_boundary_pools_the_keys_of_its_key_modality():
    chat, estimate = conversation(2, (1, 1, 6), 4), attending(12, {8: [4]})
    queries = Boundary2D({(TEXT, IMAGE): PooledQueries(0, 1, 0.5, group=4, span=99)})
    blocks = Boundary2D({(TEXT, IMAGE): PooledBlocks(0, 1, 0.5, group=4, block=2)})
    assert mask_of(chat, queries, **estimate).split()[8:10] == ["##..#..##", "##..#..###"]
    assert mask_of(chat, blocks, **estimate).split()[8:10] == ["##..#####", "##..######"]


@settings(max_examples=60)
@given(maps(), heads(growing), st.data())
def test_the_mask_of_a_chunk_is_a_part_of_the_whole_mask(conversation_, head, data):
    n = conversation_.length
    whole = pattern_mask(conversation_, head, 0, n, n)
    stop = data.draw(st.integers(0, n))
    start, kv_stop = data.draw(st.integers(0, stop)), data.draw(st.integers(stop, n))
    assert torch.equal(pattern_mask(conversation_, head, start, stop, kv_stop), whole[start:stop, :kv_stop])
    turns = data.draw(st.integers(1, len(conversation_.segments)))
    earlier = ModalityMap(conversation_.segments[:turns])
    m = earlier.length
    assert torch.equal(pattern_mask(earlier, head, 0, m, m), whole[:m, :m])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, 4, 7), "q_start=5, q_stop=4"),
        ((-1, 4, 7), "q_start=-1"),
        ((0, 7, 6), "q_stop=7, kv_stop=6"),
        ((0, 7, 8), r"kv_stop <= 7 \(the map's length\), got .*kv_stop=8"),
    ],
)
def test_positions_out_of_range_are_refused(arguments, words):
    with pytest.raises(ValueError, match=f"pattern_mask: .*{words}"):
        pattern_mask(FRAMES, Dense(), *arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality_map": None}, "modality_map: expected a ModalityMap, got None"),
        ({"pattern": "dense"}, "pattern: expected a pattern or a boundary, got 'dense'"),
        ({"pattern": Dense}, "pattern: expected a pattern or a boundary, got <class"),
        ({"q_stop": 5.0}, "q_stop: expected an integer, got 5.0"),
        ({"kv_stop": "7"}, "kv_stop: expected an integer, got '7'"),
        ({"q": [[1.0]]}, r"q: expected a tensor or None, got \[\[1.0\]\]"),
        ({"sm_scale": "1"}, "sm_scale: expected a number or None, got '1'"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(changes, words):
    whole = {"modality_map": FRAMES, "pattern": Dense(), "q_start": 0, "q_stop": 7, "kv_stop": 7}
    with pytest.raises(ValueError, match=f"^pattern_mask: {words}"):
        pattern_mask(**whole | changes)


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        ({}, r"needs q \[rows, D\] and k"),
        ({"q": torch.zeros(7, 4)}, r"needs q \[rows, D\] and k"),
        ({"q": torch.zeros(6, 4), "k": torch.zeros(7, 4)}, r"got \[6, 4\] and \[7, 4\]"),
        ({"q": torch.zeros(7, 4), "k": torch.zeros(8, 4)}, r"got \[7, 4\] and \[8, 4\]"),
        ({"q": torch.zeros(7, 4), "k": torch.zeros(7, 8)}, r"got \[7, 4\] and \[7, 8\]"),
    ],
)
@pytest.mark.parametrize(
    "pattern", [VerticalSlash(2, 2), Adaptive(1, 1, 1, 0.5), PooledBlocks(1, 1, 0.5), PooledQueries(1, 1, 0.5)]
)
def test_an_estimated_pattern_needs_the_queries_and_keys_of_its_head(pattern, estimate, words):
    with pytest.raises(ValueError, match=f"pattern_mask: .*{words}"):
        pattern_mask(FRAMES, pattern, 0, 7, 7, **estimate)
