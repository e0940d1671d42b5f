"""The filter function for Open WebUI: bodies of requests before and after it. Open WebUI is not installed here."""

from __future__ import annotations

import asyncio
import base64
import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def filter_function(tmp_path: Path) -> Any:
    """The filter, as Open WebUI makes it, with uploads "one" and "two" in its storage."""
    spec = importlib.util.spec_from_file_location("open_webui_video", ROOT / "examples" / "open_webui_video.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("one", "two"):
        (tmp_path / f"{name}_a.mp4").write_bytes(name.encode() * 100)
    made = module.Filter()

    async def path_of(file_id: str) -> Path:
        return tmp_path / f"{file_id}_a.mp4"

    made.path_of = path_of
    return made


def item(name: str, kind: str = "video/mp4") -> dict[str, Any]:
    """An attached file, as the body of a request has it."""
    return {"type": "file", "id": name, "name": f"{name}.mp4", "file": {"id": name, "meta": {"content_type": kind}}}


def sent(filter_function: Any, questions: list[Any], files: list[dict[str, Any]], chat: str = "c") -> list[Any]:
    """What the server gets of a chat with "yes" for every answer."""
    messages = []
    for words in questions:
        messages += [{"role": "user", "content": copy.deepcopy(words)}, {"role": "assistant", "content": "yes"}]
    body = {"messages": messages[:-1], "files": files, "metadata": {"chat_id": chat, "files": list(files)}}
    body = asyncio.run(filter_function.inlet(body, __files__=files, __metadata__=body["metadata"]))
    assert [f["id"] for f in body["files"]] == [f["id"] for f in files if "text" in f["file"]["meta"]["content_type"]]
    return body["messages"]


def test_a_video_becomes_a_part_before_the_words(filter_function: Any, tmp_path: Path) -> None:
    (message,) = sent(filter_function, ["What?"], [item("one"), item("notes", "text/plain")])
    video, words = message["content"]
    encoded = base64.b64encode((tmp_path / "one_a.mp4").read_bytes()).decode()
    assert video == {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{encoded}"}}
    assert words == {"type": "text", "text": "What?"}


def test_later_turns_begin_with_the_same_messages(filter_function: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    questions: list[Any] = ["What?", [{"type": "text", "text": "And this?"}, image], "And now?"]
    first = sent(filter_function, questions[:1], [item("one")])
    second = sent(filter_function, questions[:2], [item("one"), item("two"), item("two")])
    third = sent(filter_function, questions, [item("two"), item("one")])
    assert second[: len(first)] == first and third[: len(second)] == second
    assert [part["type"] for part in second[2]["content"]] == ["video_url", "text", "image_url"]
    assert third[4] == {"role": "user", "content": "And now?"}
    assert sent(filter_function, ["Other"], [item("two")], chat="d")[0]["content"][0]["type"] == "video_url"


def test_paths_where_the_server_reads_them(filter_function: Any, tmp_path: Path) -> None:
    filter_function.valves.as_paths = True
    (message,) = sent(filter_function, ["What?"], [item("one")])
    assert message["content"][0]["video_url"]["url"] == f"file://{tmp_path}/one_a.mp4"


def test_without_videos_nothing_changes(filter_function: Any) -> None:
    assert sent(filter_function, ["What?"], [item("notes", "text/plain")]) == [{"role": "user", "content": "What?"}]
    body = {"messages": [{"role": "user", "content": "What?"}]}
    assert asyncio.run(filter_function.inlet(copy.deepcopy(body))) == body


def test_what_is_gone_or_too_large_is_told(filter_function: Any) -> None:
    with pytest.raises(ValueError, match=r"three\.mp4: the uploaded file is gone"):
        sent(filter_function, ["What?"], [item("three")])
    filter_function.valves.most_mb = 0
    with pytest.raises(ValueError, match=r"one\.mp4: larger than 0 MB"):
        sent(filter_function, ["What?"], [item("one")])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_uploads_are_found_by_old_and_new_interfaces(
    filter_function: Any, asynchronous: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Open WebUI's two modules, by what the filter asks of them: once plain and once awaited."""

    def given(value: Any) -> Any:
        async def later() -> Any:
            return value

        return later() if asynchronous else value

    files, provider = ModuleType("files"), ModuleType("provider")
    record = SimpleNamespace(path="uploads/one_a.mp4")
    files.Files = SimpleNamespace(get_file_by_id=lambda file_id: given(record if file_id == "one" else None))  # type: ignore[attr-defined]
    provider.Storage = SimpleNamespace(get_file=lambda path: str(tmp_path / Path(path).name))  # type: ignore[attr-defined]
    for name, module in (
        ("open_webui", ModuleType("open_webui")),
        ("open_webui.models", ModuleType("models")),
        ("open_webui.models.files", files),
        ("open_webui.storage", ModuleType("storage")),
        ("open_webui.storage.provider", provider),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    find = type(filter_function).path_of
    assert asyncio.run(find(filter_function, "one")) == tmp_path / "one_a.mp4"
    with pytest.raises(ValueError, match="there is no upload nobody"):
        asyncio.run(find(filter_function, "nobody"))
    assert json.dumps(filter_function.valves.model_dump())
