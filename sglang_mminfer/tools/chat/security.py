"""Who may talk to the application, and what its page may load.

The application listens on this machine alone unless it is told otherwise. Even there a page of somebody else's, open in
the same browser, could talk to it: by a request of its own, or by a name that it lets point to this machine. So
requests whose Host is no name of this machine are refused, and requests of other origins that change something, too.

The page loads nothing from anywhere else. An answer of a model may hold a link to a picture, and the browser would tell
its host what was said, if the page's policy let it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_mminfer.tools.connections import is_loopback
from sglang_mminfer.tools.errors import Refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""gradio's page needs its inline scripts. All hosts but its own are out."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def credentials(host: str, auth_file: Path | None) -> list[tuple[str, str]] | None:
    """Names and passwords of those who may log in; None: everybody on this machine.

    Args:
        host: what the application listens on.
        auth_file: a file with a line NAME:PASSWORD for each user.

    Raises:
        Refused: other machines reach the host and there is no file, or the file holds something else.
    """
    if auth_file is None:
        if is_loopback(host):
            return None
        raise Refused(
            f"--host {host} lets other machines in: name a file of NAME:PASSWORD lines with --auth-file, and put a "
            "proxy with TLS before the application"
        )
    try:
        lines = [line.strip() for line in auth_file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--auth-file {auth_file}: {error}") from None
    pairs = [tuple(line.split(":", 1)) for line in lines]
    if not pairs or not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise Refused(f"--auth-file {auth_file}: expected lines NAME:PASSWORD")
    return pairs  # type: ignore[return-value]


class Guard:
    """ASGI middleware that refuses foreign requests and adds the headers of the page's policy.

    Args:
        app: the application.
        host: what it listens on. Names of this machine are asked for only where that is this machine alone.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], host: str) -> None:
        self._app, self._alone = app, is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._foreign(scope["method"], headers.get("host", ""), headers.get("origin", "")):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not a request of this application's page"})
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self._app(scope, receive, with_policy)

    def _foreign(self, method: str, host: str, origin: str) -> bool:
        if self._alone and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return True
        return method not in ("GET", "HEAD", "OPTIONS") and bool(origin) and urlsplit(origin).netloc != host
