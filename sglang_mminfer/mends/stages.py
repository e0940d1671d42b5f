"""How long the media of a request take in the tokenizer process, stage by stage, by one clock.

A stage adds to the times of the request that it works for. Worker threads get these from the task that gives them work.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

MOST_REQUESTS = 4096
"""Requests whose times are remembered."""

Stage = Literal["open_ms", "decode_ms", "resize_ms", "process_ms", "prepare_ms"]


class MediaTimes(msgspec.Struct, kw_only=True):
    """Milliseconds that the media of a request took before the scheduler got them.

    Attributes:
        open_ms: fetching, hashing and opening videos, the sum over them.
        decode_ms: decoding frames, the sum over videos; 0 if all were kept.
        resize_ms: making frames smaller as they are decoded, in the same way.
        process_ms: transformers' processor: normalising, cutting patches, and the prompt's tokens; 0 for families that
            have code of their own in its place.
        prepare_ms: all of it, from begin to end.
    """

    open_ms: float = 0.0
    decode_ms: float = 0.0
    resize_ms: float = 0.0
    process_ms: float = 0.0
    prepare_ms: float = 0.0


_current: contextvars.ContextVar[MediaTimes | None] = contextvars.ContextVar("mminfer_media_times", default=None)
_lock = threading.Lock()
_requests: OrderedDict[str, MediaTimes] = OrderedDict()


@contextmanager
def of_request(rid: str) -> Iterator[None]:
    """The block prepares the media of a request. Its times are remembered."""
    token = _current.set(MediaTimes())
    try:
        with timed("prepare_ms"):
            yield
    finally:
        times = _current.get()
        _current.reset(token)
        if times is not None:
            with _lock:
                _requests[rid] = times
                _requests.move_to_end(rid)
                while len(_requests) > MOST_REQUESTS:
                    _requests.popitem(last=False)


@contextmanager
def timed(stage: Stage) -> Iterator[None]:
    """The block is a stage of the current request, if there is one."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        times = _current.get()
        if times is not None:
            with _lock:  # several threads may work for a request
                setattr(times, stage, getattr(times, stage) + 1e3 * (time.perf_counter() - begin))


def times_of(rid: str) -> MediaTimes | None:
    """The times of one of the latest requests; None if it is not remembered, or had no media."""
    with _lock:
        return _requests.get(rid)


def follow(executor: Any) -> None:
    """Lets the threads of an executor know for which request they work."""
    executor.submit = functools.partial(_submit, executor.submit)


def _submit(submit: Callable[..., Any], function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return submit(contextvars.copy_context().run, function, *args, **kwargs)
