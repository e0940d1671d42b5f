"""The table of model families in docs/families.md, made from the outcomes of their tests.

    make support-matrix

runs tests/server/test_families.py on every server with `--support FILE`, and then this module. FILE holds the outcome
of each test on each server, and a description of the machine.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from families import FAMILIES, Family

Outcomes = Mapping[str, Mapping[str, str]]
"""By server and test: "passed", "skipped" or "failed"."""

TESTS: dict[str, tuple[str, ...]] = {
    "images": ("test_an_image", "test_what_is_no_picture_is_the_clients_error"),
    "video": ("test_a_video", "test_odd_videos", "test_what_is_no_video_is_the_clients_error"),
    "several videos": ("test_several_videos_in_a_turn",),
    "turns over a cached prefix": ("test_every_turn_of_a_conversation",),
    "chunked prefill": ("test_every_turn_of_a_conversation", "test_a_long_prompt_is_sparse"),
    "in a batch": ("test_all_turns_at_once",),
}
"""By column: the tests on which its "yes" rests. A name covers all cases of its test."""

BEGIN, END = "<!-- support matrix -->", "<!-- /support matrix -->"


def table(outcomes: Outcomes) -> str:
    """The table, in Markdown.

    Raises:
        ValueError: naming a family without outcomes, or a test that failed or is missing.
    """
    columns = [*TESTS, "2 ranks", "patterns", "held against"]
    rows = [["family", "model class", *columns]]
    for family in FAMILIES:
        marks = [_mark(family, column, outcomes.get(family.name, {})) for column in TESTS]
        rows.append(
            [family.title, family.served_by, *marks, _ranks(family, outcomes), _patterns(family), family.oracle_title]
        )
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def written(page: str, outcomes: Outcomes) -> str:
    """A page with the table between its two marks.

    Raises:
        ValueError: if the marks are not there, or as `table`.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"page: expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}"


def _mark(family: Family, column: str, ended: Mapping[str, str]) -> str:
    if column == "turns over a cached prefix" and not family.cached_turns:
        return "no"
    if column == "chunked prefill" and not family.chunked_prefill:
        return "no"
    return _yes(family.name, ended, TESTS[column])


def _yes(server: str, ended: Mapping[str, str], tests: Iterable[str]) -> str:
    passed = []
    for test in tests:
        own = {outcome for name, outcome in ended.items() if re.match(rf"{test}(\W|$)", name)}
        if not own or "failed" in own:
            raise ValueError(f"{server}: {test}: expected it passed or skipped, got {', '.join(own) or 'no outcome'}")
        passed.append("passed" in own)
    return "yes" if all(passed) else "no"


def _ranks(family: Family, outcomes: Outcomes) -> str:
    if not family.tensor_parallel:
        return "no"
    server = f"{family.name}_2_ranks"
    ended = outcomes.get(server, {})
    run = {name.partition("[")[0] for name, outcome in ended.items() if outcome != "skipped"}
    return _yes(server, ended, sorted(run or {"test_an_image"}))


def _patterns(family: Family) -> str:
    return "all" if "row grid" in family.patterns else "all but the row grid"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m support_matrix", description=__doc__)
    parser.add_argument("outcomes", type=Path, help="what the tests wrote")
    parser.add_argument("page", type=Path, help="the page that holds the table between its marks")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = json.loads(options.outcomes.read_text())
    options.page.write_text(written(options.page.read_text(), found["servers"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
