"""What the server benchmark makes of its rounds."""

from __future__ import annotations

from sglang_mminfer.benchmarks.server_prefill import speedups


def rounds(*times: tuple[float, float]) -> dict:
    return {"rounds": [{"attn_ms": attention, "forward_ms": forward, "ttft_ms": 0.0} for attention, forward in times]}


def test_speedups_are_over_the_better_stock_server_of_each_round():
    results = {
        "mminfer, whole prompt": {512: rounds((10, 100), (20, 100), (10, 50))},
        "mminfer, chunked": {512: rounds((40, 200), (40, 200), (40, 200))},
        "stock, whole prompt": {512: rounds((50, 300), (90, 400), (20, 100))},
        "stock, chunked": {512: rounds((60, 200), (80, 500), (30, 90))},
        "without plugin, whole prompt": {512: rounds((1, 1), (1, 1), (1, 1))},
    }
    found = speedups([results])
    assert set(found) == {"mminfer, whole prompt", "mminfer, chunked"}, "who is compared with stock"
    assert found["mminfer, whole prompt"][512]["attn"] == {"median": 4.0, "least": 2.0, "most": 5.0}
    assert found["mminfer, whole prompt"][512]["forward"] == {"median": 2.0, "least": 1.8, "most": 4.0}
    assert found["mminfer, chunked"][512]["attn"] == {"median": 1.25, "least": 0.5, "most": 2.0}


def test_the_median_is_that_of_runs_and_the_spread_that_of_all_rounds():
    runs = [
        {"mminfer, whole prompt": {512: rounds(*[(10, 10)] * 3)}, "stock, whole prompt": {512: rounds(*times)}}
        for times in ([(20, 20), (90, 90), (30, 30)], [(40, 40), (50, 50), (10, 10)], [(60, 60)] * 3)
    ]
    assert speedups(runs)["mminfer, whole prompt"][512]["attn"] == {"median": 4.0, "least": 1.0, "most": 9.0}
