"""Tiny LLaVAs with the files and names of the original code's checkpoints, and an oracle for them.

Two forms: lmms-lab's LLaVA-OneVision (SigLIP, Qwen2, any resolution) and LLaVA-1.5 (CLIP, Llama, padded pictures). As
released, the vision tower is a checkpoint of its own that `mm_vision_tower` names; here it lies in a sub-folder. So
do tokenizer and image processor in the folder itself, which OneVision has elsewhere (--tokenizer-path).

The oracle runs transformers' tower and language model, with plain loops between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from families import Family, Prompt
from families.embedded import Chat, EmbeddedOracle, Piece, output_of
from families.llava_video import LANGUAGE, any_resolution, random_tower
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import Message, split_messages
from sglang_mminfer.testing.oracle_media import read_picture

PATCH, SIDE = 14, 20
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
}
"""Released: 27 patches along a side (SigLIP), 24 (CLIP)."""

LONGEST_SIDE = 6
"""Tiles along a side of a picture of any resolution, as released."""

ONEVISION = {
    "architectures": ["LlavaQwenForCausalLM"],
    "add_faster_video": False,
    "add_time_instruction": False,
    "faster_token_stride": 10,
    "force_sample": False,
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_grid_pinpoints": [
        [SIDE * PATCH * w, SIDE * PATCH * h] for w in range(1, LONGEST_SIDE + 1) for h in range(1, LONGEST_SIDE + 1)
    ],
    "image_split_resolution": None,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava",
    "use_mm_proj": True,
}
V1_5 = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava",
    "pad_token_id": 0,
    "use_mm_proj": True,
}
"""Fields of the released config.json besides the language model's."""


class Vicuna(Chat):
    """LLaVA-1.5's chat: what others say as a system message stands before all."""

    def before(self, messages: Sequence[Message]) -> str:
        return (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        )

    def opening(self, role: str) -> str:
        return "USER: " if role == "user" else "ASSISTANT: "

    def closing(self, role: str) -> str:
        return " " if role == "user" else "</s>"

    def asking(self) -> str:
        return "ASSISTANT:"


def make_onevision(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random LLaVA-OneVision to the folder `path`. Errors: as `make_checkpoint`."""
    return _make(path, ONEVISION, "siglip", ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"))


def make_v1_5(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random LLaVA-1.5 to the folder `path`. Errors: as `make_checkpoint`."""
    return _make(path, V1_5, "clip", ("<|endoftext|>", "</s>", "<|im_end|>", "<image>"))


def _make(path: str | os.PathLike[str], fields: dict[str, Any], kind: str, special: Sequence[str]) -> Path:
    # SGLang opens the tower by its name alone, so this is a path that holds from everywhere.
    tower = str(Path(path).resolve() / f"{kind}-tower")
    recipe = {"arch": f"llava_original_{kind}", "mm_vision_tower": tower, **fields}
    return tiny_model.make_checkpoint(path, recipe, lambda fresh: _write(fresh, fields, kind, tower, special))


def _write(path: Path, fields: dict[str, Any], kind: str, named: str, special: Sequence[str]) -> None:
    import transformers
    from safetensors.torch import save_file

    tokenizer = tiny_model.make_tokenizer(special, "")
    rows = tiny_model.vocabulary_rows(tokenizer)
    language = _language(fields["architectures"][0], {"vocab_size": rows, **LANGUAGE})
    tiny_model.draw_weights(language, 0, tiny_model.spoken_tokens(tokenizer, rows))
    tower = _tower(kind)
    tower.save_pretrained(path / Path(named).name)
    size, image = {"height": TOWER["image_size"], "width": TOWER["image_size"]}, tokenizer.convert_tokens_to_ids
    if kind == "clip":
        cut: Any = transformers.CLIPImageProcessor(size={"shortest_edge": TOWER["image_size"]}, crop_size=size)
    else:
        cut = transformers.SiglipImageProcessor(size=size, resample=3)
    cut.save_pretrained(path)
    tokenizer.save_pretrained(path)
    tensors = {**language.state_dict(), **_between(language.config.hidden_size, "unpad" in str(fields))}
    for name, tensor in getattr(tower, "vision_model", tower).state_dict().items():
        tensors[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        path / "model-00001-of-00001.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        **LANGUAGE,
        **fields,
        "attention_dropout": 0.0,
        "bos_token_id": image("<|endoftext|>"),
        "eos_token_id": image("<|im_end|>"),
        "hidden_act": "silu",
        "image_token_index": image("<image>"),
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_vision_tower": named,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": rows,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tiny_model.generation_config(tokenizer).save_pretrained(path)


def _language(architecture: str, fields: Mapping[str, Any]) -> Any:
    import transformers

    if architecture == "LlavaQwenForCausalLM":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields))
    own = {name: value for name, value in fields.items() if name != "max_window_layers"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**own))


def _tower(kind: str) -> Any:
    """In half precision, in which SGLang loads it whatever the rest is."""
    import transformers

    if kind == "siglip":
        tower: Any = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER))
    else:
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    drawn = random_tower(TOWER).state_dict() if kind == "siglip" else {}
    draw = torch.Generator().manual_seed(5)
    for name, weight in getattr(tower, "vision_model", tower).named_parameters():
        with torch.no_grad():
            if name in drawn:
                weight.copy_(drawn[name])
            elif "norm" in name:
                weight.copy_((1 if name.endswith("weight") else 0) + 0.1 * torch.randn(weight.shape, generator=draw))
            elif "embedding" in name and weight.ndim < 4:
                weight.copy_(torch.randn(weight.shape, generator=draw))
            else:
                fan = weight[0].numel() if weight.ndim > 1 else 100
                weight.copy_(torch.randn(weight.shape, generator=draw) / fan**0.5)
    return tower.half().eval()


def _between(hidden: int, newline: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    found = {}
    for name, inside in (("0", TOWER["hidden_size"]), ("2", hidden)):
        found[f"model.mm_projector.{name}.weight"] = torch.randn(hidden, inside, generator=draw) / inside**0.5
        found[f"model.mm_projector.{name}.bias"] = 0.1 * torch.randn(hidden, generator=draw)
    if newline:
        found["model.image_newline"] = torch.randn(hidden, generator=draw).half()
    return found


# ---- the oracle --------------------------------------------------------------------------------------------


def oracle(path: str | os.PathLike[str], video_options: Mapping[str, Any] | None = None) -> EmbeddedOracle:
    """The oracle of a checkpoint of either form, which takes no video."""
    return OriginalLlavaOracle(path)


class OriginalLlavaOracle(EmbeddedOracle):
    """Transformers' tower and language model on a checkpoint's tensors."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import transformers
        from safetensors.torch import load_file

        root = Path(path)
        self.config = json.loads((root / "config.json").read_text())
        tensors = {name: t.float() for name, t in load_file(root / "model-00001-of-00001.safetensors").items()}
        language = _language(self.config["architectures"][0], {k: self.config[k] for k in ("vocab_size", *LANGUAGE)})
        language.load_state_dict({k: v for k, v in tensors.items() if k in language.state_dict()})
        kind: Any = transformers.SiglipVisionModel if "siglip" in self.config["mm_vision_tower"] else None
        self.tower = (kind or transformers.CLIPVisionModel).from_pretrained(self.config["mm_vision_tower"]).float()
        self.processor = transformers.AutoImageProcessor.from_pretrained(root)
        self.weights = [tensors[f"model.mm_projector.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
        self.newline = tensors.get("model.image_newline")
        self.several = False
        tokenizer = transformers.AutoTokenizer.from_pretrained(root)
        chat = Chat() if self.newline is not None else Vicuna()
        super().__init__(language, tokenizer, self.config["image_token_index"], chat)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        _, images, _ = split_messages(messages)
        self.several = len(images) > 1
        return super().pieces(messages)

    def shown(self, kind: str, path: str) -> tuple[list[Piece], str]:
        if kind != "image_url":
            raise ValueError(f"LLaVA is shown images only, got {kind}")
        if self.newline is not None and not self.several:
            return [any_resolution(path, self.config, TOWER["image_size"], self.projected, self.newline)], "\n"
        return [self.padded(path)], "\n"

    def padded(self, path: str) -> torch.Tensor:
        """A picture on a square of the mean colour, and a newline behind it where the model has learned one."""
        from PIL import Image

        picture = read_picture(path)
        longest = max(picture.size)
        square = Image.new("RGB", (longest, longest), tuple(int(255 * mean) for mean in self.processor.image_mean))
        square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
        tokens = self.projected([square])[0].flatten(0, 1)
        return tokens if self.newline is None else torch.cat([tokens, self.newline[None]])

    @torch.no_grad()
    def projected(self, views: Sequence[Any]) -> torch.Tensor:
        """[n, side, side, hidden] of n views."""
        pixels = self.processor([view.convert("RGB") for view in views], return_tensors="pt")["pixel_values"]
        layers = getattr(self.tower, "vision_model", self.tower).encoder.layers
        # SGLang hands pixels over in half precision.
        seen = output_of(layers[-2], lambda: self.tower(pixel_values=pixels.half().float()))
        first, bias, second, bias_2 = self.weights
        patches = seen[:, -(SIDE**2) :]  # without CLIP's token of the whole
        state = torch.nn.functional.gelu(patches @ first.T + bias) @ second.T + bias_2
        return state.unflatten(1, (SIDE, SIDE))


FAMILIES = (
    Family(
        name="llava_onevision_lmms",
        title="LLaVA-OneVision (lmms-lab)",
        architecture="LlavaQwenForCausalLM",
        maker=make_onevision,
        oracle=oracle,
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        video=False,  # SGLang answers a video with an error
        several_videos=False,
        reach=1664,  # of three pictures
        lone_image=True,
        flags=("--chat-template", "chatml-llava"),
        prompt=Prompt("llava", "<image>", expanded=("image",)),
    ),
    Family(
        name="llava_v1_5",
        title="LLaVA-1.5 (original)",
        architecture="LlavaLlamaForCausalLM",
        maker=make_v1_5,
        oracle=oracle,
        oracle_title="transformers (CLIP, Llama), and the steps between them written out",
        video=False,
        several_videos=False,
        reach=1664,  # of three pictures
        chunked_prefill=False,  # SGLang turns it off for this architecture
        flags=("--chat-template", "vicuna_v1.1"),
    ),
)
