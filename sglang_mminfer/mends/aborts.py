"""Requests that are aborted, or whose client leaves, while their media are loaded and prepared.

SGLang tells the scheduler, which does not know the request yet: it comes afterwards, and runs to its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import requests

logger = logging.getLogger(__name__)

NAME = "aborts"

_CLIENT = "_mminfer_client"
"""On the state of a request: who asked, to be asked whether it is still there."""

_PREPARING = "_mminfer_preparing"
"""On a tokenizer manager: by rid, the task that prepares a request's media, and its loop."""

_SECONDS = 1.0  # between two looks whether a client is still there


class Aborted(ValueError):
    """A request ended before it reached the scheduler."""


def begin(original: Callable[..., None], self: Any, obj: Any, request: Any = None) -> None:
    """AROUND TokenizerManager._init_req_state."""
    if mends.wanted(self.server_args) and mends.active(requests.NAME):
        with requests.readable():
            original(self, obj, request)
    else:
        original(self, obj, request)
    if request is not None and _acts(self):
        for rid in [obj.rid] if getattr(obj, "is_single", True) else obj.rid:
            setattr(self.rid_to_state[rid], _CLIENT, request)


async def tokenize(original: Callable[..., Any], self: Any, obj: Any) -> Any:
    """AROUND TokenizerManager._tokenize_one_request."""
    if not mends.wanted(self.server_args) or not mends.active(requests.NAME):
        return await prepare(original, self, obj)
    with requests.readable():
        return await prepare(original, self, obj)


async def prepare(original: Callable[..., Any], self: Any, obj: Any) -> Any:
    """A request with its token ids and media.

    Raises:
        Aborted: if the request is aborted, or its client has gone, before it is ready for the scheduler.
    """
    if not _acts(self) or not obj.contains_mm_input():
        return await original(self, obj)
    state = self.rid_to_state.get(obj.rid)
    client = None if getattr(obj, "background", False) else getattr(state, _CLIENT, None)
    preparing = self.__dict__.setdefault(_PREPARING, {})
    task = asyncio.ensure_future(original(self, obj))
    preparing[obj.rid] = task, asyncio.get_running_loop()
    try:
        while True:
            if getattr(state, "abort_sent", False):
                raise Aborted(f"Request {obj.rid} was aborted while its media were prepared.")
            done, _ = await asyncio.wait({task}, timeout=_SECONDS)
            if done and task.cancelled():
                raise Aborted(f"Request {obj.rid} was aborted while its media were prepared.")
            if done and not getattr(state, "abort_sent", False):
                return task.result()
            if client is not None and await client.is_disconnected():
                raise Aborted(f"The client of request {obj.rid} has left while its media were prepared.")
    finally:
        preparing.pop(obj.rid, None)
        if not task.done():
            task.cancel()


def abort(original: Callable[..., None], self: Any, rid: str = "", abort_all: bool = False) -> None:
    """AROUND TokenizerManager.abort_request, in whatever thread."""
    original(self, rid, abort_all)
    for one, (task, loop) in list(self.__dict__.get(_PREPARING, {}).items()):
        if abort_all or one == rid:
            logger.info("mminfer: request %s is aborted while its media are prepared", one)
            loop.call_soon_threadsafe(task.cancel)


def _acts(manager: Any) -> bool:
    return mends.wanted(manager.server_args) and mends.active(NAME)
