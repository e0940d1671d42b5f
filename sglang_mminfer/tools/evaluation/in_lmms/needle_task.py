"""Functions of our needle tasks for lmms-eval. A document has its chat as JSON, and the right answer."""

from __future__ import annotations

import json
import re
from typing import Any


def doc_to_messages(doc: dict[str, Any], *_: Any, **__: Any) -> list[dict[str, Any]]:
    """The chat in lmms-eval's form: media by their paths."""
    return [
        {"role": message["role"], "content": [_part(part) for part in message["content"]]}
        for message in json.loads(doc["chat"])
    ]


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """Paths of the media, for models that do not take messages."""
    return [part["url"] for message in doc_to_messages(doc) for part in message["content"] if part["type"] != "text"]


def doc_to_text(doc: dict[str, Any], *_: Any, **__: Any) -> str:
    """The question."""
    return doc_to_messages(doc)[-1]["content"][-1]["text"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right or wrong."""
    return {"exact_match": float(is_right(doc["needles"], doc["answer"], results[0]))}


def is_right(needles: str, expected: str, answer: str) -> bool:
    """Whether an answer is right, by the kind of needles: `glyphs` are one sign, `cards` a number of four digits."""
    if needles == "glyphs":
        return answer.strip() == expected
    plain = re.sub(r"(?<=\d)[,\s](?=\d{3})", "", answer)
    return set(re.findall(r"(?<!\d)\d{4}(?!\d)", plain)) == {expected}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    return {"type": kind.removesuffix("_url"), "url": part[kind]["url"]}
