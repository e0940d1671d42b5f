"""LLaVA in the form of its original code, as SGLang serves it by itself (`sglang/srt/models/llava.py`), mended.

SGLang lays these prompts out in the scheduler, by a rule that is not always what its model then does: the newline
behind a picture replaces the token after it, more than 16 pictures overwrite the text behind them, and of several
pictures only the first is seen unless every part of the request says "modalities": "multi-images". Here the processor
lays the prompt out, from what the model will do with each picture, so that every item knows its tokens, as in other
families.

Classes are made when SGLang asks for those of such a model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import re
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from sglang_mminfer import releases
from sglang_mminfer.mends import pictures
from sglang_mminfer.modality.items import KEY, fresh_numbers

if TYPE_CHECKING:
    import torch

Rasters = list[tuple[int, int, int]]
"""(rows, cols, tail) of each raster of a picture: `tail` tokens without a cell stand behind it."""


# ---- layout ------------------------------------------------------------------------------------------------


def side_of(tower: str) -> tuple[int, int]:
    """Patches and pixels along a side of a picture in a vision tower, from its own config.

    Raises:
        ValueError: for a tower that SGLang does not load either.
    """
    import transformers

    # SGLang tells the towers apart by these parts of their names.
    if "clip" in tower:
        config: Any = transformers.CLIPVisionConfig.from_pretrained(tower)
    elif "siglip" in tower:
        config = transformers.SiglipVisionConfig.from_pretrained(tower)
    else:
        raise ValueError(f"mm_vision_tower: expected a name with clip or siglip in it, got {tower!r}")
    return config.image_size // config.patch_size, config.image_size


def rasters_of(
    size: tuple[int, int], side: int, pixels: int, aspect: str | None, merge: str, pinpoints: Any, video: bool
) -> Rasters:
    """The rasters that SGLang's model makes of a picture.

    Args:
        size: width and height of the picture.
        side, pixels: the side of a picture in the tower, as `side_of` gives it.
        aspect: how it was cut up: "anyres", "anyres_max_N", or anything else for not at all.
        merge: `mm_patch_merge_type` of the config.
        pinpoints: `image_grid_pinpoints` of the config.
        video: whether it is a frame, which is pooled.

    Raises:
        ValueError: for a picture of which nothing would be left.
    """
    from sglang.srt.multimodal.mm_utils import get_anyres_image_grid_shape, unpad_image_shape

    if not merge.startswith("spatial"):
        return [(side, side, 0)]
    newline = int("unpad" in merge)
    if video:
        half = math.ceil(side / 2)
        return [(half, half, newline)]
    if aspect is None or "anyres" not in aspect:
        return [(side, side, newline)]
    across, down = get_anyres_image_grid_shape(size, pinpoints, pixels)
    rows, cols = down * side, across * side
    if newline:
        rows, cols = unpad_image_shape(rows, cols, size)
        if most := re.match(r"anyres_max_(\d+)", aspect):
            excess = math.sqrt(rows * cols / (int(most[1]) * side**2))
            if excess > 1.1:
                rows, cols = int(rows // excess), int(cols // excess)
                if not rows or not cols:  # SGLang's model would fail, and its scheduler with it
                    raise ValueError(
                        f"expected a picture with less difference between its sides, got {size[0]} x {size[1]}"
                    )
    first = [(side, side, 0)]
    # The tiles of a very wide picture may have no rows left; those of a very high one only the newlines of their rows.
    return [*first, (rows, cols + newline, 0)] if rows * (cols + newline) else first


def lay_out(ids: Sequence[int], image_token: int, lengths: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """A prompt with each placeholder repeated, and where the pictures stand in it: (first, last) of each.

    Raises:
        ValueError: if there are more or fewer placeholders than pictures.
    """
    placeholders = ids.count(image_token)
    if placeholders != len(lengths):
        raise ValueError(
            f"expected a placeholder (token {image_token}, image_token_index of the model's config) for each of "
            f"{len(lengths)} images, got {placeholders}"
        )
    out: list[int] = []
    offsets = []
    next_lengths = iter(lengths)
    for token in ids:
        if token == image_token:
            length = next(next_lengths)
            offsets.append((len(out), len(out) + length - 1))
            out += [token] * length
        else:
            out.append(token)
    return out, offsets


# ---- SGLang's classes --------------------------------------------------------------------------------------


@functools.cache
def processor_class(base: Any) -> type:
    """SGLang's processor class `base` with the mend."""

    class MMInferLlavaImageProcessor(base):
        """The model sees every picture, whatever `modalities` the request names, and items know their tokens."""

        prefer_tokenized_input = True
        REQUEST_OPTIONS: ClassVar[dict[str, frozenset[str]]] = {"image": frozenset()}

        async def process_mm_data_async(
            self, image_data: Any, input_text: Any, request_obj: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if videos := getattr(request_obj, "video_data", None):
                raise ValueError(
                    f"{self.hf_config.architectures[0]} takes images only, got {len(videos)} videos; give frames as "
                    f'images of "modalities": "video"'
                )
            images = list(image_data or ())
            if len(images) > 1 and not {"multi-images", "video"} & set(_words(request_obj.modalities)):
                request_obj.modalities = ["multi-images"] * len(images)
            output = await super().process_mm_data_async(image_data, input_text, request_obj, *args, **kwargs)
            if images and not isinstance(images[0], dict):  # a dict is a picture that the client has processed
                self._place(output, input_text)
            return output

        async def _process_single_image(self, image_data: Any, aspect_ratio: Any, grid_pinpoints: Any) -> Any:
            # SGLang reads the files of this family, and of no other, in a process of its own.
            url = getattr(image_data, "url", image_data)
            if isinstance(url, str) and url.startswith(("http://", "https://")):
                file = await self._fetch_remote_image_bytes(url)
                image_data = dataclasses.replace(image_data, url=file) if hasattr(image_data, "url") else file
            as_file = functools.partial(pictures.as_file, type(self), image_data, squared=aspect_ratio == "pad")
            file = await asyncio.get_running_loop().run_in_executor(self.io_executor, as_file)
            return await super()._process_single_image(file, aspect_ratio, grid_pinpoints)

        @functools.cached_property
        def _side(self) -> tuple[int, int]:
            return side_of(self.hf_config.mm_vision_tower)

        def _place(self, output: Any, prompt: Any) -> None:
            config, (side, pixels) = self.hf_config, self._side
            merge = getattr(config, "mm_patch_merge_type", "flat")
            pinpoints = getattr(config, "image_grid_pinpoints", None)
            lengths = []
            for number, item in zip(fresh_numbers(len(output.mm_items)), output.mm_items):
                data = item.model_specific_data
                # A picture that was cut up has several views; one that came as an object is never cut.
                aspect = data["image_aspect_ratio"] if len(item.feature) > 1 else None
                (size,) = data["image_sizes"]
                rasters = rasters_of(size, side, pixels, aspect, merge, pinpoints, item.is_video())
                data[KEY] = [(number, 0, 1, *raster) for raster in rasters]
                lengths.append(sum(rows * cols + tail for rows, cols, tail in rasters))
            ids = self._processor.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            output.input_ids, offsets = lay_out(ids, config.image_token_index, lengths)
            for item, offset in zip(output.mm_items, offsets):
                item.offsets = [offset]
            output.im_token_id = output.video_token_id = config.image_token_index

    return MMInferLlavaImageProcessor


def _words(modalities: Any) -> list[str]:
    return [modalities] if isinstance(modalities, str) else list(modalities or ())


@functools.cache
def model_class(base: Any) -> type:
    """SGLang's class `base` with pictures where our processor placed them; other pictures are treated as by SGLang."""

    class MMInferLlava(base):
        """SGLang's model in any dtype, with pictures where their items say."""

        def pad_input_ids(self, input_ids: array[int], image_inputs: Any) -> array[int]:
            if not _placed(image_inputs):
                return super().pad_input_ids(input_ids, image_inputs)
            return releases.pad_mm_tokens(input_ids, image_inputs)

        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
            media = forward_batch.mm_inputs
            if media is None or not forward_batch.forward_mode.is_extend():
                return super().forward(input_ids, positions, forward_batch)
            lengths = forward_batch.extend_seq_lens_cpu
            chunks = zip(media, forward_batch.extend_prefix_lens_cpu or [0] * len(lengths), lengths)
            # SGLang would encode all pictures of a prompt for each of its chunks, so it gets only those of the chunk.
            forward_batch.mm_inputs = [_within(one, int(start), int(start + length)) for one, start, length in chunks]
            try:
                return super().forward(input_ids, positions, forward_batch)
            finally:
                forward_batch.mm_inputs = media

        def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
            # SGLang loads the tower in half precision, and fails where the rest was loaded in another dtype.
            dtype = self.multi_modal_projector.linear_1.weight.dtype
            self.vision_tower.to(dtype)
            return super().encode_images(pixel_values.to(dtype))

    MMInferLlava.__name__ = MMInferLlava.__qualname__ = base.__name__
    return MMInferLlava


def _placed(media: Any) -> bool:
    return all(item.offsets for item in media.mm_items)


def _within(media: Any, start: int, stop: int) -> Any:
    """The pictures with tokens in [start, stop) of the prompt, with the fields that SGLang's model reads.

    None if there are none. Media that our processor did not place are returned as they are.
    """
    if media is None or not _placed(media):
        return media
    items = [item for item in media.mm_items if item.offsets[0][0] < stop and item.offsets[0][1] >= start]
    if not items:
        return None
    return SimpleNamespace(
        mm_items=items,
        image_offsets=[item.offsets[0][0] for item in items],
        image_pad_len=[item.offsets[0][1] - item.offsets[0][0] + 1 for item in items],
    )
