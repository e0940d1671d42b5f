"""Tiny LLaVA-OneVision and LLaVA-NeXT-Video as transformers has them, and transformers' own classes as the oracle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from families import Family, Prompt, with_options
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle, Message, split_messages
from sglang_mminfer.testing.oracle_media import Video, open_video, read_picture

SEED = 0
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 16, 2
HIDDEN = HEADS * HEAD_DIM
VISION_HIDDEN, VISION_DEPTH = 64, 2
PATCH = 14

ONEVISION_SIZE = 5 * PATCH  # released: 27 patches a side, odd as here
NEXT_SIZE = 6 * PATCH  # released: 24 patches a side

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
CHAT_TEMPLATE = tiny_model.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>"
)


def make_onevision(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random LLaVA-OneVision to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "llava_onevision"}, lambda fresh: _write(fresh, _onevision))


def make_next_video(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random LLaVA-NeXT-Video to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "llava_next_video"}, lambda fresh: _write(fresh, _next_video))


def _write(path: Path, parts: Any) -> None:
    tokenizer = tiny_model.make_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE)
    rows = tiny_model.vocabulary_rows(tokenizer)
    pad, end, image, video = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<image>", "<video>"])
    text = {
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": pad,
        "eos_token_id": end,
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_hidden_layers": VISION_DEPTH,
        "num_attention_heads": 2,
        "patch_size": PATCH,
    }
    shared = {"image_token_index": image, "video_token_index": video, "tie_word_embeddings": False}
    processor, model = parts(tokenizer, text, vision, shared)
    tiny_model.save_all(model, processor, tokenizer, rows, SEED, path)


def _pinpoints(size: int, most: int) -> list[list[int]]:
    return [[rows * size, cols * size] for rows in range(1, most + 1) for cols in range(1, most + 1)]


def _onevision(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], shared: dict[str, Any]) -> Any:
    import transformers

    size = {"height": ONEVISION_SIZE, "width": ONEVISION_SIZE}
    # As released: up to more tiles than the 9 to which their features are then shrunk.
    pinpoints = _pinpoints(ONEVISION_SIZE, 4)
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(ONEVISION_SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=CHAT_TEMPLATE,
    )
    config = transformers.LlavaOnevisionConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config={
            **vision,
            "model_type": "siglip_vision_model",
            "image_size": ONEVISION_SIZE,
            "vision_use_head": False,
        },
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=pinpoints,
        **shared,
    )
    return processor, transformers.LlavaOnevisionForConditionalGeneration(config)


def _next_video(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], shared: dict[str, Any]) -> Any:
    import transformers

    crop = {"height": NEXT_SIZE, "width": NEXT_SIZE}
    pinpoints = [[rows * NEXT_SIZE, cols * NEXT_SIZE] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    processor = transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": NEXT_SIZE}, crop_size=crop, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": NEXT_SIZE}, crop_size=crop),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = transformers.LlavaNextVideoConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={
            **vision,
            "model_type": "clip_vision_model",
            "image_size": NEXT_SIZE,
            "projection_dim": VISION_HIDDEN,
        },
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        **shared,
    )
    return processor, transformers.LlavaNextVideoForConditionalGeneration(config)


class LlavaOracle(HFOracle):
    """Transformers' own class, shown every frame of a file, or as many as the server is told to take."""

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        rendered, images, videos = split_messages(messages)
        text = self.processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [read_picture(url) for url in images]
        if videos:
            arguments["videos"] = [self._frames(open_video(url)) for url in videos]
            arguments["videos_kwargs"] = {"do_sample_frames": False}
        return dict(self.processor(text=text, return_tensors="pt", **arguments))

    def _frames(self, video: Video) -> torch.Tensor:
        """uint8 [frames, 3, height, width], from the first to the last."""
        total = len(video)
        wanted = np.linspace(0, total - 1, self.config.get("video", {}).get("num_frames", total))
        return torch.from_numpy(video.frames([int(i) for i in wanted])).permute(0, 3, 1, 2)


FAMILIES = (
    Family(
        name="llava_onevision",
        title="LLaVA-OneVision (Hugging Face)",
        architecture="LlavaOnevisionForConditionalGeneration",
        maker=make_onevision,
        oracle=with_options(LlavaOracle),
        oracle_title="transformers",
        served_by="fallback",
        cached_turns=False,  # SGLang turns both off for media in its Transformers fallback
        chunked_prefill=False,
        long_video=(400, 64, 64, 24),
        long_videos=8,
        video_options={"num_frames": 64},  # transformers takes several videos only of one length
        prompt=Prompt("transformers_auto", "<image>", "<video>", ("image", "video")),
    ),
    Family(
        name="llava_next_video",
        title="LLaVA-NeXT-Video (Hugging Face)",
        architecture="LlavaNextVideoForConditionalGeneration",
        maker=make_next_video,
        oracle=with_options(LlavaOracle),
        oracle_title="transformers",
        served_by="fallback",
        cached_turns=False,
        chunked_prefill=False,
        long_video=(400, 64, 64, 24),
        long_videos=12,
        video_options={"num_frames": 64},
    ),
)
