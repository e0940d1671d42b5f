"""Our needles as tasks of lmms-eval: a folder with a YAML file and the documents of each, for `--include_path`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_mminfer.tools.evaluation.in_lmms import needle_task
from sglang_mminfer.tools.evaluation.tasks import NEEDLES
from sglang_mminfer.tools.needles.kits import GLYPHS, Kit
from sglang_mminfer.tools.niah.ask import Media, Settings

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: generate_until
doc_to_messages: !function needle_task.doc_to_messages
doc_to_visual: !function needle_task.doc_to_visual
doc_to_text: !function needle_task.doc_to_text
doc_to_target: answer
process_results: !function needle_task.process_results
generation_kwargs:
  max_new_tokens: {max_tokens}
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write(settings: Settings, kit: Kit, folder: Path) -> Path:
    """Write the tasks of `settings`, their documents and their media. Returns the folder for `--include_path`."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    shutil.copy(needle_task.__file__, tasks / "needle_task.py")
    media = Media(settings, kit, folder / "media")
    for alias in settings.tasks:
        name = NEEDLES[alias].name
        documents = (tasks / f"{name}.jsonl").resolve()
        lines = documents_of(alias, settings, kit, media)
        documents.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        text = TASK.format(name=name, documents=json.dumps(str(documents)), max_tokens=kit.max_tokens)
        (tasks / f"{name}.yaml").write_text(text)
    return tasks


def documents_of(alias: str, settings: Settings, kit: Kit, media: Media) -> list[dict[str, Any]]:
    """A document for each question: of V-NIAH a video and one question, of MM-NIAH the whole chat up to it, with the
    right answers between."""
    documents = []
    for case in (case for case in settings.cases if case.task == alias):
        chat = [_as_parts(message) for message in media.messages(case)]
        for asked in settings.conversation(case).asked:
            turns = chat[: 2 * asked.turn + 1]
            documents.append(
                {
                    "about": case.name,
                    "needles": kit.name,
                    "answer": chat[2 * asked.turn + 1]["content"][0]["text"],
                    "chat": json.dumps(_alone(turns, kit) if alias.startswith("v-") else turns, ensure_ascii=False),
                }
            )
    return documents


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _alone(turns: Sequence[dict[str, Any]], kit: Kit) -> list[dict[str, Any]]:
    """The last question alone with the media of the first turn."""
    question = turns[-1]["content"][-1]["text"]
    if kit is GLYPHS and len(turns) > 1:
        question = f"\n{question}"  # as in the message that shows the video
    return [{"role": "user", "content": [*turns[0]["content"][:-1], {"type": "text", "text": question}]}]
