"""SGLang's processor of MiniCPM-V 4.6, mended."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from sglang_mminfer.families.counted_frames import count_for, counting_frames
from sglang_mminfer.families.frames import frames_at, length_and_rate
from sglang_mminfer.families.minicpm_v.geometry import merge_of
from sglang_mminfer.families.sampling import each_second, evenly
from sglang_mminfer.mends import options
from sglang_mminfer.mends.token_ids import Piece
from sglang_mminfer.modality.items import KEY, fresh_numbers

FRAMES = 128
"""The most frames of a video, as in the released code, if neither request nor operator says how many."""


@functools.cache
def processor_class(base: Any) -> type:
    """SGLang's class `base` with the mend."""

    class MMInferMiniCPMVProcessor(counting_frames(base)):  # type: ignore[misc]
        """MiniCPM-V with the frames that its released code takes, and slices that know which medium they belong to.

        SGLang's class takes every frame of a file.
        """

        @property
        def tokenizer(self) -> Any:
            """The one that knows the marks of this package (`verbatim`). SGLang's constructor sets another."""
            return self._tokenizer

        @tokenizer.setter
        def tokenizer(self, given: Any) -> None:
            pass

        async def load_mm_data(self, *args: Any, **kwargs: Any) -> Any:
            loaded = await super().load_mm_data(*args, **kwargs)
            loop = asyncio.get_running_loop()
            for i, video in enumerate((loaded and loaded.videos) or ()):
                loaded.videos[i] = await loop.run_in_executor(self.io_executor, self._frames, video)
            return loaded

        def _frames(self, video: Any) -> Sequence[Any]:
            """The frames of a video that the model is shown, each uint8 [height, width, 3].

            Raises:
                ValueError: if the file has no frames or breaks off, or for more frames than a request may ask for.
            """
            wanted = options.on(video)
            total, rate = length_and_rate(video)
            count = count_for(video, self.num_frames or FRAMES)
            if self.num_frames or wanted.keys() & {"num_frames", "fps"}:
                indices = evenly(total, rate, count=count).indices
            else:
                indices = each_second(total, rate, most=count).indices
            return frames_at(video, indices, f"{len(indices)} frames")

        def _build_items(
            self, ids: Any, token: int, media: Any, modality: Any, image_processor: Any = None, /
        ) -> list[Any]:
            if image_processor is None:  # up to SGLang 0.5.22 nothing says which slices belong to one medium
                return super()._build_items(ids, token, media, modality)
            items = super()._build_items(ids, token, media, modality, image_processor)
            merge = merge_of(image_processor.pad_divisor)
            sizes = [[(rows // merge, cols // merge) for rows, cols in patches] for _, patches, _ in media]
            for item, place in zip(items, places(sizes), strict=True):
                item.model_specific_data[KEY] = [place]
            return items

        @property
        def media_tokens(self) -> Mapping[int, tuple[str, ...]]:
            around = (self._tokenizer.convert_tokens_to_ids(token) for token in _AROUND)
            media = {self.image_token_id: ("image",), self.video_token_id: ("video",)}
            return {**dict.fromkeys(around, ()), **media}

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """The pieces with one placeholder for each medium, if a client sent back the ids of an answer."""
            return collapsed(pieces)

    return MMInferMiniCPMVProcessor


def places(media: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, ...]]:
    """The `Place` of each raster, from rows and columns of the rasters of each medium, in their order.

    Rasters of a medium that have one size and stand one behind the other belong together.
    """
    runs = [(size, len(list(run))) for sizes in media for size, run in groupby(sizes)]
    return [
        (number, frame, frames, rows, cols, 0)
        for number, ((rows, cols), frames) in zip(fresh_numbers(len(runs)), runs)
        for frame in range(frames)
    ]


_AROUND = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
_IMAGE, _IMAGE_END, _SLICE, _SLICE_END, _ID, _ID_END = (Piece(name=token) for token in _AROUND)
_PLACEHOLDERS = tuple(Piece(name=f"<|{kind}_pad|>") for kind in ("image", "video"))


def collapsed(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of a prompt with one placeholder for each picture and each video.

    A processor replaces a placeholder by the medium's number between `<image_id>` and `</image_id>`, and thumbnails and
    slices of its tokens. Pieces that do not look like that stay as they are.
    """
    out: list[Piece] = []
    at = 0
    while at < len(pieces):
        numbered = at + 2 < len(pieces) and pieces[at] == _ID and pieces[at + 1].ids and pieces[at + 2] == _ID_END
        placeholder, stop = _rasters(pieces, at + 3) if numbered else (None, at)
        if placeholder is not None:
            out.append(placeholder)
            at = stop
        else:
            out.append(pieces[at])
            at += 1
    return out


def _rasters(pieces: Sequence[Piece], at: int) -> tuple[Piece | None, int]:
    """The placeholder of the medium whose thumbnails and slices begin at `at` and the index behind them; or None."""
    placeholder: Piece | None = None
    stop = at
    while True:
        between = stop
        if pieces[stop - 1] == _SLICE_END and pieces[stop : stop + 1] and pieces[stop].ids:
            between += 1  # a line break between two rows of slices
        opened = pieces[between : between + 1]
        inside = pieces[between + 1 : between + 2]
        if opened == [_SLICE] and placeholder is not None:
            end = _SLICE_END
        elif opened == [_IMAGE] and between == stop:
            end = _IMAGE_END
        else:
            return placeholder, stop
        if not inside or inside[0] not in _PLACEHOLDERS or placeholder not in (None, inside[0]):
            return placeholder, stop
        behind = between + 2
        while pieces[behind : behind + 1] == inside:
            behind += 1
        if pieces[behind : behind + 1] != [end]:
            return placeholder, stop
        placeholder, stop = inside[0], behind + 1
