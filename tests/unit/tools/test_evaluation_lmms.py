"""The client inside lmms-eval itself, against a server whose answers a test decides. Skipped where lmms-eval is not
installed (`make setup-eval`); each run of it takes about 15 seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_openai import FakeOpenAI
from sglang_mminfer.tools.evaluation import lmms, needle_tasks, tasks
from sglang_mminfer.tools.needles.kits import GLYPHS
from sglang_mminfer.tools.niah.ask import Settings

try:
    PROGRAM = lmms.find(None)
except lmms.LmmsError as error:
    pytest.skip(str(error), allow_module_level=True)

SETTINGS = Settings(("v-niah", "mm-niah"), (512,), 3, 2, 1)


def evaluated(fake: FakeOpenAI, folder: Path, conversation: bool = False) -> dict[str, lmms.Scores]:
    include = needle_tasks.write(SETTINGS, GLYPHS, folder / "needles")
    client = {"base_url": f"{fake.url}/v1", "local": True, "model": "fake", "timeout": 30, "concurrency": 2}
    client |= {"conversation": conversation, "answers": str(folder / "answers.jsonl")}
    named = [tasks.task_of(name) for name in SETTINGS.tasks]
    return lmms.run(PROGRAM, named, client, folder / "run", include=[include], offline=True)


def texts(messages: list[dict[str, Any]]) -> list[Any]:
    """Roles, texts, and the kinds of media."""
    return [
        (m["role"], m["content"] if isinstance(m["content"], str) else [p.get("text", p["type"]) for p in m["content"]])
        for m in messages
    ]


def test_failures_are_told_and_only_they_are_asked_again(tmp_path: Path) -> None:
    broken = {"video": True}

    def reply(messages: list[dict[str, Any]]) -> str | int:
        return 503 if broken["video"] and "v-niah-512-2-" in json.dumps(messages[0]) else "3"

    with FakeOpenAI(reply) as fake:
        with pytest.raises(lmms.LmmsError, match="3 requests failed; none of them counts as a wrong answer"):
            evaluated(fake, tmp_path)
        answered = sum(entry.get("answer") is not None for entry in lmms.answers_in(tmp_path / "answers.jsonl"))
        assert answered == SETTINGS.questions - 3
        broken["video"], before = False, len(fake.prompts)
        found = evaluated(fake, tmp_path)
        assert len(fake.prompts) - before == SETTINGS.questions - answered
    assert {name: len(scores.score) for name, scores in found.items()} == {"mminfer_v_niah": 6, "mminfer_mm_niah": 6}
    documents = (tmp_path / "needles" / "tasks" / "mminfer_v_niah.jsonl").read_text().splitlines()
    right = [float(json.loads(line)["answer"] == "3") for line in documents]
    assert list(found["mminfer_v_niah"].score.values()) == right
    assert sorted(set(found["mminfer_v_niah"].about.values())) == ["v-niah-512-1", "v-niah-512-2"]


def test_a_conversation_asks_about_a_video_in_one_chat(tmp_path: Path) -> None:
    with FakeOpenAI(lambda messages: str(len(messages) // 2)) as fake:
        evaluated(fake, tmp_path, conversation=True)
    chats = [texts(prompt) for prompt in fake.prompts if prompt[0]["content"][0]["type"] == "video_url"]
    longest = [chat for chat in chats if len(chat) == 5 and [role for role, _ in chat[1::2]] == ["assistant"] * 2]
    video_chats = [chat for chat in longest if chat[1][1] == "0" and chat[3][1] == "1"]
    assert len(video_chats) == 2
    for first, _, second, _, third in video_chats:
        assert first[1][0] == "video_url" and first[1][1].startswith("\n")
        assert len(second[1]) == len(third[1]) == 1 and not second[1][0].startswith("\n")
