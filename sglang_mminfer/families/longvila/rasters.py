"""Pictures and videos as LongVILA wants them: every frame is a square with a newline behind it."""

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
    """Cuts pictures and videos into rasters for one model.

    With a frame rate of 0, a video gives `num_frames` frames, spread over all of it. With any other rate it gives that
    many frames a second from its start on, at most `num_frames`.

    Args:
        config: the model's config.
        options: "num_frames" and "fps" of --mm-process-config; the checkpoint has their defaults.

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
        """A raster for each frame. Raises ValueError if the video cannot be decoded."""
        total, rate = length_and_rate(video)
        sampled = self._sampled(total, rate, request_options.on(video))
        bordered = self.config.image_aspect_ratio == "pad"
        frames = decode(video, sampled.indices, self.size, self.size, bordered=bordered)
        return Medium("video", [self._raster(pixels) for pixels in frames])

    def _sampled(self, total: int, rate: float, wanted: Mapping[str, Any]) -> Sampled:
        """The frames that the request asks for, else those that the server's options give."""
        within = request_options.within
        if count := wanted.get("num_frames"):
            return evenly(total, rate, count=within(count, self.frames, "num_frames"))
        # A rate takes frames from the start: at a request's rate, few frames would leave out the rest of the video.
        usual = max(self.frames, limits.FRAMES) if "fps" in wanted else self.frames
        most = within(wanted.get("max_frames", usual), self.frames, "max_frames")
        fps = wanted.get("fps", self.fps)
        return first_seconds(total, rate, fps=fps, most=most) if fps > 0 else evenly(total, rate, count=most)

    def image(self, picture: Image.Image) -> list[Medium]:
        """The picture as one raster."""
        if self.config.image_aspect_ratio == "pad":
            picture = squared(picture)
        return [Medium("image", [self._raster(resize(picture, self.size, self.size))])]

    def _raster(self, pixels: Any) -> Raster:
        side = tokens_per_side(self.config)
        return Raster(pixels, side, side, separator=self.config.separator)
