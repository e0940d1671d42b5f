"""What a processor gives the scheduler, held against the prompt before it gets there.

SGLang's scheduler ends where embeddings are fewer than placeholders, and a processor's worker may never answer where
a prompt has more placeholders than media. Here both are the client's error.
"""

from __future__ import annotations

from typing import Any


def check_placeholders(processor: Any, prompt: Any, request: Any) -> None:
    """Raises ValueError if a prompt's placeholders are not as many as its media, where the family can tell."""
    count = getattr(processor, "placeholders_in", None)
    if count is None or not isinstance(prompt, str):
        return
    for kind, found in count(prompt).items():
        media = getattr(request, f"{kind}_data", None) or ()
        given = len(media) if isinstance(media, list | tuple) else 1
        if found > given or (found < given and not getattr(processor, "adds_placeholders", False)):
            raise ValueError(
                f"prompt: expected one {kind} placeholder for each of the {given} {kind}s given, found {found}"
            )


def check(output: Any, processor: Any) -> None:
    """Raises ValueError for items that do not fit the prompt that they stand in."""
