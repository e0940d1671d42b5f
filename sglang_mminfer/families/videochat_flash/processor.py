"""Pictures and videos in the form that VideoChat-Flash was trained with: clips of frames, views and tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image

from sglang_mminfer.families.frames import decode, in_square, length_and_rate, resize
from sglang_mminfer.families.own.processor import MediaProcessor
from sglang_mminfer.families.own.prompt import Medium, Raster
from sglang_mminfer.families.sampling import Sampled
from sglang_mminfer.families.videochat_flash.config import CLIP_TOKENS, tower_config
from sglang_mminfer.families.videochat_flash.sampling import CLIP, by_clips
from sglang_mminfer.families.videochat_flash.tiles import ACROSS, best_canvas, canvases
from sglang_mminfer.families.videochat_flash.vision import MEAN
from sglang_mminfer.mends import options

LEAST, MOST = 64, 512
"""The least and the most frames of a video, as in the model's training."""


class VideoChatFlashProcessor(MediaProcessor):
    """`--mm-process-config '{"video": {"min_frames": 64, "max_frames": 512}}'`, both in clips of 4 frames."""

    VIDEO_OPTIONS: ClassVar[Mapping[str, type | tuple[type, ...]]] = {"min_frames": int, "max_frames": int}

    REQUEST_OPTIONS: ClassVar[Mapping[str, frozenset[str]]] = {
        "video": frozenset({"fps", "min_frames", "max_frames", "num_frames"}),
    }

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self.size = tower_config(hf_config).image_size
        self.aspect = str(hf_config.image_aspect_ratio)
        self.canvases = canvases(hf_config.image_grid_pinpoints, self.size)
        self.most = self.video_config.get("max_frames", MOST)
        self.least = self.video_config.get("min_frames", min(LEAST, self.most))
        if self.least < CLIP or self.most < self.least or self.least % CLIP or self.most % CLIP:
            raise ValueError(
                f"--mm-process-config: video.min_frames and video.max_frames: expected multiples of {CLIP}, the first "
                f"no larger than the second, got {self.least} and {self.most}"
            )

    def video(self, video: Any) -> Medium:
        total, rate = length_and_rate(video)
        sampled = self._sampled(total, rate, options.on(video))
        frames = decode(video, sampled.indices, self.size, self.size)
        clips = [torch.stack(frames[i : i + CLIP]) for i in range(0, len(frames), CLIP)]
        return Medium("video", [Raster(clip, 1, CLIP_TOKENS) for clip in clips], f"\n{time_message(sampled)} ")

    def _sampled(self, total: int, rate: float, wanted: Mapping[str, Any]) -> Sampled:
        """The frames that the request asks for, in whole clips, else those that the server's options give."""

        def clips(name: str, usual: int) -> int:
            count = options.within(wanted.get(name, usual), self.most, name)
            return max(CLIP, count // CLIP * CLIP)

        if "num_frames" in wanted:
            count = clips("num_frames", self.most)
            return by_clips(total, rate, least=count, most=count)
        most = clips("max_frames", self.most)
        # The usual least number of frames does not raise a rate or a limit that the request names.
        usual = CLIP if "fps" in wanted else self.least
        least = min(clips("min_frames", usual), most)
        return by_clips(total, rate, least=least, most=most, fps=wanted.get("fps", 1.0))

    def image(self, picture: Image.Image) -> list[Medium]:
        picture = picture.convert("RGB")
        if self.aspect == "pad":
            picture = in_square(picture, tuple(int(value * 255) for value in MEAN))
        media = [Medium("image", [_view([resize(picture, self.size, self.size)], 1)])]
        if "anyres" in self.aspect:
            across, down = best_canvas(*picture.size, self.canvases, self.size)
            canvas = resize(picture, across * self.size, down * self.size)
            tiles = [tile for row in canvas.split(self.size, dim=1) for tile in row.split(self.size, dim=2)]
            media.append(Medium("image", [_view(tiles, across)]))
        return media


def time_message(sampled: Sampled) -> str:
    """The sentence that the model was trained to read after a video."""
    return (
        f"The video lasts for {sampled.duration:.2f} seconds, and {len(sampled.indices)} frames are uniformly sampled "
        "from it."
    )


def _view(tiles: list[torch.Tensor], across: int) -> Raster:
    return Raster(torch.stack(tiles), 1, CLIP_TOKENS * len(tiles), values={ACROSS: across})
