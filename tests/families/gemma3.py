"""Tiny Gemma 3, written by transformers, and transformers' own model as the oracle.

SGLang's backends other than Triton let each token of a picture see what is before it, and so does the oracle: it gets
no `token_type_ids`, with which transformers would let them see each other. SGLang's vision tower has QuickGELU whatever
a config says, so this config says the same; released ones name another GELU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from families import Family, Prompt
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle, Message, split_messages
from sglang_mminfer.testing.oracle_media import read_picture

SEED = 0
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 16  # released models have a HEAD_DIM of 256 or 128
HIDDEN = HEADS * HEAD_DIM
FULL_LAYERS, INTERVAL, WINDOW = 2, 3, 64  # released models have an INTERVAL of 6 and a WINDOW of 1024
VISION_HIDDEN, VISION_DEPTH, PATCH = 64, 2, 14
SIDE = 12  # of a picture, in tokens; released models have 16
SIZE = 2 * SIDE * PATCH

NAMED_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
IMAGE = NAMED_TOKENS["boi_token"]
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())
CHAT_TEMPLATE = tiny_model.CHAT_TEMPLATE.replace(tiny_model.PLACEHOLDERS[0], IMAGE)


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random Gemma 3 to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "gemma3"}, _write)


def _write(path: Path) -> None:
    import transformers

    tokenizer = tiny_model.make_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE, NAMED_TOKENS)
    rows = tiny_model.vocabulary_rows(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": FULL_LAYERS * INTERVAL,
        "layer_types": [*["sliding_attention"] * (INTERVAL - 1), "full_attention"] * FULL_LAYERS,
        "sliding_window": WINDOW,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_hidden_layers": VISION_DEPTH,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "image_size": SIZE,
        "vision_use_head": False,
        "hidden_act": "quick_gelu",
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=SIDE**2,
        boi_token_index=ids[NAMED_TOKENS["boi_token"]],
        eoi_token_index=ids[NAMED_TOKENS["eoi_token"]],
        image_token_index=ids[NAMED_TOKENS["image_token"]],
        eos_token_id=ids["<|im_end|>"],
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(
            size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=SIDE**2,
    )
    model: Any = transformers.Gemma3ForConditionalGeneration(config)
    spoken = tiny_model.spoken_tokens(tokenizer, rows)
    tiny_model.save_all(model, processor, tokenizer, rows, SEED, path, lambda drawn: _adjust(drawn, spoken))
    # Transformers writes names without a part that SGLang looks for.
    tower = "vision_tower."
    tiny_model.rename_weights(path, lambda name: name.replace(tower, f"{tower}vision_model.", 1))


@torch.no_grad()
def _adjust(model: Any, spoken: torch.Tensor) -> None:
    """Changes the weights that mean something else in this architecture than in others.

    Norms of the language model and of the projector multiply by 1 + weight. Token embeddings are the output layer, too,
    and as inputs they are multiplied by the root of their width. The last norm changes signs, because an answer would
    repeat its last word for ever if a hidden state were like the embedding that it began with.
    """
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight") and ("language_model" in name or "mm_soft_emb_norm" in name):
            weight -= 1
    embedding = model.get_input_embeddings().weight
    embedding *= torch.where(spoken, 1.0, tiny_model.MUTED)[:, None] * tiny_model.LOGIT_SPREAD / math.sqrt(HIDDEN)
    last = model.model.language_model.norm.weight
    last[torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(SEED))[: HIDDEN // 2]] += -2


class Oracle(HFOracle):
    """Transformers' own model.

    Attributes:
        bidirectional: whether tokens of a picture see each other.
    """

    bidirectional = False

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        rendered, images, _ = split_messages(messages)
        text = self.processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        arguments = {"images": [[read_picture(url) for url in images]]} if images else {}
        inputs = dict(self.processor(text=[text], return_tensors="pt", **arguments))
        inputs.pop("attention_mask")
        if not self.bidirectional:
            inputs.pop("token_type_ids", None)
        return inputs


def oracle(path: str | os.PathLike[str], video: Mapping[str, int]) -> Oracle:
    return Oracle(path)


FAMILIES = (
    Family(
        name="gemma3",
        title="Gemma 3",
        architecture="Gemma3ForConditionalGeneration",
        maker=make,
        oracle=oracle,
        oracle_title="transformers, with pictures causal as in SGLang",
        video=False,
        several_videos=False,
        reach=832,  # of three pictures
        flags=("--enable-multimodal",),
        prompt=Prompt("gemma3", IMAGE, expanded=("image",)),
    ),
)
