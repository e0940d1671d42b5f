"""The table of families in docs/families.md says what their tests did, no more and no less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from families import FAMILIES, Family
from support_matrix import BEGIN, END, TESTS, table, written

ROOT = Path(__file__).parents[2]


@pytest.fixture
def outcomes() -> dict[str, dict[str, str]]:
    return json.loads((ROOT / "tests" / "server" / "support.json").read_text())["servers"]


def cell(outcomes: dict[str, dict[str, str]], family: Family, column: str) -> str:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(outcomes).splitlines()]
    (row,) = [line for line in lines if line[0] == family.title]
    return row[lines[0].index(column)]


def test_the_page_has_the_table_of_the_last_run(outcomes: dict[str, dict[str, str]]) -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    assert written(page, outcomes) == page, "make support-matrix writes it"


def test_every_family_has_a_row_with_an_answer_in_each_column(outcomes: dict[str, dict[str, str]]) -> None:
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(outcomes).splitlines()]
    assert [row[0] for row in rows] == [family.title for family in FAMILIES]
    for row in rows:
        assert len(row) == len(head) and {row[head.index(column)] for column in [*TESTS, "2 ranks"]} <= {"yes", "no"}
    assert {server.removesuffix("_2_ranks") for server in outcomes} == {family.name for family in FAMILIES}


def test_what_a_family_is_said_to_lack_is_what_its_tests_skipped(outcomes: dict[str, dict[str, str]]) -> None:
    for family in FAMILIES:
        ended = outcomes[family.name]
        assert cell(outcomes, family, "video") == ("yes" if family.video else "no")
        assert cell(outcomes, family, "several videos") == ("yes" if family.several_videos else "no")
        assert cell(outcomes, family, "chunked prefill") == ("yes" if family.chunked_prefill else "no")
        assert (ended["test_a_video"] == "passed") == family.video
        assert (ended["test_several_videos_in_a_turn"] == "passed") == family.several_videos
        assert ended["test_an_image"] == "passed"


@pytest.mark.parametrize("outcome", ["failed", None])
def test_no_table_is_made_of_a_failure(outcomes: dict[str, dict[str, str]], outcome: str | None) -> None:
    name = FAMILIES[0].name
    ended = {test: result for test, result in outcomes[name].items() if test != "test_an_image"}
    if outcome:
        ended["test_an_image"] = outcome
    with pytest.raises(ValueError, match=rf"{name}: test_an_image: expected it passed or skipped, got"):
        table({**outcomes, name: ended})


def test_the_marks_must_be_there(outcomes: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="expected the marks"):
        written(f"# A page\n{END}\n{BEGIN}", outcomes)
