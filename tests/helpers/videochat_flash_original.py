"""What VideoChat-Flash's own modules compute, and the recipe that asked them.

    python tests/helpers/videochat_flash_original.py CHECKOUT

writes `data/videochat_flash.npz`, where CHECKOUT is a checkout of github.com/OpenGVLab/VideoChat-Flash (the file
was made with commit 2f8e2f5, torch 2.11, timm 1.0 and einops 0.8, on a CPU, in fp32). Nothing of that repository
is kept but these numbers: towers of hidden size 32 with weights drawn from their names, run on pixels drawn here
with attention's eager branch; token merging at the sizes of the released towers; positions; sampled frames;
preprocessed pictures. Only every few rows of large results are kept.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parent / "data" / "videochat_flash.npz"

HIDDEN, HEADS, LAYERS, SIDE, TEXT_HIDDEN = 32, 4, 3, 9, 24
PATCH = {"umt": 16, "internvideo2": 14}
ROWS = 18
"""Every how many rows of a tower's output are kept."""
TOKENS = 5
"""The same of what is merged."""

# Patches of a clip (or an image) of each released tower: 224 / 16, 448 / 16 and 224 / 14 a side.
MERGED = {"image_196": 196, "image_256": 256, "clip_784": 784, "clip_1024": 1024, "clip_3136": 3136}
MERGE_HIDDEN = 16

# Frames of the file, frames a second, most frames.
SAMPLED = [
    (1, 24.0, 512),
    (3, 1.0, 512),
    (7, 24.0, 512),
    (10, 0.5, 512),
    (63, 24.0, 512),
    (64, 1.0, 512),
    (150, 29.97, 512),
    (257, 1.0, 512),
    (1801, 25.0, 512),
    (2400, 24.0, 512),
    (2400, 24.0, 72),
    (20_000, 23.976, 512),
]

PICTURE = (50, 70)

PICTURES = [
    (70, 50),
    (224, 224),
    (225, 224),
    (300, 200),
    (640, 480),
    (1920, 1080),
    (1080, 1920),
    (100, 4000),
    (5000, 90),
]
"""Widths and heights for which a canvas is chosen."""


def drawn(name: str, *shape: int) -> torch.Tensor:
    """Standard normal numbers that depend on the name and the shape alone."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(state.standard_normal(shape).astype(np.float32))


def draw_weights(module: torch.nn.Module) -> None:
    """Every parameter from its name. Biases and norms are small or near one, products keep the size of a row."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = drawn(name, *weight.shape)
            if weight.dim() == 1:
                near_one = "norm" in name or ".ls" in name
                weight.copy_((1.0 if near_one and name.endswith("weight") else 0.0) + 0.1 * noise)
            elif weight.dim() == 3:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)


def pixels(kind: str, frames: int) -> torch.Tensor:
    """Two clips, [2, frames, 3, size, size]."""
    size = SIDE * PATCH[kind]
    return drawn(f"pixels of {kind}", 2, frames, 3, size, size)


def picture() -> np.ndarray:
    return (drawn("picture", *PICTURE, 3).numpy() * 60 + 128).clip(0, 255).astype(np.uint8)


def main(checkout: str) -> None:
    root = Path(checkout) / "llava-train_videochat" / "llava"
    import transformers.image_processing_utils  # noqa: F401, before it can take a stand-in for a package

    for missing in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding", "av", "cv2", "imageio"):
        sys.modules[missing] = _Anything(missing)
    sys.modules["torchaudio"] = _Anything("torchaudio")
    sys.modules["llava"] = types.ModuleType("llava")
    sys.modules["llava.utils"] = _Anything("llava.utils")
    sys.modules["timm.models.layers"] = __import__("timm.layers", fromlist=["layers"])
    kept: dict[str, Any] = {}

    vit = _load("umt.vit", root / "model/multimodal_encoder/umt/vit.py")
    umt = vit.PretrainVisionTransformer(
        img_size=SIDE * PATCH["umt"],
        patch_size=PATCH["umt"],
        encoder_embed_dim=HIDDEN,
        encoder_depth=LAYERS,
        encoder_num_heads=HEADS,
        num_frames=4,
        tubelet_size=1,
        return_index=-2,
        with_ln=True,
    ).eval()
    for block in umt.encoder.blocks:
        block.attn.attn_type, block.attn.attn_drop = "origin", torch.nn.Identity()
    sys.modules["iv2"] = types.ModuleType("iv2")
    sys.modules["iv2"].__path__ = []  # type: ignore[attr-defined]
    folder = root / "model/multimodal_encoder/internvideo2"
    _load("iv2.pos_embed", folder / "pos_embed.py")
    _load("iv2.flash_attention_class", folder / "flash_attention_class.py")
    clean = _load("iv2.vit_scale_clean", folder / "vit_scale_clean.py")
    internvideo2 = clean.PretrainVisionTransformer_clean(
        img_size=SIDE * PATCH["internvideo2"],
        patch_size=PATCH["internvideo2"],
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        use_flash_attn=False,
        use_fused_rmsnorm=False,
        use_fused_mlp=False,
        num_frames=4,
        sep_image_video_pos_embed=True,
        x_vis_return_idx=-2,
        x_vis_only=True,
    ).eval()
    tome = _load("tome", root / "model/multimodal_projector/tome16_mlp_hd64.py")
    projector = _projector(tome, SIDE, HIDDEN, HEADS)
    draw_weights(projector)
    for kind, tower in (("umt", umt), ("internvideo2", internvideo2)):
        draw_weights(tower)
        kept[f"{kind}_names"] = np.array(sorted(name for name, _ in tower.named_parameters()))
        for frames in (4, 1):
            with torch.no_grad():
                seen = tower(pixels(kind, frames).transpose(1, 2), use_image=frames == 1)
                seen = seen.flatten(1, -2) if kind == "umt" else seen[:, 1:]
                tokens = projector(seen.reshape(-1, SIDE**2, HIDDEN), compress=frames > 1, local_num_frames=frames)
            kept[f"{kind}_{frames}"] = seen[:, ::ROWS].numpy()
            kept[f"{kind}_{frames}_projected"] = tokens[:, ::TOKENS].numpy()
    for name, patches in MERGED.items():
        merge = _projector(tome, int((patches / (4 if "clip" in name else 1)) ** 0.5), MERGE_HIDDEN, HEADS)
        with torch.no_grad():
            kept[name] = merge.merge_tokens(drawn(name, 1, patches, MERGE_HIDDEN), 64)[:, ::TOKENS].numpy()

    # As UMT's encoder makes them for 224 and for 448 pixels: clips, and images.
    positions = {
        "positions_224_4": vit.get_sinusoid_encoding_table(784, 1024, ckpt_num_frame=4, cur_frame=4),
        "positions_224_1": vit.get_sinusoid_encoding_table(196, 1024),
        "positions_448_4": vit.get_sinusoid_encoding_table2(3136, 1024, ckpt_num_frame=4, cur_frame=4),
        "positions_448_1": vit.get_sinusoid_encoding_table2(
            784, 1024, cur_frame=1, ckpt_num_frame=1, pre_n_position=196
        ),
    }
    kept.update({name: table[0, ::97, ::64].numpy() for name, table in positions.items()})

    video = _load("video_utils", root / "video_utils.py")
    for frames, rate, most in SAMPLED:
        chosen = video.get_frame_indices(
            most, frames, sample="dynamic_fps1", input_fps=rate, min_num_frames=64, max_num_frames=most,
            local_num_frames=4,
        )  # fmt: skip
        kept[f"sampled_{frames}_{rate}_{most}"] = np.array(chosen, dtype=np.int16)

    encoder = types.ModuleType("enc")
    encoder.__path__ = []  # type: ignore[attr-defined]
    sys.modules.update({"enc": encoder, "enc.umt": encoder, "enc.umt.vit": vit})
    preprocess = _load("enc.umt_encoder", root / "model/multimodal_encoder/umt_encoder.py").UMTImageProcessor
    size = SIDE * PATCH["umt"]
    squeezed = preprocess(size=(size, size)).preprocess([picture()], return_tensors="np")["pixel_values"][0]
    kept["picture"] = np.asarray(squeezed)[:, ::16, ::16].astype(np.float32)

    sys.modules["llava.constants"] = _Anything("llava.constants")
    choose = _load("mm_utils", root / "mm_utils.py").select_best_resolution
    allowed = [(224 * across, 224 * down) for across in range(1, 7) for down in range(1, 7)]
    best = [choose(size, allowed, max_resolutions=None, patch_size=224) for size in PICTURES]
    kept["canvases"] = np.array(best, dtype=np.int16)

    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, **kept)
    print(f"{DATA}: {len(kept)} results, {DATA.stat().st_size} bytes")


def _projector(tome: Any, side: int, hidden: int, heads: int) -> Any:
    config = types.SimpleNamespace(mm_hidden_size=hidden, hidden_size=TEXT_HIDDEN, mm_pos_num_frames=4)
    vision = types.SimpleNamespace(image_size=side, patch_size=1, num_attention_heads=heads)
    return tome.ToMe16_mlp_hd64(config, vision).eval()


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Anything(types.ModuleType):
    """A module that the original imports and these computations do not need."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


if __name__ == "__main__":
    main(sys.argv[1])
