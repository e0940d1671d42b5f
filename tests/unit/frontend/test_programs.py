"""Programs against a stand-in of a server's HTTP interface: what is sent, how often, and where errors arise."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState, StreamExecutor

from sglang_mminfer.frontend import MediaEndpoint, MediaError
from sglang_mminfer.frontend.executor import PATCHES, MediaExecutor, MediaState
from sglang_mminfer.tools.media import make_image, make_video
from stand_in import StandIn, rendered

NO_FILE = "An exception occurred while loading VIDEO data at index 1: Error while loading data {}: no moov atom"
TOO_LONG = "The input (70000 tokens) is longer than the model's context length (32768 tokens)."

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def server() -> Iterator[StandIn]:
    made = StandIn()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def no_waiting_warnings() -> Iterator[None]:
    """A failed program also warns; tests look at its error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a program failed")
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("media")
    return {
        **{name: str(make_image(root / f"{name}.png", 32, 48, seed=n)) for n, name in enumerate("ab")},
        **{name: str(make_video(root / f"{name}.mp4", 4, 32, 32, seed=n)) for n, name in enumerate("vw")},
    }


@sgl.function
def three_turns(s: Any, files: dict[str, str]) -> None:
    s += sgl.system("Be brief.")
    s += sgl.user(sgl.video(files["v"], -1) + "What is in " + sgl.image(files["a"]) + "?")
    s += sgl.assistant(sgl.gen("first", max_tokens=4))
    s += sgl.user(sgl.image(files["b"]) + sgl.video(files["w"], -1) + sgl.video(files["v"], -1) + "And now?")
    s += sgl.assistant(sgl.gen("second"))
    s += sgl.user("Which?")
    s += sgl.assistant(sgl.select("third", choices=["one", "seven"]))


def chat(files: dict[str, str], answers: list[str], turns: int) -> list[dict[str, Any]]:
    def part(name: str) -> dict[str, Any]:
        kind = "image" if files[name].endswith("png") else "video"
        return {"type": f"{kind}_url", f"{kind}_url": {"url": files[name]}}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part("v"), text("What is in "), part("a"), text("?")]},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": [part("b"), part("w"), part("v"), text("And now?")]},
        {"role": "assistant", "content": answers[1]},
        {"role": "user", "content": "Which?"},
    ]
    return messages[: 2 * turns]


# ---- what is sent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_program_sends_what_a_chat_would(server: StandIn, files: dict[str, str], stream: bool) -> None:
    state = three_turns.run(files, backend=MediaEndpoint(server.url, media="path"), stream=stream)
    answers = [state["first"], state["second"]]
    assert state["third"] == "one"
    url = {name: Path(path).as_uri() for name, path in files.items()}
    first, second, *selected = server.bodies
    for turn, body in ((1, first), (2, second), (3, selected[0])):
        assert body["text"] == rendered(chat(files, answers, turn))
    assert (first["image_data"], first["video_data"]) == ([url["a"]], [url["v"]])
    images, videos = [url["a"], url["b"]], [url["v"], url["w"], url["v"]]
    assert (second["image_data"], second["video_data"]) == (images, videos)
    assert selected[1]["text"] == [selected[0]["text"] + choice for choice in ("one", "seven")]
    assert (selected[1]["image_data"], selected[1]["video_data"]) == ([images] * 2, [videos] * 2)
    (three, _, _), (five, *_) = (one[:3] for one in state.get_meta_info("third")["input_token_logprobs"])
    assert three[0] == -3 and five[0] == -5, "no token of the prompt is among them"
    assert first["sampling_params"]["max_new_tokens"] == 4


def test_a_file_is_encoded_once_for_all_turns_forks_and_runs(server: StandIn, files: dict[str, str]) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(sgl.video(files["v"], -1) + "What?") + sgl.assistant(sgl.gen("a"))
        forks = s.fork(3)
        forks += sgl.user("Why?") + sgl.assistant(sgl.gen("b"))
        forks.join()

    backend = MediaEndpoint(server.url, media="data")
    for _ in range(2):
        program.run(backend=backend).sync()
    assert len(server.bodies) == 2 * (1 + 1 + 3)
    assert {body["video_data"][0][:22] for body in server.bodies} == {"data:video/mp4;base64,"}
    assert backend.media.reads == 1


def test_likelihoods_without_the_prompt_go_without_its_media(server: StandIn, files: dict[str, str]) -> None:
    @sgl.function
    def program(s: Any) -> None:
        method = sgl.unconditional_likelihood_normalized
        s += sgl.user(sgl.image(files["a"]) + "What?")
        s += sgl.assistant(sgl.select("x", choices=["a", "b"], choices_method=method))

    assert program.run(backend=MediaEndpoint(server.url))["x"] in ("a", "b")
    assert ["image_data" in body for body in server.bodies] == [True, True, False]


def test_several_answers_each_see_all_media(server: StandIn, files: dict[str, str]) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(sgl.video(files["v"], -1) + sgl.video(files["w"], -1) + "What?")
        s += sgl.assistant(sgl.gen("x", n=2))

    state = program.run(backend=MediaEndpoint(server.url, media="path"))
    assert state["x"] == [" answer 1"] * 2
    assert len(server.bodies[0]["video_data"]) == 1 and len(server.bodies[0]["video_data"][0]) == 2


def test_the_key_goes_with_every_request(server: StandIn) -> None:
    backend = MediaEndpoint(server.url, api_key="secret")
    chat_of_text.run(backend=backend).sync()
    assert set(server.keys) == {"Bearer secret"}


@pytest.mark.parametrize(("backend", "honoured"), [("mminfer", True), ("triton", False)])
def test_frames_are_asked_for_or_warned_about_once(
    server: StandIn, files: dict[str, str], backend: str, honoured: bool
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        for name in "vw":
            s += sgl.user(sgl.video(files[name], 4) + "What?") + sgl.assistant(sgl.gen(name))

    server.backend = backend
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        program.run(backend=MediaEndpoint(server.url, media="path"))["w"]
    url = Path(files["v"]).as_uri()
    assert server.bodies[0]["video_data"] == [{"url": url, "num_frames": 4} if honoured else url]
    assert sum("--mm-process-config" in str(one.message) for one in told) == (0 if honoured else 1)


def test_frames_that_a_family_refuses_are_left_out(server: StandIn, files: dict[str, str]) -> None:
    server.refuse = lambda body: (
        "video: num_frames: this model takes fps" if isinstance(body["video_data"][0], dict) else None
    )
    with pytest.warns(UserWarning, match="num_frames=4 is left out"):
        assert video_chat.run(files["v"], 4, backend=MediaEndpoint(server.url))["x"] == " answer 1"


def test_a_server_behind_a_tunnel_gets_the_content(server: StandIn, files: dict[str, str]) -> None:
    def refuse(body: dict[str, Any]) -> str | None:
        url = body["video_data"][0]
        return NO_FILE.format(url).replace("index 1", "index 0") if url.startswith("file:") else None

    server.refuse = refuse
    for stream in (False, True):
        backend = MediaEndpoint(server.url)
        for run in (1, 2):
            state = video_chat.run(files["v"], -1, backend=backend, stream=stream)
            assert state["x"].startswith(" answer")
            assert server.paths.count("/generate") == (2, 3)[run - 1]  # a path is tried once
        server.paths.clear()
    with pytest.raises(MediaError, match="no moov atom"):
        video_chat.run(files["v"], -1, backend=MediaEndpoint(server.url, media="path"))["x"]


@sgl.function
def video_chat(s: Any, path: str, num_frames: int) -> None:
    s += sgl.user(sgl.video(path, num_frames) + "What?") + sgl.assistant(sgl.gen("x"))


@sgl.function
def chat_of_text(s: Any) -> None:
    s += sgl.user("What?") + sgl.assistant(sgl.gen("x"))
    s += sgl.user("Why?") + sgl.assistant(sgl.gen("y"))


# ---- forks -------------------------------------------------------------------------------------------------


def test_a_fork_prefills_what_is_shared_first(server: StandIn, files: dict[str, str]) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user_begin() + sgl.video(files["v"], -1)
        forks = s.fork(3)
        forks += lambda i: f"question {i}" + sgl.user_end() + sgl.assistant(sgl.gen("x"))
        forks.join()

    for _ in range(5):
        server.bodies.clear()
        state = program.run(backend=MediaEndpoint(server.url))
        state.sync()
        shared, *children = server.bodies
        assert shared["sampling_params"] == {"max_new_tokens": 0}
        assert all(body["text"].startswith(shared["text"]) for body in children)
        assert [body["video_data"] for body in children] == [shared["video_data"]] * 3
        assert len(state["x"]) == 3


def test_a_failed_child_raises_in_join(server: StandIn, files: dict[str, str]) -> None:
    seen = []
    before = set(threading.enumerate())

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(sgl.video(files["v"], -1) + "What?") + sgl.assistant(sgl.gen("first"))
        forks = s.fork(2)
        forks += lambda i: sgl.user(f"question {i}") + sgl.assistant(sgl.gen("x"))
        try:
            forks.join()
        except MediaError as error:
            seen.append((str(error), s["first"], forks[0]["x"]))

    server.refuse = lambda body: TOO_LONG if "question 1" in body["text"] else None
    program.run(backend=MediaEndpoint(server.url)).sync()
    assert seen == [(TOO_LONG, " answer 1", " answer 3")]
    for thread in set(threading.enumerate()) - before:  # a process would wait for them when it ends
        if not thread.daemon:
            thread.join(10)
            assert not thread.is_alive(), thread


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_a_program_that_streams_is_raised_in_the_streams(server: StandIn) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("What?") + sgl.assistant(sgl.gen("first"))
        forks = s.fork(2)
        forks += lambda i: sgl.user(f"question {i}") + sgl.assistant(sgl.gen("x"))
        forks.join()
        s += sgl.user("Why?") + sgl.assistant(sgl.gen("last"))

    server.refuse = lambda body: TOO_LONG if "question 1" in body["text"] else None
    state = program.run(backend=MediaEndpoint(server.url), stream=True)
    assert "".join(state.text_iter("first")) == " answer 1"
    for name in ("last", None):
        with pytest.raises(MediaError, match="context length"):
            list(state.text_iter(name))


# ---- errors ------------------------------------------------------------------------------------------------


def test_an_error_is_raised_where_the_answer_is_read(server: StandIn, files: dict[str, str]) -> None:
    server.refuse = lambda body: TOO_LONG if "And now?" in body["text"] else None
    state = three_turns.run(files, backend=MediaEndpoint(server.url))
    for _ in range(2):
        with pytest.raises(MediaError, match="context length"):
            state["second"]
    with pytest.raises(MediaError, match="context length"):
        state["third"]  # submitted after the error: nobody waits for it forever
    with pytest.raises(MediaError, match="context length"):
        state.get_meta_info("second")
    assert state["first"] == " answer 1" and "second" not in state
    assert state.text().endswith("<|im_start|>assistant\n") and " answer 1" in state.text()
    assert str(state.error()) == TOO_LONG


@pytest.mark.parametrize("in_stream", [True, False])
def test_an_error_is_raised_in_streams(server: StandIn, files: dict[str, str], in_stream: bool) -> None:
    server.refuse_in_stream = in_stream
    server.refuse = lambda body: TOO_LONG if "And now?" in body["text"] else None
    state = three_turns.run(files, backend=MediaEndpoint(server.url), stream=True)
    assert "".join(state.text_iter("first")) == " answer 1"
    for name in ("second", "third", None):
        with pytest.raises(MediaError, match="context length"):
            list(state.text_iter(name))

    async def asynchronous(name: str | None) -> list[Any]:
        return [piece async for piece in state.text_async_iter(name)]

    assert "".join(asyncio.run(asynchronous("first"))) == " answer 1"
    with pytest.raises(MediaError, match="context length"):
        asyncio.run(asynchronous("second"))


def test_a_stream_has_what_the_answer_has(server: StandIn, files: dict[str, str]) -> None:
    state = video_chat.run(files["v"], -1, backend=MediaEndpoint(server.url), stream=True)
    pieces = list(state.text_iter("x"))
    assert "".join(pieces) == state["x"] == " answer 1"
    assert "".join(state.text_iter()) == state.text()
    assert "".join(state.text_iter("x")) == " answer 1"  # after the end, too


def test_a_bad_file_among_others_is_named_and_nothing_is_sent(
    server: StandIn, files: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "nothing.mp4"
    state = three_turns.run(files | {"w": str(path)}, backend=MediaEndpoint(server.url))
    assert state["first"] == " answer 1"
    with pytest.raises(MediaError) as error:
        state["second"]
    assert str(error.value) == f"{path}: cannot be read: No such file or directory"
    assert len(server.bodies) == 1


@pytest.mark.parametrize("media", ["path", "data", "auto"])
def test_a_file_that_the_server_cannot_decode_is_named(server: StandIn, files: dict[str, str], media: Any) -> None:
    server.refuse = lambda body: (
        NO_FILE.format(body["video_data"][1][:100] + "...") if len(body.get("video_data", ())) > 1 else None
    )
    state = three_turns.run(files, backend=MediaEndpoint(server.url, media=media))
    with pytest.raises(MediaError) as error:
        state["second"]
    assert str(error.value).startswith(f"{files['w']}: ") and "base64" not in str(error.value)


def test_words_that_look_like_media_are_refused(server: StandIn, files: dict[str, str]) -> None:
    place = MediaEndpoint(server.url).chat_template.placeholder("image")

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(sgl.image(files["a"]) + f"What does {place} mean?") + sgl.assistant(sgl.gen("x"))

    with pytest.raises(MediaError, match="2 times, and the program has 1 of them"):
        program.run(backend=MediaEndpoint(server.url))["x"]


def test_a_batch_keeps_the_answers_of_programs_that_did_not_fail(server: StandIn, files: dict[str, str]) -> None:
    server.refuse = lambda body: TOO_LONG if len(body["text"]) > 600 else None

    @sgl.function
    def program(s: Any, question: str) -> None:
        s += sgl.system("Be brief. " * 10)
        s += sgl.user(sgl.image(files["a"]) + question) + sgl.assistant(sgl.gen("x"))

    questions = [{"question": words} for words in ("a", "b" * 500, "c")]
    states = program.run_batch(questions, backend=MediaEndpoint(server.url), num_threads=2)
    assert states[0]["x"] and states[2]["x"]
    assert server.bodies[0]["sampling_params"] == {"max_new_tokens": 0} and "Be brief." in server.bodies[0]["text"]
    with pytest.raises(MediaError, match="context length"):
        states[1]["x"]


def test_an_ended_program_takes_nothing_more(server: StandIn) -> None:
    state = chat_of_text.run(backend=MediaEndpoint(server.url))
    with pytest.raises(MediaError, match="the program has ended"):
        state += "more"
    assert state["y"] == " answer 2"


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(MediaError, match=r"^no answer from http://127\.0\.0\.1:9: .*Connection refused$"):
        MediaEndpoint("http://127.0.0.1:9")


def test_a_wrong_way_of_sending_media() -> None:
    with pytest.raises(ValueError, match="media: expected 'auto', 'path' or 'data', got 'file'"):
        MediaEndpoint("http://127.0.0.1:9", media="file")  # type: ignore[arg-type]


# ---- others are left alone ---------------------------------------------------------------------------------


def test_the_stock_endpoint_is_as_before(server: StandIn, files: dict[str, str]) -> None:
    """In one process with ours, before and after it ran, each class and each payload is SGLang's own."""
    ours, stock = MediaEndpoint(server.url), RuntimeEndpoint(server.url)
    mine = video_chat.run(files["v"], -1, backend=ours)
    assert mine["x"] and type(mine) is MediaState and type(mine.stream_executor) is MediaExecutor
    server.bodies.clear()
    kinds = []

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("What?") + sgl.assistant(sgl.gen("x"))
        s.sync()
        kinds.extend(type(state.stream_executor) for state in (s, *s.fork(2)))

    state = program.run(backend=stock)
    assert state["x"] == " answer 1" and type(state) is ProgramState
    assert kinds == [StreamExecutor] * 3
    assert server.bodies[0]["text"] == "USER:What?\nASSISTANT:" and "video_data" not in server.bodies[0]
    server.refuse = lambda body: TOO_LONG
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        failed = chat_of_text.run(backend=stock)
        with pytest.raises(KeyError):
            failed["x"]


def test_only_what_is_listed_is_patched() -> None:
    """In a fresh process: every attribute of SGLang's frontend, before and after the import."""
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    changed, torch = done.stdout.splitlines()
    assert changed == str(sorted(f"{patch.target.__name__}.__new__" for patch in PATCHES))
    assert torch == "False"


COMPARE = """
import importlib.util, sys, types
spec = importlib.util.find_spec("sglang")
package = types.ModuleType("sglang")  # without what SGLang's own __init__ imports, torch among it
package.__path__ = spec.submodule_search_locations
sys.modules["sglang"] = package
import sglang.lang.api, sglang.lang.backend.runtime_endpoint, sglang.lang.tracer

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang."):
            for key, value in vars(module).items():
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {(value.__name__, inner): held for inner, held in vars(value).items()}
    return found

before = attributes()
import sglang_mminfer.frontend
after = attributes()
print(sorted(".".join(key) for key in after if key not in before or after[key] is not before[key]))
print("torch" in sys.modules)
"""
