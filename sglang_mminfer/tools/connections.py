"""Connections to a server over HTTP: without a proxy on this machine, and a new one for each request.

SGLang closes a connection that was idle for 5 seconds, and httpx keeps one for just as long, so a request may leave on
a connection that is being closed. It would get no answer, and what is asked here is not asked twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

if TYPE_CHECKING:
    import openai

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Hosts that are reached without a proxy."""

NOT_KEPT = httpx.Limits(max_keepalive_connections=0)


def is_local(url: str) -> bool:
    """Whether an address is this machine's."""
    return urlsplit(url).hostname in LOCAL


def openai_client(url: str, timeout: float, api_key: str | None = None) -> openai.OpenAI:
    """The official OpenAI client, which asks everything once.

    Args:
        url: the server's address, with or without /v1.
        timeout: seconds.
    """
    import openai

    http = openai.DefaultHttpxClient(trust_env=not is_local(url), timeout=timeout, limits=NOT_KEPT)
    return openai.OpenAI(
        base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1",
        api_key=api_key or "none",
        timeout=timeout,
        max_retries=0,
        http_client=http,
    )
