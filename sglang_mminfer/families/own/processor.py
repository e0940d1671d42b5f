"""The processor that these families share. SGLang loads the media; here they become one item for each raster.

A video is an item for each frame and not one item, because SGLang keeps the embedding of an item from one prefill chunk
to the next only if it fits its cache: a long video in one item would be encoded again for every chunk.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens

from sglang_mminfer.families.own.prompt import IMAGE, VIDEO, Medium, Placed, fill_id, lay_out, split

_MODALITIES = {"image": Modality.IMAGE, "video": Modality.VIDEO}


class MediaProcessor(BaseMultimodalProcessor):
    """A family implements `image` and `video`, which cut media into rasters; everything else is here.

    Attributes:
        VIDEO_OPTIONS: names and types that `--mm-process-config '{"video": {...}}'` may give.
        REQUEST_OPTIONS: names that a request may give of an "image" or a "video"; see `mends.options`.
    """

    models: ClassVar[list[type]] = []  # SGLang's own scan finds none; see registration.py
    VIDEO_OPTIONS: ClassVar[Mapping[str, type | tuple[type, ...]]] = {}
    REQUEST_OPTIONS: ClassVar[Mapping[str, frozenset[str]]] = {}

    # A prompt is cut at these words. The id of media tokens does not mark media: other tokens may have it, too.
    placeholder_words: ClassVar[tuple[str, ...]] = (IMAGE, VIDEO)
    media_tokens: ClassVar[Mapping[int, tuple[str, ...]]] = {}

    # Text is tokenized here, around the media, and once.
    generates_input_ids_from_raw_prompt = True
    # All of this runs in SGLang's IO threads, so there is no processor to clone.
    auto_mm_processor_worker_num = 1
    # Frames are resized on the CPU.
    video_preprocessing_device = "cpu"
    gpu_image_decode = False

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.fill = fill_id(hf_config, self._tokenizer)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=IMAGE, video_token=VIDEO, image_token_id=self.fill, video_token_id=self.fill
        ).build(_processor)
        # A copy for one thread at a time, because two threads cannot use one fast tokenizer.
        self._encoder, self._encoding = copy.deepcopy(self._tokenizer), threading.Lock()
        _check_options("video", self.video_config, self.VIDEO_OPTIONS)
        _check_options("image", self.image_config, {})

    @abstractmethod
    def image(self, picture: Any) -> Sequence[Medium]:
        """A PIL image as one medium, or as several views of different shapes, one behind the other."""

    @abstractmethod
    def video(self, video: Any) -> Medium:
        """A video as one medium.

        Args:
            video: SGLang's decoder, or the frames themselves; see `frames.decode`.

        Raises:
            ValueError: if it cannot be decoded. The client gets the message.
        """

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: Any, request_obj: Any, *args: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        """SGLang calls this for each request; the result holds its token ids and items.

        Raises:
            ValueError: for media and placeholders that do not match, and for media that cannot be decoded.
        """
        video_data = getattr(request_obj, "video_data", None)
        if audio_data:
            raise ValueError("audio: this model takes images and video only")
        for name, given in (("image", image_data), ("video", video_data)):
            if any(self._is_preprocessed_input(entry) for entry in given or ()):
                raise ValueError(f"{name}: expected files, URLs or frames, got a processor's output or embeddings")
        text = input_text if isinstance(input_text, str) else self._tokenizer.decode(input_text)
        pieces = split(text, len(image_data or ()), len(video_data or ()))
        loaded = await self.load_mm_data(
            prompt=text,
            multimodal_tokens=self.mm_tokens,
            image_data=list(image_data or ()),
            video_data=list(video_data or ()),
        )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.io_executor, self._assemble, pieces, loaded.images, loaded.videos)

    def _assemble(
        self, pieces: Sequence[str], images: Sequence[Any], videos: Sequence[Any]
    ) -> MultimodalProcessorOutput:
        pictures, films = iter(images), iter(videos)
        run: list[str | Medium] = []
        for piece in pieces:
            if piece == IMAGE:
                run.extend(self.image(next(pictures)))
            elif piece == VIDEO:
                run.append(self.video(next(films)))
            else:
                run.append(piece)
        ids, placed = lay_out(run, self._encode, self.fill)
        return MultimodalProcessorOutput(
            input_ids=ids,
            mm_items=[item_of(raster) for raster in placed],
            im_token_id=self.fill,
            video_token_id=self.fill,
        )

    def _encode(self, text: str) -> list[int]:
        with self._encoding:
            return list(self._encoder.encode(text, add_special_tokens=False))


def item_of(placed: Placed) -> MultimodalDataItem:
    """SGLang's item of one raster and its tokens in the prompt."""
    data = placed.data()
    return MultimodalDataItem(
        modality=_MODALITIES[placed.kind],
        feature=placed.raster.pixels,
        offsets=[(placed.start, placed.start + placed.raster.tokens - 1)],
        model_specific_data=data,
        hash=_hash(placed),
    )


def _hash(placed: Placed) -> int:
    """64 bits of a hash of everything that decides the embedding: pixels, layout and modality.

    The number of a frame in its video is left out, so a frame that comes twice is encoded once.
    """
    raster = placed.raster
    layout = (placed.kind, raster.rows, raster.cols, raster.tail, sorted(raster.values.items()))
    digest = hashlib.sha256(repr((layout, tuple(raster.pixels.shape))).encode())
    digest.update(raster.pixels.contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8], "big")


def _check_options(kind: str, given: Mapping[str, Any], known: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, value in given.items():
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise ValueError(f"--mm-process-config: {kind}.{name}: this model knows {expected}")
        if isinstance(value, bool) != (known[name] is bool) or not isinstance(value, known[name]):
            raise ValueError(f"--mm-process-config: {kind}.{name}: expected {_named(known[name])}, got {value!r}")


def _named(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
