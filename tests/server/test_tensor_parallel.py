"""Two ranks answer as one, though their heads differ; and so does a server that decodes on another backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from serving import DENSE_BELOW, LAYERS, PAGE, References, Served, ran_sparse, same

from sglang_mminfer.head_config import HeadConfig


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
