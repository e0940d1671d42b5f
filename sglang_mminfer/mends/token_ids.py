"""Prompts of token ids with media: ids outside the media stay what they are, and expanded media are found again."""

from __future__ import annotations

from typing import Any


def as_text(processor: Any, prompt: Any, request: Any) -> Any:
    """A prompt of ids as text with marks, which the processor's tokenizer turns into the same ids; text as it is."""
    return prompt
