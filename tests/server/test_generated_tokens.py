"""Generated tokens see every key, also if they come as prefill: in mixed chunks, after retractions, in sessions.

The config leaves much out, so a generated row that follows its pattern would change the answer.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from families_served import FAMILY_SERVERS, MIXED_SERVERS
from serving import LAYERS, Media, Message, Served, image, same, scripted, text, user, video
from sglang_mminfer.testing.oracle import OracleAnswer
from test_batching import tokens_only

NEW_TOKENS = 40

EVERY = [pytest.param(name, marks=pytest.mark.server(name)) for name in MIXED_SERVERS]


def prompts(name: str, media: Media) -> list[list[Message]]:
    """Prompts of one or two turns, each of several chunks."""
    first, second, _ = media.videos
    turns = [
        [user(image(media.images[0]), text("What do you see? " * 6)), user(text("And now? " * 9))],
        [user(video(first), text("Where did it go? " * 3))],
        [user(text("Compare both. " * 30), image(media.images[1]), image(media.images[2]))],
        [user(video(second), text("Is that so? " * 12)), user(image(media.images[3]), text("Why?"))],
    ]
    return [scripted(some, seed)[-1] for seed, some in enumerate(turns)]


@dataclass(frozen=True)
class Run:
    served: Served
    alone: list[OracleAnswer]
    together: list[list[int]]
    again: list[list[int]]

    def records(self, label: str) -> list[Any]:
        return [r for r in self.served.records() if r.rid.startswith(f"{label}-")]


@pytest.fixture(scope="module")
def runs(servers: Callable[[str], Served], media: Media) -> Callable[[str], Run]:
    """Every request alone; all at the same time; all at the same time while clients of other requests disconnect."""
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in done:
            served, asked = servers(name), prompts(name, media)
            alone = [served.ask(prompt, NEW_TOKENS, rid=f"alone-{i}") for i, prompt in enumerate(asked)]
            together = ask_all(served, asked, "together")
            with ThreadPoolExecutor(2) as pool:
                leaving = [pool.submit(leave, served, asked[i], f"left-{i}") for i in (0, 3)]
                again = ask_all(served, asked, "again")
                for left in leaving:
                    left.result()
            done[name] = Run(served, alone, together, again)
        return done[name]

    return run


def ask_all(served: Served, asked: list[list[Message]], label: str) -> list[list[int]]:
    served.server.flush_cache()
    with ThreadPoolExecutor(len(asked)) as pool:
        waiting = [pool.submit(tokens_only, served, p, NEW_TOKENS, f"{label}-{i}") for i, p in enumerate(asked)]
        return [answer.result() for answer in waiting]


def leave(served: Served, messages: list[Message], rid: str) -> None:
    served.ask_and_leave(messages, 200, lambda: served.records(rid), rid)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("when", ["together", "again"])
def test_each_answer_is_that_of_the_request_alone(runs: Callable[[str], Run], name: str, when: str) -> None:
    run = runs(name)
    for expected, tokens in zip(run.alone, getattr(run, when)):
        same(expected, replace(expected, token_ids=tokens))


@pytest.mark.parametrize("name", EVERY)
def test_generated_rows_are_counted_as_decoding(runs: Callable[[str], Run], name: str) -> None:
    """In mixed chunks they are a chunk of their own; after a retraction they also come with rows of their prompt."""
    run = runs(name)
    records = run.records("together") + run.records("again")
    assert any(r.chunk_len == 1 and r.dense_reason == "decode" for r in records), "no chunk was mixed"
    for record in records:
        prompt = len(run.alone[int(record.rid[-1])].prompt_ids)
        assert (record.dense_reason == "decode") == (record.prefix_len >= prompt), record
    lengths = [len(answer.prompt_ids) for answer in run.alone]
    assert any(r.seq_len > lengths[int(r.rid[-1])] and r.chunk_len > 1 for r in records), "nothing was retracted"


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_has_one_map(runs: Callable[[str], Run], name: str) -> None:
    """The record of its last chunk has the map, also if the last chunks hold no media."""
    run = runs(name)
    for i, answer in enumerate(run.alone):
        records, prompt = run.served.records(f"alone-{i}"), len(answer.prompt_ids)
        assert len(records) > 1
        for record in records:
            assert (record.map is not None) == (record.prefix_len < prompt <= record.seq_len)
        assert {record.map[-1].stop for record in records if record.map} == {prompt}


# ---- sessions ----------------------------------------------------------------------------------------------


def post(served: Served, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        served.server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return json.loads(answer.read())


def generate(served: Served, prompt: str, rid: str, session: dict[str, Any] | None = None, **media: Any) -> Any:
    body: dict[str, Any] = {
        **{"text": prompt, "rid": rid, "return_logprob": True, "logprob_start_len": -1, **media},
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    }
    return post(served, "/generate", body | ({"session_params": session} if session else {}))


def tokens_of(answer: Any) -> list[int]:
    return [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]]


PLACEHOLDER = {"main": "<|vision_start|><|video_pad|><|vision_end|>", "mixed_internvl": "<image>"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.server(name)) for name in PLACEHOLDER])
def test_a_turn_of_text_in_a_session_is_sparse(servers: Callable[[str], Served], media: Media, name: str) -> None:
    """It shares the media of the turn before; their M-RoPE positions end with that turn's prompt."""
    served = servers(name)
    medium: dict[str, Path] = {"video_data": media.videos[0]} if name == "main" else {"image_data": media.images[0]}
    shown = {key: str(path) for key, path in medium.items()}
    first, second = PLACEHOLDER[name] + "What do you see?" * 9, "\nriver stone green light" * 40
    session = f"session-{name}"
    assert post(served, "/open_session", {"capacity_of_str_len": 100_000, "session_id": session}) == session
    served.server.flush_cache()
    generate(served, first, f"{name}-first", {"id": session, "drop_previous_output": True}, **shown)
    later = {"id": session, "rid": f"{name}-first", "drop_previous_output": True}
    turn = generate(served, second, f"{name}-second", later)
    served.server.flush_cache()
    stateless = generate(served, first + second, f"{name}-stateless", **shown)
    assert turn["meta_info"]["prompt_tokens"] == stateless["meta_info"]["prompt_tokens"]
    assert tokens_of(turn) == tokens_of(stateless)
    prompt = turn["meta_info"]["prompt_tokens"]
    records = served.records(f"{name}-second")
    assert records and {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
    (found,) = (r.map for r in records if r.map)
    assert found[-1].stop == prompt and any(entry.grid for entry in found)


def test_the_families_are_of_both_kinds() -> None:
    served_by = {FAMILY_SERVERS[family][0].served_by for family in MIXED_SERVERS.values()}
    assert served_by == {"SGLang", "plugin"}
