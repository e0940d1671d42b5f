"""Ends requests that are aborted, or whose client disconnects, while their media are loaded and prepared.

SGLang sends an abort to the scheduler. The scheduler does not know the request yet: the request arrives later, and
runs to its end.
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
"""Attribute of a request's state: the HTTP request, which tells whether its client is still connected."""

_PREPARING = "_mminfer_preparing"
"""Attribute of a tokenizer manager: by request id, the task that prepares the request's media, and its event loop."""

_SECONDS = 1.0  # between two checks whether a client is still connected


class Aborted(ValueError):
    """A request ended before it reached the scheduler."""


def begin(original: Callable[..., None], self: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """AROUND TokenizerManager._init_req_state: keeps the HTTP request of each new request."""
    if mends.wanted(self.server_args) and mends.active(requests.NAME):
        with requests.readable():
            original(self, obj, request, *args, **kwargs)
    else:
        original(self, obj, request, *args, **kwargs)
    if request is not None and _acts(self):
        for rid in [obj.rid] if getattr(obj, "is_single", True) else obj.rid:
            setattr(self.rid_to_state[rid], _CLIENT, request)


async def tokenize(original: Callable[..., Any], self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND TokenizerManager._tokenize_one_request.

    Raises:
        Aborted: as `prepare`.
    """
    if not mends.wanted(self.server_args) or not mends.active(requests.NAME):
        return await prepare(original, self, obj, *args, **kwargs)
    with requests.readable():
        return await prepare(original, self, obj, *args, **kwargs)


async def prepare(original: Callable[..., Any], self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Tokenizes a request and prepares its media with SGLang's own method, and watches for its abort meanwhile.

    Raises:
        Aborted: if the request is aborted, or its client disconnects, before it is ready for the scheduler.
    """
    if not _acts(self) or not obj.contains_mm_input():
        return await original(self, obj, *args, **kwargs)
    state = self.rid_to_state.get(obj.rid)
    client = None if getattr(obj, "background", False) else getattr(state, _CLIENT, None)
    preparing = self.__dict__.setdefault(_PREPARING, {})
    task = asyncio.ensure_future(original(self, obj, *args, **kwargs))
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


def abort(
    original: Callable[..., None], self: Any, rid: str = "", abort_all: bool = False, *args: Any, **kwargs: Any
) -> None:
    """AROUND TokenizerManager.abort_request, which any thread may call."""
    original(self, rid, abort_all, *args, **kwargs)
    for prepared_rid, (task, loop) in list(self.__dict__.get(_PREPARING, {}).items()):
        if abort_all or prepared_rid == rid:
            logger.info("mminfer: request %s is aborted while its media are prepared", prepared_rid)
            loop.call_soon_threadsafe(task.cancel)


def _acts(manager: Any) -> bool:
    return mends.wanted(manager.server_args) and mends.active(NAME)
