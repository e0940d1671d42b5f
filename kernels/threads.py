"""Shares out the CPU's work: each thread takes whole tiles, instead of all threads sharing every small operation.

An operation on one tile is too small to be worth a fork and join of all threads, and on a busy machine such joins
cost far more than the work itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

_before = threading.local()
"""`threads`: how many torch might use in this thread before `one_thread`."""


def for_each(work: Callable[[T], None], items: Sequence[T]) -> None:
    """Call work(item) for every item, in any order, on as many threads as torch may use, inside `one_thread` as many as
    it might use before. Raises what work raises."""
    allowed = max(torch.get_num_threads(), getattr(_before, "threads", 1))
    threads = min(allowed, len(items))
    if threads < 2:
        for item in items:
            work(item)
        return
    todo, lock = iter(items), threading.Lock()

    def take() -> None:
        with torch.inference_mode():  # each thread has its own mode; SGLang's tensors are inference tensors
            while True:
                with lock:
                    item = next(todo, None)
                if item is None:
                    return
                work(item)

    pool = _pool(allowed)
    for done in [pool.submit(take) for _ in range(threads)]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one thread each."""
    started, own = threading.Barrier(threads + 1), torch.get_num_threads()

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch takes the number up when a thread first asks: now, before another is set
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="mminfer", initializer=alone)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(own)  # restore it: new threads start with the number that was set last
    return pool


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, the caller's torch operations use one thread: for index work, which is many small operations."""
    threads, before = torch.get_num_threads(), getattr(_before, "threads", 1)
    _before.threads = max(threads, before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _before.threads = before
