"""Pipeline and data parallelism and a cache in the host's memory: answers and traces are those of one plain server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from serving import DENSE_BELOW, LAYERS, References, Served, ran_sparse, same
from sglang_mminfer.serving.trace import PrefillRecord, read_trace

PARALLEL = ["pp_2", "dp_2", "dp_attention"]
pytestmark = pytest.mark.wide


def records_of(served: Served, rid: str) -> list[PrefillRecord]:
    """What all data-parallel replicas wrote of a request."""
    files = served.trace.parent.glob(f"{served.trace.name}*")
    return [record for file in files if "rank" not in file.suffix for record in read_trace(file) if record.rid == rid]


@pytest.mark.parametrize("name", PARALLEL)
def test_every_answer_and_every_token_counted_once(served: Served, references: References, name: str) -> None:
    """The first stage of a pipeline tells of its own layers."""
    rids = [f"batch-{i}" for i in range(len(references.batch))]
    answers = served.ask_all([prompt for prompt, _ in references.batch], rids=rids)
    new_tokens = 0
    for rid, (_, expected), got in zip(rids, references.batch, answers):
        same(expected, got)
        records = records_of(served, rid)
        assert sum(r.chunk_len for r in records) == len(got.prompt_ids) - (got.cached_tokens or 0)
        assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW], LAYERS // 2 if name == "pp_2" else LAYERS)
        new_tokens += sum(r.chunk_len for r in records)
    counted = sum(
        float(line.rpartition(" ")[2])
        for line in served.get("/metrics").decode().splitlines()
        if line.startswith("sglang:mminfer_prefill_tokens_total")
    )
    assert counted >= new_tokens
    sums = json.loads(served.get("/mminfer"))
    print(sums, counted, new_tokens)


@pytest.mark.parametrize("name", PARALLEL)
def test_turn_by_turn(served: Served, references: References) -> None:
    for i, (prompt, expected) in enumerate(references.turns):
        same(expected, served.ask(prompt, rid=f"turn-{i}"))


@pytest.mark.server("hicache")
def test_a_conversation_that_went_to_the_host_and_came_back(
    servers: Callable[[str], Served], references: References
) -> None:
    """Its KV is evicted in the middle of a video by other conversations, and loaded again for its next turn."""
    served, back = servers("hicache"), []
    for i, (prompt, expected) in enumerate(references.turns):
        got = served.ask(prompt, rid=f"turn-{i}")
        same(expected, got)
        back.append(got.cached_tokens or 0)
        for j, (other, answer) in enumerate(references.others):
            same(answer, served.ask(other, rid=f"other-{i}-{j}"))
    print(back, LAYERS)
    assert all(cached > 0 for cached in back[1:])


def _files(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*"))
