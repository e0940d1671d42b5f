"""The Prometheus endpoint and the trace tell the same story."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
from serving import Media, Served, scripted, text, user

FIGURE = re.compile(r'^sglang:mminfer_(\w+?)_total(?:\{ran="([\w,]+)"\})? ([\d.e+-]+)$', re.MULTILINE)

pytestmark = pytest.mark.server("main")


def figures(served: Served) -> dict[tuple[str, str], float]:
    return {(name, ran): float(value) for name, ran, value in FIGURE.findall(served.get("/metrics").decode())}


def traced(served: Served) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = defaultdict(float)
    batches = set()
    for record in served.records():
        ran = record.dense_reason or "sparse"
        sums["prefill_requests", ran] += 1
        sums["prefill_tokens", ran] += record.chunk_len
        sums["density_tokens", ""] += (record.density or 0.0) * record.chunk_len
        batches.add((record.plan_ms, record.attn_ms))
    for plan_ms, attn_ms in batches:
        sums["plan_ms", ""] += plan_ms
        sums["attn_ms", ""] += attn_ms
    return sums


@pytest.fixture
def worked(main: Served, media: Media) -> Served:
    """Sparse, short and text-only requests are among what it did."""
    main.ask_all([*scripted(media.six_turns())[-2:], [user(text("Why?"))]])
    return main


def test_figures_equal_the_trace(worked: Served) -> None:
    shown, expected = figures(worked), traced(worked)
    assert set(shown) == set(expected)
    assert {("prefill_tokens", ran) for ran in ("sparse", "short", "no_media")} <= set(shown)
    for name, value in expected.items():
        assert shown[name] == pytest.approx(value, rel=1e-6), name


def test_every_figure_explains_itself(worked: Served) -> None:
    page = worked.get("/metrics").decode()
    for name in ("prefill_requests", "prefill_tokens", "density_tokens", "plan_ms", "attn_ms"):
        assert re.search(rf"^# HELP sglang:mminfer_{name}(_total)? \w", page, re.MULTILINE), name
        assert re.search(rf"^# TYPE sglang:mminfer_{name}(_total)? counter$", page, re.MULTILINE), name
