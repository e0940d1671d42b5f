"""Many conversations at once, with clients that give up: nothing breaks or leaks, and every answer is right.

`make soak` has them with every family in turn, each time with a server of other settings (soak_shift.py). `make test`
has a few with the server of most tests. Variables of `make soak`:

    MMINFER_SOAK          conversations altogether (10,000)
    MMINFER_SOAK_EACH     conversations of one server (96)
    MMINFER_SOAK_MINUTES  the time limit (none)
    MMINFER_SOAK_SEED     (0)
    MMINFER_SOAK_RECORD   the file of the record; another run with it goes on where the last one ended (build/soak.json)
    MMINFER_SOAK_REPEAT   the number of a server: repeats its conversations, and leaves the record as it is
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import soak_wave
from families import FAMILIES, FAMILY
from families_served import make_shown
from run_record import ROOT, RunRecord, command
from serving import Media, Served
from sglang_mminfer.testing.oracle import OracleAnswer
from sglang_mminfer.tools.server import Server
from soak_shift import Shift, shift
from soak_talk import SECONDS, Talk

WAVE, CLIENTS = 24, 8
QWEN = FAMILY["qwen2_5_vl"]


@pytest.mark.server("main")
def test_a_few_conversations_at_once(servers: Callable[[str], Served], media: Media) -> None:
    talk = Talk(QWEN, media.images[:2], media.videos[:2], live=False)
    wave = soak_wave.run(servers("main"), talk, [f"smoke-{i}" for i in range(WAVE)], CLIENTS)
    print(f"\n{dict(wave.counts)}, log-probabilities within {wave.largest:.1e}")
    assert not wave.faults
    # Whether a client leaves or aborts before its answer comes is a matter of time.
    assert min(wave.counts[kind] for kind in ("chat", "several", "session", "sparse")) > 0


ANSWER = OracleAnswer([1, 2], [3, 4], [{3: -0.1, 5: -2.0}, {4: -0.2, 6: -1.0}], "")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (ANSWER, None),
        (replace(ANSWER, top_logprobs=[]), None),
        (replace(ANSWER, prompt_ids=[1, 7]), "another prompt"),
        (replace(ANSWER, token_ids=[3, 6]), "another token"),
        (replace(ANSWER, token_ids=[3, 6], top_logprobs=[]), "another token"),
        (replace(ANSWER, token_ids=[3], top_logprobs=[]), "1 tokens"),
        (replace(ANSWER, top_logprobs=[{3: -0.1, 5: -2.0}, {4: -0.3, 6: -1.0}]), "log-probabilities apart"),
    ],
)
def test_an_answer_that_differs_is_a_fault(other: OracleAnswer, what: str | None) -> None:
    wave = soak_wave.Wave()
    soak_wave.compare(wave, "a", [ANSWER], [other])
    assert [fault["what"].startswith(what) for fault in wave.faults] == ([True] if what else [])


def test_a_record_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    first = RunRecord(path, 3, "make soak")
    first.add("0-internvl", {"chat": 5})
    first.save()
    second = RunRecord(path, 3, "make soak")
    second.add("0-internvl", {"chat": 2, "session": 1})
    second.save()
    assert json.loads(path.read_text())["parts"] == {"0-internvl": {"chat": 7, "session": 1}}
    assert len(json.loads(path.read_text())["runs"]) == 2 and second.total("chat") == 7
    with pytest.raises(ValueError, match="seed 3, not 4"):
        RunRecord(path, 4, "make soak")


def test_a_fault_names_no_folder_of_a_machine_and_is_open_until_it_is_told_what_became_of_it(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "soak.json", 3, "make soak")
    site = f"{ROOT}/.venv/lib/python3.11/site-packages/hypothesis/core.py"
    record.fault(
        f'File "{site}", line 1\n  File "{ROOT}/tests/fuzz/x.py"; /tmp/tmpab12/drawn.json: no', again="make soak"
    )
    (fault,) = record.open_faults
    what = 'File "site-packages/hypothesis/core.py", line 1\n  File "tests/fuzz/x.py"; drawn.json: no'
    assert fault == {"what": what, "again": "make soak"}
    fault["since"] = "mended"
    assert not record.open_faults and record.faults


def test_a_round_has_every_family_and_a_seed_always_the_same_servers() -> None:
    numbers = range(len(FAMILIES), 2 * len(FAMILIES))
    shifts = [shift(7, number) for number in numbers]
    assert {one.family.name for one in shifts} == {family.name for family in FAMILIES}
    assert shifts == [shift(7, number) for number in numbers]
    assert len({str(one.settings) for one in shifts}) > len(FAMILIES) // 2


# ---- make soak ---------------------------------------------------------------------------------------------


def number_of(variable: str, otherwise: float) -> float:
    return float(os.environ.get(f"MMINFER_{variable}") or otherwise)


class Soak:
    """Servers one after another; the next one starts while the one before it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.media = make_shown(folder)
        self.seed, self.each = int(number_of("SOAK_SEED", 0)), int(number_of("SOAK_EACH", 96))
        self.until = time.monotonic() + 60 * number_of("SOAK_MINUTES", float("inf"))
        self.starter = ThreadPoolExecutor(1)
        self.started: dict[int, tuple[Served, Future[Server]]] = {}

    def begin(self, number: int) -> None:
        if number not in self.started:
            one = shift(self.seed, number)
            served = one.server(self.folder / one.name)
            served.client = served.server.client(SECONDS)
            self.started[number] = served, self.starter.submit(served.server.start)

    def over(self, reserve: float = 0) -> bool:
        """Whether the time, less some seconds, is over."""
        return time.monotonic() + reserve > self.until

    def run(self, one: Shift, done: int, after: Callable[[soak_wave.Wave], None], next_number: int | None) -> None:
        """The conversations of a server from number `done` on; `after` gets each wave."""
        self.begin(one.number)
        served, start = self.started[one.number]
        try:
            try:
                start.result()
            except Exception as error:
                wave = soak_wave.Wave(died=True)
                wave.fault("start", str(error))
                after(wave)
                return
            if next_number is not None and not self.over(60):
                self.begin(next_number)
            talk = Talk(one.family, *self.media, live=one.settings.covering)
            while done < self.each and not self.over():
                seeds = [f"{self.seed}-{one.number}-{i}" for i in range(done, min(done + WAVE, self.each))]
                wave = soak_wave.run(served, talk, seeds, CLIENTS)
                done += len(seeds)
                after(wave)
                if wave.died:
                    return
        finally:
            served.server.stop()
            del self.started[one.number]

    def stop(self) -> None:
        self.starter.shutdown(wait=False, cancel_futures=True)
        for served, _ in self.started.values():
            served.server.stop()


@pytest.fixture
def soak(tmp_path: Path) -> Soak:
    one = Soak(tmp_path)
    yield one
    one.stop()


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_every_family_in_turn(soak: Soak) -> None:
    if repeated := os.environ.get("MMINFER_SOAK_REPEAT"):
        faults: list[dict] = []
        soak.run(shift(soak.seed, int(repeated)), 0, lambda wave: faults.extend(wave.faults), None)
        assert not faults
        return
    path = Path(os.environ.get("MMINFER_SOAK_RECORD") or "build/soak.json")
    record, most = RunRecord(path, soak.seed, command("make soak", "MMINFER_SOAK")), number_of("SOAK", 10_000)
    number = 0
    while record.total("conversations") < most and not soak.over():
        one = shift(soak.seed, number)
        number += 1
        part = record.part(one.name, **one.facts())
        if part.get("done"):
            continue
        began = time.monotonic()

        def after(wave: soak_wave.Wave) -> None:
            record.add(one.name, wave.counts)  # noqa: B023
            part["largest"] = max(part.get("largest", 0.0), wave.largest)  # noqa: B023
            part["done"] = wave.died or part.get("conversations", 0) >= soak.each  # noqa: B023
            again = f"MMINFER_SOAK_REPEAT={one.number} MMINFER_SOAK_SEED={soak.seed} MMINFER_SOAK_EACH={soak.each}"  # noqa: B023
            for fault in wave.faults:
                record.fault(**fault, server=one.name, again=f"{again} make soak")  # noqa: B023
            record.save()
            seconds = time.monotonic() - began  # noqa: B023
            print(
                f"{one.name}: {part.get('conversations', 0)} of {soak.each}, {seconds:.0f} s; "  # noqa: B023
                f"{record.total('conversations')} of {most:.0f} in all, {len(record.open_faults)} faults",
                flush=True,
            )

        soak.run(one, part.get("conversations", 0), after, number)
    record.save()
    assert not record.open_faults, record.open_faults[:5]
