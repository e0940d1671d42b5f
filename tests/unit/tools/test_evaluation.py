"""`mminfer eval` without lmms-eval: scores in its samples, our tasks, crashes, figures and refusals."""

from __future__ import annotations

import json
import stat
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sglang_mminfer import cli
from sglang_mminfer.commands import eval as eval_words
from sglang_mminfer.tools import paired
from sglang_mminfer.tools.evaluation import figure, lmms, measured, needle_tasks, tasks
from sglang_mminfer.tools.evaluation.in_lmms import needle_task
from sglang_mminfer.tools.evaluation.run import compared, table_of
from sglang_mminfer.tools.needles.kits import CARDS, GLYPHS
from sglang_mminfer.tools.niah.ask import Media, Settings

VIDEO = Path(__file__).parents[3] / "examples" / "needle_vlm" / "video"

# ---- scores ----------------------------------------------------------------------------------------------------

SAMPLES: list[tuple[str, dict[str, Any], float]] = [
    # As lmms-eval 0.7.3 writes them.
    ("videomme", {"videomme_perception_score": {"pred_answer": "a", "answer": "A", "score": 1.0, "videoID": "x"}}, 1.0),
    ("videomme-long", {"videomme_perception_score": {"pred_answer": "b", "answer": "A", "score": 0.0}}, 0.0),
    ("longvideobench", {"lvb_acc": {"id": "1", "answer": "B", "parsed_pred": "B"}, "submission": {"id": "1"}}, 1.0),
    ("mlvu", {"mlvu_percetion_score": {"task_type": "ego", "pred_answer": "C", "answer": "D"}}, 0.0),
    ("egoschema", {"submission": {"v": 3}, "score": {"pred": 3, "ground_truth": "3"}}, 1.0),
    ("nextqa", {"exact_match": True}, 1.0),
    ("activitynetqa", {"gpt_eval_accuracy": {"Correctness": "yes", "score": 4}}, 1.0),
    ("perceptiontest", {"accuracy": {"pred_id": 1, "answer_id": 2, "correct": 0}}, 0.0),
    ("videodc", {"gpt_eval_score": {"score": 4, "review": "good"}}, 0.8),
    ("v-niah", {"exact_match": 0.0}, 0.0),
    ("some_captions", {"CIDEr": 0.25}, 0.25),
]


@pytest.mark.parametrize("name, metrics, score", SAMPLES, ids=lambda value: value if isinstance(value, str) else "")
def test_scores_of_samples(name: str, metrics: dict[str, Any], score: float) -> None:
    sample = {"doc_id": 3, "target": "7", "filtered_resps": ["x"], "doc_hash": "0", "input": "?", **metrics}
    assert tasks.score_of(sample, tasks.task_of(name)) == pytest.approx(score)


def test_every_task_of_the_paper_has_a_sample() -> None:
    assert {name for name, _, _ in SAMPLES} >= set(tasks.PAPER)
    assert tuple(tasks.PAPER) == eval_words.PAPER and tuple(tasks.NEEDLES) == eval_words.NEEDLES


@pytest.mark.parametrize("metrics", [{}, {"submission": {"1": 2}}, {"exact_match": "yes"}, {"exact_match": 7}])
def test_a_sample_without_a_score_is_no_wrong_answer(metrics: dict[str, Any]) -> None:
    with pytest.raises(tasks.NoScore, match="nextqa_mc_test, question 3"):
        tasks.score_of({"doc_id": 3, **metrics}, tasks.task_of("nextqa"))


# ---- our tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kit", [GLYPHS, CARDS], ids=lambda kit: kit.name)
@pytest.mark.parametrize("said", ["7", " 7\n", "77", "", "1234", "It is 1,234.", "1 234", "1234 or 4321", "12345"])
def test_right_is_what_the_kit_calls_right(kit: Any, said: str) -> None:
    for expected in ("7", "1234"):
        assert needle_task.is_right(kit.name, expected, said) == kit.is_right(expected, said)


def test_documents_of_video_needles_show_the_video_and_ask_once(tmp_path: Path) -> None:
    settings = Settings(("v-niah",), (512,), 3, 1, 5)
    folder = needle_tasks.write(settings, GLYPHS, tmp_path)
    documents = [json.loads(line) for line in (folder / "mminfer_v_niah.jsonl").read_text().splitlines()]
    chat = Media(settings, GLYPHS, tmp_path / "again").messages(settings.cases[0])
    assert len(documents) == 3 and {document["about"] for document in documents} == {"v-niah-512-5"}
    shown = [needle_task.doc_to_messages(document) for document in documents]
    assert all(len(messages) == 1 and [part["type"] for part in messages[0]["content"]] == ["video", "text"]
               for messages in shown)  # fmt: skip
    assert Path(shown[0][0]["content"][0]["url"]).exists()
    questions = [needle_task.doc_to_text(document) for document in documents]
    assert [q.lstrip("\n") for q in questions] == [m["content"][-1]["text"].lstrip("\n") for m in chat[::2]]
    assert all(question.startswith("\n") for question in questions)
    assert [document["answer"] for document in documents] == [message["content"] for message in chat[1::2]]
    right = needle_task.process_results(documents[0], [documents[0]["answer"]])
    assert right == {"exact_match": 1.0} and needle_task.process_results(documents[0], ["?"]) == {"exact_match": 0.0}


def test_documents_of_mixed_needles_are_chats(tmp_path: Path) -> None:
    settings = Settings(("mm-niah",), (512,), 4, 1, 2)
    media = Media(settings, GLYPHS, tmp_path)
    documents = needle_tasks.documents_of("mm-niah", settings, GLYPHS, media)
    turns = [len(needle_task.doc_to_messages(document)) for document in documents]
    assert len(turns) == 4 and max(turns) > 1 and all(turn % 2 for turn in turns)
    last = needle_task.doc_to_messages(documents[turns.index(max(turns))])
    assert [message["role"] for message in last[:2]] == ["user", "assistant"]


# ---- a program that behaves as lmms-eval does when it fails -------------------------------------------------------


def program(folder: Path, body: str) -> Path:
    path = folder / "lmms-eval"
    path.write_text("#!/usr/bin/env python3\nimport json, os, sys\nfrom pathlib import Path\n" + textwrap.dedent(body))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def evaluated(folder: Path, body: str) -> dict[str, lmms.Scores]:
    client = {"answers": str(folder / "answers.jsonl")}
    return lmms.run(program(folder, body), [tasks.task_of("v-niah")], client, folder / "run")


WRITES = """
    words = dict(zip(sys.argv, sys.argv[1:]))
    out = Path(words["--output_path"]) / "model"
    out.mkdir()
    client = json.loads(Path(words["--model_args"].partition("=")[2]).read_text())
    asked = open(client["answers"], "a")
    for number in range(2):
        entry = {"key": str(number), "task": "mminfer_v_niah", "doc_id": number, "about": "film", ENTRY}
        asked.write(json.dumps(entry) + "\\n")
    (out / "1_results.json").write_text("{}")
    lines = [json.dumps({"doc_id": n, "exact_match": n % 2}) for n in range(SAMPLES)]
    (out / "1_samples_mminfer_v_niah.jsonl").write_text("\\n".join(lines))
"""


def test_results_are_read(tmp_path: Path) -> None:
    body = WRITES.replace("ENTRY", '"answer": "3", "turn": 0').replace("SAMPLES", "2")
    found = evaluated(tmp_path, body)["mminfer_v_niah"]
    assert found.score == {"0": 0.0, "1": 1.0} and found.about == {"0": "film", "1": "film"}


def test_a_crash_with_exit_status_0_is_a_failure(tmp_path: Path) -> None:
    told = r"no results for mminfer_v_niah; .*lmms-eval.log ends with:\n  \| it broke"
    with pytest.raises(lmms.LmmsError, match=told):
        evaluated(tmp_path, 'print("it broke")')


def test_a_failed_request_is_no_wrong_answer(tmp_path: Path) -> None:
    body = WRITES.replace("ENTRY", '"error": "Timeout: too late", "turn": 0').replace("SAMPLES", "2")
    told = r"2 requests failed; none of them counts as a wrong answer.*Timeout: too late"
    with pytest.raises(lmms.LmmsError, match=told):
        evaluated(tmp_path, body)


def test_a_score_without_a_request_is_a_failure(tmp_path: Path) -> None:
    body = WRITES.replace("ENTRY", '"answer": "3", "turn": 0').replace("SAMPLES", "3")
    with pytest.raises(lmms.LmmsError, match="1 questions have a score, but no request"):
        evaluated(tmp_path, body)


def test_without_lmms_eval_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["eval", "--model-path", str(VIDEO), "--tasks", "v-niah"]) == 1
    assert "lmms-eval is not installed: run `make setup-eval`" in capsys.readouterr().err


# ---- figures ---------------------------------------------------------------------------------------------------


def written(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_figures_hold_answers_of_earlier_runs(tmp_path: Path) -> None:
    earlier = [
        {"key": "a", "answer": "1", "prompt_tokens": 100, "cached_tokens": 0, "turn": 0},
        {"key": "b", "error": "broke", "turn": 1},
    ]
    answers = written(tmp_path / "answers", earlier)
    begins_at = answers.stat().st_size
    now = [
        {"planned": 2},
        {"key": "a", "again": True},
        {"key": "b", "answer": "2", "prompt_tokens": 300, "cached_tokens": 100, "turn": 1},
    ]
    answers = written(answers, [*earlier, *now])
    told = {"attn_ms": 1.0, "dense_reasons": []}
    prefills = written(
        tmp_path / "prefills",
        [
            {"key": "a", "density": 1.0, "forward_ms": 10.0, **told},
            {"key": "b", "density": 0.5, "forward_ms": 30.0, **told},
        ],
    )
    found = measured.figures(answers, prefills, begins_at)
    assert (found["requests"], found["sent"], found["told"]) == (2, 1, 2)
    assert found["cached_share"] == 0.25 and found["cached_share_by_turn"] == {"0": 0.0, "1": 0.3333}
    # Pairs: 100^2 / 2 of a, (300^2 - 100^2) / 2 of b.
    assert found["density"] == pytest.approx((10_000 + 0.5 * 80_000) / 90_000, abs=1e-4)
    assert found["forward_ms"] == 20.0


def test_a_watch_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    seen: list[tuple[int, int, int]] = []
    watch = measured.Watch(answers, tmp_path / "prefills", None, lambda *counts: seen.append(counts))
    watch.look()
    answers.write_text('{"planned": 3}\n{"key": "a", "ans')
    watch.look()
    with answers.open("a") as out:
        out.write('wer": "1"}\n{"key": "b", "error": "no"}\n')
    watch.look()
    assert seen == [(0, 3, 0), (1, 3, 1)]


# ---- configs side by side ----------------------------------------------------------------------------------------


def config(right: list[bool]) -> dict[str, Any]:
    keys = [str(i) for i in range(len(right))]
    scores = {"score": dict(zip(keys, map(float, right))), "about": {key: str(int(key) // 4) for key in keys}}
    none = {"density": None, "forward_ms": None, "cached_share": 0.5}
    return {"scores": {"mminfer_v_niah": scores, "mminfer_v_relay": scores}, "figures": none}


def test_configs_are_compared_and_drawn(tmp_path: Path) -> None:
    configs = {"dense": config([True] * 80), "good": config([True] * 80), "bad": config([False] * 60 + [True] * 20)}
    named = [tasks.task_of("v-niah"), tasks.task_of("v-relay")]
    baseline, found = compared(configs, named, 0.01)
    assert baseline == "dense" and list(found) == ["good", "bad"]
    assert [one.verdict for one in found["bad"]] == ["no", "no"] and found["bad"][0].videos == 20
    assert found["bad"][0].holm == pytest.approx(min(1.0, 2 * found["bad"][0].p_value))
    assert [one.verdict for one in found["good"]] == ["not enough questions"] * 2
    rows = table_of(configs, named)
    assert rows[3][:3] == ["bad", "25.0 %", "25.0 %"] and rows[1][-2:] == ["50.0 %", "160"]
    assert figure.draw(found, baseline, tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_configs_that_were_asked_different_questions_are_not_compared() -> None:
    with pytest.raises(lmms.LmmsError, match="other beside dense: V-NIAH: 1 questions were answered by one"):
        compared({"dense": config([True] * 4), "other": config([True] * 5)}, [tasks.task_of("v-niah")], 0.01)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--tasks", "v-niah"), "name running servers with --url, or a model to serve"),
        (("--tasks", "v-niah", "--url", "http://127.0.0.1:1"), "--url: expected NAME=URL"),
        (("--tasks", "v-niah", "--url", "a=http://x", "--url", "a=http://y"), "--url: expected different names"),
        (("--tasks", "v-niah", "--url", "a=http://x", "--mminfer-config", "dense"), "is for servers that are started"),
        (("--tasks", "v-niah", "v-niah", "--url", "a=http://x"), "none twice"),
        (("--tasks", "v-niah", "--url", "a=http://x", "--frames", "8"), "--frames is for servers that are started"),
        (("--tasks", "videodc", "--url", "a=http://x"), "a language model judges the answers of videodc"),
        (("--tasks", "v-niah", "--url", "a=http://x", "--margin", "0"), "--margin: expected points between 0 and 100"),
        (("--tasks", "v-niah", "--url", "a=http://x", "--include-path", "/no"), "--include-path: /no: no such folder"),
    ],
)
def test_wrong_words_end_in_a_sentence(
    words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in tasks.JUDGE_KEYS:
        monkeypatch.delenv(key, raising=False)
    assert cli.main(["eval", *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_margin_is_one_point() -> None:
    assert paired.MARGIN == 0.01
