"""A request whose client aborts it or disconnects while its media are loaded ends, and no other request notices."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serving import Media, Served, image, same, text, user, wait_for


class Dribbling(ThreadingHTTPServer):
    """Serves a picture byte by byte, so that the reader does not give up, and the rest of it after `released`."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.asked = 0
        self.released = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}.png"


class _Handler(BaseHTTPRequestHandler):
    server: Dribbling

    def do_GET(self) -> None:
        content = self.server.content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.server.asked += 1
        sent = 0
        try:
            while not self.server.released.wait(0.5):
                self.wfile.write(content[sent : sent + 1])
                self.wfile.flush()
                sent += 1
            self.wfile.write(content[sent:])
        except OSError:
            pass  # the reader disconnected

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def slow(media: Media) -> Iterator[Dribbling]:
    server = Dribbling(media.images[1].read_bytes())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def body(url: str, rid: str, **extra: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
    return {"model": "default", "messages": messages, "max_tokens": 4, "temperature": 0, "rid": rid, **extra}


def send(main: Served, path: str, content: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(main.server.host, main.server.port, timeout=60)
    connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
    return connection


def settled(main: Served, rid: str, slow: Dribbling) -> None:
    """Serves the rest of the picture, gives the request time to run, and asserts that it did not run."""
    slow.released.set()
    time.sleep(3)
    assert not main.records(rid), "it ran"


@pytest.mark.server("main")
@pytest.mark.parametrize("stream", [False, True])
def test_abort_while_media_are_loaded(main: Served, media: Media, slow: Dribbling, stream: bool) -> None:
    good = [user(image(media.images[2]), text("And now?"))]
    before, rid = main.ask(good), f"abort-loading-{stream}"
    connection = send(main, "/v1/chat/completions", body(slow.url("a"), rid, stream=stream))
    wait_for(lambda: slow.asked)
    assert send(main, "/abort_request", {"rid": rid}).getresponse().status == 200
    begin = time.monotonic()
    answer = connection.getresponse()
    said = answer.read().decode()
    assert time.monotonic() - begin < 10, "the client waits for its picture"
    assert answer.status == 400 or stream, said
    assert f"Request {rid} was aborted" in said
    same(before, main.ask(good))
    settled(main, rid, slow)
    # The request id can be used again.
    assert send(main, "/v1/chat/completions", body(slow.url("b"), rid)).getresponse().status == 200
    assert main.records(rid)


@pytest.mark.server("main")
@pytest.mark.parametrize("stream", [False, True])
def test_client_leaves_while_media_are_loaded(main: Served, media: Media, slow: Dribbling, stream: bool) -> None:
    good = [user(image(media.images[2]), text("And now?"))]
    before, rid = main.ask(good), f"leave-loading-{stream}"
    connection = send(main, "/v1/chat/completions", body(slow.url("a"), rid, stream=stream))
    wait_for(lambda: slow.asked)
    connection.close()
    time.sleep(3)  # the server checks once a second
    same(before, main.ask(good))
    settled(main, rid, slow)


@pytest.mark.server("main")
def test_abort_of_one_among_several(main: Served, slow: Dribbling) -> None:
    """Other requests that load at the same time continue."""
    rids = [f"several-{i}" for i in range(3)]
    connections = [send(main, "/v1/chat/completions", body(slow.url(rid), rid)) for rid in rids]
    wait_for(lambda: slow.asked == 3)
    send(main, "/abort_request", {"rid": rids[1]}).getresponse()
    assert connections[1].getresponse().status == 400
    slow.released.set()
    assert [connections[i].getresponse().status for i in (0, 2)] == [200, 200]
    assert [bool(main.records(rid)) for rid in rids] == [True, False, True]


@pytest.mark.server("main")
def test_abort_of_all(main: Served, slow: Dribbling) -> None:
    rids = [f"all-{i}" for i in range(2)]
    connections = [send(main, "/generate", generate(slow, rid)) for rid in rids]
    wait_for(lambda: slow.asked == 2)
    send(main, "/abort_request", {"abort_all": True}).getresponse()
    said = [connection.getresponse().read().decode() for connection in connections]
    assert all("was aborted" in one for one in said), said
    settled(main, rids[0], slow)
    assert not main.records(rids[1])


def generate(slow: Dribbling, rid: str) -> dict[str, Any]:
    return {
        "text": "<|vision_start|><|image_pad|><|vision_end|>?",
        "image_data": slow.url(rid),
        "rid": rid,
        "sampling_params": {"max_new_tokens": 4},
    }
