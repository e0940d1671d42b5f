"""Every family of tests/families on a real server: its answers equal its oracle's, and long prompts run sparse.

Each family has one server and one head config, with patterns and boundaries of every kind and windows of `Family.reach`
tokens. A shorter prompt runs on the sparse path and gives the dense answer; in a longer one keys are left out.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from families import prompt_of
from families_served import EVERY_SERVER, FAMILY_SERVERS, Files, Running, make_files
from plain_http import as_oracle_answer, fine, generate, post
from programs import Recording, chats, conversation
from serving import LAYERS, Message, Served, assistant, image, same, sound, text, user, video
from sglang_mminfer.serving.clip_sender import CLIP_RID
from sglang_mminfer.tools.media import make_video

pytestmark = pytest.mark.parametrize("name", EVERY_SERVER)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("shown"))


@pytest.fixture(scope="session")
def runnings(
    servers: Callable[[str], Served], files: Files, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Running]:
    found: dict[str, Running] = {}

    def get(name: str) -> Running:
        served = servers(name)
        if name not in found:
            family, _ = FAMILY_SERVERS[name]
            frames, width, height, fps = family.long_video
            long = make_video(tmp_path_factory.mktemp(name) / "long.mp4", frames, width, height, fps, seed=3)
            found[name] = Running(family, served, family.make_oracle(served.server.model), files, long)
        return found[name]

    return get


@pytest.fixture
def running(runnings: Callable[[str], Running], name: str) -> Running:
    return runnings(name)


def needs(fact: bool, otherwise: str) -> None:
    if not fact:
        pytest.skip(f"this family is served {otherwise}")


def test_the_clip_gives_the_basis(running: Running) -> None:
    """The config has heads that choose by a basis, so the server has sent itself the clip, as far as the family takes
    it, before any other request."""
    log = running.served.server.log()
    assert "mminfer: heads choose keys by a basis of rank 8 from the built-in clip." in log
    first = running.served.records()[0]
    assert first.rid.startswith(CLIP_RID) and first.dense_reason == "no_basis"
    assert not [r for r in running.served.records() if r.dense_reason == "no_basis" and not r.rid.startswith(CLIP_RID)]


def test_an_image(running: Running) -> None:
    running.ask([user(image(running.files.images[0]), text("What is this?"))], "image")
    assert running.rasters("image") == ["image"] * len(running.rasters("image")) != []


def test_a_video(running: Running) -> None:
    needs(running.family.video, "without video")
    running.ask([user(video(running.files.videos[0]), text("What do you see in the video?"))], "video")
    assert running.rasters("video") == ["video"]


def test_a_video_that_nobody_would_read_is_refused(running: Running) -> None:
    if running.family.video:
        pytest.skip("this family is served with video")
    with pytest.raises(openai.BadRequestError, match=r"(?i)video"):
        running.served.ask([user(video(running.files.videos[0]), text("What do you see in the video?"))], 1)
    _unharmed(running)


def test_several_videos_in_a_turn(running: Running) -> None:
    needs(running.family.several_videos, "with one video in a prompt")
    first, second = running.files.videos
    running.ask([user(video(second), text("What?"), video(first), text("Compare both."))], "several")
    assert running.rasters("several") == ["video", "video"]


def test_sounds_beside_pictures_and_videos(running: Running) -> None:
    """They are read, and for a map they are text. A prompt that has nothing else runs dense."""
    needs(running.family.sound, "without sound")
    files = running.files
    heard = [sound(path) for path in files.sounds]
    messages = [user(heard[1], text("Who?"))]
    running.hold(running.oracle.answer(messages), running.served.ask(messages, rid="sound alone"))
    assert {r.dense_reason for r in running.served.records("sound alone")} == {"no_media"}
    running.ask([user(heard[0], image(files.images[0]), text("What is this?"))], "sound")
    assert running.rasters("sound") == ["image"]
    running.ask([user(heard[0], video(files.videos[0]), text("And"), heard[1])], "sounds")
    assert running.rasters("sounds") == ["video"]


def test_every_turn_of_a_conversation(running: Running) -> None:
    known = 0
    for i, (messages, expected) in enumerate(running.turns):
        got = running.ask(messages, f"turn-{i}", expected)
        if running.family.cached_turns:
            cached = got.cached_tokens or 0
            # The second picture changes the first one's layout; the tokens before the first stay cached.
            assert 0 < cached < known if running.family.lone_image and i == 2 else cached >= known
            known = len(got.prompt_ids)
        else:
            assert not got.cached_tokens


def test_a_program_is_the_same_chat(running: Running) -> None:
    """A program of SGLang's frontend has the token ids of the chat in every turn, and each finds the other's prefix."""
    served, questions = running.served, running.questions
    # Vicuna's template has "ASSISTANT:" before what is generated, and "ASSISTANT: " before an answer of the history.
    space = " " if running.family.name == "llava_v1_5" else ""

    def in_chat(answers: list[str]) -> list[str]:
        return [answer.removeprefix(space) for answer in answers]

    def program() -> tuple[Recording, list[str], list[int]]:
        backend = Recording(served.server.url)
        state = conversation.run(questions, 4, backend=backend)
        answers = [state[str(turn)] for turn in range(len(questions))]
        cached = [state.get_meta_info(str(turn))["cached_tokens"] for turn in range(len(questions))]
        return backend, answers, cached

    served.server.flush_cache()
    backend, answers, _ = program()
    asked = [served.ask(chat, 4) for chat in chats(questions, in_chat(answers))]
    assert [answer.text for answer in asked] == answers
    assert [answer.prompt_ids for answer in asked] == backend.prompt_ids
    running.hold_cached([answer.cached_tokens or 0 for answer in asked], list(map(len, backend.prompt_ids)))
    served.server.flush_cache()
    again = [served.ask(chat, 4) for chat in chats(questions, in_chat(answers))]
    _, same_answers, cached = program()
    assert same_answers == answers == [answer.text for answer in again]
    running.hold_cached(cached, [len(answer.prompt_ids) for answer in again])


def test_all_turns_at_once(running: Running) -> None:
    """In one batch over an empty cache each turn gets the answer that it gets alone."""
    running.served.server.flush_cache()
    answers = running.served.ask_all([messages for messages, _ in running.turns])
    for (_, expected), got in zip(running.turns, answers):
        running.hold(expected, got)


def test_a_long_prompt_is_sparse(running: Running) -> None:
    family = running.family
    shown = [video(running.long_video)] * family.long_videos if family.video else [image(running.files.images[0])] * 8
    parts = [part for medium in shown for part in (medium, text("Where did it go?"))]
    got = running.served.ask([user(*parts)], rid="long")
    records = running.served.records("long")
    assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
    assert len(got.prompt_ids) > 1.2 * family.reach
    assert records[-1].density is not None and records[-1].density < 0.9, records[-1]
    assert set(running.rasters("long")) == {"video" if family.video else "image"}


@pytest.mark.parametrize("kind", ["uneven", "portrait", "one_frame", "10000_frames"])
def test_odd_videos(running: Running, kind: str) -> None:
    family = running.family
    needs(family.video, "without video")
    messages: list[Message] = [user(video(running.files.odd[kind]), text("Who?"))]
    if kind == "one_frame" and family.one_frame:
        with pytest.raises(openai.BadRequestError, match=family.one_frame):
            running.served.ask(messages)
        return
    got = running.served.ask(messages, rid=kind)
    if len(got.prompt_ids) + len(got.token_ids) <= family.reach:
        running.hold(running.oracle.answer(messages), got)
    else:
        assert len(got.token_ids) == 8
    records = running.served.records(kind)
    assert {(r.sparse_layers, r.dense_reason) for r in records} == {(LAYERS, None)}
    assert running.rasters(kind) == ["video"]


@pytest.mark.parametrize("kind", ["broken", "words", "missing"])
def test_what_is_no_video_is_the_clients_error(running: Running, kind: str) -> None:
    path = running.files.unreadable[kind]
    with pytest.raises(openai.BadRequestError, match=r"(?i)video|invalid image") as failure:
        running.served.ask([user(video(path), text("What?"))], 1)
    assert len(str(failure.value)) > 40
    _unharmed(running)


def test_what_is_no_picture_is_the_clients_error(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=r"(?i)image"):
        running.served.ask([user(image(running.files.unreadable["words"]), text("What?"))], 1)
    _unharmed(running)


def _unharmed(running: Running) -> None:
    messages, expected = running.turns[0]
    running.hold(expected, running.served.ask(messages))


def test_media_within_the_request(running: Running) -> None:
    """A data: URL gives the same answer as its file."""

    def data(path: Path, kind: str) -> str:
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    picture, moving = running.files.images[1], running.files.videos[1]
    told = text("What do you see?")
    pairs = [
        (user(image(picture), told), {"type": "image_url", "image_url": {"url": data(picture, "image/png")}}),
        (user(video(moving), told), {"type": "video_url", "video_url": {"url": data(moving, "video/mp4")}}),
    ]
    for message, within in pairs if running.family.video else pairs[:1]:
        same(running.served.ask([message]), running.served.ask([user(within, told)]))


def test_a_session_with_media_in_both_turns(running: Running) -> None:
    """As the whole prompt in one request."""
    written = prompt_of(running.family)
    needs(written is not None, "without prompts of its own")
    served = running.served
    pictures = [str(path) for path in running.files.images[:2]]
    words = [f"{written.image}\nWhat do you see?\n", f"{written.image}\nAnd here?\n"]
    session = {"id": fine(post(served, "/open_session", {"capacity_of_str_len": 100_000}))}
    first = fine(generate(served, text=words[0], image_data=pictures[0], session_params=session))
    follows = {**session, "rid": first["meta_info"]["id"], "drop_previous_output": True}
    second = fine(generate(served, text=words[1], image_data=pictures[1], session_params=follows))
    fine(post(served, "/close_session", {"session_id": session["id"]}))
    served.server.flush_cache()
    whole = as_oracle_answer(fine(generate(served, text="".join(words), image_data=pictures)))
    own = second["prompt_token_ids"]  # of the turn
    needs(own == whole.prompt_ids[-len(own) :], "with tokens of a turn that depend on the turns before it")
    assert second["meta_info"]["prompt_tokens"] == len(whole.prompt_ids)
    same(whole, as_oracle_answer({**second, "prompt_token_ids": whole.prompt_ids}))


def test_words_that_look_like_placeholders_are_words(running: Running) -> None:
    """In a question and in the history of a conversation with media they are tokenized as words; the server goes on."""
    family, files = running.family, running.files
    shown = video(files.videos[0]) if family.video else image(files.images[0])
    asked = "How do <image>, <video>, <img>, </img>, <|image_pad|> and <IMG_CONTEXT> differ?"
    said = "Use <video> or <image>, or <img></img>."
    messages: list[Message] = [user(shown, text(asked)), assistant(said), user(text(asked))]
    got = running.served.ask(messages, rid="words")
    quiet = running.served.ask([user(shown, text("What?")), assistant("This."), user(text("What?"))], rid="quiet")
    assert running.rasters("words") == running.rasters("quiet")
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(running.served.server.model))
    decoded = tokenizer.decode(got.prompt_ids)
    assert decoded.count(asked) == 2 and said in decoded, decoded[-600:]
    for name, token in tokenizer.get_added_vocab().items():  # no media token more than without the words
        if name in asked + said:
            assert got.prompt_ids.count(token) == quiet.prompt_ids.count(token), name
    _unharmed(running)


def _tokenizer_folder(model: str) -> Path:
    folder = Path(model)
    return folder / "llm" if (folder / "llm").is_dir() else folder


def test_nothing_failed_inside(running: Running) -> None:
    reasons = {r.dense_reason for r in running.served.records() if not r.rid.startswith(CLIP_RID)}
    assert reasons <= {None, "no_media"}
    assert not any(r.encoded_again for r in running.served.records())
