"""Sparse, short and text-only requests in one batch: each gets the answer that it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from serving import DENSE_BELOW, Media, Message, Served, image, ran_sparse, same, scripted, text, user
from sglang_mminfer.testing.oracle import OracleAnswer

pytestmark = pytest.mark.server("main")

ROUNDS = 5
"""How often requests are sent together until kinds share a batch, or one decodes while another prefills. The machine's
speed decides both."""


def requests(media: Media) -> dict[str, list[Message]]:
    prompts = {f"sparse-{i}": scripted(media.conversation(10 + i, 4), i)[-1] for i in range(4)}
    prompts["sparse-six"] = scripted(media.six_turns())[-1]
    prompts |= {f"short-{i}": [user(image(media.images[i]), text("Why? " * (5 + i)))] for i in range(3)}
    prompts |= {f"text-{i}": [user(text("Tell me more. " * (10 + 40 * i)))] for i in range(3)}
    return prompts


@pytest.fixture(scope="module")
def alone_and_together(
    servers: Callable[[str], Served], media: Media
) -> tuple[Served, dict[str, OracleAnswer], dict[str, list[OracleAnswer]]]:
    """Answers of the requests one by one, then at the same time; both over an empty cache."""
    main, prompts = servers("main"), requests(media)
    alone = {}
    for rid, prompt in prompts.items():
        main.server.flush_cache()
        alone[rid] = main.ask(prompt, 24, rid=f"alone-{rid}")
    together: dict[str, list[OracleAnswer]] = {rid: [] for rid in prompts}
    for _ in range(ROUNDS):
        main.server.flush_cache()
        for rid, answers in ask_together(main, prompts).items():
            together[rid] += answers
        if kinds_shared_a_batch(main):
            break
    return main, alone, together


def ask_together(main: Served, prompts: dict[str, list[Message]]) -> dict[str, list[OracleAnswer]]:
    """The answers to all prompts at the same time. Media take a while to process, so those without long media are
    asked again and again until the long ones are answered: whatever the speed of the machine, they share batches."""

    def once(rid: str) -> OracleAnswer:
        return main.ask(prompts[rid], 24, rid=f"together-{rid}")

    def again(rid: str) -> list[OracleAnswer]:
        answers = [once(rid)]
        while not all(answer.done() for answer in long.values()):
            answers.append(once(rid))
        return answers

    with ThreadPoolExecutor(len(prompts)) as pool:
        long = {rid: pool.submit(once, rid) for rid in prompts if rid.startswith("sparse")}
        rest = {rid: pool.submit(again, rid) for rid in prompts if rid not in long}
        return {rid: [answer.result()] for rid, answer in long.items()} | {
            rid: answers.result() for rid, answers in rest.items()
        }


def test_each_answer_equals_the_same_request_alone(alone_and_together: tuple) -> None:
    _, alone, together = alone_and_together
    for rid, answers in together.items():
        for answer in answers:
            same(alone[rid], answer)


def kinds_shared_a_batch(main: Served) -> bool:
    """Whether requests with and without media ran in one batch. Records with equal times are of one batch."""
    batches: dict[float, set[str]] = {}
    for record in main.records():
        if record.rid.startswith("together-"):
            batches.setdefault(record.attn_ms, set()).add(record.rid.split("-")[1])
    return any({"sparse", "text"} <= kinds for kinds in batches.values())


def test_kinds_of_requests_shared_batches(alone_and_together: tuple) -> None:
    """Without this the test before proves little."""
    main, _, _ = alone_and_together
    assert kinds_shared_a_batch(main)


@pytest.mark.parametrize("when", ["alone", "together"])
def test_dense_reasons_tell_why(alone_and_together: tuple, when: str) -> None:
    main, alone, _ = alone_and_together
    for rid, answer in alone.items():
        prompt = [r for r in main.records(f"{when}-{rid}") if r.prefix_len < len(answer.prompt_ids)]
        assert when == "together" or sum(r.chunk_len for r in prompt) <= len(answer.prompt_ids)
        kind = rid.split("-")[0]
        if kind == "text":
            assert {r.dense_reason for r in prompt} == {"no_media"}
        elif kind == "short":
            assert {r.dense_reason for r in prompt} == {"short"}
        else:
            assert {r.dense_reason for r in prompt if r.seq_len <= DENSE_BELOW} <= {"short", "no_media"}
            assert len(answer.prompt_ids) > DENSE_BELOW
            assert ran_sparse([r for r in prompt if r.seq_len > DENSE_BELOW])


def test_nothing_failed_inside(alone_and_together: tuple) -> None:
    main, _, _ = alone_and_together
    assert not [r for r in main.records() if r.dense_reason and "internal_error" in r.dense_reason]


def tokens_only(served: Served, messages: list[Message], new_tokens: int, rid: str) -> list[int]:
    """A greedy answer without log-probabilities: SGLang puts only such requests into mixed chunks."""
    response = served.client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=new_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "rid": rid},
    )
    return response.choices[0].model_dump()["response_token_ids"]


def test_decoding_in_a_mixed_chunk_is_decoding(servers: Callable[[str], Served], media: Media) -> None:
    """Rows of requests that decode while others prefill see every key, as in a decode batch."""
    main, new_tokens = servers("main"), 48
    prompts = [scripted(media.conversation(30 + i, 4), i)[-1] for i in range(6)]
    alone = [main.ask(prompt, new_tokens) for prompt in prompts]
    rows = []
    for _ in range(ROUNDS):
        main.server.flush_cache()
        with ThreadPoolExecutor(len(prompts)) as pool:
            waiting = [pool.submit(tokens_only, main, p, new_tokens, f"mixed-{i}") for i, p in enumerate(prompts)]
            mixed = [answer.result() for answer in waiting]
        for expected, got in zip(alone, mixed):
            same(expected, replace(expected, token_ids=got))
        rows = [r for r in main.records() if r.rid.startswith("mixed-") and r.dense_reason == "decode"]
        if rows:
            break
    assert rows and all(r.chunk_len == 1 for r in rows)
