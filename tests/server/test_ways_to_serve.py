"""Pipeline and data parallelism: answers and sums are those of one plain server."""

from __future__ import annotations

import json
import re

import pytest

from serving import DENSE_BELOW, LAYERS, References, Served, ran_sparse, same
from sglang_mminfer.serving.trace import PrefillRecord, read_trace

PARALLEL = ["pp_2", "dp_2"]
"""Data-parallel attention is not among them: SGLang runs no padded and no idle batches on a CPU."""

TOKENS = re.compile(r"^sglang:mminfer_prefill_tokens_total(?:\{[^}]*\})? ([\d.e+-]+)$", re.MULTILINE)

pytestmark = pytest.mark.wide


def records_of(served: Served, rid: str) -> list[PrefillRecord]:
    """What the replicas wrote of a request."""
    return [record for record in all_records(served) if record.rid == rid]


def all_records(served: Served) -> list[PrefillRecord]:
    return [r for file in sorted(served.trace.parent.glob(f"{served.trace.name}*")) for r in read_trace(file)]


@pytest.mark.parametrize("name", PARALLEL)
def test_every_answer_and_every_token_counted_once(served: Served, references: References, name: str) -> None:
    """The first stage of a pipeline tells of its own layers."""
    rids = [f"batch-{i}" for i in range(len(references.batch))]
    answers = served.ask_all([prompt for prompt, _ in references.batch], rids=rids)
    for rid, (_, expected), got in zip(rids, references.batch, answers):
        same(expected, got)
        records = records_of(served, rid)
        assert sum(r.chunk_len for r in records) == len(got.prompt_ids) - (got.cached_tokens or 0)
        assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW], LAYERS // 2 if name == "pp_2" else LAYERS)
    new_tokens = sum(record.chunk_len for record in all_records(served))
    report = json.loads(served.get("/mminfer"))
    assert sum(report["counters"]["tokens"].values()) == new_tokens
    assert sum(map(float, TOKENS.findall(served.get("/metrics").decode()))) == new_tokens
    assert report["replicas"] == (2 if name == "dp_2" else 1)


@pytest.mark.parametrize("name", PARALLEL)
def test_turn_by_turn(served: Served, references: References) -> None:
    for i, (prompt, expected) in enumerate(references.turns):
        same(expected, served.ask(prompt, rid=f"turn-{i}"))
