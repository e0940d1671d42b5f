"""What clients of the soak ask: chats, several answers at once, sessions; and requests that they abort or leave."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from families import Family, Prompt, prompt_of
from plain_http import as_oracle_answer, fine, generate, post
from serving import Media, Message, Served, assistant, image, scripted, text, user, video
from sglang_mminfer.testing.oracle import OracleAnswer

SECONDS = 120
"""The longest time until a request is answered, or an aborted one ends."""

MOST_TURNS = 4


class Question(Protocol):
    """Requests of a client whose answers must not depend on anything else."""

    def ask(self, served: Served) -> list[OracleAnswer]: ...

    def alone(self, served: Served) -> list[OracleAnswer]:
        """The answers over an empty cache, if no other request runs."""


@dataclass(frozen=True)
class Turn:
    """A request of a chat.

    Attributes:
        samples: `n`; greedy, so that all answers are the same.
        logprobs: whether it asks for log-probabilities. SGLang mixes only requests without into chunks.
    """

    prompt: Sequence[Message]
    new_tokens: int
    samples: int = 1
    logprobs: bool = True

    def ask(self, served: Served) -> list[OracleAnswer]:
        if self.logprobs and self.samples == 1:
            return [served.ask(self.prompt, self.new_tokens)]
        response = served.client.chat.completions.create(
            **{"model": "default", "messages": list(self.prompt), "max_tokens": self.new_tokens, "temperature": 0},
            n=self.samples,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        choices = [choice.model_dump() for choice in response.choices]
        return [
            OracleAnswer(one["prompt_token_ids"], one["response_token_ids"], [], one["message"]["content"] or "")
            for one in choices
        ]

    def alone(self, served: Served) -> list[OracleAnswer]:
        served.server.flush_cache(SECONDS)
        return [served.ask(self.prompt, self.new_tokens)] * self.samples


@dataclass(frozen=True)
class Session:
    """Turns of a session: the text and the media of each.

    Attributes:
        keeps_answers: whether an answer is part of the next turn's prompt.
    """

    turns: Sequence[tuple[str, dict[str, Any]]]
    new_tokens: int
    keeps_answers: bool

    def ask(self, served: Served) -> list[OracleAnswer]:
        session = fine(post(served, "/open_session", {"capacity_of_str_len": 100_000}))
        answers, before = [], {}
        try:
            for words, media in self.turns:
                params = {"id": session, **before, **({} if self.keeps_answers else {"drop_previous_output": True})}
                body = {"text": words, **media, "session_params": params}
                answer = fine(generate(served, self.new_tokens, SECONDS, **body))
                answers.append(as_oracle_answer(answer))
                before = {"rid": answer["meta_info"]["id"]}
        finally:
            post(served, "/close_session", {"session_id": session})
        return answers

    def alone(self, served: Served) -> list[OracleAnswer]:
        served.server.flush_cache(SECONDS)
        return self.ask(served)


def abort(served: Served, prompt: Sequence[Message], rid: str, after: float) -> None:
    """Asks for many tokens, and aborts the request after some seconds. Returns when the request has ended."""
    body = {
        **{"model": "default", "messages": list(prompt), "max_tokens": 400, "temperature": 0, "rid": rid},
        **{"ignore_eos": True},
    }
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, served, "/v1/chat/completions", body, SECONDS)
        time.sleep(after)
        while not waiting.done():  # before it has come to the server there is nothing to abort
            post(served, "/abort_request", {"rid": rid})
            time.sleep(0.2)
        waiting.result()


@dataclass(frozen=True)
class Talk:
    """The conversations that a family's clients have.

    Attributes:
        live: whether an answer may be part of the next prompt, as it is in a real chat. It is then cached as it was
            generated.
    """

    family: Family
    images: Sequence[Path]
    videos: Sequence[Path]
    live: bool

    def questions(self, draw: random.Random) -> list[list[dict[str, Any]]]:
        """The parts of each turn of a conversation: at most three media, of which two may be videos."""
        left = [*self.images, draw.choice(self.images)] if not self.family.video else [draw.choice(self.images)]
        if self.family.video:
            left += self.videos if self.family.several_videos else [draw.choice(self.videos), draw.choice(self.images)]
        draw.shuffle(left)
        turns = []
        for turn in range(draw.randint(1, MOST_TURNS)):
            parts = [text(Media.words(draw))]
            for _ in range(draw.choice([1, 1, 2] if turn == 0 else [0, 0, 1])):
                if left:
                    path = left.pop()
                    parts.insert(draw.randrange(len(parts) + 1), (video if path in self.videos else image)(path))
            turns.append(parts)
        return turns

    def session(self, draw: random.Random, written: Prompt) -> Session:
        turns = []
        for parts in self.questions(draw):
            words, media = "", {}
            for part in parts:
                if part["type"] == "text":
                    words += f"{part['text']}\n"
                else:
                    kind = part["type"].removesuffix("_url")
                    words += written.image if kind == "image" else written.video
                    media.setdefault(f"{kind}_data", []).append(part[part["type"]]["url"])
            turns.append((words, media))
        return Session(turns, draw.choice([1, 4, 8]), self.live)

    def converse(self, served: Served, seed: str) -> Iterator[tuple[str, Question | None, list[OracleAnswer]]]:
        """Has one random conversation. Yields what was asked and answered; no question for one that was given up."""
        draw = random.Random(seed)
        kind: Literal["chat", "live", "session", "left", "aborted"] = draw.choice(
            ["chat"] * 6 + ["live"] * 2 + ["session"] * 3 + ["left"] * 2 + ["aborted"] * 2  # type: ignore[arg-type]
        )
        # Some conversations have the first turns, or all media, of another one.
        shared = random.Random(f"{self.family.name}-{draw.randrange(40)}")
        if kind == "session" and (written := prompt_of(self.family)):
            session = self.session(shared, written)
            yield "session", session, session.ask(served)
            return
        questions = [user(*parts) for parts in self.questions(shared)]
        prompts = scripted(questions, draw.randrange(3))
        gives_up = draw.randrange(len(prompts)) if kind in ("left", "aborted") else -1
        for turn, prompt in enumerate(prompts):
            if turn == gives_up:
                after, rid = draw.choice([0.0, 0.05, 0.2, 0.5, 1.0, 2.0]), f"{seed}-{turn}-{time.monotonic_ns()}"
                if kind == "left":
                    until = time.monotonic() + after
                    served.ask_and_leave(prompt, 400, lambda: time.monotonic() >= until, rid)  # noqa: B023
                else:
                    abort(served, prompt, rid, after)
                yield kind, None, []
                if draw.random() < 0.5:
                    return
            asked = Turn(prompt, draw.choice([1, 4, 8, 24]))
            if draw.random() < 0.4:
                asked = replace(asked, samples=draw.choice([1, 1, 2, 3]), logprobs=False)
            answers = asked.ask(served)
            yield "several" if asked.samples > 1 else kind, asked, answers
            if kind == "live" and self.live and turn + 1 < len(prompts):
                prompts[turn + 1] = [*prompt, assistant(answers[0].text), questions[turn + 1]]
