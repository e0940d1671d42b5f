"""What backend.py assumes about SGLang's scheduler, checked from inside a server under stress.

The server mixes decoding into chunks, retracts requests, and has cached prefixes; some of its clients disconnect.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from serving import Media
from test_generated_tokens import Run, runs  # noqa: F401

NAME = "mixed_internvl"
pytestmark = pytest.mark.server(NAME)


@pytest.fixture(scope="module")
def seen(runs: Callable[[str], Run], media: Media) -> list[dict[str, Any]]:  # noqa: F811
    run = runs(NAME)
    file = run.served.trace.with_name("probe.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def of(seen: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in seen if line["kind"] == kind]


def test_the_row_of_a_request_holds_position_after_position(seen: list[dict[str, Any]]) -> None:
    """Index p of a row holds the slot of position p, also after cached prefixes and retractions."""
    batches = of(seen, "batch")
    assert any(line["prefix"] for line in batches) and any(line["retracted"] for line in batches)
    assert any(line["prefix"] >= line["prompt"] for line in batches)
    assert [line for line in batches if line["wrong"]] == []
    assert all(line["new_in_place"] for line in batches)


def test_mixed_batches_come_as_extend_with_decoding_as_rows_of_one(seen: list[dict[str, Any]]) -> None:
    """So the mode does not tell generated tokens from prompt tokens, and prompts.py asks the requests."""
    assert any(line["mode"] == "MIXED" for line in of(seen, "batch"))
    assert {line["mode"] for line in of(seen, "metadata")} == {"EXTEND"}


def test_media_are_there_for_the_metadata_and_gone_before_the_first_layer(seen: list[dict[str, Any]]) -> None:
    assert any(any(line["media"]) for line in of(seen, "metadata"))
    assert of(seen, "layer") and not any(line["media_left"] for line in of(seen, "layer"))


def test_requests_with_media_keep_them_until_they_are_done(seen: list[dict[str, Any]]) -> None:
    """The decode rows of a mixed batch have them too."""
    assert all(line["media"] for line in of(seen, "batch") if line["rid"].startswith(("alone", "together", "again")))
