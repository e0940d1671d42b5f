"""What the commands do with a pattern of any kind: read and write it, try it, draw it, label it, account for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mminfer import Boundary2D, Dense, HeadConfig, Modality, QBoundary
from sglang_mminfer.head_config import Provenance, words_of
from sglang_mminfer.patterns.base import kinds
from sglang_mminfer.patterns.ladder import RANKS, STRIDES, Prompt
from sglang_mminfer.planning.visited import order_of
from sglang_mminfer.tools.inspect.figures import REASON_COLOURS
from sglang_mminfer.tools.inspect.reasons import REASONS, SPARSE, reasons_by_row
from sglang_mminfer.tools.search.candidates import candidates
from sglang_mminfer.tools.search.report import mosaic
from support import TEXT, VIDEO, VISION, Batch, conversation, heads, maps, patterns_of_kind

every_kind = pytest.mark.parametrize("kind", kinds())


@every_kind
@settings(max_examples=10)
@given(data=st.data())
def test_a_head_config_holds_it_under_every_boundary(kind: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns_of_kind(kinds()[kind]))
    row = (pattern, QBoundary({VIDEO: pattern}), Boundary2D({(VISION, TEXT): pattern, (TEXT, VISION): Dense()}))
    config = HeadConfig("x", Provenance("handwritten", "of a test"), "cycle", (row,))
    assert HeadConfig.from_json(config.to_json(), "x") == config
    assert all(kind in words_of(head) for head in row)


def test_the_search_tries_what_every_ladder_says() -> None:
    chat, phases = conversation(900, (8, 6, 7), 900), [[{"frame": [7]}, {"frame": [3, 1], "row": [2]}]] * 2
    tried = dict(candidates(chat, phases, RANKS))
    assert next(iter(tried)) == "dense" and all(len(of) == 2 and len(of[0]) == 2 for of in tried.values())
    for kind, cls in kinds().items():
        for name, pattern in cls.ladder(Prompt(chat.length, STRIDES, phases[0][1], RANKS)):
            assert tried[name][1][1] == pattern, kind
    assert tried["grid frame v 64 phase #1"][0][0].phase == 7 and tried["grid frame v 64 phase #2"][0][1].phase == 1


def test_the_report_draws_and_names_every_kind() -> None:
    from matplotlib import pyplot

    prompt = Prompt(2000, STRIDES, {}, RANKS)
    row = [next(iter(cls.ladder(prompt)))[1] for cls in kinds().values() if list(cls.ladder(prompt))]
    figure = mosaic([[*row, QBoundary({VIDEO: row[1]}), Boundary2D({(TEXT, VIDEO): row[1]})]])
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[:-2] == [pattern.label for pattern in row]
    assert texts[-2:] == [f"v:{row[1].label}", f"tv:{row[1].label}"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [*(pattern.kind for pattern in row), "Q-Boundary", "2D-Boundary"]
    pyplot.close(figure)


@settings(max_examples=60)
@given(maps(), heads(), st.integers(0, 12), st.data())
def test_inspect_accounts_for_every_row_that_sees_everything(chat, head, dense_below, data) -> None:
    """Every row with all of its keys has a reason, every other row none; and an order holds every token once."""
    n = chat.length
    start = data.draw(st.integers(0, n - 1))
    batch = Batch([chat], [n - start], [n], [head], dense_below=dense_below)
    wrapper = batch.planned()
    batch.run(wrapper)
    visited = wrapper.visited_mask(0, 0).sum(dim=1).numpy()
    reasons = reasons_by_row(chat, head, dense_below, visited, start, False)
    assert ((reasons == SPARSE) == (visited < start + 1 + np.arange(n - start))).all()
    assert set(reasons) <= {SPARSE, *REASONS} and set(REASONS) == set(REASON_COLOURS)
    assert (np.sort(order_of(chat, head)[1]) == np.arange(n)).all()


def test_reasons_under_a_boundary_are_those_of_the_pattern() -> None:
    """A text row after a video sees everything by the grid's own rule under a Q-Boundary, too."""
    chat = conversation(300, (9, 6, 7), 200)
    grid = kinds()["grid"]("frame", False, True, True, 5, 8, 16)  # type: ignore[call-arg]
    everything = torch.arange(1, chat.length + 1).numpy()
    reasons = reasons_by_row(chat, QBoundary({Modality.TEXT: grid, VIDEO: grid}), 0, everything, 0, False)
    assert set(reasons[-200:]) == {"text after vision"}
    assert set(reasons[300 + 5 : 300 + 9 * 42 : 42]) == {"grid row on the phase (h)"}
