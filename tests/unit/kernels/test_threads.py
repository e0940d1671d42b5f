"""Work is shared out over as many threads as torch may use, also by callers whose own small operations use one."""

from __future__ import annotations

import threading

import pytest
import torch

from sglang_mminfer.kernels.threads import for_each, one_thread


@pytest.fixture
def three() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_of(number: int) -> set[int]:
    """Those that took up an item, each of which waits until so many have one."""
    seen, meet = set(), threading.Barrier(number)

    def work(item: int) -> None:
        seen.add(threading.get_ident())
        assert torch.get_num_threads() == 1
        meet.wait(timeout=30)

    for_each(work, range(number))
    return seen


def test_three_threads_are_used_inside_one_thread_too(three: None) -> None:
    for _ in range(2):
        assert len(threads_of(3)) == 3
        with one_thread():
            assert torch.get_num_threads() == 1 and len(threads_of(3)) == 3
            with one_thread():
                assert len(threads_of(3)) == 3
            assert torch.get_num_threads() == 1 and len(threads_of(3)) == 3
        assert torch.get_num_threads() == 3


def test_one_allowed_thread_is_the_callers_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_thread():
            assert threads_of(1) == {threading.get_ident()}
    finally:
        torch.set_num_threads(before)
