"""Tiny LongVILA checkpoints with the folders, files and names of the released ones, and an oracle for them.

The oracle shares nothing with the product: it decodes with PyAV, resizes with transformers' image processor, merges
patches one square at a time, and asks transformers' own Qwen2 or Llama.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from families import Family
from families.embedded import Chat, EmbeddedOracle, Piece, output_of
from families.llava_video import random_tower
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle_media import open_video, read_picture

SPECIAL_TOKENS = {
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]"),
    "llama": (
        *("<|endoftext|>", "<|im_end|>", "<|begin_of_text|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[PAD]"),
    ),
}
MEDIA_TOKENS = ("<vila/sentinel>", "<image>", "<vila/video>")
"""The tokenizer has them, the embedding of the released -1M has no rows for them."""

LANGUAGE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 384,
    "patch_size": 14,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "256f": {"image_size": 448, "projector": "mlp_downsample"},
    "1M": {
        "projector": "mlp_downsample",
        "language": {
            "rope_theta": 1062356830.0,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "max_position_embeddings": 1048576,
        },
    },
    "r1": {"image_size": 448, "projector": "mlp_downsample_2x2_fix", "remote_code": True},
    "3x3": {"projector": "mlp_downsample_3x3_fix"},
    "llama_3": {"projector": "mlp_downsample", "kind": "llama", "language": {"rope_theta": 207112184.0}},
}
"""What sets the released checkpoints apart from each other."""

CHATS = {
    "qwen2": Chat(system="You are a helpful assistant"),
    "llama": Chat(
        head="<|start_header_id|>{}<|end_header_id|>\n\n",
        tail="<|eot_id|>",
        first="<|begin_of_text|>",
        system="You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
    ),
}
"""By the language model."""


def make(path: str | os.PathLike[str], variant: str = "1M") -> Path:
    """Writes a tiny random LongVILA to the folder `path`. Errors as `tiny_model.make_checkpoint`."""
    if variant not in VARIANTS:
        raise ValueError(f"tiny LongVILA: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    recipe = {"arch": "longvila", "variant": variant, **VARIANTS[variant]}
    return tiny_model.make_checkpoint(path, recipe, lambda fresh: _write(fresh, VARIANTS[variant]))


def _write(path: Path, variant: dict[str, Any]) -> None:
    import transformers
    from safetensors.torch import save_file

    kind = variant.get("kind", "qwen2")
    special = SPECIAL_TOKENS[kind]
    tokenizer = tiny_model.make_tokenizer((*special, *MEDIA_TOKENS), "")
    tokenizer.pad_token = "[PAD]"
    if kind == "llama":
        tokenizer.eos_token = "<|eot_id|>"
    rows = tokenizer.convert_tokens_to_ids(MEDIA_TOKENS[0])
    classes: dict[str, Any] = {
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    }
    model_class, config_class = classes[kind]
    fields = {**LANGUAGE, **variant.get("language", {})}
    language = model_class(config_class(vocab_size=rows, **fields))
    tiny_model.draw_weights(language, 0, tiny_model.spoken_tokens(tokenizer, rows))

    llm = path / "llm"
    llm.mkdir()
    language.generation_config = tiny_model.generation_config(tokenizer)
    tiny_model.save_model(language, llm)
    llm_config = {
        "architectures": [model_class.__name__],
        "model_type": kind,
        "vocab_size": rows,
        **fields,
        "attention_bias": False,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (llm / "config.json").write_text(json.dumps(llm_config, indent=2) + "\n")  # of the transformers of its time
    tokenizer.save_pretrained(llm)

    sizes = {**TOWER, "image_size": variant.get("image_size", TOWER["image_size"])}
    tower = path / "vision_tower"
    tower.mkdir()
    tensors = {f"vision_model.{k}": v.contiguous().clone() for k, v in random_tower(sizes).state_dict().items()}
    save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
    tower_config = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", **sizes}
    (tower / "config.json").write_text(json.dumps(tower_config, indent=2) + "\n")
    pixels = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor",
        "resample": 3,
        "size": {"height": sizes["image_size"], "width": sizes["image_size"]},
    }
    (tower / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")

    projector = path / "mm_projector"
    projector.mkdir()
    save_file(
        random_projector(variant["projector"], sizes["hidden_size"], fields["hidden_size"]),
        projector / "model.safetensors",
        metadata={"format": "pt"},
    )
    projector_config = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": variant["projector"],
        "model_type": "v2l_projector",
    }
    (projector / "config.json").write_text(json.dumps(projector_config, indent=2) + "\n")

    root = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "fps": 0.0,
        "hidden_size": fields["hidden_size"],
        "image_aspect_ratio": "resize",
        "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
        "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"},
        "llm_cfg": llm_config,
        "mm_hidden_size": sizes["hidden_size"],
        "mm_projector_cfg": projector_config,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "model_dtype": "torch.bfloat16",
        "num_video_frames": 6,
        "s2": False,
        "vision_tower_cfg": tower_config,
    }
    name = "config_vila_style.json" if variant.get("remote_code") else "config.json"
    (path / name).write_text(json.dumps(root, indent=2) + "\n")
    if variant.get("remote_code"):
        remote = {
            "architectures": ["VILAForCausalLM"],
            "auto_map": {"AutoConfig": "modeling_vila.VILAConfig", "AutoModel": "modeling_vila.VILAForCausalLM"},
            "model_type": "vila",
        }
        (path / "config.json").write_text(json.dumps(remote, indent=2) + "\n")


def random_projector(kind: str, inside: int, outside: int) -> dict[str, torch.Tensor]:
    """The tensors of a projector by their released names: layer 0 merges and has none."""
    layers: dict[int, Any]
    if kind == "mlp_downsample_3x3_fix":
        layers = {
            1: 9 * inside,
            2: (9 * inside, 3 * inside),
            4: 3 * inside,
            5: (3 * inside, outside),
            7: (outside,) * 2,
        }
    else:
        layers = {1: 4 * inside, 2: (4 * inside, outside), 4: (outside, outside)}
    draw = torch.Generator().manual_seed(11)
    found = {}
    for i, shape in layers.items():
        if isinstance(shape, int):
            found[f"layers.{i}.weight"] = 1 + 0.1 * torch.randn(shape, generator=draw)
            found[f"layers.{i}.bias"] = 0.1 * torch.randn(shape, generator=draw)
        else:
            found[f"layers.{i}.weight"] = torch.randn(shape[1], shape[0], generator=draw) / math.sqrt(shape[0])
            found[f"layers.{i}.bias"] = 0.1 * torch.randn(shape[1], generator=draw)
    return found


# ---- the oracle --------------------------------------------------------------------------------------------


class LongVilaOracle(EmbeddedOracle):
    """Transformers' SigLIP and language model on a checkpoint's tensors, and VILA's steps between them in loops.

    Args:
        video: as `--mm-process-config` gives it for video.
    """

    def __init__(self, path: str | os.PathLike[str], video: dict[str, Any] | None = None) -> None:
        import transformers
        from safetensors.torch import load_file

        root = Path(path)
        style = root / "config_vila_style.json"
        self.config = json.loads((style if style.exists() else root / "config.json").read_text())
        self.video = {"num_frames": self.config["num_video_frames"], "fps": self.config["fps"], **(video or {})}
        language = transformers.AutoModelForCausalLM.from_pretrained(root / "llm", dtype=torch.float32)
        # Its last layer runs, too; `_kept_layer` is the one before it.
        self.tower = transformers.SiglipVisionModel.from_pretrained(root / "vision_tower", dtype=torch.float32).eval()
        inner = getattr(self.tower, "vision_model", self.tower)
        self._kept_layer = inner.encoder.layers[len(inner.encoder.layers) - 2]
        self.processor = transformers.SiglipImageProcessorPil.from_pretrained(root / "vision_tower")
        self.projector = load_file(root / "mm_projector" / "model.safetensors")
        kind = json.loads((root / "mm_projector" / "config.json").read_text())["mm_projector_type"]
        self.merge = 3 if "3x3" in kind else 2
        tokenizer = transformers.AutoTokenizer.from_pretrained(root / "llm")
        self.newline = tokenizer.encode("\n", add_special_tokens=False)
        super().__init__(language, tokenizer, tokenizer.pad_token_id, CHATS[language.config.model_type])

    def shown(self, kind: str, path: str) -> tuple[list[Piece], str]:
        return [piece for frame in self.embedded(self.pictures(path, kind)) for piece in (frame, self.newline)], ""

    def pictures(self, path: str, kind: str) -> list[Any]:
        """A picture, or the frames of a video."""
        from PIL import Image

        if kind == "image_url":
            return [read_picture(path)]
        import numpy as np

        video = open_video(path)
        total, rate = len(video), video.fps
        if self.video["fps"] > 0:
            times = np.arange(0, total / rate, 1.0 / self.video["fps"])[: self.video["num_frames"]]
            wanted = [int(t * rate) for t in times]
        else:
            wanted = np.round(np.linspace(0, total - 1, self.video["num_frames"])).astype(int).tolist()
        return [Image.fromarray(frame) for frame in video.frames(wanted)]

    @torch.no_grad()
    def embedded(self, pictures: Sequence[Any]) -> torch.Tensor:
        """[n, tokens, hidden]"""
        seen = output_of(self._kept_layer, lambda: self.tower(**self.processor(list(pictures), return_tensors="pt")))
        return projected(merged(seen, self.merge), self.projector)


def merged(seen: torch.Tensor, by: int) -> torch.Tensor:
    """[n, tokens, by * by * c] from patches [n, side * side, c]: `by` x `by` in one, zeros where there are none."""
    side, width = math.isqrt(seen.shape[1]), seen.shape[-1]
    pictures = []
    for patches in seen:
        tokens = []
        for row in range(0, side, by):
            for col in range(0, side, by):
                square = [
                    patches[r * side + c] if r < side and c < side else torch.zeros(width)
                    for r in range(row, row + by)
                    for c in range(col, col + by)
                ]
                tokens.append(torch.cat(square))
        pictures.append(torch.stack(tokens))
    return torch.stack(pictures)


def projected(state: torch.Tensor, projector: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a projector with the tensors of `random_projector` makes of merged patches."""
    numbers = sorted({int(name.split(".")[1]) for name in projector})
    for i in numbers:
        weight, bias = projector[f"layers.{i}.weight"], projector[f"layers.{i}.bias"]
        if weight.ndim == 1:
            state = torch.nn.functional.layer_norm(state, weight.shape, weight, bias)
        else:
            state = state @ weight.T + bias
            if i != numbers[-1] and i + 1 not in numbers:
                state = torch.nn.functional.gelu(state)
    return state


FAMILIES = (
    Family(
        name="longvila",
        title="LongVILA",
        architecture="LlavaLlamaModel",
        maker=make,
        oracle=LongVilaOracle,
        recipe={"variant": "1M"},
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        served_by="plugin",
        long_videos=4,
        video_options={"num_frames": 5},
    ),
)
