"""Telemetry of a running server over HTTP, as serving/telemetry_http.py gives it."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from sglang_mminfer.serving.telemetry_http import PATH, RequestReport, ServerReport
from sglang_mminfer.serving.trace import PrefillRecord
from sglang_mminfer.tools import connections


class NoTelemetry(Exception):
    """A server gave no telemetry; the message says why, in a sentence without its subject."""


class Telemetry:
    """The telemetry of one server.

    Args:
        url: the server's address, with or without the /v1 of its OpenAI API.
        api_key: the server's.
        timeout: seconds; a server may take as long as a prefill chunk.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 90.0) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            base_url=base,
            headers=headers,
            timeout=timeout,
            trust_env=not connections.is_local(base),
            limits=connections.NOT_KEPT,
        )

    def server(self) -> ServerReport:
        """How the server serves, and what it has done.

        Raises:
            NoTelemetry: if the server does not run mminfer, or does not answer.
        """
        return self._get(PATH, ServerReport)

    def records(self, rid: str) -> list[PrefillRecord]:
        """The prefill chunks of a request, oldest first.

        Raises:
            NoTelemetry: if the server does not remember the request, or does not answer.
        """
        return self.report(rid).records

    def report(self, rid: str) -> RequestReport:
        """The prefill chunks of a request, and how long its media took before. Raises what `records` raises."""
        return self._get(f"{PATH}/requests/{quote(rid, safe='')}", RequestReport)

    def _get(self, path: str, kind: type[Any]) -> Any:
        try:
            answer = self._client.get(path)
        except httpx.HTTPError as error:
            raise NoTelemetry(f"does not answer: {error or type(error).__name__}") from None
        if answer.status_code == 200:
            try:
                return msgspec.json.decode(answer.content, type=kind)
            except msgspec.DecodeError:  # another program's page
                raise NoTelemetry(f"has no GET {PATH}, so it does not run mminfer") from None
        if answer.status_code == 404 and kind is ServerReport:
            raise NoTelemetry(
                f"has no GET {PATH}: it does not run mminfer, or several tokenizer workers, which do not serve it"
            )
        raise NoTelemetry(f"answers {answer.status_code}: {_message_of(answer)}")


def _message_of(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        return str(body.get("message") or body.get("detail") or body.get("error") or body)[:300]
    except (ValueError, AttributeError):
        return answer.text.strip()[:300]
