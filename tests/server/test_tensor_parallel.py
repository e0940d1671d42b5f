"""Two ranks answer as one rank does, though their heads differ; so does a server that decodes on another backend."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from serving import DENSE_BELOW, LAYERS, PAGE, RECIPE, References, Served, ran_sparse, same, wait_for
from sglang_mminfer.head_config import HeadConfig

HEADS = RECIPE["heads"]


def test_ranks_have_other_patterns(sparse_config: Path, model: Path) -> None:
    from transformers import AutoConfig

    config = HeadConfig.load(str(sparse_config)).bind(AutoConfig.from_pretrained(model))
    for layer in range(LAYERS):
        heads = config.patterns(layer)
        assert set(heads[:4]).isdisjoint(heads[4:])


@pytest.mark.parametrize("name", ["ranks_2", "paged"])
def test_same_answers_as_one_rank_with_one_backend(served: Served, references: References, name: str) -> None:
    for turn, (prompt, expected) in enumerate(references.turns):
        got = served.ask(prompt, rid=f"{name}-{turn}")
        same(expected, got)
        assert ran_sparse([r for r in served.records(f"{name}-{turn}") if r.seq_len > DENSE_BELOW])
        assert turn == 0 or got.cached_tokens


@pytest.mark.parametrize("name", ["ranks_2", "paged"])
def test_flags_arrived(servers: Callable[[str], Served], name: str) -> None:
    info = servers(name).server.get_info()
    if name == "ranks_2":
        assert (info["tp_size"], info["attention_backend"]) == (2, "mminfer")
    else:
        assert (info["prefill_attention_backend"], info["decode_attention_backend"]) == ("mminfer", "torch_native")
        assert info["page_size"] == PAGE


AUDITED = re.compile(
    r'^sglang:mminfer_audit_(rows|error_rows|lost_rows)_total\{layer="(\d+)"\} ([\d.e+-]+)$', re.MULTILINE
)


@pytest.mark.server("ranks_2")
def test_audits_of_all_ranks_reach_trace_and_metrics(servers: Callable[[str], Served], references: References) -> None:
    served = servers("ranks_2")
    prompt, _ = references.turns[-1]
    served.server.flush_cache()
    served.ask(prompt, rid="audited")
    wait_for(lambda: all(a.num_heads == HEADS for r in served.records("audited") for a in r.audit or []))
    records = served.records("audited")
    assert any(record.dense_reason is None for record in records)
    for record in records:
        assert (record.audit is not None) == (record.dense_reason is None)
        for found in record.audit or []:
            assert (found.first_head, found.num_heads) == (0, HEADS) and 0 <= found.worst_head < HEADS
            assert 0 <= found.recall_min <= found.recall_mean <= 1 and 0 < found.error_mean <= found.error_max
    alone = [json.loads(line) for line in served.trace.read_text().splitlines()]
    heads = {(a["first_head"], a["num_heads"]) for record in alone for a in record.get("audit") or []}
    assert heads == {(0, HEADS // 2)}, "rank 0 tells of its own"
    expected: dict[tuple[str, str], float] = defaultdict(float)
    for record in served.records():
        for found in record.audit or []:  # each rank counts its rows
            expected["rows", str(found.layer)] += 2 * found.rows
            expected["error_rows", str(found.layer)] += 2 * found.rows * found.error_mean
            expected["lost_rows", str(found.layer)] += 2 * found.rows * (1 - found.recall_mean)
    shown = {(name, layer): float(v) for name, layer, v in AUDITED.findall(served.get("/metrics").decode())}
    assert len(expected) == 3 * LAYERS and shown == pytest.approx(dict(expected), rel=1e-6)
