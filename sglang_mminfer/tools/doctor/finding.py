"""A line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. An "error" makes the exit status 1, and every error has a fix."""

    section: str
    name: str
    status: Status
    text: str
    fix: str | None = None


def brief(error: BaseException) -> str:
    """The type of an error and the first line of its message, cut to 300 characters."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__
