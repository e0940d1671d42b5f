"""GLM-4.1V, GLM-4.5V and GLM-4.6V.

A video is one span of placeholders for each temporal patch. Between two of them stand `<|end_of_image|>`, the second
of the patch as text, and `<|begin_of_image|>`: these tokens are members of the video without a cell. The tokens that
begin and end the video, and the second of its last patch, are text. An image is one span.

A frame has the placeholder of a picture, `<|image|>`; `<|video|>` stands only in prompts that are not expanded.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglang_mminfer import mends
from sglang_mminfer.families.grid_thw import FrameSpanReader, GridFamily
from sglang_mminfer.mends import options, videos
from sglang_mminfer.mends.token_ids import Piece


class Glm4V(GridFamily):
    """GLM-4.1V, GLM-4.5V and GLM-4.6V: dense models and those with experts."""

    model_types = ("glm4v", "glm4v_moe")
    why = "A video is a span for each frame, with its second as text behind it and the placeholder of a picture."
    processors = ("Glm4vImageProcessor",)
    reader = FrameSpanReader

    def processor(self, base: type, hf_config: Any) -> type | None:
        return _processor_class(base) if hf_config.model_type in self.model_types else None


@functools.cache
def _processor_class(base: Any) -> type:
    class MMInferGlm4VProcessor(base):
        """Options of a video are applied or refused by name, and expanded media are recognised in ids."""

        REQUEST_OPTIONS: ClassVar[dict[str, frozenset[str]]] = {
            "image": frozenset(),
            "video": frozenset({"fps", "max_frames", "max_tokens_per_frame"}),
        }

        def placeholders_in(self, prompt: str) -> dict[str, int]:
            return {"image": prompt.count(self.IMAGE_TOKEN), "video": prompt.count(self.VIDEO_TOKEN)}

        @property
        def media_tokens(self) -> Mapping[int, tuple[str, ...]]:
            """SGLang names only `<|image|>` as a token that stands for media."""
            around = (
                *(self.IMAGE_START_TOKEN_ID, self.IMAGE_END_TOKEN_ID),
                *(self.VIDEO_START_TOKEN_ID, self.VIDEO_END_TOKEN_ID),
            )
            return {self.IM_TOKEN_ID: ("image",), self.VIDEO_TOKEN_ID: ("video",), **dict.fromkeys(around, ())}

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """The pieces with one placeholder for each medium, if a client sent back the ids of an answer."""
            return collapsed(pieces, self._tokenizer)

        async def process_mm_data_async(
            self, image_data: Any, input_text: Any, request_obj: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if mends.active("video_options") and (entries := getattr(request_obj, "video_data", None)):
                request_obj = copy.copy(request_obj)
                request_obj.video_data = [self._with_options(video) for video in entries]
            return await super().process_mm_data_async(image_data, input_text, request_obj, *args, **kwargs)

        def _with_options(self, video: Any) -> Any:
            """An entry with the options that SGLang's class heeds, around an entry with the file and all other options.

            SGLang's class reads the options of the outer entry, and loads the inner one.

            Raises:
                ValueError: for an option that this family does not have, by name.
            """
            from sglang.srt.utils import VideoData

            if self._is_preprocessed_input(video):
                return video
            source, wanted = options.of(video, type(self), "video")
            names = self.REQUEST_OPTIONS["video"] & wanted.keys()
            if videos.frames_in(source) is not None:
                names -= {"fps"}  # with single frames it is the rate at which they were taken
            heeded = {name: wanted.pop(name) for name in names}
            return VideoData(url=VideoData(url=source, preprocess_kwargs=wanted), preprocess_kwargs=heeded)

    return MMInferGlm4VProcessor


_BEGIN, _IMAGE, _END = (Piece(name=f"<|{name}|>") for name in ("begin_of_image", "image", "end_of_image"))
_BEGIN_VIDEO, _VIDEO, _END_VIDEO = (Piece(name=f"<|{name}|>") for name in ("begin_of_video", "video", "end_of_video"))
_SECOND = re.compile(r"\d+|\d+\.\d seconds")
"""The second of a frame: as GLM-4.1V and GLM-4.5V write it, or as GLM-4.6V does."""


def collapsed(pieces: Sequence[Piece], tokenizer: Any) -> list[Piece]:
    """The pieces of a prompt with one placeholder for each picture and each video.

    A processor replaces `<|video|>` by a picture and its second for each temporal patch, and a picture's `<|image|>` by
    one for each token. Pieces that do not look like that stay as they are.
    """
    out: list[Piece] = []
    at = 0
    while at < len(pieces):
        stop = at
        if out[-1:] == [_BEGIN_VIDEO]:
            while (behind := _behind_frame(pieces, stop, tokenizer)) is not None:
                stop = behind
        if stop > at and pieces[stop : stop + 1] == [_END_VIDEO]:
            out.append(_VIDEO)
            at = stop
        else:
            if not (pieces[at] == _IMAGE and out[-2:] == [_BEGIN, _IMAGE]):
                out.append(pieces[at])
            at += 1
    return out


def _behind_frame(pieces: Sequence[Piece], at: int, tokenizer: Any) -> int | None:
    """The index of the piece behind a frame and its second, if they begin at `at`; else None."""
    stop = at + 1
    while pieces[stop : stop + 1] == [_IMAGE]:
        stop += 1
    if pieces[at : at + 1] != [_BEGIN] or stop == at + 1 or pieces[stop : stop + 1] != [_END]:
        return None
    second = pieces[stop + 1 : stop + 2]
    if not second or not _SECOND.fullmatch(tokenizer.decode(second[0].ids)):
        return None
    return stop + 2
