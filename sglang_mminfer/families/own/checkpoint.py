"""The files of a checkpoint, in a local folder or a repository of the hub, without any of its weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Checkpoint:
    """A folder, or the name of a repository and its revision."""

    path: str
    revision: str | None = None

    def json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file; None if there is no such file, or it does not hold an object.

        A path that is neither a folder nor a name on the hub (one GGUF file, a remote URL) has no files.
        """
        file = self._file(name)
        if file is None:
            return None
        try:
            with open(file, encoding="utf-8") as opened:
                content = json.load(opened)
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def folder(self, name: str) -> str:
        """The local path of a sub-folder with its tokenizer files. Files that are not here yet are downloaded."""
        if os.path.isdir(self.path):
            return os.path.join(self.path, name)
        from huggingface_hub import snapshot_download

        patterns = [f"{name}/*.json", f"{name}/*.txt", f"{name}/*.model", f"{name}/*.jinja"]
        return os.path.join(snapshot_download(self.path, revision=self.revision, allow_patterns=patterns), name)

    def _file(self, name: str) -> str | None:
        if os.path.isdir(self.path):
            file = os.path.join(self.path, name)
            return file if os.path.isfile(file) else None
        if os.path.exists(self.path) or "://" in self.path:
            return None
        from transformers.utils import cached_file

        try:
            return cached_file(
                self.path,
                name,
                revision=self.revision,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError):  # SGLang looks for the config next, and says what is wrong with the name
            return None
