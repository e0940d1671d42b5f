"""PD disaggregation: a server with mminfer computes the prompts, and another one gets their keys and values.

NIXL moves them between the processes, as it does between machines. A CPU runs it with what `no_device` stands in for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import no_device
from serving import DENSE_BELOW, Message, References, Served, ran_sparse, same, serve
from sglang_mminfer.testing.oracle import OracleAnswer
from sglang_mminfer.tools.server import Server, free_port

pytest.importorskip("nixl", reason="`make test-wide` installs NIXL, which moves keys and values between servers")

pytestmark = [pytest.mark.server("one_shot"), pytest.mark.wide]

FLAGS = ("--sleep-on-idle", "--disaggregation-transfer-backend", "nixl", "--disable-overlap-schedule")
"""SGLang's overlap schedule records events of a GPU on a prefill server."""


@dataclass
class Pair:
    """The two servers, and the router's part: a client's request goes to both."""

    prefill: Served
    decode: Served
    bootstrap_port: int
    rooms: random.Random = field(default_factory=lambda: random.Random(0))

    def ask(self, prompt: Sequence[Message], rid: str) -> OracleAnswer:
        meeting: dict[str, Any] = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port}
        meeting["bootstrap_room"] = self.rooms.randrange(2**40)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(self.prefill.ask, prompt, rid=rid, **meeting)
            answer = pool.submit(self.decode.ask, prompt, rid=rid, **meeting).result()
        assert first.result().token_ids == answer.token_ids[:1]
        return answer


@pytest.fixture(scope="module", params=["stock", "mminfer"])
def pair(
    request: pytest.FixtureRequest, model: Path, sparse_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """The decode server with mminfer, and without."""
    env = {"PYTHONPATH": no_device.install(tmp_path_factory.mktemp("plugin"))}
    mminfer = ("--attention-backend", "mminfer", "--mminfer-config", str(sparse_config))
    port = free_port("127.0.0.1")
    mode = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(port))
    flags = (*FLAGS, *mode, *mminfer, "--chunked-prefill-size", "96")
    prefill = serve(tmp_path_factory.mktemp("prefill"), model, flags, env)
    flags = (*FLAGS, "--disaggregation-mode", "decode", *(mminfer if request.param == "mminfer" else ()))
    decode = serve(tmp_path_factory.mktemp("decode"), model, flags, env)
    both: list[Server] = [prefill.server, decode.server]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Server.start, both))
        yield Pair(prefill, decode, port)
    finally:
        for server in both:
            server.stop()


def test_turn_by_turn(pair: Pair, references: References) -> None:
    """Sparse, in chunks, over the prefill server's radix cache; nothing of a prompt is computed a second time."""
    before = 0
    for turn, (prompt, expected) in enumerate(references.turns):
        same(expected, pair.ask(prompt, f"turn-{turn}"))
        records = pair.prefill.records(f"turn-{turn}")
        assert sum(r.chunk_len for r in records) == len(expected.prompt_ids) - before
        assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW])
        before = len(expected.prompt_ids)
    assert min(r.density or 1 for r in pair.prefill.records()) < 0.95
    assert not [r for r in pair.decode.records() if r.chunk_len > 1]


def test_conversations_at_once(pair: Pair, references: References) -> None:
    with ThreadPoolExecutor(len(references.batch)) as pool:
        waiting = [pool.submit(pair.ask, prompt, f"batch-{i}") for i, (prompt, _) in enumerate(references.batch)]
    for (_, expected), answer in zip(references.batch, waiting, strict=True):
        same(expected, answer.result())
