"""The media of a request that wants several answers (n > 1): each answer gets all of them.

SGLang makes a batch of such a request and copies its list of media as if the list held one medium for each prompt. So
it refuses two pictures, gives each answer only one of two videos, and takes the frames of a video for videos.
"""

from __future__ import annotations

from typing import Any

from sglang_mminfer import mends


def generate_request(original: Any, self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """A part of what is AROUND TokenizerManager.generate_request: see `serving.clip_sender`."""
    if mends.wanted(self.server_args) and mends.active("media_of_samples"):
        gather(obj)
    return original(self, obj, *args, **kwargs)


def gather(request: Any) -> None:
    """Wraps the media of a single prompt into one entry of a batch, if SGLang will copy the prompt."""
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
    params = getattr(request, "sampling_params", None)
    if not isinstance(params, dict) or (params.get("beam_width") or 1) > 1:
        return 1
    count = params.get("n", 1)
    return count if isinstance(count, int) else 1
