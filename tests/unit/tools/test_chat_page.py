"""The page of `mminfer chat` in this process: what its buttons do, and who may talk to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from sglang_mminfer.tools.chat.application import application
from sglang_mminfer.tools.chat.conversation import Question, Sampling, Turn
from sglang_mminfer.tools.chat.endpoint import Facts
from sglang_mminfer.tools.chat.page import Page
from sglang_mminfer.tools.chat.reply import Phase, Reply
from sglang_mminfer.tools.chat.security import credentials
from sglang_mminfer.tools.chat.uploads import KINDS
from sglang_mminfer.tools.errors import Refused
from sglang_mminfer.tools.media import make_image, make_video

FACTS = Facts("tiny", 4096, frozenset(KINDS), {"video": 1}, 1, None, "tells nothing")


class Echo:
    """A server that answers with the question's words, or refuses."""

    as_files, page_size = True, 1

    async def answer(self, turns: Sequence[Turn], question: Question, reply: Reply, sampling: Sampling) -> None:
        if "refuse" in question.text:
            raise RuntimeError("the prompt is longer than the context")
        if "wait" in question.text:
            await asyncio.sleep(60)
        reply.text, reply.phase = f"{len(turns)}: {question.text}", Phase.DONE

    async def settle(self, reply: Reply) -> None:
        pass


# ---- what the buttons do ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "uploads"
    path.mkdir()
    return path


@pytest.fixture
def page(folder: Path) -> Page:
    return Page(Echo(), FACTS, "http://here", 1_000_000, folder)


def updates(handler: Any) -> list[Any]:
    """All updates of a handler."""

    async def collected() -> list[Any]:
        return [update async for update in handler]

    return asyncio.run(collected())


def ask(page: Page, text: str, *files: Path) -> Any:
    """Asks a question in the conversation "k". Returns the last update: conversation, box, notice, panel."""
    return updates(page.submit({"text": text, "files": [str(file) for file in files]}, "k", None, None))[-1]


def texts(messages: Any) -> list[str]:
    return [part for message in messages for part in message["content"] if isinstance(part, str)]


def at(turn: int, value: str = "") -> Any:
    """A button of the question of a turn, as gradio tells it."""
    return SimpleNamespace(index=[2 * turn, 0], value=value)


def test_a_turn_with_files(page: Page, folder: Path) -> None:
    video = make_video(folder / "a.mp4", 4, 56, 56, 2)
    shown, box, notice, panel = ask(page, "what", video, make_image(folder / "b.png", 56, 56))
    assert [part.get("path") for part in shown[0]["content"] if isinstance(part, dict)] == [
        str(video),
        str(folder / "b.png"),
    ]
    assert texts(shown) == ["what", "0: what"] and notice == "" and "<td>1</td>" in panel
    assert box.value is None or box.value == {"text": "", "files": []}


def test_what_is_wrong_with_a_file_leaves_the_box_alone(page: Page, folder: Path) -> None:
    (folder / "bad.mp4").write_bytes(b"no video\0")
    shown, box, notice, _ = ask(page, "what", folder / "bad.mp4")
    assert "bad.mp4: not a video" in notice
    assert all(isinstance(part, dict) and "value" not in part for part in (shown, box))  # gradio's skip
    assert page.conversation("k").turns == []
    _, _, notice, _ = ask(page, "what", Path("/etc/passwd"))
    assert "passwd: not an uploaded file" in notice
    first, second = (make_video(folder / f"{i}.mp4", 2, 56, 56, 2, seed=i) for i in range(2))
    ask(page, "one", first)
    _, _, notice, _ = ask(page, "two", second)
    assert "too many videos" in notice and len(page.conversation("k").turns) == 1


def test_a_refused_question_comes_back(page: Page, folder: Path) -> None:
    ask(page, "one")
    image = make_image(folder / "b.png", 56, 56)
    shown, box, _, _ = ask(page, "refuse", image)
    assert box.value["text"] == "refuse" and [Path(str(f["path"])).name for f in box.value["files"]] == ["b.png"]
    assert "longer than the context" in shown[-1]["content"][-1].value and len(page.conversation("k").turns) == 1
    shown, *_ = ask(page, "two")
    assert texts(shown) == ["one", "0: one", "two", "1: two"]


def test_the_fields_of_an_answer(page: Page) -> None:
    seen: list[Sampling] = []
    server = page.conversation("k").server
    answer = server.answer

    async def noted(turns: Any, question: Any, reply: Any, sampling: Sampling) -> None:
        seen.append(sampling)
        await answer(turns, question, reply, sampling)

    server.answer = noted  # type: ignore[method-assign]
    for most, temperature in ((8, " 0.5"), (None, ""), (1, "0")):
        updates(page.submit({"text": "one", "files": []}, "k", most, temperature))
    assert seen == [Sampling(8, 0.5), Sampling(1024, None), Sampling(1, 0.0)]
    for bad in ("hot", "3", "nan"):
        (update,) = updates(page.submit({"text": "one", "files": []}, "k", 8, bad))
        assert "temperature: expected a number from 0 to 2" in update[2]
        update = updates(page.retry("k", 8, bad, at(0)))[-1]
        assert "temperature: expected" in update[2] and len(page.conversation("k").turns) == 3
    assert len(seen) == 3


def test_nothing_is_asked_with_nothing(page: Page) -> None:
    assert updates(page.submit({"text": "  \n", "files": []}, "k", None, None)) == []


def test_edit_retry_undo_and_clear(page: Page) -> None:
    for words in ("one", "two", "three"):
        ask(page, words)
    shown, *_ = updates(page.edit("k", None, None, at(1, "2")))[-1]
    assert texts(shown) == ["one", "0: one", "2", "1: 2"]
    shown, *_ = updates(page.retry("k", None, None, at(0)))[-1]
    assert texts(shown) == ["one", "0: one"]
    shown, box, _, _ = asyncio.run(page.undo("k", at(0)))
    assert shown == [] and box.value["text"] == "one"
    _, _, notice, _ = asyncio.run(page.undo("k", at(7)))
    assert notice
    ask(page, "four")
    shown, *_ = asyncio.run(page.clear("k"))
    assert shown == [] and page.conversation("k").turns == []


def test_stop_and_a_second_question_meanwhile(page: Page) -> None:
    async def stopped() -> Any:
        asking = page.submit({"text": "wait", "files": []}, "k", None, None)
        shown, box, _, _ = await anext(asking)
        assert "mminfer-wait" in shown[-1]["content"][-1].value and box.stop_btn
        (refused,) = [update async for update in page.submit({"text": "more", "files": []}, "k", None, None)]
        assert "still coming" in refused[2]
        await page.stop("k")
        return [update async for update in asking][-1]

    shown, box, _, _ = asyncio.run(stopped())
    assert "Stopped before the first word" in shown[-1]["content"][-1].value and box.value["text"] == "wait"
    assert page.conversation("k").turns == []


def test_a_page_opened_again_shows_its_conversation(page: Page) -> None:
    (first,) = updates(page.load(None))
    key = first[0]
    assert len(key) > 16 and first[1] == []
    updates(page.submit({"text": "one", "files": []}, key, None, None))
    (again,) = updates(page.load(key))
    assert again[0] == key and texts(again[1]) == ["one", "0: one"]
    (other,) = updates(page.load(None))
    assert other[0] != key and other[1] == []


def test_a_saved_conversation_is_what_was_sent(page: Page, folder: Path) -> None:
    ask(page, "one", make_image(folder / "b.png", 56, 56))
    button = asyncio.run(page.save("k"))
    path = Path(button.value["path"] if isinstance(button.value, dict) else str(button.value))
    user, answer = json.loads(path.read_text())
    assert user["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert user["content"][1] == {"type": "text", "text": "one"} and answer == {
        "role": "assistant",
        "content": "0: one",
    }


# ---- who may talk to it ----------------------------------------------------------------------------------------


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    app = application(Echo(), FACTS, "http://here", folder, upload_bytes=100_000)
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield client


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False and not config.get("share")
    assert all(entry["api_visibility"] == "private" for entry in config["dependencies"])


def test_uploads_stay_in_their_folder(client: TestClient, folder: Path) -> None:
    answer = client.post(
        "/gradio_api/upload", files=[("files", ("../../../evil.mp4", b"x")), ("files", ("a.png", b"y"))]
    )
    assert answer.status_code == 200
    for path in answer.json():
        assert Path(path).resolve().is_relative_to(folder.resolve()) and Path(path).exists()
    assert client.post("/gradio_api/upload", files=[("files", ("a.png", bytes(200_000)))]).status_code == 413


def test_other_files_cannot_be_read(client: TestClient, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("hidden words")
    for path in ("/etc/passwd", f"{folder}/../secret.txt", f"{tmp_path}/secret.txt", "../../../../etc/passwd"):
        answer = client.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404)
        assert b"hidden words" not in answer.content and b"root:" not in answer.content


def submitted(client: TestClient, path: str) -> tuple[bool, str]:
    """What a client of its own making gets that names a file in the box: whether it was answered, and all that came."""
    config = client.get("/config").json()
    (box,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "box")
    (submit,) = (d["id"] for d in config["dependencies"] if d["targets"] == [[box, "submit"]])
    data = [{"text": "what", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}, "k", 1, None]
    asked = client.post("/gradio_api/queue/join", json={"data": data, "fn_index": submit, "session_hash": "s"})
    assert asked.status_code == 200, asked.text
    with client.stream("GET", "/gradio_api/queue/data?session_hash=s") as stream:
        events = [json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:")]
    (ended,) = (event for event in events if event["msg"] == "process_completed")
    return ended["success"], json.dumps(events)


def test_only_what_was_uploaded_is_sent(client: TestClient, folder: Path, tmp_path: Path) -> None:
    outside = make_image(tmp_path / "outside.png", 56, 56)
    (uploaded,) = client.post("/gradio_api/upload", files=[("files", ("a.png", outside.read_bytes()))]).json()
    assert submitted(client, uploaded)[0]
    for path in (
        str(outside),
        f"{folder}/../outside.png",
        "/etc/passwd",
        "http://127.0.0.1:9/a.png",
        f"file://{outside}",
    ):
        success, told = submitted(client, path)
        assert not success and "0: what" not in told, path
    assert not list(folder.rglob("outside.png")) and not list(folder.rglob("passwd"))


def test_foreign_requests_are_refused(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403  # its name may lead here
    upload = {"files": [("files", ("a.png", b"y"))]}
    assert client.post("/gradio_api/upload", headers={"origin": "http://evil.example"}, **upload).status_code == 403
    assert client.post("/gradio_api/upload", headers={"origin": "http://127.0.0.1:7860"}, **upload).status_code == 200
    assert client.get("/", headers={"host": "localhost:7860"}).status_code == 200


def test_another_host_wants_credentials(tmp_path: Path, folder: Path) -> None:
    assert credentials("127.0.0.1", None) is None and credentials("localhost", None) is None
    users = tmp_path / "users"
    users.write_text("ada:count:ess\n\nbob:b\n")
    for host, file, says in (
        ("0.0.0.0", None, "--auth-file"),
        ("chat.example", None, "--auth-file"),
        ("0.0.0.0", tmp_path / "gone", "gone"),
        ("0.0.0.0", tmp_path, "--auth-file"),
    ):
        with pytest.raises(Refused, match=says):
            credentials(host, file)
    (tmp_path / "bad").write_text("ada")
    with pytest.raises(Refused, match="NAME:PASSWORD"):
        credentials("127.0.0.1", tmp_path / "bad")
    auth = credentials("0.0.0.0", users)
    assert auth == [("ada", "count:ess"), ("bob", "b")]
    app = application(Echo(), FACTS, "http://here", folder, host="0.0.0.0", auth=auth)
    with TestClient(app, base_url="http://chat.example") as client:
        upload = {"files": [("files", ("a.png", b"y"))]}
        assert client.post("/gradio_api/upload", **upload).status_code == 401
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 401
        assert (
            client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "s"}).status_code
            == 401
        )
        assert client.post("/login", data={"username": "ada", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "ada", "password": "count:ess"}).status_code == 200
        assert client.post("/gradio_api/upload", **upload).status_code == 200
