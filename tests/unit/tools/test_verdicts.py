"""Tables of comparisons, of needles and of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import result_pages
from sglang_mminfer.tools import verdicts
from sglang_mminfer.tools.niah.against import compared
from sglang_mminfer.tools.niah.ask import Answer


def answers(right: list[bool], errors: set[int] = frozenset()) -> list[Answer]:  # type: ignore[assignment]
    """One question a conversation."""
    return [
        Answer("v-niah", 1024, i, 0, 0, "video", "1", right=one, error="broke" if i in errors else None)
        for i, one in enumerate(right)
    ]


def test_dense_is_the_baseline_and_failures_count_for_nobody() -> None:
    answers_of = {
        "default": answers([True] * 20, {4}),
        "dense": answers([True] * 20, {2, 3}),
        "bad": answers([False] * 18 + [True] * 2),
    }
    baseline, found = compared(answers_of)
    assert baseline == "dense" and list(found) == ["default", "bad"]
    default, bad = found["default"][0], found["bad"][0]
    assert (default.questions, default.gained, default.lost) == (17, 0, 0)
    assert (bad.questions, bad.lost, bad.verdict) == (18, 16, "no")
    rows = verdicts.rows_of(found, baseline)
    assert [row[0] for row in rows] == ["config", "default", "bad"]
    assert rows[2][-1] == "no" and "0 / 16" in rows[2]
    assert rows[1][-1].startswith("not enough questions, ")
    assert json.loads(json.dumps(verdicts.to_json(found, baseline)))["configs"]["bad"][0]["lost"] == 16


def test_without_dense_the_first_is_the_baseline() -> None:
    assert compared({"a": answers([True]), "b": answers([True])})[0] == "a"


def test_one_config_is_compared_with_nothing() -> None:
    baseline, found = compared({"dense": answers([True])})
    assert found == {} and verdicts.markdown_section(found, baseline) == ""


def test_a_config_that_answered_nothing_has_no_row() -> None:
    _, found = compared({"dense": answers([True, True]), "b": answers([True, True], {0, 1})})
    assert found == {"b": []}


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in result_pages.RESULTS.glob("*.md") if path.stem not in result_pages.OVER_ALL)
)
def test_stored_tables_are_those_of_the_stored_answers(name: str) -> None:
    result = json.loads((result_pages.RESULTS / f"{name}.json").read_text())
    assert Path(result_pages.RESULTS / f"{name}.md").read_text() == result_pages.page_of(name, result)


@pytest.mark.parametrize("config, gained_and_lost", [("default", [(0, 1), (0, 0)]), ("text_chosen", [(3, 0), (0, 0)])])
def test_the_page_of_a_config_over_all_is_that_of_the_stored_answers(
    config: str, gained_and_lost: list[tuple[int, int]]
) -> None:
    assert (result_pages.RESULTS / f"{config}.md").read_text() == result_pages.page_over_all(config)
    comparisons = result_pages.over_all(config)
    assert [comparison.questions for comparison in comparisons] == [648, 648]
    assert [(comparison.gained, comparison.lost) for comparison in comparisons] == gained_and_lost
