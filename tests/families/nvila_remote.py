"""Remote code of a tiny NVILA: `families.nvila` copies this file into its checkpoints.

Released NVILA checkpoints bring their config class and their processor along, as code that transformers loads from
the checkpoint's folder (--trust-remote-code). That code is theirs and is not copied. This is written anew and does what
it does, as far as a server can tell: the same names of classes, the same call, the same tokens, tiles and sampling.
How many tokens a tile has is a number in it; here `processor_config.json` says so, because tiny tiles have fewer.

It stands by itself: nothing of this package is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, Qwen2Config, SiglipVisionConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.image_transforms import to_pil_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

MOST_TILES = 12
S2_SCALES = (448, 896, 1344)


class NVILAConfig(PretrainedConfig):
    model_type = "nvila"
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        *,
        text_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        image_token_id: int = -1,
        video_token_id: int = -1,
        **kwargs: Any,
    ) -> None:
        self.text_config = Qwen2Config(**(text_config or {}))
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        super().__init__(**kwargs)


class NVILALiteConfig(NVILAConfig):
    model_type = "nvila_lite"

    def __init__(self, **kwargs: Any) -> None:  # transformers writes one where there is none
        super().__init__(**kwargs)


class _Options(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {}  # type: ignore[var-annotated]  # noqa: RUF012


class NVILAProcessor(ProcessorMixin):
    """Text with a placeholder for each medium, to ids with one for each token of it, and tiles of pixels.

    Args:
        tile_tokens: of one tile, without the line break behind it.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, chat_template: str | None = None, tile_tokens: int = 256
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.tile_tokens = tile_tokens

    def __call__(self, *, text: Any, images: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        options = self._merge_kwargs(_Options, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        pictures = [to_pil_image(image).convert("RGB") for image in images or ()]
        films = [self._sampled(video, options["videos_kwargs"]) for video in videos or ()]
        found: dict[str, Any] = {}
        texts, behind = [text] if isinstance(text, str) else list(text), ""
        runs: list[list[int]] = [[self.tile_tokens] for _ in pictures]
        if len(pictures) == 1:
            tiles, runs, behind, more = self._cut(pictures[0])
            found.update(more, pixel_values=self._pixels(tiles, options))
        elif pictures:
            found["pixel_values"] = self._pixels(pictures, options)
        if films:
            frames = [to_pil_image(frame).convert("RGB") for film in films for frame in film]
            found["pixel_values_videos"] = self._pixels(frames, options)
        spans = {
            self.tokenizer.image_token: runs,
            self.tokenizer.video_token: [[self.tile_tokens] * len(film) for film in films],
        }
        for token, media in spans.items():
            texts = _spread(texts, token, media, behind if token == self.tokenizer.image_token else "")
        encoded = self.tokenizer(texts, **{**options["text_kwargs"], "return_tensors": "pt"})
        newline = self.tokenizer.encode("\n")[0]
        for token, media in spans.items():
            where = (encoded["input_ids"] == self.tokenizer.convert_tokens_to_ids(token)).nonzero()
            ends = torch.tensor([length + 1 for medium in media for length in medium], dtype=torch.int64).cumsum(0) - 1
            encoded["input_ids"][tuple(where[ends].T)] = newline
        return BatchFeature({**encoded, **found})

    def _cut(self, picture: Image.Image) -> tuple[list[Image.Image], list[list[int]], str, dict[str, Any]]:
        """Tiles of a single image, lengths of its spans, the text behind each, and what else the model is given."""
        side = self.image_processor.size["height"]
        ratios = [scale // S2_SCALES[0] for scale in S2_SCALES]
        tiles = [tile for ratio in ratios[:-1] for tile in _tiles(picture, ratio, ratio, side)]
        rows, cols = _shape(picture, ratios[-1] ** 2, side)
        tiles += _tiles(picture, rows, cols, side)
        return tiles, [[self.tile_tokens * rows * cols]], "", {"block_sizes": [(rows, cols)]}

    def _pixels(self, pictures: list[Image.Image], options: dict[str, Any]) -> torch.Tensor:
        return self.image_processor(pictures, **{**options["images_kwargs"], "return_tensors": "pt"})["pixel_values"]

    @staticmethod
    def _sampled(video: Any, options: dict[str, Any]) -> list[Any]:
        if not options.get("do_sample_frames"):
            return list(video)
        last = len(video) - 1
        return [video[round(i)] for i in torch.linspace(0, last, options["num_frames"], dtype=torch.float64).tolist()]


class NVILALiteProcessor(NVILAProcessor):
    def _cut(self, picture: Image.Image) -> tuple[list[Image.Image], list[list[int]], str, dict[str, Any]]:
        side = self.image_processor.size["height"]
        rows, cols = _shape(picture, 1, side)
        tiles = _tiles(picture, rows, cols, side)
        if len(tiles) > 1:
            tiles.append(picture.resize((side, side)))
        return tiles, [[self.tile_tokens] * len(tiles)], "\n", {}


def _spread(texts: list[str], token: str, media: list[list[int]], behind: str) -> list[str]:
    """A placeholder for each token of a span and one for its line break, and what is behind it, for each medium."""
    count = sum(text.count(token) for text in texts)
    if count != len(media):
        raise ValueError(f"text: expected {len(media)} of {token}, got {count}")
    left = iter("".join(token * (length + 1) + behind for length in medium) for medium in media)
    spread = []
    for text in texts:
        first, *rest = text.split(token)
        spread.append(first + "".join(next(left) + part for part in rest))
    return spread


def _tiles(picture: Image.Image, rows: int, cols: int, side: int) -> list[Image.Image]:
    whole = picture.resize((cols * side, rows * side))
    corners = [(col * side, row * side) for row in range(rows) for col in range(cols)]
    return [whole.crop((x, y, x + side, y + side)) for x, y in corners]


def _shape(picture: Image.Image, least: int, side: int) -> tuple[int, int]:
    """Rows and columns of `least` to MOST_TILES tiles that distort the picture least; more if it fills half of them."""
    shapes = [
        (cols, count // cols)
        for count in range(least, MOST_TILES + 1)
        for cols in range(1, count + 1)
        if count % cols == 0
    ]
    best, smallest = (1, 1), float("inf")
    for cols, rows in shapes:
        distortion = abs(picture.width / picture.height - cols / rows)
        larger = picture.width * picture.height > 0.5 * side * side * cols * rows
        if distortion < smallest or (distortion == smallest and larger):
            best, smallest = (rows, cols), distortion
    return best
