"""Settings of every test: one thread, the same hypothesis cases in every run, and SGLang's parts on a CPU."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("SGLANG_PLATFORM", "mminfer_cpu")  # SGLang takes a CPU only if asked to

# Small prompts run sparse, too. Servers are told by tests/server/conftest.py.
os.environ.setdefault("SGLANG_MMINFER_SPARSE", "always")

# Ranks on a CPU share the machine's memory, and SGLang refuses to start where it shrinks between two looks at it: each
# time that another server starts beside them.
os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")

settings.register_profile(
    "ci",
    derandomize=True,
    print_blob=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile("ci")


@pytest.fixture
def note() -> Iterator[Callable[[Any], None]]:
    """`asked.note`: this process works for a server with these arguments, until the test ends."""
    from sglang_mminfer.mends import asked

    before = asked.server_args()
    yield asked.note
    asked.note(before)
