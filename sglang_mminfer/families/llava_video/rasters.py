"""Pictures and videos as LLaVA-Video wants them: frames, views and tiles of 384 pixels, and a text about time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from sglang_mminfer.families.frames import decode, length_and_rate, resize, squared
from sglang_mminfer.families.llava_video import layout
from sglang_mminfer.families.llava_video.config import check
from sglang_mminfer.families.own.prompt import Medium, Raster
from sglang_mminfer.families.sampling import Sampled, every_second
from sglang_mminfer.mends import options as request_options

MAX_FRAMES = 64
"""The most frames of a video, as in the official evaluation; papers went up to 110."""


class LlavaVideoRasters:
    """Cuts pictures and videos into rasters for one model.

    Args:
        config: the model's config.
        options: "fps", "max_frames" and "force_sample" of --mm-process-config; the checkpoint has their defaults.

    Raises:
        ValueError: for options out of range.
    """

    def __init__(self, config: Any, options: Mapping[str, Any]) -> None:
        check(config)
        self.config = config
        self.size = int(config.vision_config.image_size)
        self.fps = float(options.get("fps", 1))
        self.max_frames = int(options.get("max_frames", MAX_FRAMES))
        self.forced = bool(options.get("force_sample", config.force_sample))
        if self.fps <= 0 or self.max_frames < 1:
            raise ValueError("--mm-process-config: video.fps and video.max_frames: expected positive numbers")

    def video(self, video: Any) -> Medium:
        """A raster for each frame, and the text about their time. Raises ValueError if the video cannot be decoded."""
        total, rate = length_and_rate(video)
        sampled = self._sampled(total, rate, request_options.on(video))
        frames = decode(video, sampled.indices, self.size, self.size)
        last = len(frames) - 1
        rasters = [Raster(pixels, *layout.frame_shape(self.config, i == last)) for i, pixels in enumerate(frames)]
        instruction = f"{time_instruction(sampled)}\n" if self.config.add_time_instruction else ""
        return Medium("video", rasters, f"\n{instruction}")

    def _sampled(self, total: int, rate: float, wanted: Mapping[str, Any]) -> Sampled:
        """The frames that the request asks for, else those that the server's options give."""
        within = request_options.within
        if count := wanted.get("num_frames"):
            most = within(count, self.max_frames, "num_frames")
            return every_second(total, rate, fps=self.fps, most=most, forced=True)
        most = within(wanted.get("max_frames", self.max_frames), self.max_frames, "max_frames")
        fps, forced = wanted.get("fps", self.fps), self.forced and "fps" not in wanted
        return every_second(total, rate, fps=fps, most=most, forced=forced)

    def image(self, picture: Image.Image) -> list[Medium]:
        """The whole picture, and its tiles if the model takes any resolution."""
        config, size, side = self.config, self.size, layout.patches(self.config)
        if not config.image_aspect_ratio.startswith("anyres"):
            overview = resize(squared(picture) if config.image_aspect_ratio == "pad" else picture, size, size)
            return [Medium("image", [Raster(overview, side, side, int("unpad" in config.mm_patch_merge_type))])]
        overview = resize(picture, size, size)
        tiles = layout.tiles_of(config, *picture.size)
        parts = _cut(_on_canvas(picture, tiles.across * size, tiles.down * size), size)
        if config.mm_patch_merge_type == "flat":  # tile by tile, each like a picture of its own
            return [Medium("image", [Raster(pixels, side, side) for pixels in (overview, *parts)])]
        ends = int("unpad" in config.mm_patch_merge_type)  # each row ends with a newline
        values = {"width": picture.width, "height": picture.height}
        view = Raster(torch.stack(parts), tiles.rows, tiles.cols + ends, values=values)
        return [Medium("image", [Raster(overview, side, side)]), Medium("image", [view])]


def time_instruction(sampled: Sampled) -> str:
    """The sentences that the model was trained to read after a video."""
    located = ",".join(f"{second:.2f}s" for second in sampled.seconds)
    return (
        f"The video lasts for {sampled.duration:.2f} seconds, and {len(sampled.indices)} frames are uniformly sampled "
        f"from it. These frames are located at {located}.Please answer the following questions related to this video."
    )


def _on_canvas(picture: Image.Image, width: int, height: int) -> Image.Image:
    canvas = Image.new("RGB", (width, height))
    fitted = picture.resize(layout.fitted(*picture.size, (width, height)), Image.Resampling.BICUBIC)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    return canvas


def _cut(canvas: Image.Image, size: int) -> list[torch.Tensor]:
    """The tiles of a canvas, row by row, each uint8 [3, size, size]."""
    corners = [(x, y) for y in range(0, canvas.height, size) for x in range(0, canvas.width, size)]
    return [resize(canvas.crop((x, y, x + size, y + size)), size, size) for x, y in corners]
