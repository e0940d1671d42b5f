"""Many conversations at once, some with clients that disconnect: nothing breaks or leaks, and every answer is right."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from serving import ROUNDING, TIE, Media, Message, Served, difference, is_tie, scripted
from sglang_mminfer.testing.oracle import OracleAnswer

pytestmark = pytest.mark.server("main")

BROKEN = re.compile(r"leak|use-after-free|double free|Traceback|hit an exception|planning .* failed", re.IGNORECASE)
"""What SGLang's checks and ours log when something is wrong. A leak also ends an idle scheduler."""

MOST_TURNS = 4


@dataclass
class Account:
    """What happened in the test."""

    answers: list[tuple[list[Message], int, OracleAnswer]] = field(default_factory=list)
    left: int = 0
    ties: int = 0
    largest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return (
            f"{len(self.answers)} answers, {self.left} requests left by their client, {self.ties} ties, "
            f"log-probabilities within {self.largest:.1e}"
        )


def converse(served: Served, media: Media, seed: int, account: Account) -> None:
    """Runs one random conversation; in every fifth the client disconnects during a turn."""
    draw = random.Random(seed)
    # Some conversations share their first turns, or all their media, with another one.
    turns = media.conversation(draw.randrange(1000), draw.randint(1, MOST_TURNS))
    leaves_at = draw.randrange(len(turns)) if draw.random() < 0.2 else None
    for turn, prompt in enumerate(scripted(turns, draw.randrange(3))):
        new_tokens = draw.choice([1, 4, 8, 24])
        if turn == leaves_at:
            until = time.monotonic() + draw.choice([0.0, 0.05, 0.2, 0.5, 1.0])
            served.ask_and_leave(prompt, 400, lambda: time.monotonic() >= until, f"left-{seed}")  # noqa: B023
            with account.lock:
                account.left += 1
            if draw.random() < 0.5:
                return
        answer = served.ask(prompt, new_tokens)
        with account.lock:
            account.answers.append((prompt, new_tokens, answer))


def compare_with_alone(served: Served, account: Account) -> Iterator[str]:
    """Asks for each answer again, alone over an empty cache. Yields how answers differ, apart from ties."""
    known: dict[tuple[str, int], OracleAnswer] = {}
    for prompt, new_tokens, answer in account.answers:
        key = str(prompt), new_tokens
        if key not in known:
            served.server.flush_cache()
            known[key] = served.ask(prompt, new_tokens)
        alone = known[key]
        gap = difference(alone, answer)
        account.largest = max(account.largest, gap)
        if alone.prompt_ids != answer.prompt_ids:
            yield "another prompt"
        elif gap > ROUNDING:
            yield f"log-probabilities apart by {gap:.1e} over a prompt of {len(alone.prompt_ids)} tokens"
        elif alone.token_ids != answer.token_ids:
            account.ties += 1
            if not is_tie(alone, answer):
                yield f"another token, and no tie within {TIE}"


def soak(served: Served, media: Media, conversations: int, clients: int) -> Account:
    account = Account()
    served.server.flush_cache()
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(converse, served, media, seed, account) for seed in range(conversations)]
        for conversation in running:
            conversation.result()
    served.server.flush_cache()  # waits until the server is idle, when SGLang looks for leaks
    assert served.used_tokens() == 0
    wrong = list(compare_with_alone(served, account))
    print(f"\nsoak of {conversations} conversations, {clients} clients: {account}")
    assert not wrong, f"{len(wrong)} of {len(account.answers)} answers are not those of the request alone: {wrong[:5]}"
    assert served.server.running
    assert not [line for line in served.server.log().splitlines() if BROKEN.search(line)]
    assert not [r for r in served.records() if r.dense_reason and "internal_error" in r.dense_reason]
    return account


def test_a_few_conversations_at_once(servers: Callable[[str], Served], media: Media) -> None:
    account = soak(servers("main"), media, 24, 8)
    assert account.left >= 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_hundred_conversations_at_once(servers: Callable[[str], Served], media: Media) -> None:
    account = soak(servers("main"), media, 300, 16)
    assert account.left >= 30 and len(account.answers) >= 500
