"""The Prometheus endpoint and the trace give the same figures."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from serving import Media, Served, scripted, text, user

FIGURE = re.compile(r'^sglang:mminfer_(\w+?)_total(?:\{ran="([\w,]+)"\})? ([\d.e+-]+)$', re.MULTILINE)

DASHBOARD = Path(__file__).parents[2] / "examples" / "monitoring" / "grafana" / "mminfer-dashboard.json"

pytestmark = pytest.mark.server("main")


def figures(served: Served) -> dict[tuple[str, str], float]:
    return {(name, ran): float(value) for name, ran, value in FIGURE.findall(served.get("/metrics").decode())}


def traced(served: Served) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = defaultdict(float)
    audits: dict[tuple[float, float], float] = {}  # by the times of a batch: those of two batches are never all equal
    for record in served.records():
        ran = record.dense_reason or "sparse"
        sums["prefill_requests", ran] += 1
        sums["prefill_tokens", ran] += record.chunk_len
        sums["density_tokens", ""] += (record.density or 0.0) * record.chunk_len
        batch = record.plan_ms, record.attn_ms
        audits[batch] = max(audits.get(batch, 0.0), record.audit_ms)  # requests that are not audited have 0
    sums["plan_ms", ""] = sum(plan_ms for plan_ms, _ in audits)
    sums["attn_ms", ""] = sum(attn_ms for _, attn_ms in audits)
    sums["audit_ms", ""] = sum(audits.values())
    sums["audit_failures", ""] = sums["encoded_again", ""] = sums["encoded_again_ms", ""] = 0.0
    return sums


@pytest.fixture
def worked(main: Served, media: Media) -> Served:
    """A server that has run sparse, short and text-only requests."""
    main.ask_all([*scripted(media.six_turns())[-2:], [user(text("Why?"))]])
    return main


def test_figures_equal_the_trace(worked: Served) -> None:
    shown, expected = figures(worked), traced(worked)
    assert set(shown) == set(expected)
    assert {("prefill_tokens", ran) for ran in ("sparse", "short", "no_media")} <= set(shown)
    for name, value in expected.items():
        assert shown[name] == pytest.approx(value, rel=1e-6), name


AUDIT = re.compile(r'^sglang:mminfer_audit_(\w+?)_total\{layer="(\d+)"\} ([\d.e+-]+)$', re.MULTILINE)


def test_every_sparse_layer_is_audited(worked: Served) -> None:
    """Nothing else is audited; trace and metrics agree for each layer."""
    expected: dict[tuple[str, str], float] = defaultdict(float)
    for record in worked.records():
        assert (record.audit is not None) == (record.dense_reason is None), record
        assert record.audit_failures == 0
        for found in record.audit or []:
            assert 0 < found.rows <= 64 and 0 <= found.recall_min <= found.recall_mean <= 1
            assert 0 <= found.error_mean <= found.error_max and 0 <= found.worst_head < 8
            expected["rows", str(found.layer)] += found.rows
            expected["error_rows", str(found.layer)] += found.error_mean * found.rows
            expected["lost_rows", str(found.layer)] += (1 - found.recall_mean) * found.rows
    assert {layer for _, layer in expected} == {"0", "1"}
    shown = {(name, layer): float(v) for name, layer, v in AUDIT.findall(worked.get("/metrics").decode())}
    assert shown == pytest.approx(dict(expected), rel=1e-6)
    assert expected["error_rows", "0"] > 0  # a sparse config loses something


def test_every_figure_explains_itself(worked: Served) -> None:
    page = worked.get("/metrics").decode()
    for name in (
        *("prefill_requests", "prefill_tokens", "density_tokens", "plan_ms", "attn_ms"),
        *("encoded_again", "encoded_again_ms"),
        *("audit_rows", "audit_error_rows", "audit_lost_rows", "audit_ms", "audit_failures"),
    ):
        assert re.search(rf"^# HELP sglang:mminfer_{name}(_total)? \w", page, re.MULTILINE), name
        assert re.search(rf"^# TYPE sglang:mminfer_{name}(_total)? counter$", page, re.MULTILINE), name


def test_the_dashboard_asks_for_what_is_there(worked: Served) -> None:
    """Every metric and every label of its queries, in the scrape of a server; what only a guard tells is left out."""
    page = worked.get("/metrics").decode()
    samples = {
        name: set(re.findall(r'(\w+)="', labels))
        for name, labels in re.findall(r"^([\w:]+)(\{[^}]*\})? [\d.e+-]+$", page, re.MULTILINE)
    }
    asked = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    names = {name for query in asked for name in re.findall(r"sglang:\w+", query)}
    assert names - set(samples) == {"sglang:mminfer_guarded_heads_total"}
    for query in asked:
        metrics = re.findall(r"sglang:\w+", query)
        for label in re.findall(r"by \((\w+)\)", query) + re.findall(r'(\w+)="', query):
            assert all(label in samples[name] for name in metrics if name in samples and label != "ran"), query
    assert "ran" in samples["sglang:mminfer_prefill_tokens_total"]
    assert {name for name in samples if name.startswith("sglang:mminfer_") and name.endswith("_total")} <= names
