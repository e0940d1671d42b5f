"""The HTTP interface of a server that programs of `sglang_mminfer.frontend` meet, without a model behind it.

It keeps what it is sent. Its tokens are the letters of the rendered chat, and its answers count the prompts so far.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jinja2

from sglang_mminfer.testing.tiny_model import CHAT_TEMPLATE


def rendered(chat: list[dict[str, Any]], add_generation_prompt: bool | None = None, source: str = CHAT_TEMPLATE) -> str:
    """A chat as SGLang renders it with a Jinja template."""
    template = jinja2.Environment().from_string(source)
    return template.render(messages=chat, add_generation_prompt=add_generation_prompt is not False)


class StandIn:
    """A server on a free port, until `stop`.

    Attributes:
        bodies: what /generate was sent.
        refuse: says why a body is refused; None to answer it.
        backend: the attention backend that it says it has.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.refuse: Callable[[dict[str, Any]], str | None] = lambda body: None
        self.refuse_in_stream = True
        self.backend = "mminfer"
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answers(self, body: dict[str, Any]) -> Any:
        with self._lock:
            self.bodies.append(body)
            number = len(self.bodies)
        texts = body["text"] if "text" in body else body["input_ids"]
        many = isinstance(texts, list)
        logprobs = []
        for text in texts if many else [texts]:
            words = text.rsplit("\n", 1)[-1] if isinstance(text, str) else ""
            logprobs.append(
                [[None, 0, "t"], [-1.0, 0, "\n"], *([-float(len(words)), ord(word), word] for word in words)]
            )
        count = body["sampling_params"].get("n") or 1
        made = [
            {
                "text": f" answer {number}" if body["sampling_params"].get("max_new_tokens") else "",
                "meta_info": {"prompt_tokens": 100, "input_token_logprobs": some, "output_token_logprobs": []},
            }
            for some in logprobs
            for _ in range(count)
        ]
        return made if many else made[0]

    def _handler(stand_in) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def reply(self, content: Any, status: int = 200) -> None:
                written = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(written)))
                self.end_headers()
                self.wfile.write(written)

            def do_GET(self) -> None:
                stand_in.keys.append(self.headers.get("Authorization"))
                if self.path in ("/model_info", "/get_model_info"):
                    self.reply({"model_path": "/models/some"})
                else:
                    self.reply({"attention_backend": stand_in.backend})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.keys.append(self.headers.get("Authorization"))
                stand_in.paths.append(self.path)
                if self.path == "/v1/tokenize":
                    self.reply({"tokens": [*map(ord, rendered(body["messages"], body.get("add_generation_prompt")))]})
                elif self.path == "/v1/detokenize":
                    self.reply({"text": "".join(map(chr, body["tokens"]))})
                elif (said := stand_in.refuse(body)) and body.get("stream") and stand_in.refuse_in_stream:
                    event = json.dumps({"error": {"message": said, "code": 400}})
                    self.reply(f"data: {event}\n\ndata: [DONE]\n\n".encode())
                elif said:
                    self.reply({"error": {"message": said}}, 400)
                elif body.get("stream"):
                    answer = stand_in.answers(body)
                    cuts = [answer | {"text": answer["text"][:end]} for end in range(1, len(answer["text"]) + 1)]
                    events = "".join(f"data: {json.dumps(cut)}\n\n" for cut in cuts)
                    self.reply(f"{events}data: [DONE]\n\n".encode())
                else:
                    self.reply(stand_in.answers(body))

        return Handler
