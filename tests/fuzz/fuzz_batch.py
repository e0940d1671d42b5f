"""A batch of cases of one kind, drawn from a seed: what a worker of the fuzz runs."""

from __future__ import annotations

import importlib
import logging
import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as from_seed

KINDS = ("head_configs", "media_maps", "item_maps", "client_items")
"""Each has a module `fuzz_KIND` with `cases()`, a strategy, and `check(case)`, which returns what became of a case in a
word or two, and raises if it is not as it must be."""


@dataclass
class Outcome:
    """What became of a batch. fault: the traceback with the smallest failing case, if there is one."""

    kind: str
    number: int
    counts: Counter[str] = field(default_factory=Counter)
    fault: str | None = None


def prepare() -> None:
    """Settings of a worker's process."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def run(kind: str, seed: int, number: int, examples: int) -> Outcome:
    """Batch `number` of a kind. The same arguments draw the same cases."""
    module = importlib.import_module(f"fuzz_{kind}")
    outcome = Outcome(kind, number)

    @from_seed(seed * 1_000_003 + number)
    @settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(module.cases())
    def batch(case: object) -> None:
        outcome.counts[module.check(case)] += 1

    try:
        batch()
    except Exception as error:
        outcome.fault = "".join(traceback.format_exception(error, limit=-4))[-4000:]
    return outcome
