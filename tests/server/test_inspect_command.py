"""`mminfer inspect` as a user runs it: two ranks, a video, and the files that it writes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from serving import DENSE_BELOW, LAYERS, RECIPE, Media
from sglang_mminfer import Dense, Modality, ModalityMap, Segment, cli
from sglang_mminfer.head_config import HeadConfig
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner
from sglang_mminfer.tools.inspect import command as inspect_command

HEADS = RECIPE["heads"]
DRAWN = [(0, 0), (0, 2), (0, 7), (1, 4)]  # A-shape and dense; on the other rank 2D-Boundary and Q-Boundary
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def inspected(
    model: Path, media: Media, sparse_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folder that the command wrote, and a copy of the folder that the server left for it."""
    out, left = tmp_path_factory.mktemp("inspect") / "out", tmp_path_factory.mktemp("left") / "left"

    def draw(folder: Path, *arguments: Any, real: Any = inspect_command.draw) -> Path:
        shutil.copytree(folder, left)
        return real(folder, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect_command, "draw", draw)
        code = cli.main(
            [
                *("inspect", "--model-path", str(model), "--video", str(media.videos[0]), "--text", "What is there?"),
                *("--mminfer-config", str(sparse_config), "--out", str(out), "--heads"),
                *(f"{layer}:{head}" for layer, head in DRAWN),
                "--server-flags=--tp-size 2 --chunked-prefill-size 256",
            ]
        )
    assert code == 0
    return out, left


def map_of(left: Path) -> ModalityMap:
    return ModalityMap(msgspec.json.decode((left / "map.json").read_bytes(), type=list[Segment]))


def test_the_map_is_that_of_the_video(inspected: tuple[Path, Path], model: Path) -> None:
    from transformers import AutoProcessor

    found = map_of(inspected[1])
    assert [s.modality for s in found.segments] == [Modality.TEXT, Modality.VIDEO, Modality.TEXT]
    grid = found.segments[1].grid
    assert grid is not None and grid.frames * grid.cells == found.segments[1].stop - found.segments[1].start
    # 24 frames at 8 a second give 6 frames at 2 a second, in pairs; frames are square.
    assert grid.frames == 3 and grid.rows == grid.cols > 1
    processor = AutoProcessor.from_pretrained(model)
    content = [{"type": "video", "video": "film"}, {"type": "text", "text": "What is there?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    text = processor.tokenizer(prompt)["input_ids"]
    at = text.index(processor.tokenizer.convert_tokens_to_ids("<|video_pad|>"))
    assert found.segments[1].start == at
    assert found.length == len(text) - 1 + grid.frames * grid.cells


def test_density_of_every_head_is_that_of_its_pattern(inspected: tuple[Path, Path], sparse_config: Path) -> None:
    """All heads of both ranks have different patterns. The test plans them again from the map alone."""
    left = inspected[1]
    modality_map, config = map_of(left), HeadConfig.load(str(sparse_config))
    chunk = RequestChunk(modality_map, 0, modality_map.length, 0, torch.arange(modality_map.length))
    overviews = [json.loads((left / f"overview-{rank}-of-2.json").read_text()) for rank in range(2)]
    for layer in range(LAYERS):
        heads = config.patterns(layer, HEADS)
        plan = BatchPlanner([chunk], modality_map.length, dense_below=DENSE_BELOW).plan(heads)
        expected = plan.visited_by_row.sum(dim=0) / chunk.causal_pairs
        density, recall, error = (
            np.array([value for rank in overviews for value in rank[str(layer)][what]])
            for what in ("density", "recall", "error")
        )
        np.testing.assert_allclose(density, expected, rtol=1e-6)
        assert density.min() < 0.9 and len(set(density.round(6))) > 4
        for head, pattern in enumerate(heads):
            if pattern == Dense():
                assert (density[head], recall[head]) == (1, pytest.approx(1, abs=1e-5)) and error[head] < 1e-4
        sparse = density < 0.8
        assert (recall[sparse] < 1 - 1e-4).all() and (error[sparse] > 1e-4).all() and (recall > 0.05).all()


def test_pictures_and_page_are_there_and_whole(inspected: tuple[Path, Path]) -> None:
    from PIL import Image

    out, left = inspected
    pictures = [f"{kind}-{layer}-{head}.png" for layer, head in DRAWN for kind in ("head", "rows")]
    assert {path.name for path in out.iterdir()} == {"inspect.html", "map.png", "overview.png", *pictures}
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(PNG)
        with Image.open(path) as image:
            assert min(image.size) > 100
            assert len(np.unique(np.asarray(image.convert("L")))) > 10, f"{path.name} shows nothing"
    page = (out / "inspect.html").read_text()
    assert page.count("<img ") == 2 + len(pictures)
    assert set(re.findall(r'(?:src|href)="(.{0,21})', page)) == {"data:image/png;base64"}
    assert "http" not in re.sub(r'base64,[^"]*', "", page) and "<script" not in page and "url(" not in page
    length = map_of(left).length
    assert f"{length:,} tokens in 3 segments" in page
    tables = re.findall(r"<table>.*?</table>", page)
    numbers = [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", table)] for table in tables]
    of_heads = [row for table, row in zip(tables, numbers) if "worst row" in table]
    assert len(of_heads) == len(DRAWN)
    for (layer, head), (_, density, recall, worst, error) in zip(DRAWN, of_heads):
        with np.load(left / f"head-{layer}-{head}.npz") as saved:
            causal = length * (length + 1) / 2
            assert float(density) == pytest.approx(saved["visited_by_row"].sum() / causal, abs=6e-4)
            assert float(recall) == pytest.approx(saved["recall"].mean(), abs=6e-4)
        assert 0 <= float(worst) <= float(recall) <= 1 and float(error) >= 0
        if (layer, head) == (0, 2):
            assert (float(density), float(recall), float(error)) == (1, 1, 0)
    chunks = numbers[0]
    assert sum(int(n.replace(",", "")) for n in chunks[2::6]) == length, "the chunks are the prompt"
