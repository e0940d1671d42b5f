"""What the demo asks, and what it makes of the answers, without a server."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from conversation import Answer, Question, questions
from demo import A_SHAPE, DEFAULT, SEARCHED, STOCK, as_json, failures_of, speed_lines
from sglang_mminfer.serving.trace import LayerAudit, MapEntry, PrefillRecord
from tables import answers_table, costs_table

ASKED = [Question("video", "A=B (video), B4 (video)", "4", []), Question("", "C7 (text)", "7", [])]


def answer(text: str, right: bool, first_token: float = 1.0, **more) -> Answer:
    return Answer(text, right, 1200, 1000, first_token, **more)


ALL_RIGHT = [answer("4", True), answer("7", True)]
ONE_WRONG = [answer("4", True), answer("", False)]


def shown(table) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(table)
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
        "default: first tokens took 3.00 times as long as stock's: NOT faster on this CPU",
        "searched: first tokens took 0.50 times as long as stock's: faster on this CPU",
    ]
    assert speed_lines({DEFAULT: slow}) == []


def test_tables_have_verdicts_and_costs_of_answers_so_far():
    answers = {STOCK: ALL_RIGHT, DEFAULT: [answer("5", False, density=0.25)], SEARCHED: []}
    verdicts, costs = shown(answers_table(ASKED, answers)), shown(costs_table(answers, STOCK))
    assert "5 WRONG" in verdicts and "2 of 2" in verdicts and "0 of 1" in verdicts and "0 of 0" in verdicts
    assert "1,200" in costs and "1,000" in costs and "200" in costs and "0.25" in costs and "2.00 s" in costs


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
