"""Is a config worse than dense? Two configs answered the same questions; their answers are compared pair by pair.

* **p**: the exact test of McNemar (1947) on the questions that only one of the two answered right. Questions about one
  video are not independent, so signs are flipped for whole videos, which is McNemar's test where each has one question.
* **Interval** of the difference of right answers: Tango's score interval (Statistics in Medicine 17, 1998). If videos
  have several questions, it takes counts divided by their design effect (Rao and Scott, Biometrics 48, 1992), with the
  variance of Obuchowski (Statistics in Medicine 17, 1998), and Student's quantile for the number of videos.
* **Interval for graded scores**: the bootstrap that draws videos, with the expanded percentiles of Hesterberg (The
  American Statistician 69, 2015), without which it is too narrow for few videos.
* **Several tasks**: Holm's step-down (Scandinavian Journal of Statistics 6, 1979).
* **Verdict**: not worse than dense by more than a margin, if the whole interval lies above minus the margin.

Differences are "the other minus dense", as shares: 0.01 is one point.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MARGIN = 0.01
"""One point: by how much a config may be worse and still pass for as good as dense."""

CONFIDENCE = 0.95
"""The confidence of every interval."""

POWER = 0.8
"""The probability of a verdict that the number of questions which would do is made for."""

DRAWS = 10_000
"""Draws of the bootstrap, and of the test by signs where the cases are too many to be counted."""

FEW = 5
"""So many videos have to differ before it can be told how much questions of one video hang together."""

Verdict = Literal["yes", "no", "not enough questions"]


@dataclass(frozen=True)
class Comparison:
    """Two configs on the same questions of one task.

    Attributes:
        task: its name.
        questions, videos: how many both answered, and about how many videos.
        dense, other: the mean scores, 0 to 1.
        gained, lost: questions that only the other, or only dense, answered right; None for graded scores.
        difference, low, high: other minus dense, and its interval of 95 %.
        p_value: of the test that videos favour neither. holm: the same with Holm's correction for all tasks.
        mcnemar: of McNemar's exact test, which takes questions for independent; None for graded scores.
        design_effect: by how many times questions of one video count less than independent ones.
        clusters_unknown: whether too few videos differ for that; 1 was taken.
        margin: of the verdict. verdict: on "not worse than dense by more than the margin".
        would_do: how many questions would probably bring a verdict; None if there is one, or if none would.
    """

    task: str
    questions: int
    videos: int
    dense: float
    other: float
    gained: int | None
    lost: int | None
    difference: float
    low: float
    high: float
    p_value: float
    holm: float
    mcnemar: float | None
    design_effect: float
    clusters_unknown: bool
    margin: float
    verdict: Verdict
    would_do: int | None

    @property
    def sentence(self) -> str:
        """The verdict in words: yes, no, or how many questions would do."""
        if self.verdict != "not enough questions":
            return self.verdict
        if self.would_do is None:
            return "not enough questions, and no number would do"
        return f"not enough questions, {self.would_do:,} would do"


# ---- tests -----------------------------------------------------------------------------------------------------


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value of McNemar's exact test on questions that only one of two answered right."""
    from scipy import stats

    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def sign_test(sums: Sequence[float]) -> float:
    """The two-sided p-value of the test that flips the signs of whole videos.

    It is exact for whole numbers, and where there are few signs; otherwise by `DRAWS` draws of a fixed seed.

    Args:
        sums: for each video the sum of its differences.
    """
    sizes = np.abs(np.asarray(sums, float))
    sizes = sizes[sizes > 0]
    observed = abs(math.fsum(sums))
    if not len(sizes):
        return 1.0
    if np.all(sizes == np.round(sizes)):
        chances = np.ones(1)  # of the sums -total, -total + 2, ..., total; here of 0 alone
        for size in sizes.astype(int):
            spread = np.zeros(len(chances) + size)
            spread[: len(chances)] += 0.5 * chances
            spread[size:] += 0.5 * chances
            chances = spread
        values = np.arange(len(chances)) * 2 - (len(chances) - 1)
        return float(min(1.0, chances[np.abs(values) >= observed - 1e-9].sum()))
    if len(sizes) <= 12:
        signs = 1 - 2 * ((np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1)
        return float(np.mean(np.abs(signs @ sizes) >= observed - 1e-9))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, len(sizes)))
    return float((1 + np.sum(np.abs(signs @ sizes) >= observed - 1e-9)) / (DRAWS + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `p_values`."""
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


# ---- intervals -------------------------------------------------------------------------------------------------


def score_interval(gained: float, lost: float, questions: float, critical: float) -> tuple[float, float]:
    """Tango's score interval of (gained - lost) / questions.

    Args:
        gained, lost, questions: counts, or counts divided by a design effect.
        critical: the quantile, 1.96 for an interval of 95 %.
    """
    estimate = (gained - lost) / questions

    def holds(difference: float) -> bool:
        """Whether the score statistic at this true difference is within the quantile."""
        # The most likely share of losses if this is the true difference.
        b = -gained - lost + (2 * questions - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 8 * questions * c)) - b) / (4 * questions)
        variance = questions * max(0.0, 2 * share + difference * (1 - difference))
        distance = questions * (estimate - difference)
        return distance * distance <= critical * critical * variance

    def end(outside: float) -> float:
        if holds(outside):
            return outside
        inside = estimate
        for _ in range(40):  # halves the distance to the end each time
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if holds(middle) else (inside, middle)
        return inside

    return end(-1.0), end(1.0)


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The interval of a mean over questions by drawing whole videos: expanded percentiles of `DRAWS` draws.

    Args:
        sums, counts: float and int [videos]: a video's sum of differences, and how many questions it has.
    """
    from scipy import stats

    videos = len(sums)
    if videos < 2:
        return -1.0, 1.0
    random = np.random.default_rng(0)
    means = np.empty(DRAWS)
    step = max(1, 4_000_000 // videos)  # draws at a time, so that many videos need little memory
    for first in range(0, DRAWS, step):
        drawn = random.integers(videos, size=(min(step, DRAWS - first), videos))
        means[first : first + step] = sums[drawn].sum(1) / counts[drawn].sum(1)
    wider = math.sqrt(videos / (videos - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, videos - 1)
    level = float(stats.norm.cdf(wider))
    low, high = np.quantile(means, [level, 1 - level])
    return float(low), float(high)


def design_effect(sums: np.ndarray, counts: np.ndarray, squares: float) -> float:
    """The variance of a mean difference over videos by that over independent questions, at least 1.

    Args:
        sums, counts: float and int [videos]: as for `bootstrap_interval`.
        squares: the sum of the squared differences of all questions.
    """
    questions, videos = int(counts.sum()), len(sums)
    if videos == questions or videos < 2:
        return 1.0
    mean = sums.sum() / questions
    independent = (squares - questions * mean * mean) / (questions - 1) * questions
    if independent <= 0:
        return 1.0
    by_video = float(((sums - counts * mean) ** 2).sum()) * videos / (videos - 1)
    return max(1.0, by_video / float(independent))


# ---- comparisons -----------------------------------------------------------------------------------------------


def compare(
    task: str,
    dense: Mapping[Hashable, float],
    other: Mapping[Hashable, float],
    video_of: Mapping[Hashable, Hashable],
    margin: float = MARGIN,
) -> Comparison:
    """Compare two configs on one task.

    Args:
        dense, other: question -> score, 0 to 1. Scores that are all 0 or 1 are right and wrong answers.
        video_of: question -> what it is about; questions about the same thing hang together.
        margin: of the verdict, a share.

    Raises:
        ValueError: the questions are not the same, there are none, a score is not 0 to 1, or the margin is not.
    """
    if dense.keys() != other.keys():
        alone = len(dense.keys() ^ other.keys())
        raise ValueError(f"{task}: {alone} questions were answered by one of the two only")
    if not dense:
        raise ValueError(f"{task}: no question was answered by both")
    if not 0 < margin < 1:
        raise ValueError(f"margin: expected more than 0 and less than 1, got {margin:g}")
    keys = list(dense)
    a, b = np.array([dense[key] for key in keys], float), np.array([other[key] for key in keys], float)
    if not (np.all((a >= 0) & (a <= 1)) and np.all((b >= 0) & (b <= 1))):
        raise ValueError(f"{task}: expected scores from 0 to 1")
    number_of: dict[Hashable, int] = {}
    video = np.array([number_of.setdefault(video_of[key], len(number_of)) for key in keys])
    differences = b - a
    sums, counts = np.bincount(video, differences), np.bincount(video)
    p_value = sign_test(sums.tolist())
    effect = design_effect(sums, counts, float((differences**2).sum()))
    is_graded = not np.all(np.isin(np.concatenate([a, b]), (0.0, 1.0)))
    gained = lost = exact = None
    if is_graded:
        low, high = bootstrap_interval(sums, counts)
    else:
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        exact = mcnemar(gained, lost)
        low, high = _clustered_interval(gained, lost, len(keys), len(counts), effect)
    verdict, would_do = _verdict(differences, low, high, effect, margin)
    differing = int(np.bincount(video, np.abs(differences)).astype(bool).sum())
    return Comparison(
        task, len(keys), len(counts), float(a.mean()), float(b.mean()), gained, lost, float(differences.mean()),
        low, high, p_value, p_value, exact, effect, len(counts) < len(keys) and differing < FEW, margin, verdict,
        would_do,
    )  # fmt: skip


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with Holm's correction, for one config on several tasks."""
    import dataclasses

    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [dataclasses.replace(comparison, holm=value) for comparison, value in zip(comparisons, adjusted)]


def _clustered_interval(gained: int, lost: int, questions: int, videos: int, effect: float) -> tuple[float, float]:
    from scipy import stats

    if videos == questions:
        critical = stats.norm.ppf((1 + CONFIDENCE) / 2)
    elif videos > 1:
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, videos - 1)
    else:  # one video tells nothing about others
        return -1.0, 1.0
    return score_interval(gained / effect, lost / effect, questions / effect, float(critical))


def _verdict(
    differences: np.ndarray, low: float, high: float, effect: float, margin: float
) -> tuple[Verdict, int | None]:
    if low > -margin:
        return "yes", None
    if high < -margin:
        return "no", None
    # If the interval has no difference in it, none is assumed; else the one that was seen.
    assumed = 0.0 if low <= 0 <= high else float(differences.mean())
    needed = questions_needed(float((differences**2).mean()), len(differences), effect, margin, assumed)
    return "not enough questions", needed


def questions_needed(
    square: float, questions: int, effect: float, margin: float, difference: float = 0.0
) -> int | None:
    """How many questions give a verdict with a probability of `POWER`, if they are like those so far.

    The usual number for one mean: (z of the interval + z of the power)^2 x variance / distance^2. It is at least what
    an interval needs if no answer differs.

    Args:
        square: the mean squared difference so far; for right and wrong the share of answers that differ.
        questions: how many there are so far: the rarer differences are, the less they tell about how rare.
        difference: the true difference that is assumed.

    Returns:
        None if the assumed difference is the margin, which no number of questions can tell.
    """
    from scipy import stats

    distance = abs(difference + margin)
    if distance < 1e-9:
        return None
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    # Half a question more that differs: none so far does not mean none ever.
    square = (square * questions + 0.5) / (questions + 1)
    variance = max(0.0, square - difference * difference)
    by_power = (z + float(stats.norm.ppf(POWER))) ** 2 * variance * effect / distance**2
    if_none_differs = z * z * (1 - margin) / margin * effect
    return max(math.ceil(by_power), math.floor(if_none_differs) + 1)
