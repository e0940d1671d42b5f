"""HiCache: keys and values that went to the host's memory, or to files, come back as they were.

A CPU runs it with what `no_device` stands in for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import no_device
from serving import DENSE_BELOW, ROUNDING, Message, References, Served, difference, ran_sparse, same, serve

pytestmark = [pytest.mark.server("one_shot"), pytest.mark.wide]

POOL = 1024
"""Tokens of the KV pool. The longest conversation alone takes more than half of it."""

FLAGS = (
    *("--attention-backend", "mminfer", "--chunked-prefill-size", "96", "--max-total-tokens", str(POOL)),
    *("--enable-hierarchical-cache", "--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
    *("--hicache-ratio", "8", "--hicache-write-policy", "write_through"),
)


def hicache(model: Path, folder: Path, *flags: str, **env: str) -> Served:
    """The server, not started."""
    folder.mkdir(exist_ok=True)
    return serve(folder, model, (*FLAGS, *flags), {"PYTHONPATH": no_device.install(folder / "plugin"), **env})


@pytest.fixture(scope="module")
def in_memory(model: Path, sparse_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = hicache(model, tmp_path_factory.mktemp("hicache"), "--mminfer-config", str(sparse_config))
    with served.server:
        yield served


def cached(served: Served, prompt: Sequence[Message]) -> dict[str, Any]:
    """How many tokens of a prompt came from the pool ("device"), from the host's memory, and from storage."""
    response = served.client.chat.completions.create(
        model="default", messages=list(prompt), max_tokens=1, extra_body={"return_meta_info": True}
    )
    return response.choices[0].model_dump()["meta_info"]["cached_tokens_details"]


def test_what_was_evicted_comes_back(in_memory: Served, references: References) -> None:
    """After every turn other conversations drive the video and all after it out of the pool."""
    before = 0
    for i, (prompt, expected) in enumerate(references.turns):
        if i:
            known = cached(in_memory, prompt)
            assert known["host"] > DENSE_BELOW and known["device"] + known["host"] >= before
        same(expected, in_memory.ask(prompt, rid=f"turn-{i}"))
        before = len(expected.prompt_ids)
        assert ran_sparse([r for r in in_memory.records(f"turn-{i}") if r.seq_len > DENSE_BELOW])
        for other, answer in references.others[:3]:
            same(answer, in_memory.ask(other))


def test_storage_keeps_head_configs_apart(
    model: Path, sparse_config: Path, references: References, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three servers after each other share a folder of pages. The last one finds those of the first one alone."""
    folder = tmp_path_factory.mktemp("storage")
    pages = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(folder / "pages")}
    storage = ("--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete")
    prompt, expected = references.turns[-1]
    found, answers = [], []
    for i, config in enumerate((str(sparse_config), "dense", str(sparse_config))):
        served = hicache(model, folder / str(i), *storage, "--mminfer-config", config, **pages)
        with served.server:
            found.append(cached(served, prompt)["storage"])
            answers.append(served.ask(prompt))
    assert found[:2] == [0, 0] and found[2] > len(expected.prompt_ids) * 0.9
    same(expected, answers[0])
    same(expected, answers[2])
    assert difference(expected, answers[1]) > 100 * ROUNDING  # the configs do answer differently
