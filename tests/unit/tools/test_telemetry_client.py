"""The client of GET /mminfer: what it makes of servers with telemetry, without, and of those that fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from sglang_mminfer.serving.telemetry import Counters
from sglang_mminfer.serving.telemetry_http import Kept, RequestReport, ServerReport
from sglang_mminfer.serving.trace import PrefillRecord
from sglang_mminfer.tools.telemetry import NoTelemetry, Telemetry

RECORD = PrefillRecord(
    rid="a/b?", prefix_len=0, chunk_len=3, seq_len=3, segments=1, sparse_layers=2, density=0.5, dense_reason=None,
    plan_ms=1.0, attn_ms=2.0, forward_ms=3.0,
)  # fmt: skip
REPORT = ServerReport(versions={}, replicas=2, serving=None, counters=Counters(), kept=Kept(records=1), mends=[])

PAGES: dict[str, tuple[int, bytes]] = {
    "/mminfer": (200, msgspec.json.encode(REPORT)),
    "/mminfer/requests/a%2Fb%3F": (200, msgspec.json.encode(RequestReport(rid="a/b?", records=[RECORD]))),
    "/mminfer/requests/old": (404, b'{"object":"error","message":"no prefill of request"}'),
    "/mminfer/requests/busy": (503, b"<html>gateway</html>"),
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = PAGES.get(self.path, (404, b'{"detail":"Not Found"}'))
            if self.path == "/web/mminfer":
                status, body = 200, b"<html>hello</html>"
            if self.headers["Authorization"] != "Bearer key":
                status, body = 401, b'{"error":"Unauthorized"}'
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_reports_and_records(url: str, suffix: str) -> None:
    server = Telemetry(url + suffix, "key")
    assert server.server() == REPORT
    assert server.records("a/b?") == [RECORD]


@pytest.mark.parametrize(
    "rid, words",
    [("old", "answers 404: no prefill of request"), ("busy", "answers 503: <html>gateway"), ("x", "404: Not Found")],
)
def test_no_records(url: str, rid: str, words: str) -> None:
    with pytest.raises(NoTelemetry, match=words):
        Telemetry(url, "key").records(rid)


def test_no_telemetry(url: str) -> None:
    for server, words in (
        (Telemetry(url), "answers 401: Unauthorized"),
        (Telemetry(f"{url}/other", "key"), "does not run mminfer, or several tokenizer workers"),
        (Telemetry(f"{url}/web", "key"), "has no GET /mminfer, so it does not run mminfer"),
        (Telemetry("http://127.0.0.1:9", "key"), "does not answer"),
    ):
        with pytest.raises(NoTelemetry, match=words):
            server.server()
