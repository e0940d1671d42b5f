"""Tiny InternVL3.5 in its native form (InternVLChatModel), and the same weights in transformers' class as the oracle.

Transformers has a class of its own with other names for the same weights (the released "-HF" checkpoints), so the
weights are drawn there and written under the native names, as released checkpoints have them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from families import Family, Prompt, internvl_tiles
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import HFOracle, Message, split_messages
from sglang_mminfer.testing.oracle_media import Video, open_video, read_picture

SEED = 0
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 2, 8, 2, 32
VISION_HIDDEN, VISION_DEPTH, VISION_HEADS = 64, 2, 2
TILE, PATCH = 448, 56
"""A patch of 56, not 14: a tile is 4 x 4 tokens, not 16 x 16. SGLang cuts tiles of 448 whatever a config says."""

TOKENS = (TILE // PATCH // 2) ** 2
"""Tokens of a tile."""

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
"""The system message of released models."""


SPECIAL_TOKENS = (
    *tiny_model.SPECIAL_TOKENS,
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)

# Native name of each weight of the vision tower and the projector, by transformers' name.
_RENAMED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^model\.vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^model\.vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (r"^model\.vision_tower\.encoder\.layer\.(\d+)\.lambda_(\d)$", r"vision_model.encoder.layers.\1.ls\2"),
    (r"^model\.vision_tower\.encoder\.layer\.(\d+)\.layernorm_before\.", r"vision_model.encoder.layers.\1.norm1."),
    (r"^model\.vision_tower\.encoder\.layer\.(\d+)\.layernorm_after\.", r"vision_model.encoder.layers.\1.norm2."),
    (r"^model\.vision_tower\.encoder\.layer\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (
        r"^model\.vision_tower\.encoder\.layer\.(\d+)\.attention\.projection_layer\.",
        r"vision_model.encoder.layers.\1.attn.proj.",
    ),
)
_QKV = re.compile(r"^model\.vision_tower\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)$")


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random InternVL3.5 to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "internvl_chat"}, _write)


def native_name(name: str) -> str:
    """The name in a native checkpoint of a weight that is not one of q, k and v of the vision tower."""
    for pattern, replacement in _RENAMED:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise ValueError(f"{name}: a weight without a native name")


def to_native(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of transformers' class under native names, q, k and v of the vision tower in one."""
    native: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if found := _QKV.match(name):
            layer, part, kind = found.groups()
            if part == "q":
                parts = [weights[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
                native[f"vision_model.encoder.layers.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
        else:
            native[native_name(name)] = weight.contiguous()
    return native


def to_transformers(native: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """The reverse of `to_native` for the weights `names` of transformers' class."""
    weights = {}
    for name in names:
        if found := _QKV.match(name):
            layer, part, kind = found.groups()
            joined = native[f"vision_model.encoder.layers.{layer}.attn.qkv.{kind}"]
            weights[name] = joined.chunk(3)["qkv".index(part)]
        else:
            weights[name] = native[native_name(name)]
    return weights


def _text_config(rows: int, pad: int, end: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": pad,
        "eos_token_id": end,
    }


_VISION_CONFIG = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": 2 * VISION_HIDDEN,
    "num_hidden_layers": VISION_DEPTH,
    "num_attention_heads": VISION_HEADS,
    "num_channels": 3,
    "image_size": TILE,
    "patch_size": PATCH,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "drop_path_rate": 0.0,
    "use_flash_attn": True,
}


def transformers_model(text: dict[str, Any]) -> Any:
    """Transformers' class of the same architecture, its weights not yet given."""
    import transformers

    text = {key: value for key, value in text.items() if key != "architectures"}
    vision = {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_hidden_layers": VISION_DEPTH,
        "num_attention_heads": VISION_HEADS,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "attention_bias": True,
        "use_qk_norm": False,
        "layer_norm_eps": 1e-6,
    }
    config = transformers.InternVLConfig(
        text_config=text, vision_config=vision, downsample_ratio=0.5, tie_word_embeddings=False
    )
    return transformers.InternVLForConditionalGeneration(config).to(torch.float32).eval()


def _write(path: Path) -> None:
    from safetensors.torch import save_file

    tokenizer = tiny_model.make_tokenizer(SPECIAL_TOKENS)
    rows = tiny_model.vocabulary_rows(tokenizer)
    pad, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    text = _text_config(rows, pad, end)
    model = transformers_model(text)
    tiny_model.draw_weights(model, SEED, tiny_model.spoken_tokens(tokenizer, rows))
    save_file(to_native(model.state_dict()), path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": text,
        "vision_config": _VISION_CONFIG,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "hidden_size": HIDDEN,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tiny_model.generation_config(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)


class InternVLOracle(HFOracle):
    """Transformers' class with the weights of a native checkpoint.

    Args:
        path: the checkpoint.
        num_frames: taken of every video, as the server is told.
        rule: how pictures and frames become tiles of pixels; see `internvl_tiles`.
    """

    def __init__(
        self, path: str | os.PathLike[str], num_frames: int, rule: internvl_tiles.Rule = internvl_tiles.SERVED
    ) -> None:
        self.num_frames = num_frames
        self.rule = rule
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        folder = Path(path)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = transformers_model(json.loads((folder / "config.json").read_text())["llm_config"])
        native = load_file(folder / "model.safetensors")
        self.model.load_state_dict(to_transformers(native, list(self.model.state_dict())))
        self.context, self.video = self.tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<|video_pad|>"])
        self.model.config.image_token_id = self.context

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        text, tiles = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", []
        for message in messages:
            (rendered,), images, videos = split_messages([message])
            words = ""
            parts = rendered["content"]
            for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
                if part["type"] == "text":
                    words += part["text"]
                elif part["type"] == "image":
                    picture = self.rule.tiles(read_picture(images.pop(0)), TILE)
                    tiles.append(picture)
                    words += f"<img>{'<IMG_CONTEXT>' * (TOKENS * len(picture))}</img>\n"
                elif part["type"] == "video":
                    frames = self._frames(open_video(videos.pop(0)))
                    tiles.append(frames)
                    words += "".join(
                        f"Frame {i}: <img>{'<|video_pad|>' * TOKENS}</img>\n" for i in range(1, len(frames) + 1)
                    )
            text += f"<|im_start|>{message['role']}\n{words}<|im_end|>\n"
        ids = self.tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
        inputs = {"prompt_ids": ids, "input_ids": torch.where(ids == self.video, self.context, ids)}
        if tiles:
            inputs["pixel_values"] = torch.cat(tiles)
        return inputs

    def _frames(self, video: Video) -> torch.Tensor:
        """[num_frames, 3, TILE, TILE]"""
        from PIL import Image

        frames = video.frames(self.rule.frames(len(video), self.num_frames))
        return torch.cat([self.rule.tiles(Image.fromarray(frame), TILE, most=1) for frame in frames])


def oracle(path: str | os.PathLike[str], video: Mapping[str, int]) -> InternVLOracle:
    return InternVLOracle(path, video["num_frames"])


FAMILIES = (
    Family(
        name="internvl",
        title="InternVL3.5",
        architecture="InternVLChatModel",
        maker=make,
        oracle=oracle,
        oracle_title="transformers (InternVLForConditionalGeneration, the same weights under other names)",
        long_video=(40, 128, 96, 4),
        long_videos=4,
        video_options={"num_frames": 34},  # above SGLang's own limit of 32
        prompt=Prompt("internvl", "<image>", "<video>", ("image",)),
    ),
)
