"""The application: the page behind its guard, as an ASGI program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang_mminfer.tools.chat.conversation import Answering
from sglang_mminfer.tools.chat.endpoint import Facts
from sglang_mminfer.tools.chat.security import Guard


def application(
    server: Answering,
    facts: Facts,
    url: str,
    folder: Path,
    *,
    host: str = "127.0.0.1",
    upload_bytes: int = 512_000_000,
    auth: list[tuple[str, str]] | None = None,
) -> Any:
    """The application.

    Args:
        server: who answers.
        facts: what it says of itself.
        url: its address, for the panel.
        folder: where uploads are kept. It is set for the process, because gradio reads it from the environment.
        host: what the application listens on.
        upload_bytes: the most bytes of an uploaded file.
        auth: names and passwords of those who may use it; None: whoever reaches it.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    from fastapi import FastAPI

    from sglang_mminfer.tools.chat.page import CSS, Page, theme

    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard, host=host)
    return gr.mount_gradio_app(
        app,
        Page(server, facts, url, upload_bytes, folder).blocks(),
        path="",
        auth=auth,
        max_file_size=upload_bytes,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme(),
        css=CSS,
    )
