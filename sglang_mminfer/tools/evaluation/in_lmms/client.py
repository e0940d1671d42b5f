"""The model that lmms-eval asks: any OpenAI-compatible server, as `mminfer eval` needs it asked.

lmms-eval's own `openai` model of version 0.7.3 has no time limit but that of the OpenAI client (600 seconds, and three
tries), and makes of a failed request an answer that is scored as a wrong one. This one

* hands videos to the server as files (as `pass_video_url=True` does), so that the server sees videos and no pictures;
* sends each request once, with the given time limit, and raises if one failed;
* keeps every answer at once, and sends nothing that was answered before;
* in a conversation asks all questions about a video as turns of one chat, its own answers between them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

MODEL = "mminfer"
"""Its name in lmms-eval."""

KEY = "MMINFER_EVAL_API_KEY"
"""The environment variable with the server's API key. `OPENAI_API_KEY` is the judge's."""

MOST_FAILURES = 5
"""After so many failed requests nothing more is sent."""


def manifest() -> ModelManifest:
    """The entry point of the group `lmms_eval.models`."""
    return ModelManifest(model_id=MODEL, chat_class_path=f"{__name__}.Client")


class Client(lmms):
    """One server.

    Args:
        settings: a JSON file with `base_url`, `local` (on this machine), `model`, `timeout` in seconds, `concurrency`,
            `conversation` and `answers`: the file that answers are kept in, a JSON line each.
    """

    is_simple = False

    def __init__(self, settings: str, **_: Any) -> None:
        super().__init__()
        import httpx
        import openai

        self.settings = json.loads(Path(settings).read_text())
        # As in tools.connections, which may be missing here: no proxy on this machine, a connection for each request.
        http = openai.DefaultHttpxClient(
            trust_env=not self.settings["local"],
            timeout=self.settings["timeout"],
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self.client = openai.OpenAI(
            base_url=self.settings["base_url"],
            api_key=os.environ.get(KEY, "none"),
            timeout=self.settings["timeout"],
            max_retries=0,
            http_client=http,
        )
        self._file = Path(self.settings["answers"])
        self._lock = threading.Lock()
        self._failures: list[str] = []
        self._kept: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                entry = _decoded(line)
                if entry.get("answer") is not None:
                    self._kept[entry["key"]] = entry

    @property
    def batch_size(self) -> int:
        return 1

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError("mminfer eval: this task asks for log-probabilities, which chat completions lack")

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError("mminfer eval: tasks of several rounds are not supported")

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answer all requests.

        Raises:
            RuntimeError: a request failed; nobody may take it for a wrong answer.
        """
        asked = [self._question(request) for request in requests]
        groups: dict[Any, list[dict[str, Any]]] = {}
        for number, question in enumerate(asked):
            shares = self.settings["conversation"] and question["shown"] and _is_single(question)
            groups.setdefault((question["task"], *question["shown"]) if shares else number, []).append(question)
        self._append({"planned": len(asked), "task": sorted({question["task"] for question in asked})})
        with ThreadPoolExecutor(self.settings["concurrency"]) as pool:
            list(pool.map(self._converse, groups.values()))
        unanswered = sum("answer" not in question for question in asked)
        if unanswered:
            raise RuntimeError(f"mminfer eval: {unanswered} of {len(asked)} requests failed: {self._failures[0]}")
        return [GenerationResult(text=question["answer"]) for question in asked]

    def _question(self, request: Any) -> dict[str, Any]:
        _, doc_to_messages, options, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        chat = ChatMessages(messages=doc_to_messages(document))
        for message in chat.messages:
            for part in message.content:
                if part.type == "video" and (part.start_time is not None or part.end_time is not None):
                    raise NotImplementedError(
                        f"mminfer eval: {task} shows clips of videos; servers are asked for whole files only"
                    )
        sent = {"temperature": options.get("temperature") or 0, "max_tokens": options.get("max_new_tokens", 1024)}
        for name in ("top_p", "seed"):
            if options.get(name) is not None:
                sent[name] = options[name]
        videos, images = (
            [str(url)[:500] for url in urls] for urls in (chat.extract_media()[1], chat.extract_media()[0])
        )
        about = document.get("about") if isinstance(document, dict) else None
        return {
            "task": task,
            "doc_id": doc_id,
            "messages": chat.to_openai_messages(pass_video_url=True),
            "shown": [*videos, *images],
            "about": str(about or next(iter([*videos, *images]), doc_id)),
            "options": sent,
        }

    def _converse(self, questions: list[dict[str, Any]]) -> None:
        """Ask the questions of one chat, one after the other. A failed one ends the chat."""
        history: list[dict[str, Any]] = []
        for turn, question in enumerate(questions):
            messages = [*history, *(_later(question["messages"]) if turn else question["messages"])]
            if not self._ask(question, messages, turn):
                return
            history = [*messages, {"role": "assistant", "content": question["answer"]}]

    def _ask(self, question: dict[str, Any], messages: list[dict[str, Any]], turn: int) -> bool:
        if len(self._failures) >= MOST_FAILURES:
            return False
        body = {"model": self.settings["model"], "messages": messages, **question["options"]}
        named = {name: question[name] for name in ("task", "doc_id", "about")}
        # The model's name may be a path that changes; what is served is in the name of the file's folder.
        content = json.dumps([named["task"], messages, question["options"]], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        entry = self._kept.get(key)
        if entry is None:
            entry = {"key": key, **named, "turn": turn, **self._send(body)}
            self._append(entry)
        else:
            self._append({"key": key, **named, "again": True})
        if entry.get("answer") is None:
            with self._lock:
                self._failures.append(f"{named['task']}, question {named['doc_id']}: {entry['error']}")
            return False
        question["answer"] = entry["answer"]
        return True

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        try:
            response = self.client.chat.completions.create(**body)
            answer = response.choices[0].message.content
        except Exception as error:  # whatever a server sends: it is no answer
            text = " ".join(str(error).split())[:300]
            return {"error": f"{type(error).__name__}: {text}", "seconds": time.perf_counter() - begun}
        usage = response.usage
        details = usage.prompt_tokens_details if usage else None
        return {
            "answer": answer or "",
            "rid": response.id,
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "cached_tokens": (details.cached_tokens or 0) if details else None,
            "seconds": time.perf_counter() - begun,
        }

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock, self._file.open("a") as out:
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _decoded(line: str) -> dict[str, Any]:
    """A kept line; {} for one that was cut off when its process died."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return entry


def _is_single(question: dict[str, Any]) -> bool:
    """Whether a question has no history of its own."""
    return all(message["role"] != "assistant" for message in question["messages"])


def _later(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A question as a later turn: without the system prompt and the media, which the chat has already."""
    turns = []
    for message in messages:
        if message["role"] != "system":
            texts = [part for part in message["content"] if part["type"] == "text"]
            # The line break between the media and the question goes with the media.
            parts = [
                {**part, "text": part["text"].lstrip("\n") if i == 0 else part["text"]} for i, part in enumerate(texts)
            ]
            turns.append({**message, "content": parts})
    return turns
