"""Tiny NVILA and NVILA-Lite with the files, keys and configs of released ones, and an oracle for them.

SGLang's classes fix the width of the vision tower, 1152, and with it the projector's; only depth and picture are small.

The oracle shares nothing with SGLang's classes or with the remote code of the checkpoints, but for transformers' image
processor. It cuts pictures, joins tiles and merges patches in plain loops, and asks transformers' SigLIP and Qwen2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from families import Family, Prompt, nvila_remote
from families.embedded import EmbeddedOracle, Piece, output_of
from families.llava_video import random_tower
from families.longvila import merged, projected, random_projector
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.testing.oracle import Message, OracleAnswer
from sglang_mminfer.testing.oracle_media import open_video, read_picture

HIDDEN, LAYERS, HEADS, KV_HEADS = 128, 2, 8, 2
PATCH = 16
TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 128,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "patch_size": PATCH,
    "vision_use_head": False,
}

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<vila/video>")
CHAT_TEMPLATE = tiny_model.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<vila/video>"
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What sets the two apart.

    Attributes:
        name: of the files of remote code, and the model's type.
        label: of the classes.
        patches: of a tile, by side: no multiple of `merge`, so that the projector pads.
        merge: patches that become one token, by side.
        scales: copies of the tower's channels that enter the projector.
        projector: as LongVILA names it.
    """

    name: str
    label: str
    patches: int
    merge: int
    scales: int
    projector: str

    @property
    def side(self) -> int:
        """The side of a tile, in tokens."""
        return -(-self.patches // self.merge)


NVILA = Variant("nvila", "NVILA", patches=7, merge=2, scales=3, projector="mlp_downsample")
LITE = Variant("nvila_lite", "NVILALite", patches=10, merge=3, scales=1, projector="mlp_downsample_3x3_fix")


def make(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random NVILA to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "nvila"}, lambda fresh: _write(fresh, NVILA))


def make_lite(path: str | os.PathLike[str]) -> Path:
    """Writes a tiny random NVILA-Lite to the folder `path`. Errors: as `make_checkpoint`."""
    return tiny_model.make_checkpoint(path, {"arch": "nvila_lite"}, lambda fresh: _write(fresh, LITE))


def _write(path: Path, variant: Variant) -> None:
    import transformers
    from safetensors.torch import save_file

    tokenizer = tiny_model.make_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE)
    rows = tiny_model.vocabulary_rows(tokenizer)
    pad, end, image, video = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<image>", "<vila/video>"])
    text = {
        "model_type": "qwen2",
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "bos_token_id": pad,
        "eos_token_id": end,
        "tie_word_embeddings": False,
    }
    side = variant.patches * PATCH
    vision = {**TOWER, "image_size": side}
    language = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text))
    tiny_model.draw_weights(language, 0, tiny_model.spoken_tokens(tokenizer, rows))
    tensors = {f"llm.{name}": tensor for name, tensor in language.state_dict().items()}
    tensors |= {f"vision_tower.vision_model.{k}": v for k, v in random_tower(vision).state_dict().items()}
    width = variant.scales * vision["hidden_size"]
    projector = random_projector(variant.projector, width, HIDDEN)
    tensors |= {f"mm_projector.{name}": tensor for name, tensor in projector.items()}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    code = f"processing_{variant.name}"
    shutil.copyfile(nvila_remote.__file__, path / f"{code}.py")
    config = {
        "architectures": [f"{variant.label}ForConditionalGeneration"],
        "auto_map": {"AutoConfig": f"{code}.{variant.label}Config"},
        "model_type": variant.name,
        "image_token_id": image,
        "video_token_id": video,
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    _dump(path / "config.json", config)
    processor = f"{variant.label}Processor"
    mapped = {"auto_map": {"AutoProcessor": f"{code}.{processor}"}, "processor_class": processor}
    _dump(path / "processor_config.json", {**mapped, "tile_tokens": variant.side**2})
    pixels = {
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3},
        **{"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}},
    }
    _dump(path / "preprocessor_config.json", {**mapped, **pixels})
    tiny_model.generation_config(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    tokens = json.loads((path / "tokenizer_config.json").read_text())
    _dump(path / "tokenizer_config.json", {**tokens, "image_token": "<image>", "video_token": "<vila/video>"})


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---- the oracle --------------------------------------------------------------------------------------------


class NVILAOracle(EmbeddedOracle):
    """Transformers' SigLIP and Qwen2 on a checkpoint's tensors, and NVILA's steps between them in loops.

    Args:
        path: the checkpoint.
        num_frames: taken of every video, as the server is told.
    """

    def __init__(self, path: str | os.PathLike[str], num_frames: int) -> None:
        self.num_frames = num_frames
        import transformers
        from safetensors.torch import load_file

        folder = Path(path)
        config = json.loads((folder / "config.json").read_text())
        self.variant = {v.name: v for v in (NVILA, LITE)}[config["model_type"]]
        tensors = load_file(folder / "model.safetensors")
        language = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config["text_config"]))
        language.load_state_dict(_below("llm.", tensors))
        self.tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config["vision_config"])).eval()
        inner = getattr(self.tower, "vision_model", self.tower)
        inner.load_state_dict(_below("vision_tower.vision_model.", tensors))
        self._kept_layer = inner.encoder.layers[-2]
        self.projector = _below("mm_projector.", tensors)
        self.pixels = transformers.SiglipImageProcessor.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.newline = tokenizer.encode("\n", add_special_tokens=False)
        self.tokens = {"image_url": config["image_token_id"], "video_url": config["video_token_id"]}
        self.alone = False
        self._known: dict[tuple[str, str, bool], tuple[list[Piece], str]] = {}
        super().__init__(language, tokenizer, fill=-1)

    def answer(self, messages: Sequence[Message], max_new_tokens: int = 8, top_logprobs: int = 20) -> OracleAnswer:
        answer = super().answer(messages, max_new_tokens, top_logprobs)
        media = (
            self.tokens[kind]
            for kind, path in _media(messages)
            for piece in self.shown(kind, path)[0]
            for _ in (piece if isinstance(piece, torch.Tensor) else ())
        )
        ids = [next(media) if token == self.fill else token for token in answer.prompt_ids]
        return dataclasses.replace(answer, prompt_ids=ids)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        self.alone = [kind for kind, _ in _media(messages)].count("image_url") == 1
        return super().pieces(messages)

    def shown(self, kind: str, path: str) -> tuple[list[Piece], str]:
        key = (kind, path, self.alone)
        if key not in self._known:
            self._known[key] = self._shown(kind, path)
        return self._known[key]

    def _shown(self, kind: str, path: str) -> tuple[list[Piece], str]:
        from PIL import Image

        if kind == "video_url":
            video = open_video(path)
            last = len(video) - 1
            taken = [round(i * last / (self.num_frames - 1)) for i in range(self.num_frames)]
            frames = [Image.fromarray(frame) for frame in video.frames(taken)]
            return _with(self.newline, self._tiles(frames)), ""
        picture = read_picture(path)
        if not self.alone:
            return _with(self.newline, self._tiles([picture])), ""
        side = self.variant.patches * PATCH
        if self.variant is NVILA:
            return _with(self.newline, [self._joined(picture, side)]), ""
        rows, cols = best_shape(picture.width, picture.height, 1, side)
        cut = cut_up(picture, rows, cols, side)
        if len(cut) > 1:
            cut.append(picture.resize((side, side)))
        pieces = _with([*self.newline, *self.newline], self._tiles(cut))
        return [*pieces[:-1], self.newline], "\n"

    @torch.no_grad()
    def _seen(self, pictures: Sequence[Any]) -> torch.Tensor:
        """[n, patches, channels] of pictures in one tile each."""
        pixels = self.pixels(list(pictures), return_tensors="pt")
        return output_of(self._kept_layer, lambda: self.tower(**pixels))

    @torch.no_grad()
    def _tiles(self, pictures: Sequence[Any]) -> torch.Tensor:
        """[n, tokens, hidden] of pictures in one tile each: at every scale they look alike."""
        seen = torch.cat([self._seen(pictures)] * self.variant.scales, dim=-1)
        return projected(merged(seen, self.variant.merge), self.projector)

    @torch.no_grad()
    def _joined(self, picture: Any, side: int) -> torch.Tensor:
        """[tokens, hidden] of a picture that is seen at three scales; only the last one keeps its proportions."""
        n = self.variant.patches
        rows, cols = best_shape(picture.width, picture.height, 9, side)
        maps = []
        for shape in ((1, 1), (2, 2), (rows, cols)):
            own = torch.zeros(shape[0] * n, shape[1] * n, TOWER["hidden_size"])
            for i, patches in enumerate(self._seen(cut_up(picture, *shape, side))):
                row, col = i // shape[1] * n, i % shape[1] * n
                own[row : row + n, col : col + n] = patches.reshape(n, n, -1)
            maps.append(averaged(own, rows * n, cols * n))
        whole = torch.cat(maps, dim=-1)
        squares = [whole[r : r + n, c : c + n] for r in range(0, rows * n, n) for c in range(0, cols * n, n)]
        tokens = projected(merged(torch.stack([s.reshape(n * n, -1) for s in squares]), 2), self.projector)
        m = self.variant.side
        joined = torch.zeros(rows * m, cols * m, tokens.shape[-1])
        for i, tile in enumerate(tokens):
            row, col = i // cols * m, i % cols * m
            joined[row : row + m, col : col + m] = tile.reshape(m, m, -1)
        return joined.reshape(rows * m * cols * m, -1)


def best_shape(width: int, height: int, least: int, side: int) -> tuple[int, int]:
    """Rows and columns of `least` to 12 tiles whose proportions are nearest to a picture's.

    Where several are equally near: the last that the picture fills by more than half, else the first, in the order of
    their count.
    """
    shapes = [(r, c) for count in range(least, 13) for c in range(1, 13) for r in range(1, 13) if r * c == count]
    nearest = min(abs(width / height - c / r) for r, c in shapes)
    equal = [(r, c) for r, c in shapes if abs(width / height - c / r) == nearest]
    filled = [(r, c) for r, c in equal[1:] if width * height > side * side * r * c / 2]
    return (filled or equal[:1])[-1]


def cut_up(picture: Any, rows: int, cols: int, side: int) -> list[Any]:
    """The picture as rows * cols tiles, row by row."""
    whole = picture.resize((cols * side, rows * side))
    boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(rows) for c in range(cols)]
    return [whole.crop(box) for box in boxes]


def averaged(patches: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """[rows, cols, channels] from [h, w, channels]: each the mean of all patches that its area touches."""
    height, width = patches.shape[:2]
    return torch.stack(
        [
            torch.stack(
                [
                    patches[
                        r * height // rows : -(-(r + 1) * height // rows),
                        c * width // cols : -(-(c + 1) * width // cols),
                    ].mean(dim=(0, 1))
                    for c in range(cols)
                ]
            )
            for r in range(rows)
        ]
    )


def _media(messages: Sequence[Message]) -> list[tuple[str, str]]:
    parts: list[Any] = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    return [(part["type"], part[part["type"]]["url"]) for part in parts if part["type"] != "text"]


def _with(behind: list[int], embeddings: Sequence[torch.Tensor] | torch.Tensor) -> list[Piece]:
    return [piece for tile in embeddings for piece in (tile, behind)]


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def oracle(path: str | os.PathLike[str], video: Mapping[str, int]) -> NVILAOracle:
    return NVILAOracle(path, **video)


FAMILIES = (
    Family(
        name="nvila",
        title="NVILA",
        architecture="NVILAForConditionalGeneration",
        maker=make,
        oracle=oracle,
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        long_video=(40, 128, 96, 4),
        long_videos=11,
        video_options={"num_frames": 20},  # SGLang takes 8 by itself
        flags=("--trust-remote-code",),  # released checkpoints bring their processor along
        prompt=Prompt("nvila", "<image>", "<vila/video>"),
    ),
    Family(
        name="nvila_lite",
        title="NVILA-Lite",
        architecture="NVILALiteForConditionalGeneration",
        maker=make_lite,
        oracle=oracle,
        oracle_title="transformers (SigLIP, Qwen2), and the steps between them written out",
        long_video=(40, 128, 96, 4),
        long_videos=11,
        video_options={"num_frames": 20},  # SGLang takes 8 by itself
        flags=("--trust-remote-code",),  # released checkpoints bring their processor along
    ),
)
