"""Head configs, conversations, media items and what clients preprocess, as nobody should write them: each is refused
with one sentence or handled right. What goes over HTTP is in tests/server/test_fuzz.py.

`make fuzz` draws as many as the variables say; `make test` draws a few, always the same.

    MMINFER_FUZZ          cases altogether (100,000): `SHARES` of them, and the rest are payloads
    MMINFER_FUZZ_MINUTES  the time limit of what needs no server, and of what needs one (none)
    MMINFER_FUZZ_SEED     (0)
    MMINFER_FUZZ_RECORD   the file of the record; another run with it goes on where the last one ended (build/fuzz.json)
    MMINFER_FUZZ_WORKERS  processes (one for each core)
"""

from __future__ import annotations

import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pytest

import fuzz_batch
from run_record import RunRecord, command

SHARES = {"head_configs": 0.45, "item_maps": 0.40, "client_items": 0.07, "media_maps": 0.03}
"""The rest are payloads (tests/server/test_fuzz.py)."""

BATCH = 100
RIGHT = {"head_configs": "read", "item_maps": "mapped", "client_items": "taken", "media_maps": "right"}


@pytest.mark.parametrize("kind", fuzz_batch.KINDS)
def test_a_few_cases(kind: str) -> None:
    outcome = fuzz_batch.run(kind, 0, 0, 30)
    assert outcome.fault is None, outcome.fault
    assert outcome.counts[RIGHT[kind]] and sum(outcome.counts.values()) >= 20, outcome.counts


def test_a_case_that_fails_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import fuzz_media_maps

    def wrong(batch: object) -> str:
        raise AssertionError("it is wrong")

    monkeypatch.setattr(fuzz_media_maps, "check", wrong)
    outcome = fuzz_batch.run("media_maps", 0, 0, 5)
    assert outcome.fault is not None and "it is wrong" in outcome.fault and "case=Batch(" in outcome.fault


def number_of(variable: str, otherwise: float) -> float:
    return float(os.environ.get(f"MMINFER_FUZZ{variable}") or otherwise)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_many_cases() -> None:
    seed, cases = int(number_of("_SEED", 0)), number_of("", 100_000)
    until = time.monotonic() + 60 * number_of("_MINUTES", float("inf"))
    path = Path(os.environ.get("MMINFER_FUZZ_RECORD") or "build/fuzz.json")
    record = RunRecord(path, seed, command("make fuzz", "MMINFER_FUZZ"))
    batches = iter(
        sorted(
            (
                (kind, batch)
                for kind, share in SHARES.items()
                for batch in record.missing(kind, round(share * cases / BATCH))
            ),
            key=lambda one: one[1] / SHARES[one[0]],  # so that a run that ends early has its share of each kind
        )
    )
    workers = int(number_of("_WORKERS", os.cpu_count() or 1))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), fuzz_batch.prepare)
    running: dict[Future[fuzz_batch.Outcome], tuple[str, int]] = {}
    said = 0.0
    try:
        while True:
            while len(running) < 2 * workers and time.monotonic() < until and (batch := next(batches, None)):
                running[pool.submit(fuzz_batch.run, batch[0], seed, batch[1], BATCH)] = batch
            if not running:
                break
            for one in wait(running, return_when=FIRST_COMPLETED).done:
                note(record, seed, one.result())
                del running[one]
            record.save()
            if time.monotonic() > said + 20:
                said = time.monotonic()
                counts = {kind: part.get("cases", 0) for kind, part in record.parts.items()}
                print(f"{sum(counts.values())} cases {counts}, {len(record.open_faults)} faults", flush=True)
    except BrokenProcessPool:
        record.fault("a process ended by itself", batches=sorted(running.values()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        record.save()
    assert not record.open_faults, record.open_faults[:3]


def note(record: RunRecord, seed: int, outcome: fuzz_batch.Outcome) -> None:
    """Adds a batch to the record."""
    record.add(outcome.kind, {"cases": sum(outcome.counts.values()), **outcome.counts})
    record.ran(outcome.kind, outcome.number)
    if outcome.fault:
        again = f"fuzz_batch.run({outcome.kind!r}, {seed}, {outcome.number}, {BATCH})"
        record.fault(outcome.fault, kind=outcome.kind, again=again)
