"""Encoder disaggregation: a server that encodes media, and one with mminfer that gets their embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from serving import DENSE_BELOW, Message, References, Served, ran_sparse, same, serve

pytestmark = pytest.mark.server("one_shot")  # the server of the references

TO_SCHEDULER = "zmq_to_scheduler"
TRANSPORTS = [TO_SCHEDULER, pytest.param("zmq_to_tokenizer", marks=pytest.mark.wide)]


@pytest.fixture(scope="module", params=TRANSPORTS)
def served(
    request: pytest.FixtureRequest, model: Path, sparse_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    common = ("--attention-backend", "mminfer", "--encoder-transfer-backend", request.param)
    encoder = serve(tmp_path_factory.mktemp("encoder"), model, (*common, "--encoder-only"), {}).server
    with encoder:
        flags = (*common, "--language-only", "--encoder-urls", encoder.url, "--mminfer-config", str(sparse_config))
        language = serve(tmp_path_factory.mktemp("language"), model, (*flags, "--chunked-prefill-size", "96"), {})
        with language.server:
            yield language


def kept(length: int, before: Sequence[Message], now: Sequence[Message], prompt_ids: list[int], model: Path) -> int:
    """How many of the `length` tokens of the last turn's prompt the radix cache must still know.

    SGLang's encoder encodes all images of a request together, and all videos, and the language server knows a medium
    by the bits of its embedding. Whether these stay the same in a larger batch depends on the processor's kernels.
    """
    config = json.loads((model / "config.json").read_text())
    for kind in ("image", "video"):
        if count(before, kind) != count(now, kind) and (token := config[f"{kind}_token_id"]) in prompt_ids:
            length = min(length, prompt_ids.index(token))
    return length


def count(messages: Sequence[Message], kind: str) -> int:
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    return sum(part["type"] == f"{kind}_url" for part in parts)


def test_a_conversation_is_answered_as_by_one_server(
    served: Served, references: References, model: Path, request: pytest.FixtureRequest
) -> None:
    """Sparse, in chunks, turn by turn over the radix cache."""
    # Where the scheduler makes the prompt, SGLang's HTTP server cannot tell its ids, and fails if it is asked to.
    with_ids = request.node.callspec.params["served"] != TO_SCHEDULER
    for turn, (prompt, expected) in enumerate(references.turns):
        got = served.ask(prompt, rid=f"turn-{turn}", return_token_ids=with_ids)
        same(expected, got if with_ids else replace(got, prompt_ids=expected.prompt_ids))
        if turn:
            before, known = references.turns[turn - 1]
            assert (got.cached_tokens or 0) >= kept(len(known.prompt_ids), before, prompt, expected.prompt_ids, model)
        records = served.records(f"turn-{turn}")
        assert sum(r.chunk_len for r in records) == len(expected.prompt_ids) - (got.cached_tokens or 0)
        assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW])
        assert all(segment.grid for r in records for segment in r.map or [] if segment.modality != "text")
    assert min(r.density or 1 for r in served.records()) < 0.95
