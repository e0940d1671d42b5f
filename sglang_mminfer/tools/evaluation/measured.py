"""What a server did with the requests of an evaluation: density, prefill time, and the share that was cached."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_mminfer.serving.trace import density_of_records
from sglang_mminfer.tools.evaluation.lmms import answers_in
from sglang_mminfer.tools.niah.command import bar_of_answers
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry


@contextlib.contextmanager
def progress(console: Console, label: str) -> Iterator[Callable[[int, int, int], None]]:
    """A function that takes (answers so far, requests, failures) and shows them: a bar on a terminal, else a line for
    each quarter."""
    told = -1
    with bar_of_answers(console) as bar:
        task = bar.add_task(f"{label}: lmms-eval", total=None, words="")

        def heard(done: int, planned: int, failed: int) -> None:
            nonlocal told
            words = f"{failed} failed" if failed else ""
            bar.update(task, completed=done, total=planned or None, words=words)
            quarter = 4 * done // planned if planned else 0
            if not console.is_terminal and quarter != told:
                told = quarter
                console.print(f"{label}: {done} of {planned} answers {words}".rstrip(), highlight=False)

        yield heard


class Watch:
    """Follows the answers of a run: tells how many there are, and asks the server about each prefill while it still
    remembers it.

    Args:
        answers: the client's file. prefills: where to keep what the server tells, a JSON line for each request.
        telemetry: of the server; None if it has none.
        heard: called with (answers so far, requests, failures).
    """

    def __init__(
        self, answers: Path, prefills: Path, telemetry: Telemetry | None, heard: Callable[[int, int, int], None]
    ) -> None:
        self.answers, self.prefills, self.telemetry, self.heard = answers, prefills, telemetry, heard
        self.begins_at = self._read_to = answers.stat().st_size if answers.exists() else 0
        self.planned = self.done = self.failed = 0

    def look(self) -> None:
        """Take in what is new."""
        if not self.answers.exists():
            return
        with self.answers.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # a line that is being written is read next time
        self._read_to += len(text)
        for line in text.splitlines():
            entry = json.loads(line)
            self.planned += entry.get("planned", 0)
            self.done += entry.get("answer") is not None or "again" in entry
            self.failed += "error" in entry
            if self.telemetry is not None and entry.get("rid"):
                self._ask(entry)
        if text:
            self.heard(self.done, self.planned, self.failed)

    def _ask(self, entry: dict[str, Any]) -> None:
        assert self.telemetry is not None
        try:
            records = self.telemetry.records(entry["rid"])
        except NoTelemetry:  # the prompt was cached as a whole, or is forgotten already
            return
        told = {
            "key": entry["key"],
            "density": density_of_records(records),
            "forward_ms": sum(record.forward_ms for record in records),
            "attn_ms": sum(record.attn_ms for record in records),
            "dense_reasons": sorted({record.dense_reason for record in records if record.dense_reason}),
        }
        with self.prefills.open("a") as out:
            out.write(json.dumps(told) + "\n")


def figures(answers: Path, prefills: Path, begins_at: int) -> dict[str, Any]:
    """Figures of all requests of a run, those that were answered in an earlier one included.

    Args:
        begins_at: where the run begins in the file of answers.

    Returns:
        requests, sent: how many there were, and how many of them were sent in this run.
        prompt_tokens: the mean. cached_share: of all prompt tokens; None if the server does not tell it.
        cached_share_by_turn: the same by the turn of a conversation.
        density: visited over causal pairs of all new tokens; None if no server told it. told: of how many requests.
        forward_ms, attn_ms: the mean time of a request's prefill batches; None if unknown.
        dense_reasons: why chunks ran dense.
    """
    run = answers_in(answers, begins_at)
    keys = [entry["key"] for entry in run if "key" in entry and not entry.get("error")]
    kept = {entry["key"]: entry for entry in answers_in(answers) if entry.get("answer") is not None}
    told = {entry["key"]: entry for entry in answers_in(prefills)}
    entries = [kept[key] for key in keys]
    known = [(kept[key], told[key]) for key in dict.fromkeys(keys) if key in told]
    by_turn = {turn: _cached_share(e for e in entries if e["turn"] == turn) for turn in {e["turn"] for e in entries}}
    visited = causal = 0.0
    for entry, prefill in known:
        if prefill["density"] is None:
            continue
        pairs = (entry["prompt_tokens"] ** 2 - (entry["cached_tokens"] or 0) ** 2) / 2
        causal += pairs
        visited += pairs * prefill["density"]
    timed = [prefill for _, prefill in known if prefill["forward_ms"]]
    return {
        "requests": len(keys),
        "sent": sum(entry.get("answer") is not None for entry in run),
        "prompt_tokens": _mean(entry["prompt_tokens"] for entry in entries),
        "cached_share": _cached_share(entries),
        "cached_share_by_turn": {str(turn): by_turn[turn] for turn in sorted(by_turn)},
        "density": round(visited / causal, 4) if causal else None,
        "told": len(known),
        "forward_ms": _mean(prefill["forward_ms"] for prefill in timed),
        "attn_ms": _mean(prefill["attn_ms"] for prefill in timed),
        "dense_reasons": sorted({reason for _, prefill in known for reason in prefill["dense_reasons"]}),
    }


def _cached_share(entries: Iterable[dict[str, Any]]) -> float | None:
    told = [entry for entry in entries if entry["cached_tokens"] is not None]
    tokens = sum(entry["prompt_tokens"] for entry in told)
    return round(sum(entry["cached_tokens"] for entry in told) / tokens, 4) if tokens else None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(sum(found) / len(found), 1) if found else None
