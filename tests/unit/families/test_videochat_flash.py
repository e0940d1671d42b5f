"""VideoChat-Flash's towers, merging, positions and sampling against what its own modules computed.

Merging once more against loops over pairs, where ties and odd numbers can be shown.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from families.videochat_flash import merged as merged_by_loops
from families.videochat_towers import Tower, umt_positions
from sglang_mminfer.families.frames import resize
from sglang_mminfer.families.videochat_flash.config import TowerConfig, UnsupportedCheckpoint, tower_config
from sglang_mminfer.families.videochat_flash.merging import merge_tokens, rounds
from sglang_mminfer.families.videochat_flash.sampling import by_clips
from sglang_mminfer.families.videochat_flash.tiles import best_canvas, canvases, join
from sglang_mminfer.families.videochat_flash.towers import sinusoid_positions
from sglang_mminfer.families.videochat_flash.vision import VisionPath
from videochat_flash_original import (
    DATA,
    HEADS,
    HIDDEN,
    LAYERS,
    MERGE_HIDDEN,
    MERGED,
    PATCH,
    PICTURE,
    PICTURES,
    ROWS,
    SAMPLED,
    SIDE,
    TEXT_HIDDEN,
    TOKENS,
    draw_weights,
    drawn,
    picture,
    pixels,
)

WITHIN = 2e-5
"""fp32 sums in another order, through three layers."""


@pytest.fixture(scope="module")
def original() -> dict[str, np.ndarray]:
    with np.load(DATA) as file:
        return dict(file)


def tiny(kind: str) -> TowerConfig:
    mlp = 4 * HIDDEN if kind == "umt" else int(HIDDEN * 48 / 11)
    patch = PATCH[kind]
    return TowerConfig(kind, SIDE * patch, patch, HIDDEN, LAYERS, HEADS, mlp, layers_used=LAYERS - 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [4, 1])
@pytest.mark.parametrize("kind", ["umt", "internvideo2"])
@torch.no_grad()
def test_towers_and_projector(original: dict[str, np.ndarray], kind: str, frames: int) -> None:
    path = VisionPath(tiny(kind), TEXT_HIDDEN).eval()
    draw_weights(path.tower)
    draw_weights(path.projector)
    assert sorted(name for name, _ in path.tower.named_parameters()) == original[f"{kind}_names"].tolist()
    seen = path.tower(pixels(kind, frames))
    assert seen.shape == (2, frames * SIDE**2, HIDDEN)
    np.testing.assert_allclose(seen[:, ::ROWS], original[f"{kind}_{frames}"], atol=WITHIN)
    tokens = path(pixels(kind, frames))
    assert tokens.shape == (2, 64, TEXT_HIDDEN)
    np.testing.assert_allclose(tokens[:, ::TOKENS], original[f"{kind}_{frames}_projected"], atol=WITHIN)


@pytest.mark.parametrize("frames", [4, 1])
@pytest.mark.parametrize("kind", ["umt", "internvideo2"])
@torch.no_grad()
def test_the_oracles_towers(original: dict[str, np.ndarray], kind: str, frames: int) -> None:
    path = VisionPath(tiny(kind), TEXT_HIDDEN).eval()
    draw_weights(path.tower)  # by names and shapes alone
    tower = Tower(dict(path.tower.named_parameters()), HEADS, PATCH[kind])
    for clip, expected in zip(pixels(kind, frames), original[f"{kind}_{frames}"]):
        np.testing.assert_allclose(tower.seen(clip)[::ROWS], expected, atol=WITHIN)


@pytest.mark.parametrize("name", MERGED)
def test_merging_at_released_sizes(original: dict[str, np.ndarray], name: str) -> None:
    merged = merge_tokens(drawn(name, 1, MERGED[name], MERGE_HIDDEN), 64, HEADS)
    np.testing.assert_allclose(merged[:, ::TOKENS], original[name], atol=WITHIN)


@pytest.mark.parametrize(("size", "frames"), [(224, 4), (224, 1), (448, 4), (448, 1)])
def test_positions_at_released_sizes(original: dict[str, np.ndarray], size: int, frames: int) -> None:
    table = sinusoid_positions(frames, size // 16, 1024)
    assert table.shape == (1, frames * (size // 16) ** 2, 1024)
    for own in (table[0], umt_positions(frames, size // 16, 1024)):
        np.testing.assert_allclose(own[::97, ::64], original[f"positions_{size}_{frames}"], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(4, 70), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_merging_pair_by_pair(tokens: int, share: float, seed: int) -> None:
    target = 1 + int(share * (tokens - 1))
    x = drawn(f"merge {seed}", 2, tokens, 8)
    merged = merge_tokens(x, target, heads=2)
    assert merged.shape == (2, target, 8)
    for clip, expected in zip(merged, (merged_by_loops(clip, target, 2) for clip in x)):
        torch.testing.assert_close(clip.double(), expected, atol=1e-5, rtol=0)


def test_equal_pairs_go_to_the_earlier_token() -> None:
    """All alike: every even token meets the first odd one, the first even tokens are merged, the last stay."""
    x = torch.ones(1, 10, 4)
    torch.testing.assert_close(merge_tokens(x, 7, heads=2), torch.ones(1, 7, 4))
    rising = (2.0 ** torch.arange(10.0))[None, :, None].expand(1, 10, 4)  # one direction, ten lengths
    merged = merge_tokens(rising, 8, heads=2)[0, :, 0]
    assert merged.tolist() == pytest.approx([16, 64, 256, (2 + 1 + 4) / 3, 8, 32, 128, 512])


def test_merging_is_of_each_clip_alone_and_in_fp32() -> None:
    x = drawn("bf16", 3, 300, 16).bfloat16()
    together = merge_tokens(x, 64, HEADS)
    assert together.dtype is torch.bfloat16
    for clip in range(3):
        alone = merge_tokens(x[clip : clip + 1].float(), 64, HEADS)
        torch.testing.assert_close(together[clip], alone[0].bfloat16())


def test_too_few_tokens() -> None:
    assert rounds(64, 64) == []
    assert rounds(3136, 64) == [1568, 784, 392, 196, 98, 34]
    with pytest.raises(ValueError, match=r"expected at least 64 tokens, got 63"):
        rounds(63, 64)


@pytest.mark.parametrize(("frames", "rate", "most"), SAMPLED)
def test_sampled_frames(original: dict[str, np.ndarray], frames: int, rate: float, most: int) -> None:
    sampled = by_clips(frames, rate, least=64, most=most)
    assert sampled.indices == original[f"sampled_{frames}_{rate}_{most}"].tolist()
    assert sampled.duration == frames / rate


@given(
    total=st.integers(1, 5000),
    rate=st.floats(0.1, 120),
    clips=st.tuples(st.integers(1, 40), st.integers(0, 100)),
)
def test_samples_are_whole_clips_in_order(total: int, rate: float, clips: tuple[int, int]) -> None:
    least, most = 4 * clips[0], 4 * sum(clips)
    indices = by_clips(total, rate, least=least, most=most).indices
    assert len(indices) % 4 == 0 and 4 <= len(indices) <= most
    assert indices == sorted(indices) and indices[0] >= 0 and indices[-1] < total
    assert len(indices) >= min(least, total // 4 * 4)


def test_a_file_without_frames_or_rate() -> None:
    with pytest.raises(ValueError, match=r"expected at least one frame"):
        by_clips(0, 24.0, least=64, most=512)
    assert by_clips(9, 0.0, least=4, most=512).indices == [0, 2, 4, 7]  # lasts a second, as far as anyone knows


def test_canvases(original: dict[str, np.ndarray]) -> None:
    allowed = canvases("(1x1),...,(6x6)", 224)
    assert len(allowed) == 36
    chosen = [best_canvas(*size, allowed, 224) for size in PICTURES]
    assert [[224 * across, 224 * down] for across, down in chosen] == original["canvases"].tolist()
    pixels_ = [[224 * across, 224 * down] for across, down in allowed]
    assert canvases(pixels_, 224) == canvases(str(pixels_), 224) == allowed
    assert canvases([[448, 224], [672, 336]], 224) == [(2, 1)]  # of others there is no whole number of tiles
    for bad in ("6 by 6", [[1, 2, 3]], [[100, 100]], 7):
        with pytest.raises(ValueError, match=r"image_grid_pinpoints: expected pairs of multiples of 224 pixels"):
            canvases(bad, 224)


@pytest.mark.parametrize(("across", "down"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_tiles_are_joined_line_by_line(across: int, down: int) -> None:
    tiles = torch.arange(across * down * 64.0).reshape(across * down, 64, 1)
    expected = [
        tiles[row * across + column, 8 * line + i, 0]
        for row in range(down)
        for line in range(8)
        for column in range(across)
        for i in range(8)
    ]
    assert join(tiles, across)[:, 0].tolist() == [float(value) for value in expected]


def test_pictures_as_the_original_prepares_them(original: dict[str, np.ndarray]) -> None:
    size = SIDE * PATCH["umt"]
    seen: list[torch.Tensor] = []
    path = VisionPath(tiny("umt"), TEXT_HIDDEN)
    path.forward = lambda pixels: seen.append(pixels)  # type: ignore[method-assign, assignment, func-returns-value]
    assert picture().shape == (*PICTURE, 3)
    path.see(resize(Image.fromarray(picture()), size, size)[None, None])
    np.testing.assert_allclose(seen[0][0, 0, :, ::16, ::16], original["picture"], atol=1e-6)


# ---- config.json ---------------------------------------------------------------------------------------------


def released(**fields: object) -> SimpleNamespace:
    said = {"mm_vision_tower": "umt-hd-large", "mm_hidden_size": 1024, "mm_vision_select_layer": -2}
    return SimpleNamespace(**{**said, "mm_llm_compress": False, "mm_local_num_frames": 4, **fields})


@pytest.mark.parametrize(
    ("name", "hidden", "expected"),
    [
        ("umt-hd-large", 1024, ("umt", 448, 784, 23)),
        ("umt-large", 1024, ("umt", 224, 196, 23)),
        ("internvideo2", 1408, ("internvideo2", 224, 256, 39)),
    ],
)
def test_released_towers(name: str, hidden: int, expected: tuple[str, int, int, int]) -> None:
    tower = tower_config(released(mm_vision_tower=name, mm_hidden_size=hidden))
    assert (tower.kind, tower.image_size, tower.patches, tower.layers_used) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_llm_compress": True}, r"mm_llm_compress drops vision tokens .* set it to false"),
        ({"mm_projector_type": "mlp2x_gelu"}, r"mm_projector_type is 'mlp2x_gelu', and only 'tome16_mlp_hd64'"),
        ({"mm_local_num_frames": 8}, r"mm_local_num_frames is 8, and only 4 is served"),
        ({"mm_vision_tower": "google/siglip"}, r"mm_vision_tower is 'google/siglip'; expected a name with one of"),
        ({"mm_hidden_size": 1408}, r"mm_hidden_size is 1408, and the tower 'umt-hd-large' is 1024 wide"),
        ({"mm_vision_select_layer": 0}, r"mm_vision_select_layer is 0 of a tower of 24 layers"),
        ({"mm_vision_config": {"depth": 2}}, r"mm_vision_config has no 'depth'; it may have heads, hidden"),
        ({"mm_vision_config": {"image_size": 112}}, r"does not work out"),
    ],
)
def test_checkpoints_that_are_not_served(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message) as caught:
        tower_config(released(**fields))
    assert "\n" not in str(caught.value)
