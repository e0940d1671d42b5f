"""Programs of SGLang's frontend with media in every turn, on a real server; test_families.py has every family."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
import torch

from programs import GREEDY, Recording, add_user, chats, conversation
from serving import ROUNDING, Media, Message, Served, text, user, video
from sglang_mminfer.frontend import MediaEndpoint, MediaError
from sglang_mminfer.testing.oracle import HFOracle

pytestmark = pytest.mark.filterwarnings("ignore:a program failed")


@pytest.mark.server("main")
@pytest.mark.parametrize("media_as", ["path", "data"])
def test_a_program_and_its_chat_share_a_prefix(main: Served, media: Media, media_as: Any) -> None:
    questions = media.six_turns()
    backend = Recording(main.server.url, media=media_as)
    state = conversation.run(questions, 8, backend=backend)
    answers = [state[str(turn)] for turn in range(6)]
    asked = [main.ask(chat) for chat in chats(questions, answers)]
    assert [answer.text for answer in asked] == answers
    assert [answer.prompt_ids for answer in asked] == backend.prompt_ids
    assert [answer.cached_tokens for answer in asked] == [len(ids) - 1 for ids in backend.prompt_ids]
    assert backend.media.reads == (5 if media_as == "data" else 0)
    main.server.flush_cache()
    for chat in chats(questions, answers):
        main.ask(chat)
    state = conversation.run(questions, 8, backend=backend)
    cached = [state.get_meta_info(str(turn))["cached_tokens"] for turn in range(6)]
    assert cached == [len(ids) - 1 for ids in backend.prompt_ids[:6]]


@pytest.mark.server("main")
def test_a_fork_after_a_video_prefills_it_once(main: Served, media: Media) -> None:
    @sgl.function
    def program(s: Any, forks: int) -> None:
        with s.user():
            s += sgl.video(media.medium_video, -1)
            children = s.fork(forks)
            for number in range(forks):
                children[number] += f"Question {number}?" + sgl.user_end()
                children[number] += sgl.assistant(sgl.gen("answer", max_tokens=2, **GREEDY))
            children.join()

    prefilled = []
    for forks in (1, 4):
        main.server.flush_cache()
        before = len(main.records())
        state = program.run(forks, backend=MediaEndpoint(main.server.url))
        state.sync()
        assert len(state["answer"]) == forks
        prefilled.append(sum(record.chunk_len for record in main.records()[before:]))
    alone, shared = prefilled
    assert shared < 1.1 * alone, prefilled


@pytest.mark.server("main")
def test_a_stream_is_the_answer_in_pieces(main: Served, media: Media) -> None:
    questions, backend = media.six_turns()[:3], MediaEndpoint(main.server.url)
    expected = conversation.run(questions, 8, backend=backend)
    streamed = conversation.run(questions, 8, backend=backend, stream=True)
    for turn in "012":
        pieces = list(streamed.text_iter(turn))
        assert "".join(pieces) == streamed[turn] == expected[turn]
    assert len(pieces) > 1
    assert "".join(streamed.text_iter()) == expected.text()
    assert streamed.get_meta_info("2")["cached_tokens"] > 0


def logprobs_of(oracle: HFOracle, messages: list[Message], words: str) -> list[tuple[int, float]]:
    """Token ids of words after a prompt, and their log-probabilities by transformers."""
    inputs = oracle.inputs(messages)
    ids = oracle.processor.tokenizer.encode(words, add_special_tokens=False)
    length = inputs["input_ids"].shape[1]
    for name, value in inputs.items():
        if value.dim() == 2 and value.shape == (1, length):  # ids, attention mask, kinds of tokens
            more = torch.tensor([ids]) if name == "input_ids" else value[:, -1:].expand(1, len(ids))
            inputs[name] = torch.cat([value, more.to(value.dtype)], dim=1)
    positions = inputs["position_ids"]
    further = positions.max() + 1 + torch.arange(len(ids)).expand(3, 1, -1)
    inputs["position_ids"] = torch.cat([positions, further], dim=2)
    with torch.no_grad():
        logits = oracle.model(**inputs).logits[0, length - 1 : -1].float()
    rows = torch.log_softmax(logits, dim=-1)
    return [(token, float(row[token])) for token, row in zip(ids, rows)]


@pytest.mark.parametrize("name", ["covering_64"])
def test_select_takes_what_transformers_finds_likeliest(served: Served, model: Path, media: Media, name: str) -> None:
    """Choices of one token to many, in the second turn of a conversation with two videos and an image."""
    oracle, choices = HFOracle(model), ["river", "a small green train", "two", "it is not the same as before"]
    questions = media.six_turns()[2:5:2]

    @sgl.function
    def program(s: Any) -> None:
        add_user(s, questions[0])
        s += sgl.assistant("Is that so?")
        add_user(s, questions[1])
        s += sgl.assistant(sgl.select("choice", choices=choices))

    state = program.run(backend=MediaEndpoint(served.server.url))
    found = state.get_meta_info("choice")
    messages = chats(questions, ["Is that so?"])[-1]
    means = []
    for choice, got in zip(choices, found["input_token_logprobs"]):
        expected = logprobs_of(oracle, messages, choice)
        assert [token for _, token, _ in got] == [token for token, _ in expected]
        for (logprob, _, _), (_, other) in zip(got, expected):
            assert math.isclose(logprob, other, abs_tol=ROUNDING)
        means.append(sum(value for _, value in expected) / len(expected))
    assert state["choice"] == choices[means.index(max(means))]


@pytest.mark.server("main")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ["undecodable", "missing", "too long"])
def test_an_error_names_its_cause_and_loses_no_earlier_turn(
    main: Served, media: Media, tmp_path: Path, case: str, stream: bool
) -> None:
    path = tmp_path / "film.mp4"
    if case == "undecodable":
        path.write_bytes(media.videos[0].read_bytes()[:600])
    first = user(video(media.videos[0]), text("And now?"))
    bad = (
        user(text("Why? " * 40_000)) if case == "too long" else user(video(media.videos[1]), video(path), text("Why?"))
    )
    told = r"longer than the model's context length|exceeds|too long" if case == "too long" else f"^{path}: "
    for media_as in ("auto", "data") if case == "undecodable" else ("auto",):
        backend = MediaEndpoint(main.server.url, media=media_as)  # type: ignore[arg-type]
        state = conversation.run([first, bad, first], 4, backend=backend, stream=stream)
        assert len(state["0"].split()) == 4
        for name in ("1", "2"):
            with pytest.raises(MediaError, match=told) as error:
                state[name]
            assert "base64" not in str(error.value) and "Traceback" not in str(error.value)
        if stream:
            with pytest.raises(MediaError, match=told):
                list(state.text_iter("1"))
        again = conversation.run([first], 4, backend=backend)
        assert again["0"] == state["0"]


@pytest.mark.server("main")
def test_a_program_says_how_many_frames(main: Served, media: Media, recwarn: pytest.WarningsRecorder) -> None:
    @sgl.function
    def program(s: Any, frames: int) -> None:
        s += sgl.user(sgl.video(media.medium_video, frames) + "What?")
        s += sgl.assistant(sgl.gen("answer", max_tokens=1, **GREEDY))

    backend = Recording(main.server.url)
    for frames in (-1, 4):
        program.run(frames, backend=backend)["answer"]
    few = {"type": "video_url", "video_url": {"url": str(media.medium_video), "num_frames": 4}}
    asked = main.ask([user(few, text("What?"))], 1)
    assert len(backend.prompt_ids[1]) < len(backend.prompt_ids[0]) and backend.prompt_ids[1] == asked.prompt_ids
    assert not [warning for warning in recwarn if "num_frames" in str(warning.message)]
