"""LongVILA's parts against an oracle that shares nothing with them, and against the original repository's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from families.longvila import VARIANTS, LongVilaOracle, make, random_projector
from family_parts import LaidOut, laid_out, loaded
from sglang_mminfer.families.longvila import LongVILA
from sglang_mminfer.families.longvila.encoder import LongVilaEncoder, Projector
from sglang_mminfer.families.longvila.rasters import LongVilaRasters
from sglang_mminfer.families.own.checkpoint import Checkpoint
from sglang_mminfer.families.own.prompt import fill_id
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.tools.media import make_image, make_video

FAMILY = LongVILA()
FIXTURES = Path(__file__).parents[2] / "helpers" / "original"
SIDE = {"256f": 16, "1M": 14, "r1": 16, "3x3": 9, "llama_3": 14}
"""Tokens along a side of a frame."""


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("media")
    return SimpleNamespace(
        video=str(make_video(root / "a.mp4", 24, 96, 64, 8, seed=1)),
        short=str(make_video(root / "b.mp4", 2, 64, 96, 2, seed=2)),
        image=str(make_image(root / "a.png", 300, 200, seed=1)),
    )


class Parts:
    def __init__(self, path: Path, video: dict[str, Any]) -> None:
        files = Checkpoint(str(path))
        self.oracle = LongVilaOracle(path, video)
        self.config = FAMILY.read_config(files.json("config.json") or {}, files)
        self.rasters = LongVilaRasters(self.config, video)
        folders = {f"{name}.": path / name for name in ("vision_tower", "mm_projector")}
        self.encoder = loaded(LongVilaEncoder(self.config), folders)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path / FAMILY.tokenizer_folder(self.config))

    def laid_out(self, messages: list[Any]) -> LaidOut:
        fill = fill_id(self.config, self.tokenizer)
        return laid_out(self.rasters, self.tokenizer, FAMILY.chat_template(self.config), messages, fill)

    @torch.no_grad()
    def encode(self, placed: Any) -> torch.Tensor:
        return self.encoder.see(placed.raster.pixels[None])[0]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_release(tmp_path: Path, media: SimpleNamespace, variant: str) -> None:
    parts = Parts(make(tmp_path / "model", variant), {"num_frames": 3})
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": media.video}},
                {"type": "text", "text": "What do you see in the video?"},
            ],
        },
        {"role": "assistant", "content": "a river"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And now?"},
                {"type": "image_url", "image_url": {"url": media.image}},
            ],
        },
    ]
    got = parts.laid_out(messages)
    pieces = parts.oracle.pieces(messages)
    got.equals(pieces, parts.encode, parts.tokenizer)

    # From the oracle's prompt alone: a frame is a run of embeddings, and a newline follows.
    starts, position = [], 0
    for piece in pieces:
        if isinstance(piece, torch.Tensor):
            starts.append(position)
            assert len(piece) == SIDE[variant] ** 2
        position += len(parts.tokenizer.encode(piece, add_special_tokens=False) if isinstance(piece, str) else piece)
    video, image = (segment for segment in got.map.segments if segment.grid)
    assert video.grid and image.grid
    assert video.grid.shape == image.grid.shape == (SIDE[variant],) * 2
    assert (*video.grid.frame_starts, *image.grid.frame_starts) == tuple(starts)
    assert (video.start, video.stop) == (starts[0], starts[2] + SIDE[variant] ** 2)
    assert starts[2] - starts[1] == starts[1] - starts[0] == SIDE[variant] ** 2 + 1
    newline = parts.oracle.newline[0]
    assert [got.ids[start - 1] for start in starts[1:3]] == [newline] * 2
    assert got.map.cells("frame")[starts[1] - 1] == -1
    assert (video.modality, image.modality) == (Modality.VIDEO, Modality.IMAGE)


@pytest.mark.parametrize("options", [{"fps": 2, "num_frames": 4}, {"fps": 0.5}, {"num_frames": 5}])
def test_sampling(tmp_path: Path, media: SimpleNamespace, options: dict[str, Any]) -> None:
    parts = Parts(make(tmp_path / "model"), options)
    for video in (media.video, media.short):
        messages = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": video}}]}]
        parts.laid_out(messages).equals(parts.oracle.pieces(messages), parts.encode, parts.tokenizer)


def test_rope_of_the_million(tmp_path: Path) -> None:
    files = Checkpoint(str(make(tmp_path / "model", "1M")))
    text = FAMILY.read_config(files.json("config.json") or {}, files).text_config
    assert text.rope_parameters["rope_theta"] == 1062356830.0
    assert (text.rope_parameters["rope_type"], text.rope_parameters["factor"]) == ("linear", 4.0)
    # SGLang multiplies the two; the checkpoint's million is the product.
    from sglang.srt.utils.hf_transformers_utils import get_context_length

    assert get_context_length(text) == 1048576


def test_the_ends_of_an_answer_are_those_beside_the_language_model(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    files = Checkpoint(str(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "llm")
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert FAMILY.read_config(files.json("config.json") or {}, files).eos_token_id == ends


def test_media_tokens_beyond_the_vocabulary_are_not_used(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "1M")
    files = Checkpoint(str(path))
    config = FAMILY.read_config(files.json("config.json") or {}, files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "llm")
    assert tokenizer.convert_tokens_to_ids("<image>") >= config.text_config.vocab_size
    assert fill_id(config, tokenizer) < config.text_config.vocab_size


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_vision_select_feature": "patch"}, r"mm_vision_select_feature: expected cls_patch, got 'patch'"),
        ({"dynamic_s2": True}, r"dynamic_s2: expected false, got True"),
        ({"image_aspect_ratio": "dynamic"}, r"image_aspect_ratio: expected resize or pad, got 'dynamic'"),
        ({"image_encoder": {"_target_": "llava.model.encoders.TSPVideoEncoder"}}, r"expected a BasicImageEncoder"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    files = Checkpoint(str(make(tmp_path / "model")))
    with pytest.raises(ValueError, match=said):
        FAMILY.read_config({**(files.json("config.json") or {}), **changes}, files)


def test_another_llava_is_left_to_sglang(tmp_path: Path) -> None:
    assert FAMILY.read_config({"architectures": ["LlavaLlamaModel"]}, Checkpoint(str(tmp_path))) is None


def test_a_part_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vision_tower/config.json: expected the config of this part"):
        FAMILY.read_config({"llm_cfg": {}}, Checkpoint(str(tmp_path)))


# ---- the original repository's own projector; original/vila.py says how these were made ----------------------


@pytest.mark.parametrize("kind", ["mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"])
@pytest.mark.parametrize("side", [4, 5])
def test_projectors_are_the_originals(kind: str, side: int) -> None:
    original = json.loads((FIXTURES / "vila.json").read_text())
    inside, outside = original["inside"], original["outside"]
    projector = Projector(kind, inside, outside)
    projector.load_state_dict(random_projector(kind, inside, outside))
    patches = torch.randn(1, side * side, inside, generator=torch.Generator().manual_seed(side))
    with torch.no_grad():
        torch.testing.assert_close(projector(patches), torch.tensor(original["tokens"][kind][str(side)]))
