"""Tiny LLaVA-Video checkpoints with the files and names of the released ones, and an oracle for them.

The oracle follows the original code's description in plain loops over transformers' SigLIP and Qwen2, and shares
nothing with the product: it decodes with PyAV, resizes with transformers' image processor, pools cell by cell.
"""

from __future__ import annotations

import ast
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from families import Family, Prompt
from families.embedded import LANGUAGE, EmbeddedOracle, Piece, output_of
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle_media import open_video, read_picture

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 384,
    "patch_size": 14,
}
"""As many patches as the released tower has, in a smaller one; the checkpoint names it as `mm_vision_config`."""

RELEASED = {
    "add_faster_video": False,
    "add_time_instruction": True,
    "faster_token_stride": 10,
    "force_sample": True,
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_grid_pinpoints": [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)],
    "image_split_resolution": None,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava",
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
}
"""Fields of the released config.json besides the language model's."""


def make(path: str | os.PathLike[str], **fields: Any) -> Path:
    """Writes a tiny random LLaVA-Video to the folder `path`; `fields` replace `RELEASED` ones.

    Errors as `tiny_model.make_checkpoint`.
    """
    unknown = sorted(set(fields) - set(RELEASED))
    if unknown:
        raise ValueError(f"tiny LLaVA-Video: expected fields of config.json, got {unknown[0]!r}")
    recipe = {"arch": "llava_video", **RELEASED, **fields}
    return tiny_model.make_checkpoint(path, recipe, lambda fresh: _write(fresh, {**RELEASED, **fields}))


def _write(path: Path, fields: dict[str, Any]) -> None:
    import transformers
    from safetensors.torch import save_file

    tokenizer = tiny_model.make_tokenizer(SPECIAL_TOKENS, "")
    rows = tiny_model.vocabulary_rows(tokenizer)
    language = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=rows, **LANGUAGE))
    tiny_model.draw_weights(language, 0, tiny_model.spoken_tokens(tokenizer, rows))
    seen = vision_parts(language.config.hidden_size, fields["mm_projector_type"])
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in {**language.state_dict(), **seen}.items()},
        path / "model-00001-of-00001.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        **LANGUAGE,
        **fields,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "hidden_act": "silu",
        "image_token_index": len(tokenizer),
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_vision_config": TOWER,
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


def vision_parts(hidden: int, projector: str) -> dict[str, torch.Tensor]:
    """The tensors before the language model by their names in the released files.

    The original code has dropped the tower's last layer and its head before it saves.
    """
    tower = random_tower(TOWER)
    found = {}
    for name, tensor in tower.state_dict().items():
        if not name.startswith((f"encoder.layers.{TOWER['num_hidden_layers'] - 1}.", "head.")):
            found[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
    draw = torch.Generator().manual_seed(7)
    depth = 1 if projector == "linear" else int(projector[3])
    for i in range(depth):
        inside = TOWER["hidden_size"] if i == 0 else hidden
        name = "model.mm_projector" if projector == "linear" else f"model.mm_projector.{2 * i}"
        found[f"{name}.weight"] = torch.randn(hidden, inside, generator=draw) / math.sqrt(inside)
        found[f"{name}.bias"] = 0.1 * torch.randn(hidden, generator=draw)
    found["model.image_newline"] = torch.randn(hidden, generator=draw)
    return found


@torch.no_grad()
def random_tower(sizes: dict[str, int], seed: int = 3) -> Any:
    """Transformers' SigLIP in which one patch tells much from another. Names as in a released file, less a prefix."""
    import transformers

    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    tower = getattr(tower, "vision_model", tower)
    for i, (name, weight) in enumerate(sorted(tower.named_parameters())):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1000 * seed + i))
        if "norm" in name:
            weight.copy_((1 if name.endswith("weight") else 0) + 0.1 * noise)
        elif weight.ndim == 1:
            weight.copy_(0.1 * noise)
        else:
            weight.copy_(noise if "position" in name else noise / math.sqrt(weight[0].numel()))
    return tower.eval()


# ---- the oracle --------------------------------------------------------------------------------------------


class LlavaVideoOracle(EmbeddedOracle):
    """Transformers' SigLIP and Qwen2 on a checkpoint's tensors, and the original's steps between them in loops.

    Args:
        video: as `--mm-process-config` gives it for video.
        fields: of config.json that a server was told to override.
    """

    def __init__(self, path: str | os.PathLike[str], video: dict[str, Any] | None = None, **fields: Any) -> None:
        import transformers
        from safetensors.torch import load_file

        root = Path(path)
        self.config = {**json.loads((root / "config.json").read_text()), **fields}
        tensors = {
            name: tensor for file in sorted(root.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
        names = set(transformers.Qwen2Config().to_dict()) | {"rope_theta"}
        language = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                **{k: v for k, v in self.config.items() if k in names and k not in ("model_type", "architectures")}
            )
        )
        language.load_state_dict({k: v for k, v in tensors.items() if k in language.state_dict()})
        tower = self.config["mm_vision_config"]
        self.side = tower["image_size"] // tower["patch_size"]
        self.size = tower["image_size"]
        self.tower = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**{**tower, "num_hidden_layers": tower["num_hidden_layers"] - 1})
        ).eval()
        inner = getattr(self.tower, "vision_model", self.tower)
        prefix = "model.vision_tower.vision_tower.vision_model."
        left = inner.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, strict=False
        )
        if left.unexpected_keys or any(not name.startswith("head.") for name in left.missing_keys):
            raise ValueError(f"oracle: tensors of the tower do not fit: {left}")
        self._last = inner.encoder.layers[-1]
        self.projector = [tensors[k] for k in sorted(tensors) if k.startswith("model.mm_projector")]
        self.newline = tensors["model.image_newline"]
        self.processor = transformers.SiglipImageProcessorPil(
            size={"height": self.size, "width": self.size}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        self.video = {"fps": 1, "max_frames": 64, "force_sample": self.config["force_sample"], **(video or {})}
        tokenizer = transformers.AutoTokenizer.from_pretrained(root)
        super().__init__(language, tokenizer, self.config["image_token_index"])

    def shown(self, kind: str, path: str) -> tuple[list[Piece], str]:
        if kind == "image_url":
            return [self.of_image(path)], "\n"
        embedded, told = self.of_video(path)
        return [embedded], f"\n{told}\n" if self.config["add_time_instruction"] else "\n"

    @torch.no_grad()
    def projected(self, pictures: Sequence[Any]) -> torch.Tensor:
        """[n, side, side, hidden] of pictures as the image processor takes them."""
        state = output_of(self._last, lambda: self.tower(**self.processor(list(pictures), return_tensors="pt")))
        for i in range(0, len(self.projector), 2):
            if i:
                state = torch.nn.functional.gelu(state)
            bias, weight = self.projector[i], self.projector[i + 1]
            state = state @ weight.T + bias
        return state.unflatten(1, (self.side, self.side))

    def of_video(self, path: str) -> tuple[torch.Tensor, str]:
        """Embeddings of a video, and what the model is told about it."""
        import numpy as np

        video = open_video(path)
        total, rate = len(video), video.fps
        step = round(rate / self.video["fps"])
        wanted = list(range(0, total, step))
        times = [i / step for i in wanted]
        if len(wanted) > self.video["max_frames"] or self.video["force_sample"]:
            wanted = np.linspace(0, total - 1, self.video["max_frames"], dtype=int).tolist()
            times = [i / rate for i in wanted]
        frames = self.projected(list(video.frames(wanted)))
        tokens: list[torch.Tensor] = []
        position = self.config["mm_newline_position"]
        for frame in frames:
            for row in self._smaller(frame):
                tokens += list(row)
                if position == "grid":
                    tokens.append(self.newline)
            if position == "frame":
                tokens.append(self.newline)
        if position == "one_token":
            tokens.append(self.newline)
        located = ",".join(f"{t:.2f}s" for t in times)
        return torch.stack(tokens), (
            f"The video lasts for {total / rate:.2f} seconds, and {len(wanted)} frames are uniformly sampled from it. "
            f"These frames are located at {located}.Please answer the following questions related to this video."
        )

    def _smaller(self, frame: torch.Tensor) -> list[list[torch.Tensor]]:
        """A frame [side, side, hidden] pooled to half its side, cell by cell."""
        mode = self.config["mm_spatial_pool_mode"]
        if mode != "bilinear":
            reduce = torch.Tensor.mean if mode == "average" else torch.Tensor.amax
            half = range(self.side // 2)
            return [[reduce(frame[2 * r : 2 * r + 2, 2 * c : 2 * c + 2], dim=(0, 1)) for c in half] for r in half]
        side = math.ceil(self.side / 2)
        return bilinear(frame, side, side)

    def of_image(self, path: str) -> torch.Tensor:
        """Embeddings of a picture of any resolution ("anyres_max_N", "spatial_unpad")."""
        return any_resolution(path, self.config, self.size, self.projected, self.newline)


def any_resolution(
    path: str, config: dict[str, Any], size: int, project: Callable[[list[Any]], torch.Tensor], newline: torch.Tensor
) -> torch.Tensor:
    """Embeddings of a picture ("anyres_max_N", "spatial_unpad") in LLaVA's original form.

    Args:
        config: of the checkpoint.
        size: pixels of a view along a side.
        project: [n, side, side, hidden] of n views.
    """
    from PIL import Image

    picture = read_picture(path)
    width, height = picture.size
    pinpoints = config["image_grid_pinpoints"]
    pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    best, best_kept, best_waste = (0, 0), 0, 0
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = w * h - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = (w, h), kept, waste
    scale_w, scale_h = best[0] / width, best[1] / height
    if scale_w < scale_h:
        fitted = (best[0], min(math.ceil(height * scale_w), best[1]))
    else:
        fitted = (min(math.ceil(width * scale_h), best[0]), best[1])
    canvas = Image.new("RGB", best)
    canvas.paste(picture.resize(fitted), ((best[0] - fitted[0]) // 2, (best[1] - fitted[1]) // 2))
    across, down = best[0] // size, best[1] // size
    views = [picture.resize((size, size))]
    for row in range(down):
        for col in range(across):
            views.append(canvas.crop((col * size, row * size, (col + 1) * size, (row + 1) * size)))
    seen = project(views)
    side = seen.shape[1]
    tokens = list(seen[0].flatten(0, 1))
    whole = [
        [seen[1 + (r // side) * across + c // side, r % side, c % side] for c in range(across * side)]
        for r in range(down * side)
    ]
    if width / height > across / down:
        pad = (len(whole) - int(height * (len(whole[0]) / width))) // 2
        whole = whole[pad : len(whole) - pad]
    else:
        pad = (len(whole[0]) - int(width * (len(whole) / height))) // 2
        whole = [row[pad : len(row) - pad] for row in whole]
    most = int(config["image_aspect_ratio"].rpartition("_")[2])
    times = math.sqrt(len(whole) * len(whole[0]) / (most * side**2))
    if times > 1.1:
        kept_map = torch.stack([torch.stack(row) for row in whole])
        whole = bilinear(kept_map, int(len(whole) // times), int(len(whole[0]) // times))
    for line in whole:
        tokens += [*line, newline]
    return torch.stack(tokens)


def bilinear(raster: torch.Tensor, rows: int, cols: int) -> list[list[torch.Tensor]]:
    """[h, w, hidden] at `rows` x `cols` points: each cell's centre, between its four nearest neighbours."""
    height, width = raster.shape[:2]

    def ends(i: int, count: int, length: int) -> tuple[int, int, float]:
        at = max(0.0, (i + 0.5) * length / count - 0.5)
        low = int(at)
        return low, min(low + 1, length - 1), at - low

    result = []
    for r in range(rows):
        top, bottom, down = ends(r, rows, height)
        row = []
        for c in range(cols):
            left, right, over = ends(c, cols, width)
            above = (1 - over) * raster[top, left] + over * raster[top, right]
            below = (1 - over) * raster[bottom, left] + over * raster[bottom, right]
            row.append((1 - down) * above + down * below)
        result.append(row)
    return result


FAMILIES = (
    Family(
        name="llava_video",
        title="LLaVA-Video",
        architecture="LlavaQwenForCausalLM",
        maker=make,
        oracle=LlavaVideoOracle,
        recipe={"mm_spatial_pool_mode": "average"},
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        served_by="plugin",
        reach=3328,
        long_videos=6,
        video_options={"max_frames": 4},
        prompt=Prompt("base_processor", "<image>", "<video>"),
    ),
)
