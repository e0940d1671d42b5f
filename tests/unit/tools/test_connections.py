"""A server that closes a connection at the moment a second request leaves on it, as an idle one of SGLang's may."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from sglang_mminfer.tools import connections
from sglang_mminfer.tools.server import Server
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry

MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": ""}]}).encode()


class Once(socketserver.StreamRequestHandler):
    """Answers the first request of a connection, and closes it without an answer when the second one comes."""

    def handle(self) -> None:
        self._read()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(MODELS), MODELS))
        self._read()

    def _read(self) -> None:
        while self.rfile.readline().strip():
            pass


@pytest.fixture
def url() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Once) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_kept_connection_loses_the_request(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        client.models.list()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_every_request_is_answered(url: str, suffix: str) -> None:
    client = connections.openai_client(url + suffix, timeout=5)
    assert [client.models.list().data[0].id for _ in range(3)] == ["m"] * 3


def _of_server(url: str) -> Callable[[], object]:
    server = Server("no-model", port=httpx.URL(url).port)
    return server.client(timeout=5).models.list


def _of_telemetry(url: str) -> Callable[[], object]:
    telemetry = Telemetry(url, timeout=5)

    def ask() -> None:
        with pytest.raises(NoTelemetry, match="does not run mminfer"):  # it answers, with the list of models
            telemetry.server()

    return ask


@pytest.mark.parametrize("client", [_of_server, _of_telemetry])
def test_every_client_of_the_tools_has_it(url: str, client: Callable[[str], Callable[[], object]]) -> None:
    ask = client(url)
    for _ in range(3):
        ask()


def test_local_addresses() -> None:
    assert all(
        map(
            connections.is_local,
            ("http://127.0.0.1:30000", "http://localhost/v1", "http://[::1]:1", "http://127.0.1.1"),
        )
    )
    assert not any(map(connections.is_local, ("https://example.org", "http://10.0.0.1:30000/v1")))
