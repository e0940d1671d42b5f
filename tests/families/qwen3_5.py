"""Tiny Qwen3.5 and Qwen3.5-MoE, written by transformers, and transformers' own model as the oracle.

Qwen3.6 has the same model types and classes. As in released models, three of four layers are gated delta nets, and a
full layer has a gated output, norms of queries and keys, and rotates a quarter of a head.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from families import Family, Prompt, qwen3_vl, with_options
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle

SEED = 0
FULL_LAYERS, INTERVAL = 2, 4
LAYERS = FULL_LAYERS * INTERVAL
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 128, 8, 2, 64  # released models have a HEAD_DIM of 256
MROPE_SECTION = [3, 3, 2]  # released models have 11, 11, 10 of 32
LINEAR_KEY_HEADS, LINEAR_VALUE_HEADS, LINEAR_HEAD_DIM = 4, 8, 32
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 4, 2, 96


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random Qwen3.5 to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "qwen3_5"}, lambda fresh: _write(fresh, moe=False))


def make_moe(path: str | os.PathLike[str]) -> Path:
    """The same with experts: Qwen3.5-MoE."""
    return tiny_model.make_checkpoint(path, {"arch": "qwen3_5_moe"}, lambda fresh: _write(fresh, moe=True))


def text_config(ids: Mapping[str, int], rows: int, moe: bool = False) -> dict[str, Any]:
    """The part of the config that is the language model's.

    Args:
        ids: of the special tokens.
        rows: of the token embedding.
    """
    text: dict[str, Any] = {
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "full_attention_interval": INTERVAL,
        "layer_types": [*["linear_attention"] * (INTERVAL - 1), "full_attention"] * FULL_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "attn_output_gate": True,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": LINEAR_HEAD_DIM,
        "linear_value_head_dim": LINEAR_HEAD_DIM,
        "linear_num_key_heads": LINEAR_KEY_HEADS,
        "linear_num_value_heads": LINEAR_VALUE_HEADS,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 65536,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": MROPE_SECTION,
            "mrope_interleaved": True,
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    text |= (
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "moe_intermediate_size": EXPERT_WIDTH,
            "shared_expert_intermediate_size": EXPERT_WIDTH,
        }
        if moe
        else {"intermediate_size": 2 * HIDDEN}
    )
    return text


def make_config(ids: Mapping[str, int], rows: int, moe: bool) -> Any:
    """The transformers config.

    Args:
        ids: of the special tokens.
        rows: of the token embedding.
    """
    import transformers

    text = text_config(ids, rows, moe)
    vision = qwen3_vl.vision_config(HIDDEN, deepstack=())
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    kind = transformers.Qwen3_5MoeConfig if moe else transformers.Qwen3_5Config
    return kind(text_config=text, vision_config=vision, **tokens)


def _write(path: Path, moe: bool) -> None:
    import transformers

    processor = qwen3_vl.make_processor()
    tokenizer = processor.tokenizer
    rows = tiny_model.vocabulary_rows(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tiny_model.SPECIAL_TOKENS}
    config = make_config(ids, rows, moe)
    kind: Any = transformers.Qwen3_5MoeForConditionalGeneration if moe else transformers.Qwen3_5ForConditionalGeneration
    tiny_model.save_all(kind(config), processor, tokenizer, rows, SEED, path, centre)


@torch.no_grad()
def centre(model: Any) -> None:
    """Changes the weights that mean something else in this architecture than in others.

    A norm of the language model multiplies by 1 + weight, except that of a delta net. The decay of a delta net is
    exp(-exp(A_log) * softplus(...)): its state shall remember tens to hundreds of tokens.
    """
    for name, weight in model.named_parameters():
        if "language_model" in name and re.search(r"norm\.weight$", name) and "linear_attn" not in name:
            weight -= 1
        elif name.endswith("A_log"):
            weight.copy_(weight - 3)


FAMILIES = (
    Family(
        name="qwen3_5",
        title="Qwen3.5, Qwen3.6",
        architecture="Qwen3_5ForConditionalGeneration",
        maker=make,
        oracle=with_options(HFOracle),
        oracle_title="transformers",
        recurrent=True,
        one_frame="nframes should in interval",
        video_options={"max_frames": 56},
        prompt=Prompt("qwen_vl", *tiny_model.PLACEHOLDERS, ("image", "video")),
    ),
    Family(
        name="qwen3_5_moe",
        title="Qwen3.5-MoE, Qwen3.6-MoE",
        architecture="Qwen3_5MoeForConditionalGeneration",
        maker=make_moe,
        oracle=with_options(HFOracle),
        oracle_title="transformers",
        recurrent=True,
        one_frame="nframes should in interval",
        video_options={"max_frames": 56},
    ),
)
