"""Media that clients preprocessed, right and wrong, through SGLang's processors and our checks: each request is refused
with a sentence, or its items fit prompt and model."""

from __future__ import annotations

import asyncio
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from families import FAMILY
from processing import Processing
from sglang_mminfer.families.maps import map_from_mm_inputs, reader_of
from sglang_mminfer.tools.media import make_image

NAMES = ("qwen2_5_vl", "qwen3_vl", "glm4v", "internvl")

SMALL = st.integers(-2, 4)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    SMALL,
    st.sampled_from([1 << 40, -(1 << 63), 1 << 70, 0.5, float("nan"), "", "x"]),
    st.lists(SMALL, max_size=3),
    st.lists(st.lists(SMALL, max_size=3), max_size=2),
    st.lists(SMALL, min_size=3, max_size=3).map(lambda row: torch.tensor([row])),
    st.lists(st.integers(0, 4), max_size=3).map(torch.zeros),
    st.sampled_from([torch.tensor(3), torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.int32)]),
)
OFFSETS = st.lists(st.tuples(st.integers(-3, 12), st.integers(-3, 6000)), max_size=2)
FIELDS = st.sampled_from(
    [
        *("image_grid_thw", "video_grid_thw", "pixel_values", "feature", "offsets", "hash", "pad_value", "pad_values"),
        *(
            "format",
            "modality",
            "mminfer",
            "mminfer_x",
            "image_sizes",
            "num_frames",
            "precomputed_embeddings",
            "colour",
        ),
    ]
)
FORMATS = st.sampled_from(["processor_output", "precomputed_embedding"])
CHANGES = st.lists(
    st.tuples(FIELDS, st.sampled_from(["gone", "odd", "odd", "tensor"]), st.integers(0, 9), ODD, OFFSETS), max_size=3
)


class Case(NamedTuple):
    family: str
    form: str
    changes: list[tuple[str, str, int, Any, Any]]
    more: int
    """Placeholders of the prompt beyond the picture's tokens."""


def cases() -> st.SearchStrategy[Case]:
    return st.builds(Case, st.sampled_from(NAMES), FORMATS, CHANGES, st.sampled_from([0, 0, 0, 0, -1, 1, -1000, 9]))


@cache
def served(name: str) -> tuple[Processing, dict[str, Any], list[int], int, int]:
    """A family's processor, a picture as it makes it, the ids of its prompt, and where the picture's tokens are."""
    family = FAMILY[name]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    processing = Processing(family.make(folder / "model"), family.prompt.module)
    path = make_image(folder / "a.png", 84, 56)
    found = processing(f"Look: {family.prompt.image} What is it?", images=[path])
    (item,) = found.items
    ((first, last),) = item.offsets
    grid = {key: value for key, value in item.model_specific_data.items() if key == "image_grid_thw"}
    return processing, {"pixel_values": item.feature, **grid}, found.ids, first, last


def check(case: Case) -> str:
    processing, picture, ids, first, last = served(case.family)
    tokens = last + 1 - first
    data: dict[str, Any] = {"format": case.form, "modality": "IMAGE", **picture}
    if case.form == "precomputed_embedding":
        del data["pixel_values"]
        data["feature"] = torch.zeros(tokens, width(processing))
    for key, what, number, odd, offsets in case.changes:
        if what == "gone":
            data.pop(key, None)
        elif what == "tensor" and isinstance(data.get(key), torch.Tensor) and data[key].dim():
            value = data[key]
            data[key] = (value[:number], value * number, value.float(), value.long(), -value, value[..., :number])[
                number % 6
            ]
        else:
            data[key] = offsets if key == "offsets" else odd
    between = [ids[first]] * max(0, tokens + case.more)
    prompt = [*ids[:first], *between, *ids[last + 1 :]]
    request = SimpleNamespace(image_data=[data], video_data=None, audio_data=None, modalities=None, rid="fuzz")
    try:
        with processing.published():
            output = asyncio.run(
                processing.processor.process_mm_data_async(
                    image_data=request.image_data, audio_data=None, input_text=prompt, request_obj=request
                )
            )
    except ValueError as error:
        unchanged = not case.changes and not case.more
        # One family takes pictures only, and says so (tests/unit/families/test_item_checks.py).
        assert not unchanged or "is not taken for models of this family" in str(error), f"nothing is wrong: {error}"
        assert len(str(error)) > 5, repr(error)
        return "refused"
    placed = [False] * len(output.input_ids)
    map_from_mm_inputs(output, len(output.input_ids), reader_of(processing.hf_config))
    for item in output.mm_items:
        count = sum(end + 1 - start for start, end in item.offsets)
        for start, end in item.offsets:
            placed[start : end + 1] = [True] * (end + 1 - start)
        value = item.feature if item.precomputed_embeddings is None else item.precomputed_embeddings
        assert isinstance(value, torch.Tensor) and bool(torch.isfinite(value).all()), "a feature of no numbers"
        if item.format.name == "PRECOMPUTED_EMBEDDING":
            assert value.numel() % count == 0 and value.numel() >= count, "rows that are not those of the prompt"
        elif case.family != "internvl":  # the others have grid rows
            assert len(value) == int(item.model_specific_data["image_grid_thw"].prod()), "rows that are not the grid's"
    left = [i for i, token in enumerate(output.input_ids) if token == output.im_token_id and not placed[i]]
    assert not left, f"placeholders at {left[:3]} belong to no item"
    return "taken"


def width(processing: Processing) -> int:
    config = processing.hf_config
    deep = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.hidden_size) * (1 + len(deep))
