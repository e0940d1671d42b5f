"""An OpenAI-compatible server in a thread, whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeOpenAI:
    """`reply(messages)` gives an answer's text, or a number: the HTTP status of a failure. `pages` are what else can be
    read, by path. The ids of its answers are request-1, request-2 and so on."""

    def __init__(
        self,
        reply: Callable[[list[dict[str, Any]]], str | int],
        model: str = "fake",
        pages: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.prompts = model, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = {"object": "list", "data": [{"id": outer.model, "object": "model"}]}
                self._send(200, (pages or {}).get(self.path, models))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.prompts.append(body["messages"])
                said = reply(body["messages"])
                if isinstance(said, int):
                    self._send(said, {"error": {"message": "no such luck"}})
                    return
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
                name = f"request-{len(outer.prompts)}"
                self._send(200, {"id": name, "object": "chat.completion", "choices": [choice], "usage": usage})

            def _send(self, status: int, value: Any) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeOpenAI:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
