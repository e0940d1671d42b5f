"""The config of VideoChat-Flash, from a checkpoint's config.json and the sizes that the file leaves out.

The file is a flat Qwen2 config with `mm_*` fields beside it. It names the vision tower but not its sizes, so the
sizes of the three released towers stand here. A checkpoint with another tower (in a test) gives its sizes in
`mm_vision_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from transformers import PretrainedConfig, Qwen2Config

CLIP_TOKENS = 64
"""Language-model tokens of a clip of 4 frames, and of an image."""


class UnsupportedCheckpoint(ValueError):
    """A checkpoint of this architecture cannot be served. The message says why."""


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of a vision tower. `mm_vision_config` of a checkpoint may replace those that `tower_config` allows."""

    kind: Literal["umt", "internvideo2"]
    image_size: int
    """Pixels along a side; pictures are stretched to this square."""
    patch: int
    hidden: int
    layers: int
    """Layers of the tower as it was trained. The last one is not used."""
    heads: int
    mlp_hidden: int
    frames: int = 4
    """Frames of a clip, which the tower sees at once."""
    layers_used: int = 0
    """How many layers run, by `mm_vision_select_layer`."""

    @property
    def side(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.patch

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.side**2


# Keys are parts of names in `mm_vision_tower`, the more specific first.
_TOWERS: dict[str, TowerConfig] = {
    "internvideo2": TowerConfig("internvideo2", 224, 14, 1408, 40, 16, 6144),
    "umt-hd": TowerConfig("umt", 448, 16, 1024, 24, 16, 4096),
    "umt": TowerConfig("umt", 224, 16, 1024, 24, 16, 4096),
}

# What every released checkpoint has. Other values are other models, which nobody has published.
_EXPECTED = {
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_local_num_frames": 4,
    "mm_newline_position": "nothing",
    "mm_patch_merge_type": "spatial_nopad",
    "vision_encode_type": "video_image",
}


def tower_config(hf_config: Any) -> TowerConfig:
    """The vision tower of a checkpoint.

    Raises:
        UnsupportedCheckpoint: with one sentence that names the field, what it says and what is served.
    """
    if getattr(hf_config, "mm_llm_compress", False):
        raise UnsupportedCheckpoint(
            "VideoChat-Flash: mm_llm_compress drops vision tokens between layers of the language model, which is not "
            "served here; set it to false in config.json, as released checkpoints do."
        )
    for name, served in _EXPECTED.items():
        value = getattr(hf_config, name, served)
        if value != served:
            raise UnsupportedCheckpoint(f"VideoChat-Flash: {name} is {value!r}, and only {served!r} is served.")
    name = str(getattr(hf_config, "mm_vision_tower", None))
    tower = next((tower for part, tower in _TOWERS.items() if part in name), None)
    if tower is None:
        raise UnsupportedCheckpoint(
            f"VideoChat-Flash: mm_vision_tower is {name!r}; expected a name with one of {', '.join(_TOWERS)} in it."
        )
    sizes = getattr(hf_config, "mm_vision_config", None) or {}
    known = {field.name for field in fields(TowerConfig)} - {"kind", "frames", "layers_used"}
    if unknown := sorted(set(sizes) - known):
        raise UnsupportedCheckpoint(
            f"VideoChat-Flash: mm_vision_config has no {unknown[0]!r}; it may have {', '.join(sorted(known))}."
        )
    layers = int(sizes.get("layers", tower.layers))
    select = int(getattr(hf_config, "mm_vision_select_layer", -2))
    used = layers + select + 1
    tower = replace(tower, **sizes, layers_used=used)
    if not 0 < used <= layers:
        raise UnsupportedCheckpoint(
            f"VideoChat-Flash: mm_vision_select_layer is {select} of a tower of {layers} layers; expected a number "
            f"from {-layers} to -1."
        )
    if tower.image_size % tower.patch or tower.hidden % tower.heads or tower.patches < CLIP_TOKENS:
        raise UnsupportedCheckpoint(
            f"VideoChat-Flash: a vision tower of {tower.image_size} pixels in patches of {tower.patch}, {tower.hidden} "
            f"wide with {tower.heads} heads, does not work out: patches have to fill the picture, number "
            f"{CLIP_TOKENS} or more, and heads have to share the width."
        )
    if (hidden := getattr(hf_config, "mm_hidden_size", tower.hidden)) != tower.hidden:
        raise UnsupportedCheckpoint(
            f"VideoChat-Flash: mm_hidden_size is {hidden}, and the tower {name!r} is {tower.hidden} wide."
        )
    return tower


class VideoChatFlashConfig(PretrainedConfig):
    """Fields of config.json under their own names, with the language model apart."""

    model_type = "videochat_flash"
    sub_configs = {"text_config": Qwen2Config}  # noqa: RUF012
    vision_tokens_merged = True
    """For head configs and geometry: a clip's tokens have neither rows nor columns."""

    def __init__(self, text_config: Any = None, **fields: Any) -> None:
        self.text_config = text_config if isinstance(text_config, Qwen2Config) else Qwen2Config(**(text_config or {}))
        super().__init__(**{**_DEFAULTS, **fields})


# What released checkpoints were trained with, for one whose config.json leaves it out.
_DEFAULTS = {"image_aspect_ratio": "anyres_nopad", "image_grid_pinpoints": "(1x1),...,(6x6)", "mm_llm_compress": False}

# Fields that the original code does not heed: it takes plain RoPE and full attention, whatever they say.
_NOT_HEEDED = ("rope_scaling", "dual_chunk_attention_config")


def read(root: dict[str, Any]) -> VideoChatFlashConfig:
    """The config of a checkpoint whose config.json is `root`.

    The model type in `root` does not matter: released checkpoints have "videochat_flash_qwen", or "qwen2".

    Raises:
        UnsupportedCheckpoint: see `tower_config`.
    """
    vision_fields = {
        name: value
        for name, value in root.items()
        if name.startswith(("mm_", "image_", "frame_", "llm_")) or name in ("vision_encode_type", "mminfer_config")
    }
    left_out = {*vision_fields, *_NOT_HEEDED, "architectures", "model_type", "auto_map"}
    config = VideoChatFlashConfig(
        text_config=Qwen2Config(**{name: value for name, value in root.items() if name not in left_out}),
        architectures=["VideoChatFlashForConditionalGeneration"],
        tie_word_embeddings=bool(root.get("tie_word_embeddings", False)),
        dtype=root.get("torch_dtype") or root.get("dtype"),
        **{name: value for name, value in vision_fields.items() if value is not None},
    )
    tower_config(config)
    return config
