"""The smallest result of a search, for the card of the hub."""

from __future__ import annotations

import numpy as np

from sglang_mminfer import AShape, HeadConfig
from sglang_mminfer.head_config import ModelFingerprint, Provenance
from sglang_mminfer.tools.search.allocate import Allocation
from sglang_mminfer.tools.search.run import Scores, SearchResult
from sglang_mminfer.tools.search.tile_times import TileTimes


def result() -> SearchResult:
    heads = [[AShape(64, 128), AShape(64, 128)]]
    how = Provenance("search", "Searched.", calibration="film", budget="density 0.25", date="2026-11-26")
    model = ModelFingerprint("X", 1, 2, 1, 4, 8, 1e4)
    config = HeadConfig("found", how, "layers", (tuple(heads[0]),), model)
    allocation = Allocation(heads, 0.1, 0.25, np.zeros((1, 2, 2)))
    causal = np.array([100.0])
    visited = np.array([[[[25.0], [25.0]]], [[[100.0], [100.0]]]])
    scores = Scores(
        ["searched", "dense"], np.full((2, 1, 2, 1), 0.1), visited, np.ones((2, 1, 2, 1, 3)), causal, np.ones((2, 1))
    )
    times = TileTimes(1.0, 2.0, 3.0, "torch")
    return SearchResult(config, allocation, allocation, [], ["one prompt is few"], times, True, scores, None)
