"""The config of LLaVA-Video, from a config.json that has the language model's fields at its root."""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig, Qwen2Config, SiglipVisionConfig

from sglang_mminfer.families.own.siglip import vision_config

TOWERS: dict[str, dict[str, int]] = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
"""Vision towers by the last part of `mm_vision_tower`. The checkpoints hold their weights but not their sizes."""

CHOICES: dict[str, tuple[str, ...]] = {
    "mm_newline_position": ("grid", "frame", "one_token", "no_token"),
    "mm_spatial_pool_mode": ("average", "bilinear", "max"),
}

DEFAULTS: dict[str, Any] = {
    "mm_spatial_pool_mode": "average",  # as in the official evaluation; most checkpoints name a mode
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "square",
    "image_grid_pinpoints": None,
    "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu",
    "add_time_instruction": False,
    "force_sample": False,
}
"""The values that the original code uses for fields that config.json lacks."""

POOL_STRIDE = 2
"""The original code pools videos with this stride, whatever `mm_spatial_pool_stride` says."""


class LlavaVideoConfig(PretrainedConfig):
    """Fields of config.json under their own names, with the language model and the tower apart."""

    model_type = "llava_video"
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}  # noqa: RUF012

    def __init__(self, text_config: Any = None, vision_config: Any = None, **fields: Any) -> None:
        self.text_config = text_config if isinstance(text_config, Qwen2Config) else Qwen2Config(**(text_config or {}))
        self.vision_config = (
            vision_config
            if isinstance(vision_config, SiglipVisionConfig)
            else SiglipVisionConfig(**(vision_config or {}))
        )
        super().__init__(**{**DEFAULTS, **fields})


def is_llava_video(root: dict[str, Any]) -> bool:
    """Whether a config.json of this architecture asks for something that only LLaVA-Video does with a video."""
    return bool(
        root.get("add_time_instruction")
        or root.get("force_sample")
        or root.get("mm_newline_position") in ("grid", "frame", "no_token")
    )


def read(root: dict[str, Any]) -> LlavaVideoConfig:
    """The config of a checkpoint.

    Raises:
        ValueError: naming the field that cannot be served.
    """
    vision_fields = {
        name: value for name, value in root.items() if name.startswith(("mm_", "image_")) or name in DEFAULTS
    }
    text = {
        name: value
        for name, value in root.items()
        if name not in vision_fields and name not in ("architectures", "model_type")
    }
    config = LlavaVideoConfig(
        text_config=Qwen2Config(**text),
        vision_config=vision_config(_tower(root)),
        architectures=["LlavaVideoForConditionalGeneration"],
        tie_word_embeddings=bool(root.get("tie_word_embeddings", False)),
        eos_token_id=root.get("eos_token_id"),
        dtype=root.get("torch_dtype") or root.get("dtype"),
        **{name: value for name, value in vision_fields.items() if value is not None},
    )
    if root.get("add_faster_video"):
        raise ValueError("add_faster_video: expected false, got true (the original code does not run it either)")
    check(config)
    return config


def check(config: LlavaVideoConfig) -> None:
    """Raises ValueError for a value that no code here implements.

    The model checks again, because --json-model-override-args apply later.
    """
    for field, allowed in CHOICES.items():
        if getattr(config, field) not in allowed:
            raise ValueError(f"{field}: expected one of {', '.join(allowed)}, got {getattr(config, field)!r}")
    if not re.fullmatch(r"linear|mlp[1-9]x_gelu", config.mm_projector_type):
        raise ValueError(f"mm_projector_type: expected linear or mlpNx_gelu, got {config.mm_projector_type!r}")
    if not re.fullmatch(r"flat|spatial(_unpad)?", config.mm_patch_merge_type):
        raise ValueError(
            f"mm_patch_merge_type: expected flat, spatial or spatial_unpad, got {config.mm_patch_merge_type!r}"
        )
    if not re.fullmatch(r"square|pad|anyres(_max_[1-9]\d*)?", config.image_aspect_ratio):
        raise ValueError(
            f"image_aspect_ratio: expected square, pad, anyres or anyres_max_N, got {config.image_aspect_ratio!r}"
        )


def _tower(root: dict[str, Any]) -> dict[str, Any]:
    if sizes := root.get("mm_vision_config"):  # a checkpoint with another tower than the published ones
        return sizes
    name = str(root.get("mm_vision_tower")).rstrip("/").rpartition("/")[2]
    if name not in TOWERS:
        raise ValueError(
            f"mm_vision_tower: expected {' or '.join(TOWERS)}, got {root.get('mm_vision_tower')!r} (the sizes of "
            f"another one may be given as mm_vision_config)"
        )
    return dict(TOWERS[name])
