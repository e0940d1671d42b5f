"""A server with a head that sees too little: the guard makes it dense, for requests that begin afterwards.

Five requests wait while a long one is computed, so each begins in the batch in which the one before it ends, and one of
them begins in the batch whose audit makes the head dense.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving import GUARD_ERROR, ROUNDING, Media, Served, difference, ran_sparse, same, text, user, video, wait_for
from sglang_mminfer.serving.guard import REQUESTS
from sglang_mminfer.serving.trace import PrefillRecord
from sglang_mminfer.testing.oracle import HFOracle, OracleAnswer

pytestmark = pytest.mark.server("guarded")

WAITING = 5


@dataclass(frozen=True)
class Run:
    """What the server said and did.

    Attributes:
        expected: dense attention's answer to the question that all but the first request ask.
        answers: by request.
        records: of all these requests, in the order in which they were written.
    """

    served: Served
    expected: OracleAnswer
    answers: dict[str, OracleAnswer]
    records: list[PrefillRecord]

    def of(self, rid: str) -> list[PrefillRecord]:
        return [record for record in self.records if record.rid == rid]

    def guarded(self, rid: str) -> int:
        """How many heads were dense for a request from its first chunk on."""
        return self.of(rid)[0].guarded_heads

    @property
    def decided(self) -> int:
        """The number of the record that tells of the change."""
        (number,) = (number for number, record in enumerate(self.records) if record.guard)
        return number


@pytest.fixture(scope="module")
def run(servers: Callable[[str], Served], media: Media, model: Path) -> Run:
    served = servers("guarded")
    question = [user(video(media.medium_video), text("Where did it go?"))]
    with ThreadPoolExecutor(1 + WAITING) as pool:
        first = pool.submit(served.ask, [user(video(media.long_video), text("Who?"))], 1, rid="first")
        wait_for(lambda: served.records("first"), 300)
        rids = [f"waits-{number}" for number in range(WAITING)]
        waiting = {rid: pool.submit(served.ask, question, rid=rid) for rid in rids}
        first.result()
        answers = {rid: answer.result() for rid, answer in waiting.items()}
    answers["last"] = served.ask(question, rid="last")
    records = [record for record in served.records() if record.rid in ("first", *answers)]  # not SGLang's own request
    return Run(served, HFOracle(model).answer(question), answers, records)


def test_a_request_keeps_its_heads_for_all_its_chunks(run: Run) -> None:
    for rid in ("first", *run.answers):
        records = run.of(rid)
        assert len(records) > 4 and ran_sparse(records)
        assert len({record.guarded_heads for record in records}) == 1
    assert run.guarded("first") == 0 and run.guarded("last") == 1
    in_flight = {record.rid for record in run.records[run.decided + 1 :] if record.guarded_heads == 0}
    assert in_flight, "a request was not complete when the head became dense"


def test_one_head_became_dense_after_three_requests(run: Run) -> None:
    """The errors of the others do not count, whenever they began."""
    decided = run.records[run.decided]
    assert decided.guard is not None
    ((layer, head),) = [(change.layer, change.head) for change in decided.guard]
    assert (layer, head) == (0, 0) and decided.guard[0].error > GUARD_ERROR
    complete = [record.rid for record in run.records[: run.decided + 1] if record.map is not None]
    assert len(complete) == REQUESTS and complete[-1] == decided.rid, complete
    lines = [line for line in run.served.server.log().splitlines() if "mminfer: guard: the output error of" in line]
    assert len(lines) == 1 and "layer 0 head 0" in lines[0]


def test_the_audited_error_falls(run: Run) -> None:
    for record in run.records:
        errors = {found.layer: found.error_max for found in record.audit or []}
        assert errors[1] < 1e-5
        assert errors[0] < 1e-5 or record.guarded_heads == 0
    last = [record for record in run.records if record.guarded_heads == 0 and record.map is not None]
    assert all(found.error_max > GUARD_ERROR for record in last for found in record.audit or [] if found.layer == 0)


def test_answers_are_those_of_the_heads_that_a_request_began_with(run: Run) -> None:
    before = [run.answers[rid] for rid in run.answers if run.guarded(rid) == 0]
    after = [run.answers[rid] for rid in run.answers if run.guarded(rid) == 1]
    assert len(before) >= REQUESTS and len(after) >= 2
    for answer in before:
        same(before[0], answer)
        assert difference(run.expected, answer) > 100 * ROUNDING
    for answer in after:
        same(run.expected, answer)


def test_requests_with_other_heads_shared_a_batch(run: Run) -> None:
    """Records of a batch have the same times."""
    batches: dict[tuple[float, float], set[int]] = {}
    for record in run.records:
        batches.setdefault((record.plan_ms, record.attn_ms), set()).add(record.guarded_heads)
    assert {0, 1} in batches.values()


def test_the_metrics_count_it(run: Run) -> None:
    page = run.served.get("/metrics").decode()
    assert re.findall(r'^sglang:mminfer_guarded_heads_total\{layer="(\d+)"\} (\S+)$', page, re.M) == [("0", "1.0")]
