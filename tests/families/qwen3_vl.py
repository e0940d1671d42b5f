"""Tiny Qwen3-VL and Qwen3-VL-MoE, written by transformers, and transformers' own model as the oracle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from families import Family, Prompt, with_options
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle

SEED = 0
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 2, 8, 2, 32
MROPE_SECTION = [6, 5, 5]  # released models have 24, 20, 20 of 64
VISION_HIDDEN, VISION_DEPTH = 64, 3
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 4, 2, 96
PATCH, MERGE = 16, 2
SMALLEST = 4 * (PATCH * MERGE) ** 2
LARGEST = 768 * (PATCH * MERGE) ** 2


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random Qwen3-VL to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "qwen3_vl"}, lambda fresh: _write(fresh, moe=False))


def make_moe(path: str | os.PathLike[str]) -> Path:
    """The same with experts: Qwen3-VL-MoE."""
    return tiny_model.make_checkpoint(path, {"arch": "qwen3_vl_moe"}, lambda fresh: _write(fresh, moe=True))


def image_processor() -> Any:
    """That of all models with this vision tower."""
    import transformers

    return transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": SMALLEST, "longest_edge": LARGEST},
        patch_size=PATCH,
        merge_size=MERGE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def text_config(ids: Mapping[str, int], rows: int, moe: bool) -> dict[str, Any]:
    """The part of the config that is the language model's.

    Args:
        ids: of the special tokens.
        rows: of the token embedding.
    """
    text: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 65536,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": MROPE_SECTION,
            "mrope_interleaved": True,
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    if moe:
        text |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "moe_intermediate_size": EXPERT_WIDTH,
        }
    return text


def vision_config(width: int, deepstack: Sequence[int] = (0, 1)) -> dict[str, Any]:
    """The part of a config that is the vision tower's.

    Args:
        width: of the language model.
        deepstack: the tower's layers whose features go to layers of the language model.
    """
    return {
        "depth": VISION_DEPTH,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(deepstack),
    }


def make_processor() -> Any:
    """Tokenizer, image and video processor as one Qwen3VLProcessor."""
    import transformers

    return transformers.Qwen3VLProcessor(
        image_processor=image_processor(),
        tokenizer=tiny_model.make_tokenizer(),
        # Its sizes are of a whole video, temporal patches included.
        video_processor=transformers.Qwen3VLVideoProcessor(
            size={"shortest_edge": SMALLEST, "longest_edge": 64 * LARGEST}, cap_pixels_per_frame=False
        ),
        chat_template=tiny_model.CHAT_TEMPLATE,
    )


def _write(path: Path, moe: bool) -> None:
    import transformers

    processor = make_processor()
    tokenizer = processor.tokenizer
    rows = tiny_model.vocabulary_rows(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tiny_model.SPECIAL_TOKENS}
    text = text_config(ids, rows, moe) | ({"tie_word_embeddings": False} if moe else {})
    vision = vision_config(HIDDEN)
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    if moe:
        config: Any = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)
        model: Any = transformers.Qwen3VLMoeForConditionalGeneration(config)
    else:
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    tiny_model.save_all(model, processor, tokenizer, rows, SEED, path)
    if moe:
        _lay_out_experts(path / "model.safetensors")


def _lay_out_experts(file: Path) -> None:
    """Turns expert weights to [experts, in, out], as released checkpoints have them.

    Transformers holds them the other way round, turns them as it loads (it sees by their shapes that it has
    to), and writes a model that was not loaded as it holds it.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for name in weights:
        if ".mlp.experts." in name:
            weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, file, metadata={"format": "pt"})


FAMILIES = (
    Family(
        name="qwen3_vl",
        title="Qwen3-VL",
        architecture="Qwen3VLForConditionalGeneration",
        maker=make,
        oracle=with_options(HFOracle),
        oracle_title="transformers",
        one_frame="nframes should in interval",
        video_options={"max_frames": 56},
        prompt=Prompt("qwen_vl", *tiny_model.PLACEHOLDERS, ("image", "video")),
    ),
    Family(
        name="qwen3_vl_moe",
        title="Qwen3-VL-MoE",
        architecture="Qwen3VLMoeForConditionalGeneration",
        maker=make_moe,
        oracle=with_options(HFOracle),
        oracle_title="transformers",
        one_frame="nframes should in interval",
        video_options={"max_frames": 56},
    ),
)
