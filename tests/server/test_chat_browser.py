"""The chat application in a real browser, over a real server: two videos, a stop, an edit, a reload.

The browser reaches this machine alone, and no request of the page may fail. With MMINFER_SCREENSHOTS=DIR the pictures
of docs/chat.md are written there.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import Media, Served, wait_for
from sglang_mminfer.tools.chat.application import application
from sglang_mminfer.tools.chat.endpoint import Endpoint

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

SECONDS = 120_000
"""Milliseconds that a step may take."""

pytestmark = [
    pytest.mark.server("main"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian: apt-get install chromium"),
]


@pytest.fixture
def address(main: Served, tmp_path: Path) -> Iterator[str]:
    """The application, in a thread."""
    import uvicorn

    endpoint = Endpoint(main.server.url)
    app = application(endpoint, asyncio.run(endpoint.facts()), main.server.url, tmp_path)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def given_up(request: Any) -> bool:
    """Whether the page itself ended a request: for events when all have come, for a film that it shows no longer."""
    return "/queue/data" in request.url or (request.resource_type == "media" and request.failure == "net::ERR_ABORTED")


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The page, opened. At the end: nothing went elsewhere, nothing failed, and no script complained."""
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    with sync_playwright() as playwright:
        # No name can be looked up, and no address but loopback is reached.
        flags = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        page = browser.new_page(viewport={"width": 1360, "height": 860})
        page.set_default_timeout(SECONDS)

        def outside(route: Any) -> None:
            faults.append(f"asks for {route.request.url}")
            route.abort()

        page.route(lambda url: not url.startswith((address, "data:", "blob:")), outside)
        page.on("requestfailed", lambda r: given_up(r) or faults.append(f"{r.url}: {r.failure}"))
        page.on("response", lambda r: r.status < 400 or faults.append(f"{r.status} {r.url}"))
        page.on("console", lambda m: m.type == "error" and faults.append(m.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#panel table")
        yield page
        browser.close()
    assert not faults


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("MMINFER_SCREENSHOTS"):
        page.wait_for_timeout(800)  # until animations have ended
        page.screenshot(path=Path(folder) / f"{name}.png")


def say(page: Any, words: str, *files: Path) -> None:
    if files:
        page.set_input_files("#box input[type=file]", [str(file) for file in files])
        page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item').length == {len(files)}")
    page.fill("#box textarea", words)
    page.press("#box textarea", "Enter")


def answered(page: Any, turns: int) -> list[str]:
    """The lines under the answers, as soon as there are so many and nothing is waited for."""
    page.wait_for_function(
        f"document.querySelectorAll('.mminfer-strip').length == {turns} && !document.querySelector('.mminfer-wait')"
    )
    return page.eval_on_selector_all(".mminfer-figures", "all => all.map(each => each.innerText)")


def test_a_conversation_in_a_browser(page: Any, main: Served, media: Media) -> None:
    page.click("#side button:has-text('Answers')")
    page.fill("#side input[type=number] >> nth=0", "8")  # tokens of an answer
    page.fill("#side .block textarea, #side .block input[type=text]", "0")
    # Two videos and a question.
    say(page, "What do both have in common?", media.videos[0], media.videos[1])
    (line,) = answered(page, 1)
    assert "cached" in line and "first token" in line and "density" in line
    assert page.locator("#chat video").count() == 2 and page.locator(".mminfer-strip rect").count() >= 4
    page.wait_for_function("[...document.querySelectorAll('#chat video')].every(video => video.readyState >= 2)")
    assert "24 frames" in page.inner_text(".mminfer-files")
    picture(page, "answer")

    # A file that is none is told, and the question stays.
    bad = media.videos[0].parent / "broken.mp4"
    bad.write_bytes(b"no video\0")
    say(page, "And this?", bad)
    page.wait_for_selector("#notice .mminfer-failed")
    assert "broken.mp4: not a video" in page.inner_text("#notice")
    assert page.input_value("#box textarea") == "And this?"
    picture(page, "bad-file")
    page.click("#box .thumbnail-item button")  # takes the file away
    page.fill("#box textarea", "")

    # A long video, stopped while the server reads it.
    say(page, "What happens in this one?", media.long_video)
    page.wait_for_selector(".mminfer-wait:has-text('tokens so far')")
    picture(page, "reading")
    page.click("#box .stop-button")
    page.wait_for_selector(".mminfer-stopped")
    assert page.input_value("#box textarea") == "What happens in this one?"
    picture(page, "stopped")
    page.click("#box .thumbnail-item button")

    # Another question, an edit of the first one, and the page opened again.
    say(page, "What is next?", media.images[0])
    lines = answered(page, 2)
    assert len(lines) == 2 and not lines[1].startswith("0 ")
    page.click("#chat button[aria-label=Edit] >> nth=0")
    page.fill("#chat textarea", "Which one is longer?")
    page.click("#chat button[aria-label=Submit]")
    page.wait_for_function("document.querySelector('#chat').innerText.includes('Which one is longer?')")
    answered(page, 1)
    assert page.locator("#chat video").count() == 2 and "What is next?" not in page.inner_text("#chat")
    page.reload()
    answered(page, 1)
    assert "Which one is longer?" in page.inner_text("#chat")

    # Saved, undone, and begun anew.
    with page.expect_download() as download:
        page.click("#save")
    messages = json.loads(Path(download.value.path()).read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part["type"] for part in messages[0]["content"]] == ["video_url", "video_url", "text"]
    page.click("#chat button[aria-label=Undo] >> visible=true")
    page.wait_for_function("document.querySelector('#box textarea').value == 'Which one is longer?'")
    page.click("#new")
    page.wait_for_function("!document.querySelector('#chat video')")
