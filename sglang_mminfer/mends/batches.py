"""The media of a request that wants several answers (n > 1): all of them for each answer.

SGLang makes a batch of such a request by copying its list of media as if it had one for each prompt: two pictures are
refused, of two videos each answer gets one, and the frames of a video become videos.
"""

from __future__ import annotations

from typing import Any

from sglang_mminfer import mends


def generate_request(original: Any, self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND TokenizerManager.generate_request."""
    if mends.wanted(self.server_args) and mends.active("media_of_samples"):
        gather(obj)
    return original(self, obj, *args, **kwargs)


def gather(request: Any) -> None:
    """Puts the media of one prompt into one entry, if the prompt is to be copied."""
    if _is_batch(request) or not _samples(request) > 1:
        return
    for name in ("image_data", "video_data", "audio_data"):
        media = getattr(request, name, None)
        if media is not None and not (isinstance(media, list) and not media):
            setattr(request, name, [media if isinstance(media, list) else [media]])


def _is_batch(request: Any) -> bool:
    text, ids = getattr(request, "text", None), getattr(request, "input_ids", None)
    if text is not None:
        return not isinstance(text, str)
    return not ids or not isinstance(ids[0], int)


def _samples(request: Any) -> int:
    said = getattr(request, "sampling_params", None)
    if not isinstance(said, dict) or (said.get("beam_width") or 1) > 1:
        return 1
    count = said.get("n", 1)
    return count if isinstance(count, int) else 1
