"""How long the prompt of each request of the current batch is, as SGLang's scheduler knows it.

A forward batch tells the length of a chunk, not that of the prompt. Its mode does not tell generated tokens from those
of a prompt either: they come as prompt rows after a retraction, beside prefilling requests (SGLang turns MIXED into
EXTEND before the attention backend sees the batch) and under data-parallel attention. The request itself knows: its
`origin_input_ids` are the prompt, the turns before it in a session included, and nothing that was generated for it.

Nothing of SGLang is imported here.
"""

from __future__ import annotations

from typing import Any

_lengths: dict[str, int] = {}
_wanted = False


def watch() -> None:
    """Keep the lengths from now on. The attention backend calls this, so a scheduler without it keeps nothing."""
    global _wanted
    _wanted = True


def note(result: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ForwardBatch.init_new, which makes the forward batch of a schedule batch directly before it runs."""
    if _wanted and not batch.forward_mode.is_decode_or_idle():
        keep({request.rid: len(request.origin_input_ids) for request in batch.reqs})


def keep(lengths: dict[str, int]) -> None:
    """The prompts of the batch that runs next: tokens by request id. Those of the batch before are forgotten."""
    global _lengths
    _lengths = lengths


def length_of(rid: str) -> int | None:
    """Tokens in the prompt of a request of the current batch; None if SGLang did not say."""
    return _lengths.get(rid)
