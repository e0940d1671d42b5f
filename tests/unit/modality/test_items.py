"""What items say of the media that they belong to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_mminfer.modality.items import KEY, GeometryError, Place, extents_of, fresh_numbers, media_of, places_of


def item(start: int, tokens: int, *places: Any, **data: Any) -> Any:
    said = {KEY: list(places)} if places else {}
    offsets = [(start, start + tokens - 1)]
    return SimpleNamespace(modality="VIDEO", offsets=offsets, model_specific_data={**said, **data})


def test_items_of_one_medium_stand_together() -> None:
    video = [item(10 + 6 * n, 4, Place(7, n, 3, 2, 2)) for n in range(3)]
    same_shape = [item(40, 4, Place(8, 0, 1, 2, 2))]
    theirs = [item(50, 4), item(60, 4)]  # SGLang's own: a medium each
    picture = [item(70, 13, Place(9, 0, 1, 2, 2), Place(9, 0, 1, 3, 3))]
    everything = [*video, *same_shape, *theirs, *picture]
    assert media_of(everything) == [video, same_shape, theirs[:1], theirs[1:], picture]
    assert [(start, stop) for start, stop, _ in extents_of(everything)] == [
        *((10, 26), (40, 44), (50, 54), (60, 64), (70, 83))
    ]


@pytest.mark.parametrize("said", [3, "x", [], [[]], [["x"]], [[None]], {}], ids=str)
def test_what_says_nothing_of_a_medium_is_one(said: Any) -> None:
    odd = [item(0, 4, **{KEY: said}), item(4, 4, **{KEY: said})]
    assert media_of(odd) == [odd[:1], odd[1:]]


def test_numbers_are_of_one_request_alone() -> None:
    numbers = [number for _ in range(100) for number in fresh_numbers(3)]
    assert len(set(numbers)) == 300 and all(0 <= number < 1 << 62 for number in numbers)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([], "grid_mismatch"),
        (5, "grid_mismatch"),
        ([(0, 0, 1, 2)], "grid_mismatch"),
        ([(0, 0, 1, 2, 2.5, 0)], "grid_mismatch"),
        ([(0, 0, 1, 0, 2, 0)], "grid_mismatch"),
        ([(0, 0, 1, 2, 2, -1)], "grid_mismatch"),
        ([(0, 0, 0, 2, 2, 0)], "zero_frames"),
    ],
)
def test_places_that_are_none_are_named(said: Any, reason: str) -> None:
    with pytest.raises(GeometryError, match="an item: expected") as caught:
        places_of(item(0, 4, **{KEY: said}), "an item")
    assert caught.value.reason == reason


def test_places_as_they_come_from_another_process() -> None:
    assert places_of(item(0, 9, [1, 0, 2, 2, 4, 1.0]), "an item") == [Place(1, 0, 2, 2, 4, 1)]
    assert Place(1, 0, 2, 2, 4, 1).tokens == 9
