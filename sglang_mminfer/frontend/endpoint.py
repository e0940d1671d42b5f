"""A running server as the backend of SGLang frontend programs with media."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Generator, Sequence
from typing import Any, Literal
from urllib.parse import urlparse

import requests

from sglang_mminfer.frontend.backend import MediaBackend, Refused
from sglang_mminfer.frontend.media import MediaError
from sglang_mminfer.frontend.template import served_template

CONNECT_SECONDS = 30
"""How long a connection may take. An answer may take any time, because a long prefill does."""

_NO_PROXY: dict[str, Any] = {"http": None, "https": None, "all": None}


class MediaEndpoint(MediaBackend):
    """A backend for programs with images and videos in every turn.

    Args:
        base_url: the server, `http://127.0.0.1:30000`.
        api_key: the server's --api-key.
        verify: a file with the certificate authorities that an https server is checked with.
        media: how files of this machine get to the server. "path": it reads them itself. "data": they are sent.
            "auto": "path" if the URL names this machine, and "data" where the server then cannot read a file.

    Raises:
        MediaError: there is no server, or its chat template cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | None = None,
        media: Literal["auto", "path", "data"] = "auto",
    ) -> None:
        if media not in ("auto", "path", "data"):
            raise ValueError(f"media: expected 'auto', 'path' or 'data', got {media!r}")
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self.verify = verify
        self._local = _is_loopback(self.base_url)
        self.model_info = self._get("/model_info")
        info = self._get("/server_info")
        super().__init__(
            as_files=media == "path" or (media == "auto" and self._local),
            guessed=media == "auto",
            takes_num_frames="mminfer" in (info.get("attention_backend"), info.get("prefill_attention_backend")),
        )
        self.chat_template = served_template(self.model_info["model_path"], self._rendered)

    def send(self, data: dict[str, Any]) -> Any:
        """As `MediaBackend.send`."""
        response = self._request("POST", "/generate", data, stream=bool(data.get("stream")))
        return _answers(response) if data.get("stream") else response.json()

    def _rendered(self, chat: Sequence[dict[str, Any]], add_generation_prompt: bool | None) -> str:
        body: dict[str, Any] = {"model": "default", "messages": list(chat)}
        if add_generation_prompt is not None:
            body["add_generation_prompt"] = add_generation_prompt
        tokens = self._request("POST", "/v1/tokenize", body).json()["tokens"]
        body = {"model": "default", "tokens": tokens, "skip_special_tokens": False}
        return self._request("POST", "/v1/detokenize", body).json()["text"]

    def _get(self, path: str) -> dict[str, Any]:
        try:
            return self._request("GET", path).json()
        except Refused as refused:
            raise MediaError(f"{self.base_url}{path}: {refused}") from None

    def _request(self, method: str, path: str, body: Any = None, stream: bool = False) -> requests.Response:
        try:
            response = requests.request(
                method,
                self.base_url + path,
                json=body,
                headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else None,
                verify=self.verify or True,
                stream=stream,
                timeout=(CONNECT_SECONDS, None),
                proxies=_NO_PROXY if self._local else None,
            )
        except requests.RequestException as error:
            raise MediaError(f"no answer from {self.base_url}: {_reason(error)}") from error
        if not response.ok:
            raise Refused(_message(response))
        return response


def _answers(response: requests.Response) -> Generator[dict[str, Any], None, None]:
    """The events of a stream. The connection closes, and the server stops, when nobody reads on."""
    with response:
        try:
            for line in response.iter_lines():
                if not line.startswith(b"data:") or line == b"data: [DONE]":
                    continue
                answer = json.loads(line[5:])
                if "error" in answer:
                    raise Refused(_words(answer))
                yield answer
        except requests.RequestException as error:
            raise MediaError(f"the stream broke off: {_reason(error)}") from error


def _message(response: requests.Response) -> str:
    try:
        return _words(response.json())
    except ValueError:
        return response.text.strip() or f"HTTP status {response.status_code}"


def _words(answer: Any) -> str:
    """The words of an error in any of the forms that SGLang gives it."""
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or answer.get("detail") or json.dumps(answer)
    return str(answer)


def _reason(error: requests.RequestException) -> str:
    cause = getattr(error.args[0], "reason", error.args[0]) if error.args else error
    return str(cause).rpartition(": ")[2] or type(error).__name__


def _is_loopback(url: str) -> bool:
    host = urlparse(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
