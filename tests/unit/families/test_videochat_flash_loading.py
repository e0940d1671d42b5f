"""A VideoChat-Flash checkpoint as SGLang finds it at start-up: its config, its classes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING
from sglang.srt.managers.schedule_batch import MultimodalInputs
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from config_files import config_file
from families import videochat_flash
from sglang_mminfer import ModalityMap, Segment, VisionGrid
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs, reader_of
from sglang_mminfer.families.own.geometry import PlacedReader
from sglang_mminfer.families.own.processor import item_of
from sglang_mminfer.families.own.prompt import Medium, Raster, lay_out
from sglang_mminfer.head_config import HeadConfigError
from sglang_mminfer.serving import head_config_choice, hooks
from sglang_mminfer.settings import CONFIG

load_plugins()

FILL = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return videochat_flash.make(tmp_path_factory.mktemp("videochat") / "flash")


def variant(checkpoint: Path, folder: Path, **fields: Any) -> str:
    """A folder with the same config, but for some fields, and nothing else."""
    content = {**json.loads((checkpoint / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def launched(note: Callable[[Any], None]) -> Callable[[str], Any]:
    """The model's config as the launch of a server with mminfer reads it."""
    note(None)

    def launch(path: str) -> Any:
        arguments = ServerArgs(model_path=path, attention_backend="mminfer")
        hooks.note(arguments)
        return model_config_of(resolving_view(arguments))

    return launch


@pytest.mark.parametrize("model_type", ["videochat_flash_qwen", "qwen2"])
def test_the_checkpoint_is_ours(
    launched: Callable[[str], Any], checkpoint: Path, tmp_path: Path, model_type: str
) -> None:
    """Also the one that calls itself Qwen2, and whose dual chunks the original code does not know either."""
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    path = variant(checkpoint, tmp_path, model_type=model_type, dual_chunk_attention_config=chunks)
    model = launched(path)
    assert model.is_multimodal and model.hf_config.architectures == ["VideoChatFlashForConditionalGeneration"]
    assert (model.hf_text_config.model_type, model.head_dim, model.num_attention_heads) == ("qwen2", 16, 8)
    assert model.context_len == 32768
    assert not hasattr(model.hf_text_config, "dual_chunk_attention_config")
    served = ModelRegistry.models["VideoChatFlashForConditionalGeneration"]
    assert PROCESSOR_MAPPING[served].__name__ == "VideoChatFlashProcessor"
    reader = reader_of(model.hf_config)
    assert reader == PlacedReader(merged=True) and not reader.has_raster


def test_dropping_tokens_inside_the_language_model_is_refused(
    launched: Callable[[str], Any], checkpoint: Path, tmp_path: Path
) -> None:
    path = variant(checkpoint, tmp_path, mm_llm_compress=True, llm_compress_layer_list=[1])
    with pytest.raises(ValueError, match=r"mm_llm_compress drops vision tokens between layers") as caught:
        launched(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_row_grid_is_refused_at_start_up(launched: Callable[[str], Any], checkpoint: Path) -> None:
    hf_config = launched(str(checkpoint)).hf_config
    with pytest.raises(HeadConfigError, match=r'grid of stride "row" needs columns.*use stride "frame"'):
        head_config_choice.load_for_model(None, hf_config, {CONFIG.variable: config_file("test_grid_row")})
    for name in (config_file("test_grid_frame"), "grid_static", "default"):
        head_config_choice.load_for_model(None, hf_config, {CONFIG.variable: name})


pieces = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.integers(1, 9)),
        st.tuples(st.just("video"), st.integers(1, 6)),
        st.tuples(st.just("image"), st.integers(1, 4)),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(pieces)
def test_the_map_is_what_the_ids_say(drawn: list[tuple[str, int]]) -> None:
    """Media with text behind each, as the processor lays them out; expected from runs of the id of media alone."""
    run: list[str | Medium] = []
    for kind, count in drawn:
        if kind == "text":
            run.append("x" * count)
        elif kind == "video":
            clips = [Raster(torch.full((4, 3, 2, 2), i, dtype=torch.uint8), 1, 64) for i in range(count)]
            run.append(Medium("video", clips, "said"))
        else:
            whole, tiles = (torch.zeros(n, 3, 2, 2, dtype=torch.uint8) for n in (1, count))
            run.append(Medium("image", [Raster(whole, 1, 64)]))
            run.append(Medium("image", [Raster(tiles, 1, 64 * count)], "said"))
    ids, placed = lay_out(run, lambda words: [1] * len(words), FILL)
    found = map_from_mm_inputs(
        MultimodalInputs(mm_items=[item_of(one) for one in placed]), len(ids), PlacedReader(merged=True)
    )

    expected, position = [], 0
    media = [(kind, count) for kind, count in drawn if kind != "text"]
    while position < len(ids):
        start = position
        if ids[position] != FILL:
            while position < len(ids) and ids[position] != FILL:
                position += 1
            expected.append(Segment("text", start, position))
            continue
        kind, count = media.pop(0)
        while position < len(ids) and ids[position] == FILL:
            position += 1
        if kind == "video":
            assert position - start == 64 * count
            starts = tuple(range(start, position, 64))
            expected.append(Segment("video", start, position, VisionGrid(count, 1, 64, starts, raster=False)))
        else:
            for a, b in ((start, start + 64), (start + 64, position)):
                expected.append(Segment("image", a, b, VisionGrid(1, 1, b - a, (a,), raster=False)))
    assert found == ModalityMap(expected)


def test_items_with_rows_do_not_fit_merged_tokens() -> None:
    _, placed = lay_out([Medium("video", [Raster(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), 8, 8)])], len, FILL)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match=r"expected one row of merged tokens, got 8") as caught:
        map_from_mm_inputs(MultimodalInputs(mm_items=[item_of(placed[0])]), 64, PlacedReader(merged=True))
    assert caught.value.reason == "grid_mismatch"
    assert reader_of(SimpleNamespace(model_type="videochat_flash")) == PlacedReader()
