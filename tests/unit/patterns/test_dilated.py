"""`dilated` against masks drawn by hand: '#' is a key the row may see. All else, every pattern's tests hold it to."""

import pytest
import torch

from sglang_mminfer import Boundary2D, Dilated, ModalityMap, QBoundary, pattern_mask
from support import TEXT, VIDEO, VISION, alone, conversation

FRAMES = conversation(2, (2, 1, 2), 3)  # t t | v v | v v | t t t


def drawn(chat: ModalityMap, head) -> str:
    """Rows of '#' and '.', cut after the diagonal."""
    n = chat.length
    mask = pattern_mask(chat, head, 0, n, n)
    assert not mask.triu(1).any(), "a row sees a key that comes after it"
    return " ".join("".join("#" if x else "." for x in row[: i + 1]) for i, row in enumerate(mask.tolist()))


@pytest.mark.parametrize(
    ("head", "drawing"),
    [
        pytest.param(Dilated(0, 1, 3), "# ## #.# #..# #..## #..#.# #..#..# #..#..## #..#..#.#", id="every-third"),
        pytest.param(Dilated(2, 2, 4), "# ## ### #### ##.## ##..## ##..### ##..#.## ##..#..##", id="sink-and-window"),
        pytest.param(Dilated(0, 1, 1), "# ## ### #### ##### ###### ####### ######## #########", id="every-key"),
        pytest.param(Dilated(0, 2, 99), "# ## ### #.## #..## #...## #....## #.....## #......##", id="the-first-alone"),
        pytest.param(
            QBoundary({VIDEO: Dilated(0, 1, 3)}),
            "# ## #.# #..# #..## #..#.# ####### ######## #########",
            id="q-positions-are-those-of-the-prompt",
        ),
        pytest.param(
            Boundary2D({(TEXT, VISION): Dilated(0, 1, 3), (TEXT, TEXT): Dilated(0, 1, 4)}),
            "# ## ### #### ##### ###### #..#.## #..#.#.# #..#.#..#",
            id="2d-positions-are-those-of-the-prompt-too",
        ),
    ],
)
def test_what_a_row_sees(head, drawing):
    assert drawn(FRAMES, head) == drawing


def test_columns_are_gathered_not_visited_by_the_tile():
    chat = conversation(1000)
    visited = alone(chat, Dilated(0, 1, 10), tiles=(128, 64)).planned().visited_mask(0, 0)
    last = visited[-1]
    assert torch.equal(last[:896].nonzero().flatten(), torch.arange(0, 896, 10))
