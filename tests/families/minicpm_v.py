"""Tiny MiniCPM-V 4.6, written by transformers, and transformers' own model as the oracle.

SGLang resizes pictures as floats, and transformers as bytes unless it is given floats, as here. Everything else of the
processing is transformers' own. The choice of frames is written out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from families import Family, Prompt, qwen3_5
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle, Message, split_messages
from sglang_mminfer.testing.oracle_media import Video, open_video, read_picture

SEED = 0
VISION_HIDDEN, VISION_DEPTH, INSERTED_BEHIND = 64, 3, 1
SIDE = 448  # pixels that a thumbnail or slice has along a side if it is square; SGLang takes no other
MOST_FRAMES = 128

NAMED_TOKENS = {
    **{f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video")},
    **{f"{kind}_start_token": f"<{kind}>" for kind in ("image", "slice", "image_id")},
    **{f"{kind}_end_token": f"</{kind}>" for kind in ("image", "slice", "image_id")},
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
CHAT_TEMPLATE = tiny_model.CHAT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "")


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random MiniCPM-V 4.6 to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "minicpmv4_6"}, _write)


def _processor() -> Any:
    import transformers

    return transformers.MiniCPMV4_6Processor(
        image_processor=transformers.MiniCPMV4_6ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tiny_model.make_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE, NAMED_TOKENS),
        video_processor=transformers.MiniCPMV4_6VideoProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3),
        chat_template=CHAT_TEMPLATE,
    )


def _write(path: Path) -> None:
    import transformers

    processor = _processor()
    tokenizer = processor.tokenizer
    rows = tiny_model.vocabulary_rows(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_hidden_layers": VISION_DEPTH,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
    }
    text = qwen3_5.text_config(ids, rows)
    # Its positions are plain, and SGLang would ask for others if the config had sections for them.
    text["rope_parameters"] = {k: v for k, v in text["rope_parameters"].items() if not k.startswith("mrope")}
    config = transformers.MiniCPMV4_6Config(
        text_config=text,
        vision_config=vision,
        insert_layer_id=INSERTED_BEHIND,
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        tie_word_embeddings=False,
    )
    model: Any = transformers.MiniCPMV4_6ForConditionalGeneration(config)
    tiny_model.save_all(model, processor, tokenizer, rows, SEED, path, qwen3_5.centre)


class Oracle(HFOracle):
    """Transformers' own model, with pictures as floats and a frame of each second."""

    def __init__(self, path: str | os.PathLike[str], video: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.video = dict(video)
        self._film = self.processor.video_processor
        self.processor._process_videos = self._films

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        rendered, images, videos = split_messages(messages)
        text = self.processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [_floats(np.asarray(read_picture(url))) for url in images]
        if videos:
            films = [open_video(url) for url in videos]
            arguments["videos"] = [_floats(film.frames(frames_of(film, self.video))) for film in films]
            arguments["videos_kwargs"] = {"do_sample_frames": False}
        inputs = dict(self.processor(text=[text], return_tensors="pt", **arguments))
        inputs.pop("attention_mask")
        return inputs

    def _films(self, films: list[torch.Tensor], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        """In place of the processor's own, which takes several videos only if they have equally many frames."""
        each = [dict(self._film([film], **kwargs)) for film in films]
        words = [self.processor.replace_video_token(one, video_idx=0, video_token_divisor=16) for one in each]
        pixels = torch.cat([one["pixel_values_videos"] for one in each], dim=-1)
        sizes = torch.cat([one["target_sizes_videos"] for one in each])
        return {"pixel_values_videos": pixels, "target_sizes_videos": sizes}, words


def _floats(pixels: np.ndarray) -> torch.Tensor:
    """[..., 3, height, width] of [..., height, width, 3]."""
    return torch.from_numpy(np.array(pixels)).float().movedim(-1, -3)


def frames_of(film: Video, options: Mapping[str, Any]) -> list[int]:
    """The numbers of the frames that the model is shown, as the released code has it."""
    total, rate = len(film), film.fps
    if "num_frames" in options:
        return [round(place) for place in np.linspace(0, total - 1, options["num_frames"])]
    if total / rate <= MOST_FRAMES:
        return [int(second * rate) for second in range(math.ceil(total / rate))]
    times = [round(tenth * 0.1, 1) for tenth in range(int(total / rate / 0.1))]
    places = np.linspace(0, len(times) - 1, min(MOST_FRAMES, len(times)), dtype=int)
    return [min(int(times[place] * rate), total - 1) for place in places]


FAMILIES = (
    Family(
        name="minicpm_v4_6",
        title="MiniCPM-V 4.6",
        architecture="MiniCPMV4_6ForConditionalGeneration",
        maker=make,
        oracle=Oracle,
        oracle_title="transformers",
        recurrent=True,
        long_video=(64, 160, 160, 1),
        prompt=Prompt("minicpmv4_6", IMAGE, VIDEO, ("image", "video")),
    ),
)
