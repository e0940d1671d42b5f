"""Pictures and videos as LongVILA wants them: every frame a square, and a newline behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from sglang_mminfer.families.frames import decode, length_and_rate, resize, squared
from sglang_mminfer.families.longvila.config import check, tokens_per_side
from sglang_mminfer.families.own.prompt import Medium, Raster
from sglang_mminfer.families.sampling import Sampled, evenly, first_seconds
from sglang_mminfer.mends import limits
from sglang_mminfer.mends import options as request_options


class LongVilaRasters:
    """Cuts media up for one model.

    At a frame rate of 0, always `num_frames` frames of the whole video; else that many frames a second from its
    start on, and no more than `num_frames`.

    Args:
        config: the model's.
        options: "num_frames", "fps"; the checkpoint says what applies without.

    Raises:
        ValueError: for options out of range.
    """

    def __init__(self, config: Any, options: Mapping[str, Any]) -> None:
        check(config)
        self.config = config
        self.size = int(config.vision_config.image_size)
        self.frames = int(options.get("num_frames", config.num_video_frames))
        self.fps = float(options.get("fps", config.fps))
        if self.fps < 0 or self.frames < 1:
            raise ValueError("--mm-process-config: expected video.fps of 0 or more and video.num_frames of 1 or more")

    def video(self, video: Any) -> Medium:
        total, rate = length_and_rate(video)
        sampled = self._sampled(total, rate, request_options.on(video))
        bordered = self.config.image_aspect_ratio == "pad"
        frames = decode(video, sampled.indices, self.size, self.size, bordered=bordered)
        return Medium("video", [self._raster(pixels) for pixels in frames])

    def _sampled(self, total: int, rate: float, wanted: Mapping[str, Any]) -> Sampled:
        """As the request wants it, else as the server does."""
        within = request_options.within
        if count := wanted.get("num_frames"):
            return evenly(total, rate, count=within(count, self.frames, "num_frames"))
        # Its frames are counted from the start: few of them at a rate of the request's would leave out the rest.
        usual = max(self.frames, limits.FRAMES) if "fps" in wanted else self.frames
        most = within(wanted.get("max_frames", usual), self.frames, "max_frames")
        fps = wanted.get("fps", self.fps)
        return first_seconds(total, rate, fps=fps, most=most) if fps > 0 else evenly(total, rate, count=most)

    def image(self, picture: Image.Image) -> list[Medium]:
        if self.config.image_aspect_ratio == "pad":
            picture = squared(picture)
        return [Medium("image", [self._raster(resize(picture, self.size, self.size))])]

    def _raster(self, pixels: Any) -> Raster:
        side = tokens_per_side(self.config)
        return Raster(pixels, side, side, separator=self.config.separator)
