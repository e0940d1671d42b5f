"""Two ranks answer as one, though their heads differ; and so does a server that decodes on another backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from serving import DENSE_BELOW, LAYERS, Media, Served, ran_sparse, same, scripted

from sglang_mminfer.evaluation.hf_oracle import Message, OracleAnswer
from sglang_mminfer.head_config import HeadConfig


@pytest.fixture(scope="module")
def expected(servers: Callable[[str], Served], media: Media) -> list[tuple[list[Message], OracleAnswer]]:
    """Each turn's prompt and what one rank with one backend answers to it."""
    one_shot = servers("one_shot")
    return [(prompt, one_shot.ask(prompt)) for prompt in scripted(media.six_turns())]


def test_ranks_have_other_patterns(sparse_config, model) -> None:
    from transformers import AutoConfig

    config = HeadConfig.load(str(sparse_config)).bind(AutoConfig.from_pretrained(model))
    for layer in range(LAYERS):
        heads = config.patterns(layer)
        assert set(heads[:4]).isdisjoint(heads[4:])


@pytest.mark.parametrize("name", ["ranks_2", "paged"])
def test_same_answers_as_one_rank_with_one_backend(
    servers: Callable[[str], Served], expected: list[tuple[list[Message], OracleAnswer]], name: str
) -> None:
    served = servers(name)
    served.server.flush_cache()
    for turn, (prompt, answer) in enumerate(expected):
        got = served.ask(prompt, rid=f"{name}-{turn}")
        same(answer, got)
        assert ran_sparse([r for r in served.records(f"{name}-{turn}") if r.seq_len > DENSE_BELOW])
        assert turn == 0 or got.cached_tokens


def test_flags_arrived(servers: Callable[[str], Served]) -> None:
    info = servers("ranks_2").server.get_info()
    assert info["tp_size"] == 2 and info["attention_backend"] == "mminfer"
    info = servers("paged").server.get_info()
    assert (info["prefill_attention_backend"], info["decode_attention_backend"]) == ("mminfer", "torch_native")
    assert info["page_size"] == 16
