"""What the demo asks, and what it makes of the answers, without a server."""

import io
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from conversation import Answer, Question, questions
from demo import A_SHAPE, DEFAULT, FLAGS, SEARCHED, STOCK, as_json, failures_of, speed_lines
from sglang_mminfer.serving.trace import LayerAudit, MapEntry, PrefillRecord
from tables import answers_table, costs

ASKED = [Question("video", "A=B (video), B4 (video)", "4", []), Question("", "C7 (text)", "7", [])]


def answer(text: str, right: bool, first_token: float = 1.0, **more) -> Answer:
    return Answer(text, right, 1200, 1000, first_token, **more)


ALL_RIGHT = [answer("4", True), answer("7", True)]
ONE_WRONG = [answer("4", True), answer("", False)]


def shown(table, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def test_every_question_says_where_its_answer_stands(tmp_path: Path):
    asked, conversation = questions(2048, 2, tmp_path)
    assert len(asked) == len(conversation.turns) and sum("=" in question.way for question in asked) >= 8
    needles = {needle.key: needle for needle in conversation.needles}
    for question, turn in zip(asked, conversation.turns):
        *_, last = question.way.split(", ")
        assert last[1] == question.right  # the way ends at the digit
        assert question.way[0] == turn.question
        named = needles[turn.question].same_as
        assert question.way.startswith(f"{turn.question}={named} (" if named else f"{turn.question}{question.right} (")
        assert question.prompt[-1]["role"] == "user"
        assert len(question.prompt) % 2 == 1
        shown_parts = [part["type"] for part in question.prompt[-1]["content"] if part["type"] != "text"]
        assert ("video" in question.shows) == ("video_url" in shown_parts)
    media = [part for m in asked[-1].prompt if m["role"] == "user" for part in m["content"] if part["type"] != "text"]
    assert media and all(Path(part[part["type"]]["url"]).is_file() for part in media)


@pytest.mark.parametrize("name", [STOCK, DEFAULT, SEARCHED])
def test_a_wrong_answer_fails_the_demo(name: str):
    assert failures_of(ASKED, {name: ALL_RIGHT}) == []
    assert failures_of(ASKED, {name: ONE_WRONG}) == [f"{name}, turn 2: answered nothing; 7 is right: C7 (text)"]


def test_a_baseline_that_is_right_everywhere_fails_the_demo():
    assert failures_of(ASKED, {STOCK: ALL_RIGHT, A_SHAPE: ONE_WRONG}) == []
    (line,) = failures_of(ASKED, {STOCK: ALL_RIGHT, A_SHAPE: ALL_RIGHT})
    assert line.startswith("a_shape answered every question right")


def test_who_is_faster_is_said_of_each_config():
    slow, fast = [answer("4", True, 3.0)], [answer("4", True, 0.5)]
    lines = speed_lines({STOCK: [answer("4", True, 1.0)], DEFAULT: slow, SEARCHED: fast})
    assert lines == [
        "default: first tokens took 3.00 times as long as stock's: NOT faster on this CPU, in this run",
        "searched: first tokens took 0.50 times as long as stock's: faster on this CPU, in this run",
    ]
    assert speed_lines({DEFAULT: slow}) == []


def test_verdicts_of_answers_so_far():
    text = shown(answers_table(ASKED, {STOCK: ALL_RIGHT, DEFAULT: [answer("5", False)], SEARCHED: []}), 160)
    assert all(words in text for words in ("5 WRONG", "4 right", "2 of 2", "0 of 1", "0 of 0"))


@pytest.mark.parametrize("width", [160, 80])
def test_costs_are_shown_whole_in_any_terminal(width: int):
    sparse = [answer("4", True, 0.5, density=0.25), answer("7", True, 0.75, density=1.0)]
    text = shown(costs({STOCK: ALL_RIGHT, DEFAULT: sparse, SEARCHED: sparse, A_SHAPE: sparse}, STOCK), width)
    assert all(words in text for words in ("1,200", "1,000", "200", "0.25", "1.00", "0.75", "2.00", "1.25"))
    assert "…" not in text
    assert shown(costs({STOCK: ALL_RIGHT}, STOCK), width) and shown(costs({DEFAULT: sparse}, STOCK), width)


def test_an_answer_with_all_that_a_trace_may_hold_is_json():
    audit = {name: 0 for name in LayerAudit.__struct_fields__}
    record = PrefillRecord(
        rid="a",
        prefix_len=0,
        chunk_len=4,
        seq_len=4,
        segments=1,
        sparse_layers=1,
        density=0.5,
        dense_reason=None,
        plan_ms=1.0,
        attn_ms=1.0,
        forward_ms=1.0,
        map=[MapEntry(modality="video", start=0, stop=4, grid=(1, 2, 2))],
        audit=[LayerAudit(**audit)],
    )
    written = json.loads(json.dumps(as_json(answer("4", True, density=0.5, records=[record]))))
    (prefill,) = written["prefills"]
    assert prefill["density"] == 0.5 and prefill["map"][0]["grid"] == [1, 2, 2]
    assert written["new_tokens"] == 200 and written["right"] is True


def test_make_chat_serves_the_model_as_the_demo_does():
    root = Path(__file__).parents[2]
    asked = ["make", "--dry-run", "--old-file=.venv/.ready", "chat"]
    # In `make test` this one would be a make within a make, which prints the folders it enters and leaves.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    typed = subprocess.run(asked, cwd=root, env=env, capture_output=True, text=True, check=True).stdout
    *_, option, flags = shlex.split(typed.splitlines()[-1])
    name, value = shlex.split(flags)
    assert option == "--server-flags" and name == FLAGS[0] and json.loads(value) == json.loads(FLAGS[1])
