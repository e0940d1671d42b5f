"""InternVL in its native form."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from typing import Any

from sglang_mminfer import mends
from sglang_mminfer.mends import verbatim
from sglang_mminfer.mends.token_ids import Piece
from sglang_mminfer.modality.geometry import VIDEO_KEY
from sglang_mminfer.processors import frames_wanted, fresh_numbers


def adapted(base: type, hf_config: Any) -> type:
    return _class(base)


@functools.cache
def _class(base: Any) -> type:
    class MMInferInternVLProcessor(base):
        """InternVL with any number of frames, one item for each frame in the order of the prompt."""

        @functools.cached_property
        def num_frames(self) -> int | None:
            return frames_wanted(self.video_config)

        def check_options(self) -> None:
            _ = self.num_frames

        placeholder_words = ("<image>", "<video>")
        adds_placeholders = True  # SGLang's own: a prompt that has too few

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """An image of `<img>`, its tokens and `</img>` as `<image>`.

            Raises:
                ValueError: for the frames of a video, which nothing tells from those of another.
            """
            if any(piece.name == self.VIDEO_CONTEXT_TOKEN for piece in pieces):
                raise ValueError("input_ids: expected <video> for each video, got tokens of its frames")
            out: list[Piece] = []
            for piece in pieces:
                if piece.name == self.IMG_CONTEXT and out and out[-1].name in (self.IMG_START, self.IMG_CONTEXT):
                    out[-1] = piece
                elif piece.name == self.IMG_END and out and out[-1].name == self.IMG_CONTEXT:
                    out[-1] = Piece(name=self.IMAGE_PLACEHOLDER_TOKEN)
                else:
                    out.append(piece)
            if any(piece.name in (self.IMG_START, self.IMG_END) for piece in out):
                raise ValueError("input_ids: expected <img> and </img> around the tokens of an image, and nowhere else")
            return out

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            images = prompt.count(self.IMAGE_PLACEHOLDER_TOKEN) + prompt.count(self.IMG_CONTEXT)
            return {"image": images, "video": prompt.count(self.VIDEO_PLACEHOLDER_TOKEN)}

        async def process_qwen_mm_data_async(
            self, image_data: Any, input_text: Any, request_obj: Any, **kwargs: Any
        ) -> Any:
            if self.num_frames is not None:
                kwargs.setdefault("video_num_frames", self.num_frames)
            # SGLang's chat template writes images as the one, its processor counts the other: it would add a
            # second placeholder for each image, and leave it in the prompt as text.
            prompt = (input_text or "").replace(self.IMG_CONTEXT, self.IMAGE_PLACEHOLDER_TOKEN)
            if mends.active("placeholder_words"):
                # SGLang's model counts these for the ends of an image, wherever they come from.
                prompt = re.sub("</?img>", lambda word: verbatim.words(word[0]), prompt)
            output = await super().process_qwen_mm_data_async(
                image_data=image_data, input_text=prompt, request_obj=request_obj, **kwargs
            )
            if output is not None:
                videos = len(getattr(request_obj, "video_data", None) or ())
                items = [part for item in output.mm_items for part in _frames_of(item, videos)]
                output.mm_items = sorted(items, key=lambda item: item.offsets[0])
            return output

    return MMInferInternVLProcessor


def _frames_of(item: Any, videos: int) -> Iterator[Any]:
    """An item for each frame of an item that holds all frames of `videos` videos; any other item as it is.

    SGLang samples all videos of a prompt to the same number of frames, and each frame is a span of tokens and a
    row of the feature.
    """
    count = len(item.offsets or ())
    if not item.is_video() or not videos or count % videos or len(item.feature) != count:
        yield item
        return
    numbers = fresh_numbers(videos)
    for i, offset in enumerate(item.offsets):
        frame = copy.copy(item)
        frame.feature = item.feature[i : i + 1]
        frame.offsets = [offset]
        frame.model_specific_data = {**item.model_specific_data, VIDEO_KEY: numbers[i // (count // videos)]}
        frame.hash = None
        yield frame
