"""A wave of the soak: conversations at once, then each of their requests alone; and what must hold after it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from serving import ROUNDING, TIE, Served, difference, is_tie
from sglang_mminfer.testing.oracle import OracleAnswer
from soak_talk import SECONDS, Question, Talk

BROKEN = re.compile(r"leak|use-after-free|double free|Traceback|hit an exception|planning .* failed", re.IGNORECASE)
"""What SGLang's checks and ours log when something is wrong. A leak also ends an idle scheduler."""

RETRACTED = "#retracted_reqs: "


@dataclass
class Wave:
    """What came of a wave.

    Attributes:
        counts: conversations, answers of each kind, requests given up, ties, prefill records, those that ran sparse and
            those of generated tokens, and lines in which SGLang says that it retracted requests.
        faults: the conversation and what is wrong with it.
        largest: the largest difference of a log-probability from the request alone.
        died: whether the server ended.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    largest: float = 0.0
    died: bool = False

    def fault(self, conversation: str, what: str) -> None:
        self.faults.append({"conversation": conversation, "what": what[:1000]})


def run(served: Served, talk: Talk, conversations: Sequence[str], clients: int) -> Wave:
    """Has the conversations with these seeds, `clients` at a time, and compares."""
    wave = Wave()
    log, records = len(served.server.log()), len(served.records())
    asked: list[tuple[str, Question, list[OracleAnswer]]] = []

    def converse(seed: str) -> None:
        try:
            for kind, question, answers in talk.converse(served, seed):
                wave.counts[kind] += max(1, len(answers))
                if question is not None:
                    asked.append((seed, question, answers))
        except Exception as error:
            wave.fault(seed, f"{type(error).__name__}: {error}")

    try:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(converse, conversations))
        idle(served, wave)
        known: dict[str, list[OracleAnswer]] = {}
        for seed, question, answers in asked:
            if (key := repr(question)) not in known:
                known[key] = question.alone(served)
            compare(wave, seed, known[key], answers)
        idle(served, wave)
    except Exception as error:
        wave.fault("alone", f"{type(error).__name__}: {error}")
    wave.counts["conversations"] = len(conversations)
    wave.died = not served.server.running
    if wave.died:
        wave.fault("all", f"the server ended: {served.server.tail(30)}")
    lines = served.server.log()[log:].splitlines()
    wave.counts["retractions"] = sum(RETRACTED in line for line in lines)
    broken = [line for line in lines if BROKEN.search(line)]
    if broken:
        wave.fault("all", f"the log says: {broken[:3]}")
    for record in served.records()[records:]:
        wave.counts["sparse"] += record.sparse_layers > 0
        wave.counts["generated"] += record.dense_reason == "decode"
        wave.counts["prefills"] += 1
        if record.dense_reason and "internal_error" in record.dense_reason:
            wave.fault("all", f"{record.rid}: {record.dense_reason}")
    return wave


def idle(served: Served, wave: Wave) -> None:
    """Waits until nothing runs, when SGLang looks for leaks, and empties the cache: no slot may stay used."""
    served.server.flush_cache(SECONDS)
    if used := served.used_tokens():
        wave.fault("all", f"{used} tokens stay used when nothing runs and nothing is cached")


def compare(wave: Wave, seed: str, alone: Sequence[OracleAnswer], answers: Sequence[OracleAnswer]) -> None:
    """Counts how answers differ from those of the requests alone, apart from ties."""
    if len(alone) != len(answers):
        wave.fault(seed, f"{len(answers)} answers, alone {len(alone)}")
    for expected, answer in zip(alone, answers):
        if not answer.top_logprobs:  # of a request without log-probabilities
            answer = replace(answer, top_logprobs=expected.top_logprobs)
        if len(expected.token_ids) != len(answer.token_ids):
            wave.fault(seed, f"{len(answer.token_ids)} tokens, alone {len(expected.token_ids)}")
            return
        gap = difference(expected, answer)
        wave.largest = max(wave.largest, gap)
        length = f"over a prompt of {len(expected.prompt_ids)} tokens"
        if expected.prompt_ids != answer.prompt_ids:
            wave.fault(seed, f"another prompt: {len(answer.prompt_ids)} tokens, alone {len(expected.prompt_ids)}")
        elif gap > ROUNDING:
            wave.fault(seed, f"log-probabilities apart by {gap:.1e} {length}")
        elif expected.token_ids != answer.token_ids:
            wave.counts["ties"] += 1
            if not is_tie(expected, answer):
                wave.fault(seed, f"another token, and no tie within {TIE}, {length}")
            return  # what follows in a session continues another text
