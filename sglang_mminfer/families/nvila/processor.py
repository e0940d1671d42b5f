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
        """NVILA with videos of any number of frames, and with tiles that know which medium they belong to.

        SGLang's class takes 8 frames, and calls a method that only decord's frames have. SGLang's decoder gives arrays,
        so every video fails.
        """

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """The pieces as they are.

            Raises:
                ValueError: for expanded media: nothing tells the tokens of one medium from those of the next.
            """
            for kind, token in (("image", self.mm_tokens.image_token), ("video", self.mm_tokens.video_token)):
                count = sum(piece.name == token for piece in pieces)
                if count > counts[kind]:
                    raise ValueError(
                        f"input_ids: expected one {token} for each of {counts[kind]} {kind}s, got {count}: ids of an "
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
                if not isinstance(video, dict):  # a dict holds embeddings, or a processor's output
                    loaded.videos[i] = await loop.run_in_executor(self.io_executor, frames_of, video, self.num_frames)
            # The frames are sampled already: the checkpoint's processor takes them all, and gets no options.
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
    """Frames from the first to the last, each uint8 [height, width, 3]; a shorter video gives some of them twice.

    Args:
        video: SGLang's decoder, or the frames themselves.
        usual: how many, if the request does not say.

    Raises:
        ValueError: if it has no frames or breaks off; the client is told.
    """
    import numpy as np

    count = count_for(video, usual)
    frames = frames_at(video, evenly(len(video), 0.0, count=count).indices, f"{count} frames")
    return [np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame) for frame in frames]


def place_media(items: Sequence[Any], images: int, videos: Sequence[int], side: int) -> None:
    """Writes into each item the `Place` of its tiles.

    An item holds one tile, or a whole image. Items come in the order of their media.

    Args:
        images: the number of images.
        videos: the number of frames of each video.
        side: tokens along a side of a tile.
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
    next_items = iter(items)
    for number, length in zip(fresh_numbers(len(lengths)), lengths):
        medium = list(itertools.islice(next_items, length))
        rows, cols = (len(medium) == 1 and blocks_of(medium[0], "image")) or (1, 1)
        tiles = sum(len(item.offsets) for item in medium)
        next_tile = itertools.count()
        for item in medium:
            item.model_specific_data[KEY] = [
                (number, next(next_tile), tiles, rows * side, cols * side, 0) for _ in item.offsets
            ]


def name_blocks(items: Sequence[Any]) -> None:
    """Writes `block_sizes` into images of one tile, which lack it.

    SGLang's NVILA encodes images of several requests together, and reads the block sizes of those that have them. An
    image of several tiles beside one without block sizes would fail and end the scheduler.
    """
    for item in items:
        if item.is_image() and item.feature is not None:
            item.model_specific_data.setdefault("block_sizes", [None] * len(item.feature))
