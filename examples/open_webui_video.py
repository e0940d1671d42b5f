"""
title: Videos for SGLang
description: Sends attached videos to the model as video_url parts.
version: 0.1.0
license: Apache-2.0

A filter function for Open WebUI, which keeps an attached video and never sends it. Paste it under Admin Panel,
Functions, and switch it on for the models that SGLang serves.

Each video stays with the question that it was attached to, in every later turn. If it moved, the prompt would change,
and the server's radix cache would find nothing.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import mimetypes
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field


class Filter:
    """Open WebUI calls `inlet` with the body of each request before the request is sent."""

    class Valves(BaseModel):
        """What an administrator sets."""

        priority: int = Field(default=0, description="order among filters")
        as_paths: bool = Field(
            default=False, description="send file:// paths, for a server on this machine that may read the uploads"
        )
        most_mb: int = Field(default=512, description="larger videos are refused, in megabytes")

    def __init__(self) -> None:
        self.valves = self.Valves()
        self._question_of: dict[tuple[str, str], int] = {}
        """The number of the question that a file of a chat was attached to."""

    async def inlet(
        self,
        body: dict[str, Any],
        __files__: list[dict[str, Any]] | None = None,
        __metadata__: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Adds the videos of a chat to its questions.

        Raises:
            ValueError: a video is gone or too large.
        """
        metadata = __metadata__ or body.get("metadata") or {}
        files = __files__ or body.get("files") or metadata.get("files") or []
        chat = str(metadata.get("chat_id") or body.get("chat_id") or "")
        questions = [message for message in body["messages"] if message["role"] == "user"]
        places: dict[int, list[dict[str, Any]]] = {}
        for item in {_id(item): item for item in files if _is_video(item)}.values():
            number = self._question_of.setdefault((chat, _id(item)), len(questions) - 1)
            places.setdefault(min(number, len(questions) - 1), []).append(item)
        for number, items in places.items():
            message = questions[number]
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            message["content"] = [*[await self._part(item) for item in items], *parts]
        for holder in (body, metadata, body.get("metadata") or {}):  # else their names become text of the prompt
            if holder.get("files"):
                holder["files"] = [item for item in holder["files"] if not _is_video(item)]
        return body

    async def _part(self, item: dict[str, Any]) -> dict[str, Any]:
        path = await self.path_of(_id(item))
        if not path.is_file():
            raise ValueError(f"{item.get('name', path.name)}: the uploaded file is gone")
        if path.stat().st_size > self.valves.most_mb * 1_000_000:
            raise ValueError(f"{item.get('name', path.name)}: larger than {self.valves.most_mb} MB")
        url = path.as_uri() if self.valves.as_paths else await asyncio.to_thread(_data_url, path)
        return {"type": "video_url", "video_url": {"url": url}}

    async def path_of(self, file_id: str) -> Path:
        """Where Open WebUI keeps an upload."""
        from open_webui.models.files import Files
        from open_webui.storage.provider import Storage

        found = Files.get_file_by_id(file_id)
        if inspect.isawaitable(found):  # since its database is asynchronous
            found = await found
        if found is None:
            raise ValueError(f"there is no upload {file_id}")
        path = Storage.get_file(found.path)
        return Path(await path if inspect.isawaitable(path) else path)


def _id(item: dict[str, Any]) -> str:
    return str(item.get("id") or (item.get("file") or {}).get("id"))


def _is_video(item: dict[str, Any]) -> bool:
    file = item.get("file") or {}
    kind = item.get("content_type") or (file.get("meta") or {}).get("content_type") or ""
    name = item.get("name") or file.get("filename") or ""
    return (kind or mimetypes.guess_type(name)[0] or "").startswith("video/")


def _data_url(path: Path) -> str:
    mime = mimetypes.guess_type(path.name)[0] or "video/mp4"
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
