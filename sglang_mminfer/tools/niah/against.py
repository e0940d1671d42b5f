"""Needles found by one config beside another: which answers differ, and whether that is chance."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from sglang_mminfer.tools import paired
from sglang_mminfer.tools.niah.ask import Answer
from sglang_mminfer.tools.niah.figure import TITLES
from sglang_mminfer.tools.paired import Comparison
from sglang_mminfer.tools.verdicts import baseline_of


def question_of(answer: Answer) -> Hashable:
    """What tells one question from all others."""
    return answer.task, answer.length, answer.seed, answer.turn, answer.depth


def compared(
    answers_of: Mapping[str, Sequence[Answer]], margin: float = paired.MARGIN
) -> tuple[str, dict[str, list[Comparison]]]:
    """Compare every config with the baseline, by task; questions of one conversation hang together.

    A request that failed is no answer, so its question is left out for the two configs.

    Returns:
        The baseline's name, and the comparisons of every other config.
    """
    baseline = baseline_of(answers_of)
    dense = {question_of(a): a for a in answers_of[baseline] if a.error is None}
    verdicts: dict[str, list[Comparison]] = {}
    for name, answers in answers_of.items():
        if name == baseline:
            continue
        other = {question_of(a): a for a in answers if a.error is None}
        both = [key for key in dense if key in other]
        comparisons = []
        for task in dict.fromkeys(dense[key].task for key in both):
            keys = [key for key in both if dense[key].task == task]
            comparisons.append(
                paired.compare(
                    TITLES[task],
                    {key: float(dense[key].right) for key in keys},
                    {key: float(other[key].right) for key in keys},
                    {key: (dense[key].length, dense[key].seed) for key in keys},
                    margin,
                )
            )
        verdicts[name] = paired.corrected(comparisons)
    return baseline, verdicts
