"""A conversation through the parts of a family of our own (`families.own`), without SGLang: ids, embeddings, map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decord
import torch
from PIL import Image
from safetensors.torch import load_file

from families.embedded import Piece
from sglang_mminfer.families.maps import map_from_mm_inputs
from sglang_mminfer.families.own.geometry import PlacedReader
from sglang_mminfer.families.own.prompt import IMAGE, VIDEO, Medium, Placed, lay_out, split
from sglang_mminfer.modality.segments import ModalityMap


class Film:
    """What SGLang's decoder offers, on decord."""

    def __init__(self, path: str) -> None:
        self.reader = decord.VideoReader(path)
        self.avg_fps = self.reader.get_avg_fps()

    def __len__(self) -> int:
        return len(self.reader)

    def get_frames_at(self, indices: Sequence[int]) -> Any:
        return self.reader.get_batch(indices).asnumpy()


@dataclass(frozen=True)
class LaidOut:
    """A prompt: its ids, its rasters, and its map from the items that they become."""

    ids: list[int]
    placed: list[Placed]
    map: ModalityMap

    def equals(self, pieces: Sequence[Piece], encode: Callable[[Placed], torch.Tensor], tokenizer: Any) -> None:
        """Asserts that text and embeddings are those of an oracle."""
        ids: list[int] = []
        media: list[torch.Tensor] = []
        for piece in pieces:
            if isinstance(piece, torch.Tensor):
                media.append(piece)
                ids += [-1] * len(piece)
            else:
                ids += tokenizer.encode(piece, add_special_tokens=False) if isinstance(piece, str) else piece
        got = list(self.ids)
        for one in self.placed:
            got[one.start : one.start + one.raster.tokens] = [-1] * one.raster.tokens
        assert got == ids
        embedded = torch.cat([encode(one) for one in self.placed])
        torch.testing.assert_close(embedded, torch.cat(media), rtol=1e-4, atol=1e-4)


def laid_out(rasters: Any, tokenizer: Any, template: str, messages: Sequence[Any], fill: int) -> LaidOut:
    """The prompt of a conversation whose URLs are paths."""
    parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"]
    images = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    videos = [p["video_url"]["url"] for p in parts if p["type"] == "video_url"]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    run: list[str | Medium] = []
    pictures, films = iter(images), iter(videos)
    for piece in split(text, len(images), len(videos)):
        if piece == IMAGE:
            run.extend(rasters.image(Image.open(next(pictures)).convert("RGB")))
        elif piece == VIDEO:
            run.append(rasters.video(Film(next(films))))
        else:
            run.append(piece)
    ids, placed = lay_out(run, lambda words: tokenizer.encode(words, add_special_tokens=False), fill)
    return LaidOut(ids, placed, map_from_mm_inputs(SimpleNamespace(mm_items=items(placed)), len(ids), PlacedReader()))


def items(placed: Sequence[Placed]) -> list[Any]:
    """What SGLang's items of these rasters look like to the geometry."""
    return [
        SimpleNamespace(
            modality=SimpleNamespace(name=one.kind.upper()),
            offsets=[(one.start, one.start + one.raster.tokens - 1)],
            model_specific_data=one.data(),
        )
        for one in placed
    ]


def loaded(encoder: Any, folders: dict[str, Path]) -> Any:
    """An encoder with a checkpoint's tensors, each by what `own_name` makes of its name behind the folder's prefix."""
    own = dict(encoder.named_parameters())
    left = set(own)
    for prefix, folder in folders.items():
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                if target := encoder.own_name(f"{prefix}{name}"):
                    with torch.no_grad():
                        own[target].copy_(tensor)
                    left.remove(target)
    assert not left
    return encoder.eval()
