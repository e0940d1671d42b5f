"""Tiny VideoChat-Flash checkpoints with the files and names of the released ones, and an oracle for them.

The oracle decodes with PyAV, resizes with transformers' image transforms, merges pair by pair, puts tiles together in
loops and runs transformers' Qwen2. No library has the towers: they are written out in `videochat_towers`, which is held
against the original's own outputs in tests/unit/families/test_videochat_flash.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from families import NO_ROWS, Family
from families.embedded import LANGUAGE, EmbeddedOracle, Piece
from families.videochat_towers import Tower
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle_media import open_video, read_picture

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# A picture has to have 64 patches or more: 9 a side.
TOWERS: dict[str, dict[str, int]] = {
    "umt-large": {"image_size": 144, "patch": 16, "mlp_hidden": 128},
    "internvideo2": {"image_size": 126, "patch": 14, "mlp_hidden": 139},
}
"""By `mm_vision_tower`; the released towers in small, told as `mm_vision_config`."""
SHARED_SIZES = {"hidden": 32, "layers": 3, "heads": 4}

RELEASED = {
    "frame_aspect_ratio": "square",
    "frame_grid_pinpoints": None,
    "image_aspect_ratio": "anyres_nopad",
    "image_crop_resolution": None,
    "image_grid_pinpoints": "(1x1),...,(3x3)",
    "max_num_pixels": 14745600000,
    "mm_llm_compress": False,
    "mm_local_num_frames": 4,
    "mm_newline_position": "nothing",
    "mm_patch_merge_type": "spatial_nopad",
    "mm_pos_num_frames": 8,
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "umt-large",
    "model_type": "videochat_flash_qwen",
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
    "vision_encode_type": "video_image",
}
"""Fields of a released config.json besides the language model's; of pictures, fewer tiles."""


def make(path: str | os.PathLike[str], **fields: Any) -> Path:
    """Writes a tiny random VideoChat-Flash to the folder `path`; `fields` replace `RELEASED` ones.

    Errors as `tiny_model.make_checkpoint`.
    """
    if unknown := sorted(set(fields) - set(RELEASED)):
        raise ValueError(f"tiny VideoChat-Flash: expected fields of config.json, got {unknown[0]!r}")
    told = {**RELEASED, **fields}
    return tiny_model.make_checkpoint(path, {"arch": "videochat_flash", **told}, lambda fresh: _write(fresh, told))


def _write(path: Path, fields: dict[str, Any]) -> None:
    import transformers
    from safetensors.torch import save_file

    tokenizer = tiny_model.make_tokenizer(SPECIAL_TOKENS, "")
    rows = tiny_model.vocabulary_rows(tokenizer)
    language = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=rows, **LANGUAGE))
    tiny_model.draw_weights(language, 0, tiny_model.spoken_tokens(tokenizer, rows))
    sizes = {**SHARED_SIZES, **TOWERS[fields["mm_vision_tower"]]}
    tensors = {name: tensor.contiguous().clone() for name, tensor in language.state_dict().items()}
    seen = vision_tensors(fields["mm_vision_tower"], language.config.hidden_size)
    for i, (name, shape) in enumerate(sorted(seen.items())):
        tensors[name] = _drawn(name, shape, torch.Generator().manual_seed(1000 + i))
    # As released: in two files, and an index beside them.
    names = sorted(tensors)
    index: dict[str, str] = {}
    for part in range(2):
        file, own = f"model-{part + 1:05d}-of-00002.safetensors", names[part::2]
        save_file({name: tensors[name] for name in own}, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(own, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2, sort_keys=True) + "\n"
    )
    config = {
        "architectures": ["VideoChatFlashQwenForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_videochat_flash.VideoChatFlashQwenConfig",
            "AutoModel": "modeling_videochat_flash.VideoChatFlashQwenForCausalLM",
        },
        **LANGUAGE,
        **fields,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "hidden_act": "silu",
        "mm_hidden_size": sizes["hidden"],
        "mm_vision_config": sizes,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": rows,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tiny_model.generation_config(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)


def vision_tensors(tower: str, hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a released file holds before the language model."""
    sizes = {**SHARED_SIZES, **TOWERS[tower]}
    width, wide, patch = sizes["hidden"], sizes["mlp_hidden"], sizes["patch"]
    patches = (sizes["image_size"] // patch) ** 2
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outside: int, inside: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outside, inside), (outside,)

    umt = tower.startswith("umt")
    top = "model.vision_tower.vision_tower." + ("encoder." if umt else "")
    found[f"{top}patch_embed.proj.weight"] = (width, 3, 1, patch, patch)
    found[f"{top}patch_embed.proj.bias"] = (width,)
    for layer in range(sizes["layers"] - 1):  # the original has dropped the last one before it saves
        block = f"{top}blocks.{layer}"
        found[f"{block}.attn.qkv.weight"] = (3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", wide, width)
        linear(f"{block}.mlp.fc2", width, wide)
        weights = ("norm1", "norm2") if umt else ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "ls1", "ls2")
        found |= {f"{block}.{name}.weight": (width,) for name in weights}
        biases = ("norm1.bias", "norm2.bias", "attn.q_bias", "attn.v_bias") if umt else ()
        found |= {f"{block}.{name}": (width,) for name in biases}
    if umt:
        found |= {f"{top}vision_layernorm.{name}": (width,) for name in ("weight", "bias")}
    else:
        found[f"{top}cls_token"] = (1, 1, width)
        found[f"{top}pos_embed"] = (1, 1 + 4 * patches, width)
        found[f"{top}img_pos_embed"] = (1, 1 + patches, width)
    linear("model.mm_projector.mlp.0", hidden, width)
    linear("model.mm_projector.mlp.2", hidden, hidden)
    return found


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        near_one = name.endswith(".weight")  # of norms and scales
        return (1.0 if near_one else 0.0) + 0.1 * noise
    if len(shape) == 3:
        return 0.5 * noise
    return noise / math.sqrt(noise[0].numel())


# ---- the oracle --------------------------------------------------------------------------------------------


class VideoChatFlashOracle(EmbeddedOracle):
    """Transformers' Qwen2 on a checkpoint's tensors, and the original's steps before it in loops.

    Args:
        video: as `--mm-process-config` gives it for video.
    """

    def __init__(self, path: str | os.PathLike[str], video: dict[str, int] | None = None) -> None:
        import transformers
        from safetensors.torch import load_file

        root = Path(path)
        self.config = json.loads((root / "config.json").read_text())
        tensors = {name: tensor for file in root.glob("*.safetensors") for name, tensor in load_file(file).items()}
        text = {name: self.config[name] for name in (*LANGUAGE, "vocab_size", "tie_word_embeddings")}
        language = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text))
        language.load_state_dict({name: tensors[name] for name in language.state_dict()})
        sizes = self.config["mm_vision_config"]
        self.heads, self.size = sizes["heads"], sizes["image_size"]
        theirs = "model.vision_tower.vision_tower."
        self.tower = Tower(
            {k.removeprefix(theirs): v for k, v in tensors.items() if k.startswith(theirs)},
            sizes["heads"],
            sizes["patch"],
        )
        self.projector = [tensors[f"model.mm_projector.mlp.{i}.{part}"] for i in (0, 2) for part in ("weight", "bias")]
        self.least, self.most = ({"min_frames": 64, "max_frames": 512, **(video or {})}[k] for k in _VIDEO)
        tokenizer = transformers.AutoTokenizer.from_pretrained(root, trust_remote_code=False)
        super().__init__(language, tokenizer, tokenizer.pad_token_id)

    def shown(self, kind: str, path: str) -> tuple[list[Piece], str]:
        if kind == "image_url":
            return [self.of_image(path)], "\n"
        embedded, told = self.of_video(path)
        return [embedded], f"\n{told} "

    @torch.no_grad()
    def embedded(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """[64, hidden] of the uint8 pictures of one clip, or of one picture."""
        from transformers.image_transforms import normalize, rescale, resize
        from transformers.image_utils import ChannelDimension, PILImageResampling

        pixels = []
        for picture in pictures:
            squeezed = resize(
                picture, (self.size, self.size), PILImageResampling.BICUBIC, data_format=ChannelDimension.FIRST
            )
            scaled = rescale(squeezed, 1 / 255, data_format=ChannelDimension.FIRST)
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
            pixels.append(normalize(scaled, mean, std, data_format=ChannelDimension.FIRST))
        seen = self.tower.seen(torch.from_numpy(np.stack(pixels)).float())
        first, first_bias, second, second_bias = self.projector
        inner = torch.nn.functional.gelu(merged(seen, 64, self.heads).float() @ first.T + first_bias)
        return inner @ second.T + second_bias

    def of_video(self, path: str) -> tuple[torch.Tensor, str]:
        """Embeddings of a video, and what the model is told about it."""
        video = open_video(path)
        total, rate = len(video), video.fps
        least = self.least if self.least <= total else total // 4 * 4
        count = max(least, min(max(4, int(total / rate // 4) * 4), self.most))
        parts = np.linspace(0, total, min(count, total) + 1).astype(int)
        wanted = [(parts[i] + parts[i + 1] - 1) // 2 for i in range(len(parts) - 1)]
        while len(wanted) < count:
            wanted.append(wanted[-1])
        frames = list(video.frames(wanted))
        clips = [self.embedded(frames[i : i + 4]) for i in range(0, count, 4)]
        seconds = f"{total / rate:.2f}"
        told = f"The video lasts for {seconds} seconds, and {count} frames are uniformly sampled from it."
        return torch.cat(clips), told

    def of_image(self, path: str) -> torch.Tensor:
        """Embeddings of a picture of any resolution: the whole, then its tiles ("anyres_nopad")."""
        picture = read_picture(path)
        width, height = picture.size
        size = self.size
        best, best_kept, best_waste = (0, 0), 0, 0
        for across in range(1, 4):
            for down in range(1, 4):
                w, h = across * size, down * size
                scale = min(w / width, h / height)
                kept = min(int(width * scale) * int(height * scale), width * height)
                if kept > best_kept or (kept == best_kept and w * h - kept < best_waste):
                    best, best_kept, best_waste = (across, down), kept, w * h - kept
        across, down = best
        canvas = np.array(picture.resize((across * size, down * size)))
        whole = self.embedded([np.array(picture.resize((size, size)))])
        tiles = [
            [self.embedded([canvas[r * size : (r + 1) * size, c * size : (c + 1) * size]]) for c in range(across)]
            for r in range(down)
        ]
        tokens = list(whole)
        for row in tiles:
            for line in range(8):
                for tile in row:
                    tokens += list(tile[8 * line : 8 * line + 8])
        return torch.stack(tokens)


_VIDEO = ("min_frames", "max_frames")


def merged(tokens: torch.Tensor, target: int, heads: int) -> torch.Tensor:
    """Tokens of one clip, [n, hidden], merged pair by pair in fp64 until `target` are left."""
    rows = [row.double() for row in tokens]
    sizes = [1] * len(rows)
    while len(rows) > target:
        seen = torch.stack([row.reshape(heads, -1).mean(0) for row in rows])
        seen = seen / seen.norm(dim=1, keepdim=True)
        odd = seen[1::2]
        best = {a: (odd @ seen[a]).max(0) for a in range(0, len(rows), 2)}
        ranked = sorted(best, key=lambda a: -float(best[a].values))
        gone = ranked[: min(len(rows) // 2, len(rows) - target)]
        groups = {b: [b] for b in range(1, len(rows), 2)}
        for a in gone:
            groups[1 + 2 * int(best[a].indices)].append(a)
        kept = ranked[len(gone) :]
        joined = [sum(sizes[i] for i in group) for group in groups.values()]
        total = [sum((rows[i] * sizes[i] for i in group), torch.zeros(())) for group in groups.values()]
        rows = [rows[a] for a in kept] + [row / size for row, size in zip(total, joined)]
        sizes = [sizes[a] for a in kept] + joined
    return torch.stack(rows)


FAMILIES = (
    Family(
        name="videochat_flash",
        title="VideoChat-Flash (UMT-L)",
        architecture="VideoChatFlashQwenForCausalLM",
        maker=make,
        oracle=VideoChatFlashOracle,
        recipe={"mm_vision_tower": "umt-large"},
        oracle_title="transformers (Qwen2), the rest written out; the tower against outputs of the original",
        served_by="plugin",
        patterns=NO_ROWS,
        long_videos=12,
        video_options={"min_frames": 4, "max_frames": 16},
    ),
    Family(
        name="videochat_flash_1b",
        title="VideoChat-Flash (InternVideo2-1B)",
        architecture="VideoChatFlashQwenForCausalLM",
        maker=make,
        oracle=VideoChatFlashOracle,
        recipe={"mm_vision_tower": "internvideo2", "model_type": "qwen2"},  # the type of a released checkpoint
        oracle_title="transformers (Qwen2), the rest written out; the tower against outputs of the original",
        served_by="plugin",
        patterns=NO_ROWS,
        long_videos=12,
        video_options={"min_frames": 4, "max_frames": 16},
    ),
)
