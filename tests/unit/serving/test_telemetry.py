"""What schedulers remember, how the HTTP server asks them, and what a client gets. The process between them is SGLang's
own: its communicator, its messages as they go over the wire, its middleware of the API key."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
from sglang.srt.utils.auth import add_api_key_middleware
from starlette.testclient import TestClient

import observed
from sglang_mminfer.mends import stages
from sglang_mminfer.serving import telemetry, telemetry_http
from sglang_mminfer.serving.telemetry import Answer, Counters, Telemetry
from sglang_mminfer.serving.trace import GuardedHead, LayerAudit, MapEntry, PrefillRecord


def record(rid: str, number: int = 0, **fields: Any) -> PrefillRecord:
    base = {"segments": 1, "sparse_layers": 2, "density": 0.25, "dense_reason": None}
    base |= {"plan_ms": 1.0, "attn_ms": 3.0, "forward_ms": 5.0}
    lengths = {"prefix_len": 100 * number, "chunk_len": 100, "seq_len": 100 * number + 100}
    return PrefillRecord(**{"rid": rid, **lengths, **base, **fields})


FULL = record(
    "full/ä?",
    3,
    map=[MapEntry(modality="video", start=3, stop=90, grid=(3, 4, 5), apart=True)],
    audit=[
        LayerAudit(
            layer=1, rows=9, error_mean=0.1, error_max=0.5, worst_head=3, recall_mean=0.9, recall_min=0.7, num_heads=8
        )
    ],
    guard=[GuardedHead(layer=1, head=3, error=None)],
)


# ---- what a scheduler remembers ------------------------------------------------------------------------------


def test_records_of_a_request_come_in_order_and_alone() -> None:
    told = Telemetry()
    told.add([record("a", 0), record("b", 0)])
    told.add([record("a", 1)])
    assert told.answer("a").records == [record("a", 0), record("a", 1)]
    assert told.answer("nobody").records == []
    assert (told.answer("").records, told.answer("").kept) == (None, 3)


def test_memory_is_bounded_in_number_and_in_age() -> None:
    now = 0.0
    told = Telemetry(most=3, seconds=10.0, clock=lambda: now)
    for number in range(5):
        told.add([record("a", number)])
    assert [one.prefix_len for one in told.answer("a").records or ()] == [200, 300, 400]
    now = 9.0
    told.add([record("b")])
    now = 10.5
    assert told.answer("a").records == [] and told.answer("b").records == [record("b")]
    now = 30.0
    assert told.answer("").kept == 0
    assert told.answer("").counters.requests == {"sparse": 6}, "sums stay"


def test_counters_are_sums() -> None:
    counters = Counters()
    counters.add([record("a"), record("b", sparse_layers=0, density=None, dense_reason="no_media", chunk_len=7)])
    counters.add([record("a", 1, density=0.5, encoded_again=2, encoded_again_ms=4.0)])
    counters.add([])
    assert counters == Counters(
        requests={"sparse": 2, "no_media": 1},
        tokens={"sparse": 200, "no_media": 7},
        density_tokens=75.0,
        plan_ms=2.0,  # of batches
        attn_ms=6.0,
        encoded_again=2,
        encoded_again_ms=4.0,
    )
    other = Counters(requests={"sparse": 1, "short": 2}, tokens={"short": 5}, density_tokens=1.0, plan_ms=0.5)
    joined = counters.joined(other)
    assert joined.requests == {"sparse": 3, "no_media": 1, "short": 2}
    assert joined.tokens == {"sparse": 200, "no_media": 7, "short": 5}
    assert (joined.density_tokens, joined.plan_ms, joined.attn_ms) == (76.0, 2.5, 6.0)
    assert Counters() == Counters(requests={}, tokens={}), "no state is shared"


@pytest.fixture
def of_process() -> Iterator[Telemetry]:
    telemetry.of_process.cache_clear()
    yield telemetry.of_process()
    telemetry.of_process.cache_clear()


STATIC, ESTIMATED, CHOSEN = "test_grid_frame", "test_vertical_slash", "test_mixed_heads"


@pytest.mark.parametrize("config", [STATIC, ESTIMATED, CHOSEN])
def test_a_backend_tells_every_batch(config: str, of_process: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trace and metrics the density is by the area of tiles, which is no less than what the rows see."""
    monkeypatch.setenv("SGLANG_MMINFER_SPARSE", "always")
    prefill = observed.prefill(config, monkeypatch)
    exactly = observed.prefill(config, monkeypatch)
    exact: list[PrefillRecord] = []
    monkeypatch.setattr(exactly, "metrics", SimpleNamespace(add=exact.extend))
    monkeypatch.setattr(exactly, "telemetry", None)
    for start, stop in ((0, 300), (300, observed.LENGTH)):
        observed.run(prefill, observed.batch(start, stop, rid="told"))
        observed.run(exactly, observed.batch(start, stop, rid="told"))
    records = of_process.answer("told").records or []
    assert [(one.prefix_len, one.chunk_len) for one in records] == [(0, 300), (300, observed.LENGTH - 300)]
    assert [one.map is None for one in records] == [True, False]
    for one, same in zip(records, exact, strict=True):
        assert (one.sparse_layers, one.dense_reason) == (same.sparse_layers, same.dense_reason) == (2, None)
        assert one.density is not None and same.density is not None and same.density <= one.density <= 1.0
        assert one.density < 1.35 * same.density
    serving = of_process.answer("").serving
    assert serving is not None and serving.executor == "torch" and serving.dense_backend == "torch_native"
    assert serving.head_config.endswith(f"{config}.json") and serving.named_by == "SGLANG_MMINFER_CONFIG"
    assert config in serving.description and serving.provenance and serving.dense_reason is None


def test_a_dense_request_is_told_too(of_process: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = observed.prefill("dense", monkeypatch)
    observed.run(prefill, observed.batch(rid="dense"))
    (told,) = of_process.answer("dense").records or ()
    assert (told.dense_reason, told.density) == ("dense_config", None)
    serving = of_process.answer("").serving
    assert serving is not None and serving.dense_reason == "dense_config"


def test_ranks_that_do_not_lead_tell_nothing(of_process: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = observed.prefill(STATIC, monkeypatch, rank=1, ranks=2)
    assert prefill.telemetry is None and of_process.answer("").serving is None


# ---- the question ----------------------------------------------------------------------------------------------


def test_questions_of_sglang_are_sglangs() -> None:
    asked: list[Any] = []

    def original(scheduler: Any, request: Any) -> str:
        asked.append((scheduler, request))
        return "its state"

    for rid in (None, "chat-1", "mminfer-basis-clip-0"):
        request = GetInternalStateReq(rid=rid)
        assert telemetry.get_internal_state(original, "scheduler", request) == "its state"
        assert asked.pop() == ("scheduler", request)


class Replica:
    """A data-parallel replica's scheduler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *records: PrefillRecord) -> None:
        self.telemetry = Telemetry()
        self.telemetry.add(list(records))
        self._patch = monkeypatch

    def get_internal_state(self, question: Any) -> Any:
        self._patch.setattr(telemetry, "of_process", lambda: self.telemetry)
        return telemetry.get_internal_state(lambda *_: GetInternalStateReqOutput(internal_state={}), self, question)


class Manager:
    """Stands for a TokenizerManager: SGLang's communicator, over a wire as SGLang has it."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas, self.sent, self.deaf = replicas, 0, False
        self.get_internal_state_communicator: Any = FanOutCommunicator(self.send, len(replicas))

    def auto_create_handle_loop(self) -> None: ...

    def send(self, question: Any) -> None:
        self.sent += 1
        if not self.deaf:
            asyncio.get_running_loop().call_soon(self.reply, question)

    def reply(self, question: Any) -> None:
        for replica in self.replicas:
            answer = replica.get_internal_state(over_the_wire(question))
            self.get_internal_state_communicator.handle_recv(over_the_wire(answer))


def over_the_wire(message: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))


Client = Callable[..., TestClient]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """Makes a client of a server with some replicas; with an API key if one is named."""

    def make(*replicas: Replica, key: str | None = None, **server_args: Any) -> TestClient:
        app = FastAPI()
        app.get("/health")(lambda: "well")
        monkeypatch.setattr(http_server, "app", app)
        state = SimpleNamespace(tokenizer_manager=Manager(*replicas))
        monkeypatch.setattr(http_server, "get_global_state", lambda: state)
        telemetry_http.add_routes(SimpleNamespace(**{"_mminfer_wanted": True, **server_args}), state.tokenizer_manager)
        if key:
            add_api_key_middleware(app, api_key=key, admin_api_key=None)
        return TestClient(app)

    return make


def test_records_of_a_request_are_those_of_the_trace(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Replica(monkeypatch, record("other")), Replica(monkeypatch)
    server = client(others[0], Replica(monkeypatch, record("full/ä?", 2), FULL), others[1])
    answer = server.get("/mminfer/requests/full%2F%C3%A4%3F")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    report = msgspec.json.decode(answer.content, type=telemetry_http.RequestReport)
    assert report == telemetry_http.RequestReport(rid="full/ä?", records=[record("full/ä?", 2), FULL])
    line = json.loads(msgspec.json.encode(FULL))
    assert answer.json()["records"][1] == line, "a record looks as in the trace"


def test_a_request_with_media_tells_what_they_took(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def worked() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(2) as pool:
            stages.follow(pool)

            def decode() -> None:
                with stages.timed("decode_ms"):
                    time.sleep(0.02)

            with stages.of_request("film"):
                await asyncio.gather(*(loop.run_in_executor(pool, decode) for _ in range(2)))
            await loop.run_in_executor(pool, decode)  # for nobody

    asyncio.run(worked())
    server = client(Replica(monkeypatch, record("film"), record("words")))
    media = server.get("/mminfer/requests/film").json()["media"]
    assert media["decode_ms"] >= 40 and media["prepare_ms"] >= 20 and media["open_ms"] == media["process_ms"] == 0
    assert server.get("/mminfer/requests/words").json()["media"] is None
    assert server.get("/mminfer").json()["media_cache"]["limit"] == 1024 * 2**20


def test_an_unknown_request_is_one_clear_404(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client(Replica(monkeypatch, record("a"))).get("/mminfer/requests/b")
    assert answer.status_code == 404
    assert "no prefill of request 'b' is remembered" in answer.json()["detail"]
    assert "60 minutes" in answer.json()["detail"] and "4096" in answer.json()["detail"]


def test_a_server_tells_how_it_serves(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replica(monkeypatch, record("a"), record("b")), Replica(monkeypatch, record("c", density=0.5))
    replicas[0].telemetry.serving = lambda: telemetry.Serving(
        head_config="default", named_by="built-in", description="heads", provenance="by hand", executor="torch",
        dense_backend="torch_native",
    )  # fmt: skip
    report = client(*replicas).get("/mminfer").json()
    assert report["replicas"] == 2
    assert report["counters"]["requests"] == {"sparse": 3}
    assert report["counters"]["density_tokens"] == 100.0
    assert report["kept"] == {"records": 3, "most": 4096, "seconds": 3600.0}
    assert report["serving"]["head_config"] == "default" and report["serving"]["executor"] == "torch"
    assert set(report["versions"]) == {"sglang_mminfer", "sglang", "torch"}
    assert "separate_videos" in report["mends"]
    assert "rid" not in json.dumps(report), "nobody learns the ids of others' requests"


def test_the_servers_api_key_protects_both(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    server = client(Replica(monkeypatch, record("a")), key="secret")
    assert server.get("/health").status_code == 200
    for path in ("/mminfer", "/mminfer/requests/a"):
        assert server.get(path).status_code == 401
        assert server.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert server.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert server.post(path, headers={"Authorization": "Bearer secret"}).status_code == 405


@pytest.mark.parametrize("server_args", [{"_mminfer_wanted": False}, {"_mminfer_wanted": None}])
def test_a_server_without_mminfer_has_no_routes(
    client: Client, monkeypatch: pytest.MonkeyPatch, server_args: dict[str, Any]
) -> None:
    server = client(Replica(monkeypatch, record("a")), **server_args)
    assert server.get("/mminfer").status_code == server.get("/mminfer/requests/a").status_code == 404


def test_the_next_server_of_a_process_does_not_inherit_them(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    server = client(Replica(monkeypatch, record("a")))
    wanted = SimpleNamespace(_mminfer_wanted=True)
    count = len(http_server.app.router.routes)
    telemetry_http.add_routes(wanted)
    assert len(http_server.app.router.routes) == count, "once, however often it is called"
    telemetry_http.add_routes(SimpleNamespace())
    assert len(http_server.app.router.routes) == count - 2
    assert server.get("/mminfer").status_code == 404 and server.get("/health").status_code == 200


def test_schedulers_without_our_hook_are_an_error_and_no_crash(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Replica(monkeypatch)
    monkeypatch.setattr(stock, "get_internal_state", lambda _: GetInternalStateReqOutput(internal_state={"a": 1}))
    assert client(stock).get("/mminfer").status_code == 503


# ---- waiting -----------------------------------------------------------------------------------------------


def test_equal_questions_are_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(Replica(monkeypatch, record("a"), record("b")))

    async def ask() -> list[list[Answer]]:
        return await asyncio.gather(*(telemetry_http.ask(manager, rid) for rid in "aaaba"))

    answers = asyncio.run(ask())
    assert [answer.records for (answer,) in answers] == [[record(rid)] for rid in "aaaba"]
    assert manager.sent == 2


def test_a_late_answer_is_none_to_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy scheduler: the client is told so, and what comes later is not mistaken for the answer to the next."""
    manager = Manager(Replica(monkeypatch, record("a"), record("b")))

    async def ask() -> None:
        manager.deaf = True
        with pytest.raises(telemetry_http.Busy, match="ask again later"):
            await telemetry_http.ask(manager, "a", seconds=0.01)
        later = asyncio.ensure_future(telemetry_http.ask(manager, "b", seconds=10))
        again = asyncio.ensure_future(telemetry_http.ask(manager, "a", seconds=10))
        await asyncio.sleep(0.01)
        manager.deaf = False
        manager.reply(GetInternalStateReq(rid=telemetry.QUESTION + "a"))
        assert [answer.records for answer in await later] == [[record("b")]]
        assert [answer.records for answer in await again] == [[record("a")]]

    asyncio.run(ask())
    assert manager.sent == 2


def test_a_client_that_leaves_ends_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(Replica(monkeypatch, record("a")))

    async def ask() -> None:
        manager.deaf = True
        leaving = asyncio.ensure_future(telemetry_http.ask(manager, "a"))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0.01)
        manager.deaf = False
        manager.reply(GetInternalStateReq(rid=telemetry.QUESTION + "a"))
        (answer,) = await telemetry_http.ask(manager, "")
        assert answer.kept == 1

    asyncio.run(ask())


def test_few_questions_wait(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    manager = Manager(Replica(monkeypatch))
    manager.deaf = True

    async def ask() -> None:
        questions = [telemetry_http.ask(manager, f"{i}", seconds=0.05) for i in range(telemetry_http.MOST_WAITING + 3)]
        answers = await asyncio.gather(*questions, return_exceptions=True)
        assert all(isinstance(answer, telemetry_http.Busy) for answer in answers)
        assert sum("wait for the schedulers already" in str(answer) for answer in answers) == 3

    asyncio.run(ask())


def test_a_busy_server_answers_503(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    server = client(Replica(monkeypatch))
    http_server.get_global_state().tokenizer_manager.deaf = True
    monkeypatch.setattr(telemetry_http, "SECONDS", 0.01)
    answer = server.get("/mminfer")
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "5"
    assert "which answer between two batches" in answer.json()["detail"]
