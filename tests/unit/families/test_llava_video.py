"""LLaVA-Video's parts against an oracle that shares nothing with them, and the original repository's outputs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from families.llava_video import RELEASED, LlavaVideoOracle, make
from family_parts import LaidOut, laid_out, loaded
from sglang_mminfer.families.llava_video import LlavaVideo, layout
from sglang_mminfer.families.llava_video.encoder import LlavaVideoEncoder, pooled
from sglang_mminfer.families.llava_video.rasters import LlavaVideoRasters
from sglang_mminfer.families.own.checkpoint import Checkpoint
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.tools.media import make_image, make_video

FAMILY = LlavaVideo()
FIXTURES = Path(__file__).parents[2] / "helpers" / "original"


class Parts:
    """Everything between a conversation and the language model, for one config.json."""

    def __init__(self, path: Path, video: dict[str, Any], **fields: Any) -> None:
        self.oracle = LlavaVideoOracle(path, video, **fields)
        files = Checkpoint(str(path))
        self.config = FAMILY.read_config({**(files.json("config.json") or {}), **fields}, files)
        self.rasters = LlavaVideoRasters(self.config, video)
        self.encoder = loaded(LlavaVideoEncoder(self.config), {"": path})
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def laid_out(self, messages: list[Any]) -> LaidOut:
        return laid_out(
            self.rasters, self.tokenizer, FAMILY.chat_template(self.config), messages, self.config.image_token_index
        )

    @torch.no_grad()
    def encode(self, placed: Any) -> torch.Tensor:
        pixels = placed.raster.pixels
        seen = self.encoder.see(pixels if pixels.ndim == 4 else pixels[None])
        return self.encoder.encode(placed.kind == "video", placed.data(), seen)


def user(*parts: Any) -> dict[str, Any]:
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "image_url" if part.suffix == ".png" else "video_url"
        content.append({"type": kind, kind: part if kind == "text" else {"url": str(part)}})
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llava_video") / "model")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("media")
    return SimpleNamespace(
        wide=make_video(root / "wide.mp4", 24, 96, 64, 8, seed=1),
        tall=make_video(root / "tall.mp4", 5, 64, 96, 2, seed=2),
        small=make_image(root / "small.png", 300, 200, seed=1),
        flat=make_image(root / "flat.png", 900, 200, seed=2),
        large=make_image(root / "large.png", 1400, 1000, seed=3),
    )


@pytest.mark.parametrize("mode", ["average", "bilinear", "max"])
@pytest.mark.parametrize("position", ["grid", "frame", "one_token", "no_token"])
def test_a_video_in_every_layout(path: Path, media: SimpleNamespace, mode: str, position: str) -> None:
    parts = Parts(path, {"max_frames": 3}, mm_spatial_pool_mode=mode, mm_newline_position=position)
    messages = [user(media.wide, "What do you see in the video?")]
    got = parts.laid_out(messages)
    got.equals(parts.oracle.pieces(messages), parts.encode, parts.tokenizer)
    side = 14 if mode == "bilinear" else 13
    cols, tail = (side + 1, 0) if position == "grid" else (side, int(position == "frame"))
    start = parts.tokenizer("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    first = len(start.input_ids)
    _, video, after = got.map.segments
    period = side * cols + tail
    assert (video.modality, video.start) == (Modality.VIDEO, first)
    assert video.stop - first == 3 * period + (position == "one_token")
    assert video.grid is not None and video.grid.shape == (side, cols)
    assert video.grid.frame_starts == tuple(first + period * i for i in range(3))
    assert after.stop == len(got.ids)


def test_newlines_stand_in_the_last_column(path: Path, media: SimpleNamespace) -> None:
    """The map's columns against the embeddings: the last column, and no other, is the learned newline."""
    parts = Parts(path, {"max_frames": 2})
    messages = [user(media.wide, "What?", media.large), {"role": "assistant", "content": "a"}, user(media.tall)]
    got = parts.laid_out(messages)
    got.equals(parts.oracle.pieces(messages), parts.encode, parts.tokenizer)
    newline = torch.zeros(len(got.ids), dtype=torch.bool)
    for one in got.placed:
        embedded = parts.encode(one)
        newline[one.start : one.start + one.raster.tokens] = (embedded == parts.oracle.newline).all(-1)
    columns = got.map.cells("row")
    last = torch.zeros_like(newline)
    for segment in got.map.segments:
        grid = segment.grid
        if grid is not None and grid.rows != 27:  # the whole picture has none
            span = slice(segment.start, segment.stop)
            last[span] = columns[span] == grid.cols - 1
    assert newline.any() and torch.equal(newline, last)


@pytest.mark.parametrize("name", ["small", "flat", "large"])
@pytest.mark.parametrize("most", [9, 1])
def test_a_picture_of_any_resolution(path: Path, media: SimpleNamespace, name: str, most: int) -> None:
    parts = Parts(path, {}, image_aspect_ratio=f"anyres_max_{most}")
    messages = [user(getattr(media, name), "What is this?")]
    got = parts.laid_out(messages)
    got.equals(parts.oracle.pieces(messages), parts.encode, parts.tokenizer)
    whole, tiles = (segment for segment in got.map.segments if segment.modality is Modality.IMAGE)
    assert whole.grid is not None and whole.grid.shape == (27, 27)
    assert tiles.start == whole.stop and tiles.grid is not None
    assert tiles.stop - tiles.start == tiles.grid.cells


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize(("most", "count"), [(2, 2), (64, 3)])
def test_one_frame_a_second_or_forced(path: Path, media: SimpleNamespace, forced: bool, most: int, count: int) -> None:
    """A video of three seconds. The oracle says what the model is told; here is only how many frames it gets."""
    options = {"max_frames": most, "force_sample": forced}
    parts = Parts(path, options)
    messages = [user("First words.", media.wide, "And now?")]
    got = parts.laid_out(messages)
    got.equals(parts.oracle.pieces(messages), parts.encode, parts.tokenizer)
    assert len(got.placed) == (most if forced else count)


def test_no_time_instruction(path: Path, media: SimpleNamespace) -> None:
    parts = Parts(path, {"max_frames": 2}, add_time_instruction=False)
    messages = [user(media.tall, "Why?")]
    parts.laid_out(messages).equals(parts.oracle.pieces(messages), parts.encode, parts.tokenizer)


def test_onevision_is_left_to_sglang() -> None:
    """The same architecture, without what only LLaVA-Video does."""
    other = {**RELEASED, "add_time_instruction": False, "force_sample": False, "mm_newline_position": "one_token"}
    files = Checkpoint("/nowhere")
    assert FAMILY.read_config(other, files) is None
    for marks in ({"mm_newline_position": "grid"}, {"add_time_instruction": True}, {"force_sample": True}):
        assert FAMILY.read_config({**other, **marks}, files) is not None


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("mm_spatial_pool_mode", "median", r"expected one of average, bilinear, max, got 'median'"),
        ("mm_projector_type", "qformer", r"mm_projector_type: expected linear or mlpNx_gelu, got 'qformer'"),
        ("mm_patch_merge_type", "spatial_maxpool2x2", r"mm_patch_merge_type: expected flat"),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336", r"mm_vision_tower: expected siglip-so400m"),
        ("add_faster_video", True, r"add_faster_video: expected false"),
    ],
)
def test_what_cannot_be_served_is_named(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FAMILY.read_config({**RELEASED, field: value}, Checkpoint("/nowhere"))


def test_the_published_tower() -> None:
    config = FAMILY.read_config(RELEASED, Checkpoint("/nowhere"))
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1152, 27)
    assert layout.frame_shape(config, False) == (14, 15, 0)
    config.mm_spatial_pool_mode = "average"
    assert layout.frame_shape(config, False) == (13, 14, 0)


# ---- the original repository's own functions; original/llava_next.py says how these were made ---------------


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    return json.loads((FIXTURES / "llava_next.json").read_text())


def test_pooling_and_newlines_are_the_originals(original: dict[str, Any]) -> None:
    side, hidden = original["side"], original["hidden"]
    draw = torch.Generator().manual_seed(original["seed"])
    frames = torch.randn(2, side, side, hidden, generator=draw)
    newline = torch.randn(hidden, generator=draw)
    for mode, grid in original["grid"].items():
        smaller = pooled(frames, mode)
        tokens = torch.cat((smaller, newline.expand(*smaller.shape[:2], 1, -1)), dim=2).flatten(0, 2)
        torch.testing.assert_close(tokens, torch.tensor(grid))


def test_the_canvas_of_a_picture_is_the_originals(original: dict[str, Any]) -> None:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=384, patch_size=14),
        image_grid_pinpoints=original["pinpoints"],
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres_max_9",
    )
    for width, height, across, down, rows, cols in original["pictures"]:
        tiles = layout.tiles_of(config, width, height)
        assert (tiles.across, tiles.down, tiles.rows, tiles.cols) == (across, down, rows, cols), (width, height)


def test_no_picture_is_without_a_row() -> None:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=384, patch_size=14),
        image_grid_pinpoints="(1x1),...,(6x6)",
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres_max_9",
    )
    for width, height in itertools.product((1, 7, 385, 4000), repeat=2):
        tiles = layout.tiles_of(config, width, height)
        assert min(tiles.height, tiles.width, tiles.rows, tiles.cols) >= 1


def test_a_border_keeps_the_picture_in_the_middle() -> None:
    from sglang_mminfer.families.frames import squared

    square = squared(Image.new("RGB", (4, 2), (255, 0, 0)))
    assert square.size == (4, 4)
    assert [square.getpixel((0, y)) for y in range(4)] == [(127,) * 3, (255, 0, 0), (255, 0, 0), (127,) * 3]
