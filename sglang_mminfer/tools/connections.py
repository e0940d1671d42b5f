"""Connections to a server over HTTP: without a proxy on this machine, and a new one for each request.

SGLang closes a connection that was idle for 5 seconds, and httpx keeps one for just as long, so a request may leave on
a connection that is being closed. It would get no answer, and what is asked here is not asked twice.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

if TYPE_CHECKING:
    import openai

NOT_KEPT = httpx.Limits(max_keepalive_connections=0)


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is a name of this machine that no other machine can use."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_local(url: str) -> bool:
    """Whether an address is this machine's, which is reached without a proxy."""
    return is_loopback(urlsplit(url).hostname or "")


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
