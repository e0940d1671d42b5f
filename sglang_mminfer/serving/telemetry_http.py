"""GET /mminfer and GET /mminfer/requests/{rid}: telemetry for clients that do not see the server's disk.

The routes stand in SGLang's own app, so its API key protects them as it does all others. They ask the schedulers
(telemetry.py). A scheduler answers between two batches, so an answer may take as long as a prefill chunk.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from importlib.metadata import version
from typing import Any

import msgspec

from sglang_mminfer import __version__, mends
from sglang_mminfer.mends import media_cache, stages
from sglang_mminfer.serving import telemetry
from sglang_mminfer.serving.telemetry import Answer, Counters, Serving
from sglang_mminfer.serving.trace import PrefillRecord

PATH = "/mminfer"

MOST_WAITING = 64
"""Different questions that wait for the schedulers at a time."""

SECONDS = 60.0
"""How long a client waits for an answer."""


class RequestReport(msgspec.Struct, kw_only=True):
    """The body of GET /mminfer/requests/{rid}: what the trace has of one request, a record for each chunk.

    Attributes:
        media: how long its media took before that; None if it had none, or is not remembered.
    """

    rid: str
    records: list[PrefillRecord]
    media: stages.MediaTimes | None = None


class Kept(msgspec.Struct, kw_only=True):
    """Records that all replicas remember, and the most of each replica: in number, and in seconds."""

    records: int
    most: int = telemetry.MOST_RECORDS
    seconds: float = telemetry.MOST_SECONDS


class ServerReport(msgspec.Struct, kw_only=True):
    """The body of GET /mminfer.

    Attributes:
        versions: of sglang_mminfer, sglang and torch.
        replicas: data-parallel replicas; `counters` and `kept` are sums over them.
        serving: how the first one serves.
        mends: names of the mends that are on.
        media_cache: what the cache of decoded and preprocessed videos did.
    """

    versions: dict[str, str]
    replicas: int
    serving: Serving | None
    counters: Counters
    kept: Kept
    mends: list[str]
    media_cache: media_cache.Report | None = None


class Busy(Exception):
    """The schedulers did not answer in time."""


def add_routes(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE http_server._setup_and_run_http_server: adds the routes if the server runs mminfer.

    The app is one for all servers of a process, so the routes of an earlier one are taken away first.
    """
    from sglang.srt.entrypoints import http_server

    routes = http_server.app.router.routes
    routes[:] = [route for route in routes if getattr(route, "endpoint", None) not in (report_server, report_request)]
    if getattr(server_args, "_mminfer_wanted", False):  # what `launch` noted
        for path, report in ((PATH, report_server), (PATH + "/requests/{rid:path}", report_request)):
            http_server.app.add_api_route(path, report, methods=["GET"], response_model=None)


async def report_server() -> Any:
    """How this server serves with mminfer, and what it has done since it started."""
    answers = await _asked("")
    return _response(
        ServerReport(
            versions={"sglang_mminfer": __version__, "sglang": version("sglang"), "torch": version("torch")},
            replicas=len(answers),
            serving=answers[0].serving,
            counters=functools.reduce(Counters.joined, (answer.counters for answer in answers)),
            kept=Kept(records=sum(answer.kept for answer in answers)),
            mends=mends.active_names(),
            media_cache=media_cache.of_process().report(),
        )
    )


async def report_request(rid: str) -> Any:
    """The prefill chunks of one of the latest requests. Its id is that of the chat completion, or `meta_info["id"]`."""
    records = [record for answer in await _asked(rid) for record in answer.records or ()]
    if not records:
        from fastapi import HTTPException

        raise HTTPException(
            404,
            f"no prefill of request {rid!r} is remembered: nothing of it was computed yet, or the request is older "
            f"than {telemetry.MOST_SECONDS / 60:.0f} minutes or the latest {telemetry.MOST_RECORDS} prefills of its "
            "replica",
        )
    return _response(RequestReport(rid=rid, records=records, media=stages.times_of(rid)))


def _response(report: msgspec.Struct) -> Any:
    from fastapi import Response

    return Response(msgspec.json.encode(report), media_type="application/json")


async def _asked(rid: str) -> list[Answer]:
    """The answer of each replica.

    Raises:
        HTTPException: with status 503 if there is none.
    """
    from fastapi import HTTPException
    from sglang.srt.entrypoints import http_server

    try:
        answers = await ask(http_server.get_global_state().tokenizer_manager, rid)
    except Busy as error:
        raise HTTPException(503, str(error), headers={"Retry-After": "5"}) from None
    if not answers:
        raise HTTPException(503, "no scheduler of this server runs mminfer")
    return answers


_waiting: weakref.WeakKeyDictionary[Any, dict[str, asyncio.Task[Any]]] = weakref.WeakKeyDictionary()
"""For each TokenizerManager the questions that are on their way."""


async def ask(manager: Any, rid: str, seconds: float | None = None) -> list[Answer]:
    """Asks the schedulers of every data-parallel replica.

    A question that is on its way already is not sent again, and one that was sent is waited for even if no client
    does: SGLang would take a late answer for one to a later question.

    Args:
        manager: SGLang's TokenizerManager.
        rid: the request whose records are wanted; "": how the schedulers do.
        seconds: how long to wait; None: `SECONDS`.

    Raises:
        Busy: if the schedulers do not answer in time, or too many questions wait.
    """
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager.auto_create_handle_loop()
    waiting = _waiting.setdefault(manager, {})
    task = waiting.get(rid)
    if task is None:
        if len(waiting) >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} questions wait for the schedulers already; ask again later")
        question = GetInternalStateReq(rid=telemetry.QUESTION + rid)
        task = asyncio.ensure_future(manager.get_internal_state_communicator(question))
        task.add_done_callback(lambda _: waiting.pop(rid, None))
        waiting[rid] = task
    seconds = SECONDS if seconds is None else seconds
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        raise Busy(
            f"no answer within {seconds:g} s from the schedulers, which answer between two batches; ask again later"
        )
    return telemetry.answers_in(output.internal_state for output in task.result())
