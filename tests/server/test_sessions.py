"""Turns of a session with media give the answers of the whole conversation in one request, and never end the server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from plain_http import Answer, fine, generate, post
from serving import ROUNDING, TIE, VOCABULARY, Media, Served, wait_for

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LONG = " ".join(VOCABULARY * 25)


def rid(answer: Answer) -> str:
    return answer["meta_info"]["id"]


def same(left: Answer, right: Answer) -> None:
    """Asserts that two answers are equal, apart from ties."""
    assert left["meta_info"]["prompt_tokens"] == right["meta_info"]["prompt_tokens"]
    rows = [one["meta_info"]["output_top_logprobs"] for one in (left, right)]
    chosen = [[token for _, token, *_ in one["meta_info"]["output_token_logprobs"]] for one in (left, right)]
    for a, b, x, y in zip(*rows, *chosen, strict=True):
        here, there = ({token: value for value, token, *_ in row} for row in (a, b))
        worst = max(abs(value - there[token]) for token, value in here.items() if token in there)
        assert worst <= ROUNDING, f"log-probabilities differ by {worst}"
        if x != y:
            assert abs(here[x] - here[y]) <= TIE
            return


@pytest.fixture
def covering(servers: Callable[[str], Served]) -> Served:
    """A server whose config leaves nothing out, so that prefilled and decoded tokens give the same answers."""
    found = servers("covering_64")
    found.server.flush_cache()
    return found


@pytest.fixture
def session(covering: Served) -> Iterator[str]:
    _, opened = post(covering, "/open_session", {"capacity_of_str_len": 100_000})
    yield opened
    post(covering, "/close_session", {"session_id": opened})


@pytest.fixture
def film(media: Media) -> str:
    return str(media.videos[0])


@pytest.fixture
def picture(media: Media) -> str:
    return str(media.images[0])


def text_of(ids: list[int], folder: Path) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).decode(ids)


ONE = ASK.format("Look at this " + VIDEO + " and tell me what it is, please.")
TWO = "<|im_end|>\n" + ASK.format("And this " + IMAGE + "?")
WORDS = "<|im_end|>\n" + ASK.format("And now? " + LONG)


def extent(answer: Answer, token: int) -> tuple[int, int]:
    """The first and the last position of a placeholder in a prompt."""
    places = [i for i, one in enumerate(answer["prompt_token_ids"]) if one == token]
    return places[0], places[-1]


@pytest.fixture(scope="module")
def tokens(model: Path) -> dict[str, int]:
    config = json.loads((model / "config.json").read_text())
    return {"video": config["video_token_id"], "image": config["image_token_id"]}


@pytest.mark.server("covering_64")
def test_turns_equal_the_whole_conversation(covering: Served, session: str, film: str, picture: str) -> None:
    first = fine(generate(covering, text=ONE, video_data=film, session_params={"id": session}))
    words = fine(generate(covering, text=WORDS, session_params={"id": session, "rid": rid(first)}))
    seen = fine(generate(covering, text=TWO, image_data=picture, session_params={"id": session, "rid": rid(first)}))
    third = fine(generate(covering, text=WORDS, session_params={"id": session, "rid": rid(seen)}))
    dropped = {"id": session, "rid": rid(first), "drop_previous_output": True}
    again = fine(generate(covering, text=WORDS, session_params=dropped))
    covering.server.flush_cache()
    talk = ONE + first["text"]
    same(words, fine(generate(covering, text=talk + WORDS, video_data=film)))
    same(seen, fine(generate(covering, text=talk + TWO, video_data=film, image_data=picture)))
    both = {"video_data": film, "image_data": picture}
    same(third, fine(generate(covering, text=talk + TWO + seen["text"] + WORDS, **both)))
    same(again, fine(generate(covering, text=ONE + WORDS, video_data=film)))


@pytest.mark.server("covering_64")
@pytest.mark.parametrize("where", ["nothing of it", "before the video", "behind the video", "in the answer"])
def test_offset_outside_media(
    covering: Served, session: str, film: str, picture: str, tokens: dict[str, int], model: Path, where: str
) -> None:
    """A medium after the offset leaves no trace: ids, positions and log-probabilities are as without it."""
    first = fine(generate(covering, text=ONE, video_data=film, session_params={"id": session}))
    start, last = extent(first, tokens["video"])
    ids = first["prompt_token_ids"]
    offset = {"nothing of it": 1, "before the video": start, "behind the video": last + 3}.get(where, len(ids) + 1)
    prefix = text_of(ids[: min(start, offset)], model)
    if offset > last:
        prefix += "<|video_pad|>" + text_of(ids[last + 1 : offset], model)
    if where == "in the answer":
        prefix += first["text"][:0] + text_of(first["output_ids"][:1], model)
    alone = {"video_data": film} if offset > last else {}
    params = {"id": session, "rid": rid(first), "offset": offset}
    words = fine(generate(covering, text=WORDS, session_params=params))
    seen = fine(generate(covering, text=TWO, image_data=picture, session_params=params))
    after = fine(generate(covering, text="And then?", session_params={"id": session, "rid": rid(words)}))
    branch = fine(generate(covering, text=WORDS, session_params={"id": session, "rid": rid(first)}))
    covering.server.flush_cache()
    same(words, fine(generate(covering, text=prefix + WORDS, **alone)))
    same(seen, fine(generate(covering, text=prefix + TWO, image_data=picture, **alone)))
    same(after, fine(generate(covering, text=prefix + WORDS + words["text"] + "And then?", **alone)))
    same(
        branch, fine(generate(covering, text=ONE + first["text"] + WORDS, video_data=film))
    )  # has all of the parent's media


@pytest.mark.server("covering_64")
def test_offset_inside_a_medium_is_refused(covering: Served, session: str, film: str, tokens: dict[str, int]) -> None:
    first = fine(generate(covering, text=ONE, video_data=film, session_params={"id": session}))
    start, last = extent(first, tokens["video"])
    for offset in (start + 1, (start + last) // 2, last):
        status, answer = generate(
            covering, text="So?", session_params={"id": session, "rid": rid(first), "offset": offset}
        )
        assert status == 400, answer
        said = f"offset: {offset} is inside the video at tokens [{start}, {last}]"
        assert said in json.dumps(answer)
    again = fine(generate(covering, text=WORDS, session_params={"id": session, "rid": rid(first)}))
    covering.server.flush_cache()
    same(again, fine(generate(covering, text=ONE + first["text"] + WORDS, video_data=film)))


@pytest.mark.server("covering_64")
def test_turn_with_media_and_no_known_parent(covering: Served, session: str, film: str, picture: str) -> None:
    """SGLang would place the media of a refused turn in the one token that replaces its prompt."""
    params = {"id": session, "rid": "nobody"}
    assert generate(covering, text=TWO, image_data=picture, session_params=params)[0] == 400
    assert generate(covering, text=ONE, video_data=film, session_params={"id": "no such session"})[0] == 400
    fine(generate(covering, text=ONE, video_data=film, session_params={"id": session}))


@pytest.mark.server("covering_64")
def test_replace(covering: Served, session: str, film: str, picture: str) -> None:
    first = fine(generate(covering, text=ONE, video_data=film, session_params={"id": session}))
    second = fine(generate(covering, text=TWO, image_data=picture, session_params={"id": session, "rid": rid(first)}))
    params = {"id": session, "rid": rid(first), "replace": True}
    replaced = fine(generate(covering, text=WORDS, session_params=params))
    gone = {"id": session, "rid": rid(second)}
    assert generate(covering, text="So?", session_params=gone)[0] == 400
    anew = fine(generate(covering, text=ONE, video_data=film, session_params={"id": session, "replace": True}))
    assert generate(covering, text="So?", session_params={"id": session, "rid": rid(first)})[0] == 400
    covering.server.flush_cache()
    same(replaced, fine(generate(covering, text=ONE + first["text"] + WORDS, video_data=film)))
    same(anew, fine(generate(covering, text=ONE, video_data=film)))


def running(covering: Served, **body: Any) -> threading.Thread:
    """Sends a request for so many tokens that it still runs when the caller acts. Returns when it has begun."""
    thread = threading.Thread(target=generate, args=(covering,), kwargs={"tokens": 20_000, **body}, daemon=True)
    thread.start()
    wait_for(lambda: covering.records(body["rid"]))
    return thread


@pytest.mark.server("covering_64")
def test_parent_that_is_replaced_or_aborted_while_it_runs(
    covering: Served, session: str, film: str, media: Media, picture: str
) -> None:
    first = fine(generate(covering, text=ONE, video_data=film, session_params={"id": session}))
    medium = str(media.medium_video)
    # Replaced during its prefill of many chunks: the next turn has its media, encoded again if necessary.
    thread = running(covering, rid="running-1", text=ONE, video_data=medium, session_params={"id": session})
    params = {"id": session, "rid": "running-1", "replace": True, "drop_previous_output": True}
    replaced = fine(generate(covering, text=WORDS, session_params=params))
    thread.join(60)
    # Aborted: the media of earlier turns are still there, its own are not.
    for i, own in enumerate(({}, {"image_data": picture})):
        body = {"text": TWO if own else WORDS, **own, "session_params": {"id": session, "rid": rid(first)}}
        thread = running(covering, rid=f"aborted-{i}", **body)
        post(covering, "/abort_request", {"rid": f"aborted-{i}"})
        thread.join(60)
        params = {"id": session, "rid": f"aborted-{i}", "drop_previous_output": True}
        status, answer = generate(covering, text="So?", session_params=params)
        if own:
            assert status == 400 and "are gone" in json.dumps(answer), answer
        else:
            after_abort = fine((status, answer))
    covering.server.flush_cache()
    same(replaced, fine(generate(covering, text=ONE + WORDS, video_data=medium)))
    same(after_abort, fine(generate(covering, text=ONE + first["text"] + WORDS + "So?", video_data=film)))


@pytest.mark.server("covering_64")
def test_session_closed_while_a_turn_runs(covering: Served, media: Media, film: str) -> None:
    _, session = post(covering, "/open_session", {"capacity_of_str_len": 100_000})
    body = {"text": ONE, "video_data": str(media.medium_video), "session_params": {"id": session}}
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(generate(covering, rid="closing", **body)))
    thread.start()
    wait_for(lambda: covering.records("closing"))
    post(covering, "/close_session", {"session_id": session})
    thread.join(60)
    covering.server.flush_cache()
    same(fine(done[0]), fine(generate(covering, text=ONE, video_data=str(media.medium_video))))
    assert generate(covering, text="So?", session_params={"id": session})[0] == 400


BAD_PARAMS: dict[str, Any] = {
    "a float": {"offset": 3.5},
    "words": {"offset": "three"},
    "negative": {"offset": -5},
    "a list": {"offset": [1]},
    "an unknown field": {"colour": "red"},
    "a number for a name": {"rid": 7},
    "no object": ["id"],
    "a list for true": {"replace": [True]},
}


@pytest.mark.server("covering_64")
@pytest.mark.parametrize("name", BAD_PARAMS)
def test_bad_session_params_are_the_clients_error(covering: Served, session: str, film: str, name: str) -> None:
    first = fine(generate(covering, text=ONE, video_data=film, session_params={"id": session}))
    bad = BAD_PARAMS[name]
    params = bad if isinstance(bad, list) else {"id": session, "rid": rid(first), **bad}
    status, answer = generate(covering, text="So?", session_params=params)
    assert status == 400, answer
    fine(generate(covering, text="So?", session_params={"id": session, "rid": rid(first)}))


def turns_about(prompt: tuple[str, str], film: str, picture: str, other: str) -> list[dict[str, Any]]:
    """A turn with a video and a picture, one with another video, and one of text. image, video: their placeholders."""
    shown, moving = prompt
    return [
        {"text": f"{moving}{shown}Look at both.", "video_data": [film], "image_data": [picture]},
        {"text": f"And now?\n{moving}", "video_data": [other]},
        {"text": "Which one came first? " + LONG},
    ]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        pytest.param("covering_64", (IMAGE, VIDEO), marks=pytest.mark.server("covering_64")),
        pytest.param("mixed_internvl", ("<image>", "<video>"), marks=pytest.mark.server("mixed_internvl")),
    ],
)
def test_a_turn_whose_history_is_no_longer_cached(
    servers: Callable[[str], Served], media: Media, film: str, picture: str, name: str, prompt: tuple[str, str]
) -> None:
    """All of it is prefilled again, media included."""
    served = servers(name)
    answers: dict[bool, list[Answer]] = {}
    for evicted in (False, True):
        served.server.flush_cache()
        before: dict[str, Any] = {"id": fine(post(served, "/open_session", {"capacity_of_str_len": 100_000}))}
        answers[evicted] = []
        for turn in turns_about(prompt, film, picture, str(media.videos[1])):
            params = {**before, "drop_previous_output": True}
            answers[evicted].append(fine(generate(served, **turn, session_params=params)))
            before["rid"] = rid(answers[evicted][-1])
            if evicted:
                served.server.flush_cache()
        post(served, "/close_session", {"session_id": before["id"]})
    assert [one["meta_info"]["cached_tokens"] for one in answers[True]] == [0, 0, 0]
    for kept, computed in zip(answers[False], answers[True], strict=True):
        same(kept, computed)
