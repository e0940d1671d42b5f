"""Programs of SGLang's frontend that ask what a chat asks, and a backend that keeps the token ids of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl

from serving import Message
from sglang_mminfer.frontend import MediaEndpoint

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


class Recording(MediaEndpoint):
    """A `MediaEndpoint` that keeps the token ids of every prompt that gets an answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt_ids: list[list[int]] = []

    def send(self, data: dict[str, Any]) -> Any:
        if data.get("stream") or isinstance(data.get("text"), list):
            return super().send(data)
        answer = super().send(data | {"return_prompt_token_ids": True})
        self.prompt_ids.append(answer["prompt_token_ids"])
        return answer


def parts_of(message: Message) -> list[Any]:
    """The content of a user's message as a program writes it."""
    content = message["content"]
    made = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            made.append(part["text"])
        elif part["type"] == "image_url":
            made.append(sgl.image(part["image_url"]["url"]))
        else:
            made.append(sgl.video(part["video_url"]["url"], -1))
    return made


def add_user(s: Any, message: Message) -> None:
    """Adds a user's message to a program."""
    with s.user():
        for part in parts_of(message):
            s += part


@sgl.function
def conversation(s: Any, questions: Sequence[Message], new_tokens: int) -> None:
    """Asks the questions as turns of one chat; the answers are "0", "1" and so on."""
    for turn, question in enumerate(questions):
        add_user(s, question)
        s += sgl.assistant(sgl.gen(str(turn), max_tokens=new_tokens, **GREEDY))


def chats(questions: Sequence[Message], answers: Sequence[str]) -> list[list[Message]]:
    """The prompt of each turn as messages of a chat."""
    prompts: list[list[Message]] = []
    messages: list[Message] = []
    for question, answer in zip(questions, [*answers, ""]):
        prompts.append([*messages, question])
        messages = [*prompts[-1], {"role": "assistant", "content": answer}]
    return prompts
