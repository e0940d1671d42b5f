"""SGLang's processor of InternVL, mended."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sglang_mminfer import mends
from sglang_mminfer.families.counted_frames import VIDEO_OPTIONS, counting_frames
from sglang_mminfer.families.frames import frames_at
from sglang_mminfer.mends import options, verbatim
from sglang_mminfer.mends.token_ids import Piece
from sglang_mminfer.modality.items import KEY, fresh_numbers

if TYPE_CHECKING:
    import torch

TILE = 448
"""Pixels along a side of a tile. SGLang cuts tiles of this size whatever a config says."""


@dataclass
class _Medium:
    """A picture or a frame as tiles: bfloat16 [tiles, 3, TILE, TILE]."""

    tiles: torch.Tensor
    video: int | None = None
    """The number of the video that a frame belongs to; None for a picture."""


@functools.cache
def processor_class(base: Any) -> type:
    """SGLang's class `base` with the mend."""

    class MMInferInternVLProcessor(counting_frames(base)):  # type: ignore[misc]
        """InternVL with any number of frames, one item for each frame in the order of the prompt.

        SGLang takes equally many frames of all videos of a prompt, and makes all of them one item. SGLang's code still
        cuts the tiles, but in a thread, so that other requests do not wait for it.
        """

        REQUEST_OPTIONS: ClassVar[dict[str, frozenset[str]]] = {
            "image": frozenset({"max_dynamic_patch"}),
            "video": VIDEO_OPTIONS | {"max_dynamic_patch"},
        }

        placeholder_words = ("<image>", "<video>")
        adds_placeholders = True  # as SGLang's class does, to a prompt that has too few

        def collapse_media(self, pieces: list[Piece], counts: dict[str, int]) -> list[Piece]:
            """The pieces with `<image>` in place of an image's `<img>`, tokens and `</img>`.

            Raises:
                ValueError: for frames: nothing tells to which video a frame belongs.
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
            # SGLang's chat template writes images as IMG_CONTEXT, and its processor counts IMAGE_PLACEHOLDER_TOKEN: it
            # would add a second placeholder for each image, and leave one of the two in the prompt as text.
            prompt = (input_text or "").replace(self.IMG_CONTEXT, self.IMAGE_PLACEHOLDER_TOKEN)
            if mends.active("placeholder_words"):
                # SGLang's model takes these words for the ends of an image, wherever they come from.
                prompt = re.sub("</?img>", lambda word: verbatim.words(word[0]), prompt)
            videos = getattr(request_obj, "video_data", None) or []
            image, video = self.IMAGE_PLACEHOLDER_TOKEN, self.VIDEO_PLACEHOLDER_TOKEN
            prompt = self._ensure_placeholders_before_assistant(prompt, image, len(image_data or ()))
            prompt = self._ensure_placeholders_before_assistant(prompt, video, len(videos))
            if videos and not self.video_token_id:
                raise ValueError(f"video: SGLang knows no placeholder for frames of a {self.llm_arch}")
            loaded = await self.load_mm_data(
                prompt=prompt, image_data=image_data, video_data=videos, multimodal_tokens=self.mm_tokens
            )
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.io_executor, self._assemble, loaded, request_obj, kwargs)

        def _assemble(self, loaded: Any, request: Any, given: dict[str, Any]) -> Any:
            """Ids and items of a request whose media are loaded.

            Raises:
                ValueError: if a video cannot be decoded, or there are more or fewer placeholders than media.
            """
            from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput

            usual = self._tiles_wanted("image", request, given, self.IMAGE_MAX_NUM)
            pictures = [
                _Medium(self._tiles(image, options.on(image).get("max_dynamic_patch", usual), thumbnail=True))
                for image in loaded.images
            ]
            films = self._films(loaded, sum(len(picture.tiles) for picture in pictures), request, given)
            text, media = self._written(loaded.input_text, pictures, films)
            ids = self.tokenizer(text, return_tensors="pt")["input_ids"].flatten()
            spans = sorted(
                span
                for token in (self.img_context_token_id, self.video_token_id)
                if token is not None
                for span in self.get_mm_items_offset(input_ids=ids, mm_token_id=token)
            )
            if len(spans) != len(media):
                raise ValueError(f"prompt: expected {len(media)} pictures and frames in it, found {len(spans)}")
            return MultimodalProcessorOutput(
                input_ids=ids.tolist(),
                mm_items=[
                    MultimodalDataItem(
                        modality=Modality.IMAGE if one.video is None else Modality.VIDEO,
                        feature=one.tiles,
                        offsets=[span],
                        model_specific_data=data,
                    )
                    for one, span, data in zip(media, spans, self._placed(media, films), strict=True)
                ],
                im_start_id=self.img_start_token_id,
                im_end_id=self.img_end_token_id,
                im_token_id=self.img_context_token_id,
                video_token_id=self.video_token_id,
            )

        def _placed(self, media: Sequence[_Medium], films: Sequence[Sequence[_Medium]]) -> Iterator[dict[str, Any]]:
            """The `model_specific_data` of each medium's item: for a frame, which tiles of its video it holds."""
            side = math.isqrt(self.num_image_token)
            numbers = fresh_numbers(len(films))
            tiles = [sum(len(frame.tiles) for frame in film) for film in films]
            next_tile = [itertools.count() for _ in films]
            for one in media:
                if (video := one.video) is None:
                    yield {}
                else:
                    yield {
                        KEY: [(numbers[video], next(next_tile[video]), tiles[video], side, side, 0) for _ in one.tiles]
                    }

        def _tiles_wanted(self, kind: str, request: Any, given: dict[str, Any], usual: int) -> int:
            """The most tiles of a picture or frame: as the request says, else SGLang's arguments, else `usual`."""
            names = (f"{kind}_max_dynamic_patch", "max_dynamic_patch")
            values = [getattr(request, name, None) for name in names] + [given.get(name) for name in names]
            counts = [int(value) for value in values if value]
            return max(1, *counts[:1]) if counts else usual

        def _tiles(self, picture: Any, most: int, *, thumbnail: bool) -> torch.Tensor:
            """Tiles of a PIL image, or an array [height, width, 3] of bytes."""
            import numpy as np
            import torch
            from sglang.srt.utils import get_device

            device = get_device()
            pixels = picture if isinstance(picture, torch.Tensor) else torch.from_numpy(np.array(picture))
            mean, std = self._get_normalize_tensors(device=device)
            values = (pixels.permute(2, 0, 1).to(device).float() / 255.0 - mean) / std
            return self.dynamic_preprocess(values, image_size=TILE, max_num=most, use_thumbnail=thumbnail)

        def _films(self, loaded: Any, tiles: int, request: Any, given: dict[str, Any]) -> list[list[_Medium]]:
            """The frames of each video; fewer than asked for if the context has no room for them."""
            if not loaded.videos:
                return []
            usual = int(self.num_frames or given.get("video_num_frames") or self.DEFAULT_VIDEO_NUM_FRAMES)
            most_tiles = self._tiles_wanted("video", request, given, self.VIDEO_MAX_NUM)
            text = self._token_len(loaded.input_text)
            films = []
            for number, video in enumerate(loaded.videos):
                wanted = options.on(video)
                count = self._resolve_video_num_frames(
                    requested=options.count_of_frames(wanted, usual, len(video), float(video.avg_fps or 0)),
                    num_videos=len(loaded.videos),
                    text_len=text,
                    image_tile_cnt=tiles,
                )
                most = wanted.get("max_dynamic_patch", most_tiles)
                tiles_of = functools.partial(self._tiles, most=most, thumbnail=False)
                films.append([_Medium(tiles_of(frame), number) for frame in _frames(video, count)])
            return films

        def _written(
            self, prompt: str, pictures: Sequence[_Medium], films: Sequence[Sequence[_Medium]]
        ) -> tuple[str, list[_Medium]]:
            """The prompt with a word for each token of a medium, and the media in the order in which they stand in it.

            Raises:
                ValueError: if it has more or fewer placeholders than media.
            """
            image, video = self.IMAGE_PLACEHOLDER_TOKEN, self.VIDEO_PLACEHOLDER_TOKEN
            pieces = re.split(f"({re.escape(image)}|{re.escape(video)})", prompt)
            for placeholder, media in ((image, pictures), (video, films)):
                if pieces.count(placeholder) != len(media):
                    raise ValueError(
                        f"prompt: expected one {placeholder} for each of the {len(media)} given, found "
                        f"{pieces.count(placeholder)}"
                    )
            next_pictures, next_films = iter(pictures), iter(films)
            text, media = "", list[_Medium]()
            for piece in pieces:
                if piece == image:
                    media.append(next(next_pictures))
                    text += self._bracketed(media[-1], self.IMG_CONTEXT)
                elif piece == video:
                    film = next(next_films)
                    media.extend(film)
                    # Released models were trained with this form.
                    shown = (self._bracketed(frame, self.VIDEO_CONTEXT_TOKEN) for frame in film)
                    text += "".join(f"Frame {i}: {frame}\n" for i, frame in enumerate(shown, 1))
                else:
                    text += piece
            return text, media

        def _bracketed(self, medium: _Medium, word: str) -> str:
            return f"{self.IMG_START}{word * (self.num_image_token * len(medium.tiles))}{self.IMG_END}"

    return MMInferInternVLProcessor


def _frames(video: Any, count: int) -> Iterator[Any]:
    """`count` frames from the first to the last, one at a time; a shorter video gives some of them twice.

    Raises:
        ValueError: if the file cannot be decoded.
    """
    import numpy as np

    indices = [0] if count == 1 else np.linspace(0, len(video) - 1, num=count, dtype=int).tolist()
    for index in indices:
        yield frames_at(video, [index], f"frame {index + 1}")[0]
