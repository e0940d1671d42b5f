"""The chat application's conversation with a real server: what is cached, what is stopped, what is refused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving import LONG_TOKENS, Media, Served, wait_for
from sglang_mminfer.tools.chat.conversation import Conversation, Question, Sampling, Turn
from sglang_mminfer.tools.chat.endpoint import Endpoint, Facts
from sglang_mminfer.tools.chat.reply import Phase
from sglang_mminfer.tools.chat.uploads import KINDS, Limits, check

SHORT = Sampling(max_tokens=4, temperature=0)


class Chat:
    """A conversation with the server, as the page leads it."""

    def __init__(self, served: Served, media: Media) -> None:
        self.endpoint = Endpoint(served.server.url)
        self.facts: Facts = asyncio.run(self.endpoint.facts())
        self.limits = Limits("tiny", self.facts.takes, {}, 1 << 30, media.long_video.parent)
        self.conversation = Conversation(self.endpoint)

    def question(self, text: str, *files: Path) -> Question:
        return Question(text, tuple(check(files, self.limits)))

    def ask(self, text: str, *files: Path, stop_when: Callable[[Turn], bool] = lambda turn: False) -> Turn:
        question = self.question(text, *files)

        async def asked() -> Turn:
            seen = []
            async for turn in self.conversation.ask(question, SHORT):
                seen.append(turn)
                if not turn.reply.ended and stop_when(turn):
                    self.conversation.stop()
            return seen[-1]

        return asyncio.run(asked())


@pytest.fixture
def chat(main: Served, media: Media) -> Chat:
    return Chat(main, media)


def has_ended(served: Served, rid: str) -> bool:
    """Whether nothing more of a request is computed. SGLang looks every 4 seconds for clients that have left."""
    before = served.records(rid)
    time.sleep(3)
    return served.records(rid) == before


def six_turns(media: Media) -> list[tuple[str, list[Path]]]:
    """Words and files of the turns of `Media.six_turns`."""
    turns = []
    for message in media.six_turns():
        parts: list[dict[str, Any]] = message["content"]
        files = [Path(part[part["type"]]["url"]) for part in parts if part["type"] != "text"]
        turns.append((" ".join(part["text"] for part in parts if part["type"] == "text"), files))
    return turns


@pytest.mark.server("main")
def test_the_server_tells_what_it_is(chat: Chat, sparse_config: Path) -> None:
    facts = chat.facts
    assert facts.takes == frozenset(KINDS) and facts.context and facts.page_size == 1
    assert facts.report is not None and facts.report.serving is not None
    assert facts.report.serving.head_config == str(sparse_config)


@pytest.mark.server("main")
def test_every_turn_finds_the_turns_before_it(chat: Chat, main: Served, media: Media) -> None:
    """Six turns with two videos and three images. Also: what is told is what the trace says."""
    for words, files in six_turns(media):
        turn = chat.ask(words, *files)
        assert turn.reply.phase is Phase.DONE, turn.reply.error
        assert turn.reply.records == main.records(turn.reply.rid)
        assert turn.reply.records[-1].map and turn.reply.prompt_tokens == turn.reply.records[-1].seq_len
        assert turn.reply.sent_bytes == turn.reply.body_bytes > 100
    replies = [turn.reply for turn in chat.conversation.turns]
    print("\nturn  prompt  cached  of  share  of")
    for index, reply in enumerate(replies):
        expected, prompt, cached = chat.conversation.expected_cache(index), reply.prompt_tokens, reply.cached_tokens
        assert prompt and cached is not None and expected is not None
        print(f"{index + 1:4} {prompt:7} {cached:7} {expected:4} {cached / prompt:6.3f} {expected / prompt:.3f}")
        if index:
            assert cached >= (replies[index - 1].prompt_tokens or 0)
            gap = chat.conversation.cache_gap(index)  # a random model's words may be other tokens when they come back
            assert not gap or f"answer of turn {index}:" in gap
            assert bool(gap) == (cached < expected)
    assert min(reply.density or 1 for reply in replies) < 0.9


@pytest.mark.server("main")
def test_content_in_place_of_paths_finds_the_same_prefix(chat: Chat, media: Media) -> None:
    named = chat.ask("What is this?", media.videos[0], media.images[0]).reply
    chat.conversation.clear()
    chat.endpoint.as_files = False
    sent = chat.ask("What is this?", media.videos[0], media.images[0]).reply
    assert sent.prompt_tokens == named.prompt_tokens and (sent.cached_tokens or 0) >= (named.prompt_tokens or 0) - 1
    assert sent.sent_bytes > media.videos[0].stat().st_size > named.sent_bytes and sent.text == named.text
    assert json.dumps(chat.conversation.saved()).count("base64,") == 2


@pytest.mark.server("main")
def test_stop_in_the_middle_of_a_prefill_ends_the_request(chat: Chat, main: Served, media: Media) -> None:
    chat.ask("Hello.")
    turn = chat.ask("What happens?", media.long_video, stop_when=lambda turn: turn.reply.tokens_read > 0)
    assert turn.reply.phase is Phase.STOPPED and not turn.reply.text and chat.conversation.current is turn
    assert [turn.question.text for turn in chat.conversation.turns] == ["Hello."]
    again = chat.ask("And without it?")
    assert again.reply.phase is Phase.DONE and (again.reply.cached_tokens or 0) > 10
    wait_for(lambda: has_ended(main, turn.reply.rid))
    last = main.records(turn.reply.rid)[-1]
    assert last.map is None and last.seq_len < LONG_TOKENS / 2  # the last chunk of a prompt has the map


@pytest.mark.server("main")
def test_what_does_not_fit_is_refused_before_it_is_sent(chat: Chat, main: Served, media: Media) -> None:
    chat.ask("Hello.", media.images[0])
    turn = chat.ask("river " * ((chat.facts.context or 0) - 5))
    assert turn.reply.phase is Phase.FAILED and "at least" in turn.reply.error and turn.reply.sent_bytes == 0
    assert not main.records(turn.reply.rid) and len(chat.conversation.turns) == 1
    assert chat.ask("And now?").reply.phase is Phase.DONE
