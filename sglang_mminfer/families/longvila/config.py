"""The config of LongVILA, from the config.json of the checkpoint and of each of its folders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, SiglipVisionConfig

from sglang_mminfer.families.frames import MEAN
from sglang_mminfer.families.own.siglip import vision_config

if TYPE_CHECKING:
    from sglang_mminfer.families.own.checkpoint import Checkpoint

LANGUAGE: dict[str, type[PretrainedConfig]] = {"qwen2": Qwen2Config, "llama": LlamaConfig}

PROJECTORS: dict[str, int] = {
    "linear": 1,
    "mlp2x_gelu": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}
"""How many patches along a side become one token."""

REMOTE_CODE = "config_vila_style.json"
"""The file with the usual fields in LongVILA-R1, whose config.json names remote code."""


class LongVilaConfig(PretrainedConfig):
    """The fields of the root that serving needs, with the configs of the parts inside."""

    model_type = "longvila"
    sub_configs = {"vision_config": SiglipVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        mm_projector_type: str = "mlp_downsample",
        mm_vision_select_layer: int = -2,
        image_aspect_ratio: str = "resize",
        num_video_frames: int = 8,
        fps: float = 0.0,
        separator: str = "\n",
        **fields: Any,
    ) -> None:
        self.text_config = text_config if isinstance(text_config, PretrainedConfig) else _text_config(text_config or {})
        self.vision_config = (
            vision_config
            if isinstance(vision_config, SiglipVisionConfig)
            else SiglipVisionConfig(**(vision_config or {}))
        )
        self.mm_projector_type = mm_projector_type
        self.mm_vision_select_layer = mm_vision_select_layer
        self.image_aspect_ratio = image_aspect_ratio
        self.num_video_frames = num_video_frames
        self.fps = fps
        self.separator = separator
        super().__init__(**fields)


def vila_style(root: dict[str, Any], files: Checkpoint) -> dict[str, Any] | None:
    """The fields that VILA's own code reads; None if the checkpoint is not made of folders."""
    vila = root if "llm_cfg" in root else files.json(REMOTE_CODE)
    return vila if vila and "llm_cfg" in vila else None


def read(vila: dict[str, Any], files: Checkpoint) -> LongVilaConfig:
    """The config of a checkpoint.

    Raises:
        ValueError: naming the field that cannot be served, or the folder without a config.json.
    """
    tower = _part("vision_tower", vila, files)
    projector = _part("mm_projector", vila, files)
    pixels = files.json("vision_tower/preprocessor_config.json") or {}
    for name in ("image_mean", "image_std"):
        if any(value != MEAN for value in pixels.get(name) or ()):
            raise ValueError(f"vision_tower/preprocessor_config.json: {name}: expected {MEAN}, got {pixels[name]}")
    if vila.get("mm_vision_select_feature", "cls_patch") != "cls_patch":
        raise ValueError(f"mm_vision_select_feature: expected cls_patch, got {vila['mm_vision_select_feature']!r}")
    for flag in ("s2", "dynamic_s2", "ps3", "mm_use_im_start_end"):
        if vila.get(flag):
            raise ValueError(f"{flag}: expected false, got {vila[flag]!r}: this is no LongVILA")
    dtype = vila.get("model_dtype") or vila.get("torch_dtype")
    config = LongVilaConfig(
        text_config=_text_config(_part("llm", vila, files)),
        vision_config=vision_config(tower),
        mm_projector_type=str(projector.get("mm_projector_type")),
        separator=_separator(vila.get("image_encoder")),
        architectures=["LongVilaForConditionalGeneration"],
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        **{
            name: vila[name]
            for name in ("mm_vision_select_layer", "image_aspect_ratio", "num_video_frames", "fps")
            if vila.get(name) is not None
        },
    )
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    # SGLang looks for the end-of-sequence token at the root, where this checkpoint has none.
    generation = files.json("llm/generation_config.json") or {}
    config.eos_token_id = generation.get("eos_token_id", config.text_config.eos_token_id)
    check(config)
    return config


def check(config: LongVilaConfig) -> None:
    """Raises ValueError for a value that no code here implements.

    The model checks again, because --json-model-override-args apply later.
    """
    if config.mm_projector_type not in PROJECTORS:
        raise ValueError(
            f"mm_projector_type: expected one of {', '.join(PROJECTORS)}, got {config.mm_projector_type!r}"
        )
    if config.image_aspect_ratio not in ("resize", "pad"):
        raise ValueError(f"image_aspect_ratio: expected resize or pad, got {config.image_aspect_ratio!r}")


def tokens_per_side(config: Any) -> int:
    """Tokens along a side of a frame. Patches that do not divide evenly are padded with zeros."""
    patches = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
    return -(-patches // PROJECTORS[config.mm_projector_type])


def _text_config(values: dict[str, Any]) -> PretrainedConfig:
    kind = values.get("model_type", "qwen2")
    if kind not in LANGUAGE:
        raise ValueError(f"llm/config.json: model_type: expected one of {', '.join(LANGUAGE)}, got {kind!r}")
    text: Any = LANGUAGE[kind](**{k: v for k, v in values.items() if k != "model_type"})
    rope = text.rope_parameters
    if rope.get("rope_type") == "linear":
        # In these checkpoints max_position_embeddings is the stretched length. Unless the original length is named,
        # SGLang would stretch it again, and reserve tables of that length for every request.
        rope.setdefault("original_max_position_embeddings", int(text.max_position_embeddings / rope["factor"]))
    return text


def _part(name: str, vila: dict[str, Any], files: Checkpoint) -> dict[str, Any]:
    """The config of a folder: its own file, else the root's copy."""
    config = files.json(f"{name}/config.json") or vila.get(f"{name}_cfg")
    if not isinstance(config, dict):
        raise ValueError(f"{name}/config.json: expected the config of this part, found none")
    return config


def _separator(encoder: Any) -> str:
    """The text after each frame. It is the image encoder's, because VILA encodes a video frame by frame."""
    encoder = json.loads(encoder) if isinstance(encoder, str) else encoder or {}
    kind = str(encoder.get("_target_", "BasicImageEncoder"))
    if not kind.endswith("BasicImageEncoder") or encoder.get("start_tokens"):
        raise ValueError(f"image_encoder: expected a BasicImageEncoder without start_tokens, got {encoder!r}")
    return encoder.get("end_tokens", "\n") or ""
