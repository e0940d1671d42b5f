"""SGLang's processor of NVILA and NVILA-Lite, mended."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from sglang_mminfer.families.counted_frames import count_for, counting_frames
from sglang_mminfer.families.frames import frames_at
from sglang_mminfer.families.nvila.geometry import blocks_of, side_of
from sglang_mminfer.families.sampling import evenly
from sglang_mminfer.mends.token_ids import Piece
from sglang_mminfer.modality.items import KEY, fresh_numbers


@functools.cache
def processor_class(base: Any) -> type:
    """SGLang's class `base` with the mend."""
    from sglang.srt.multimodal.processors.nvila import NUM_VIDEO_FRAMES

    class MMInferNVILAProcessor(counting_frames(base, NUM_VIDEO_FRAMES)):  # type: ignore[misc]
        """NVILA with videos, of any number of frames, and with the number of its medium on each tile.

        SGLang's own takes 8 frames, asks each for a method that only decord's frames have, and fails on every
        video because its decoder gives arrays.
        """

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """The pieces as they are.

            Raises:
                ValueError: for the tokens of media, which nothing tells from those of other media.
            """
            for kind, token in (("image", self.mm_tokens.image_token), ("video", self.mm_tokens.video_token)):
                found = sum(piece.name == token for piece in pieces)
                if found > counts[kind]:
                    raise ValueError(
                        f"input_ids: expected one {token} for each of {counts[kind]} {kind}s, got {found}: ids of an "
                        f"answer, with the tokens of media in them, are not taken by this model"
                    )
            return pieces

        async def process_mm_data_async(
            self, image_data: Any, audio_data: Any, input_text: Any, request_obj: Any, **kwargs: Any
        ) -> Any:
            from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

            loaded = await self.load_mm_data(
                prompt=input_text,
                multimodal_tokens=self.mm_tokens,
                image_data=request_obj.image_data,
                video_data=request_obj.video_data,
            )
            loop = asyncio.get_running_loop()
            for i, video in enumerate(loaded.videos):
                if not isinstance(video, dict):  # embeddings, or what a processor made of it
                    loaded.videos[i] = await loop.run_in_executor(self.io_executor, frames_of, video, self.num_frames)
            # The frames are chosen: the checkpoint's processor takes all, and is told of no option.
            items, ids, _ = await self.process_and_combine_mm_data_async(
                loaded, self.mm_tokens, processor_video_config={}
            )
            films = [len(video) for video in loaded.videos]
            place_media(items, len(loaded.images), films, side_of(self.hf_config))
            if self.hf_config.model_type == "nvila":
                name_blocks(items)
            return MultimodalProcessorOutput(
                input_ids=ids.tolist(),
                mm_items=items,
                im_token_id=self.mm_tokens.image_token_id,
                video_token_id=self.mm_tokens.video_token_id,
            )

    return MMInferNVILAProcessor


def frames_of(video: Any, usual: int) -> list[Any]:
    """Frames from the first to the last, each uint8 [height, width, 3]; of a shorter video some come twice.

    Args:
        video: SGLang's decoder, or the frames themselves.
        usual: how many, where the request does not say it.

    Raises:
        ValueError: if it has no frames or breaks off; the client is told.
    """
    import numpy as np

    count = count_for(video, usual)
    frames = frames_at(video, evenly(len(video), 0.0, count=count).indices, f"{count} frames")
    return [np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame) for frame in frames]


def place_media(items: Sequence[Any], images: int, videos: Sequence[int], side: int) -> None:
    """Says of each item where in its medium it belongs.

    Items are of one tile each, or of a whole image, and in the order of their media.

    Args:
        videos: the number of frames of each.
        side: of a tile, in tokens.
    """
    pictures = [item for item in items if not item.is_video()]
    if images and len(pictures) % images == 0:
        _place(pictures, [len(pictures) // images] * images, side)
    frames = [item for item in items if item.is_video()]
    if len(frames) == sum(videos):
        _place(frames, videos, side)
    elif videos and len(frames) % len(videos) == 0:
        _place(frames, [len(frames) // len(videos)] * len(videos), side)


def _place(items: Sequence[Any], lengths: Sequence[int], side: int) -> None:
    left = iter(items)
    for number, length in zip(fresh_numbers(len(lengths)), lengths):
        medium = list(itertools.islice(left, length))
        rows, cols = (len(medium) == 1 and blocks_of(medium[0], "image")) or (1, 1)
        tiles = sum(len(item.offsets) for item in medium)
        following = itertools.count()
        for item in medium:
            item.model_specific_data[KEY] = [
                (number, next(following), tiles, rows * side, cols * side, 0) for _ in item.offsets
            ]


def name_blocks(items: Sequence[Any]) -> None:
    """Says of images in one tile that they are.

    SGLang's NVILA encodes images of several requests together and reads the blocks of those that name them, so that
    an image in several tiles beside one that names none would fail, and end the scheduler.
    """
    for item in items:
        if item.is_image() and item.feature is not None:
            item.model_specific_data.setdefault("block_sizes", [None] * len(item.feature))
