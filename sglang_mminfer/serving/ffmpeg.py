"""What comes before a video is decoded: no playlist where clients may not name files, the hash of the file by which its
frames are kept, and decord where FFmpeg's libraries are missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def decode_without_ffmpeg(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND VideoDecoderWrapper.__init__: falls back to decord if torchcodec finds no FFmpeg libraries.

    SGLang has this fallback for an import of torchcodec that fails, but torchcodec looks for FFmpeg only with the first
    video.

    Raises:
        ForbiddenFile: as `media_root.before_video`.
    """
    from sglang.srt.utils import video_decoder

    from sglang_mminfer.mends import asked, media_cache
    from sglang_mminfer.serving import cpu_platform, media_root

    source = args[0] if args else kwargs["source"]
    media_root.before_video(source)
    if asked.for_mminfer() and media_cache.enabled():  # before the file is opened: what is decoded is no older
        setattr(self, media_cache.ORIGIN, media_cache.origin_of(source))
    if not asked.for_mminfer() and not cpu_platform.selected():
        return original(self, *args, **kwargs)
    try:
        original(self, *args, **kwargs)
    except RuntimeError as error:
        if "Could not load libtorchcodec" not in str(error):
            raise
        logger.warning("mminfer: torchcodec finds no FFmpeg libraries; video is decoded by decord.")
        video_decoder._BACKEND = "decord"
        original(self, *args, **kwargs)
