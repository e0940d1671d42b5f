"""Runs the application: over a server that runs, or over one that it starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_mminfer import settings
from sglang_mminfer.tools.chat.endpoint import Endpoint
from sglang_mminfer.tools.chat.security import credentials
from sglang_mminfer.tools.chat.uploads import MB
from sglang_mminfer.tools.errors import Refused
from sglang_mminfer.tools.server import Server, shown_wait


@dataclass(frozen=True)
class Options:
    """What the command was asked for.

    Attributes:
        url: the server to chat with, unless `model_path` names a model to serve.
        model_path: a folder, or a name on the hub.
        config: head config of the server that is started.
        server_flags: further flags for it, as one word.
        host, port: what the application listens on.
        auth_file: who may log in; needed where `host` lets other machines in.
        max_upload_mb: the most megabytes of a file.
        api_key: the server's.
    """

    url: str = "http://127.0.0.1:30000"
    model_path: str | None = None
    config: str = "default"
    server_flags: str = ""
    host: str = "127.0.0.1"
    port: int = 7860
    auth_file: Path | None = None
    max_upload_mb: int = 512
    api_key: str | None = None


def serve(options: Options, as_json: bool = False) -> int:
    """Serves until it is interrupted. Returns exit status 0.

    Args:
        as_json: tell as a JSON document where the page is.

    Raises:
        Refused: the port is taken, or the options would let anybody in; found before a server is started.
        NoServer: there is no server.
        ServerError: the server that was to be started was not.
        KeyboardInterrupt: a server was interrupted while it started.
    """
    auth = credentials(options.host, options.auth_file)
    _check_port(options.host, options.port)
    with tempfile.TemporaryDirectory(prefix="mminfer-chat-") as name, _server(options, Path(name)) as url:
        import uvicorn

        from sglang_mminfer.tools.chat.application import application

        folder = Path(name)
        endpoint = Endpoint(url, options.api_key)
        facts = asyncio.run(endpoint.facts())
        app = application(
            endpoint,
            facts,
            url,
            folder,
            host=options.host,
            upload_bytes=options.max_upload_mb * MB,
            auth=auth,
        )
        page = f"http://{_shown(options.host)}:{options.port}"
        told = json.dumps({"page": page, "server": url, "model": facts.model})
        print(told if as_json else f"Chat with {facts.model}: {page} (Ctrl-C ends it)", flush=True)
        uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=2)
    return 0


@contextlib.contextmanager
def _server(options: Options, folder: Path) -> Iterator[str]:
    """The address of the server; one that is started ends with the block, and reads the uploads alone."""
    if options.model_path is None:
        yield options.url
        return
    flags = ["--attention-backend", "mminfer", settings.CONFIG.flag, options.config, "--enable-cache-report"]
    flags += [settings.MEDIA_ROOT.flag, str(folder), *shlex.split(options.server_flags)]
    local = Path(options.model_path).is_dir()
    env: dict[str, str | None] = {} if local else {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
    with shown_wait("the server starts") as progress:
        server = Server(options.model_path, *flags, env=env, progress=progress, timeout=1800).start()
    try:
        yield server.url
    finally:
        server.stop()


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Refused(f"--port {port}: {error.strerror or error}; name another one") from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
