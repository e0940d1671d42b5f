"""Statistics of two configs on the same questions: against scipy, brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sglang_mminfer.tools import paired
from sglang_mminfer.tools.paired import compare, holm, mcnemar, score_interval, sign_test

Z = 1.959964


def answered(a: np.ndarray, b: np.ndarray, videos: np.ndarray | None = None, **options: float) -> paired.Comparison:
    names = range(len(a))
    of = videos if videos is not None else np.arange(len(a))
    return compare("task", dict(zip(names, a)), dict(zip(names, b)), dict(zip(names, of.tolist())), **options)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_sum_of_binomial_tails(gained: int, lost: int) -> None:
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(gained, lost) == pytest.approx(mcnemar(lost, gained))


@given(st.integers(0, 30), st.integers(0, 30))
def test_signs_of_single_questions_are_mcnemars_test(gained: int, lost: int) -> None:
    assert sign_test([1.0] * gained + [-1.0] * lost) == pytest.approx(mcnemar(gained, lost))


@given(st.lists(st.one_of(st.integers(-5, 5).map(float), st.sampled_from([-0.5, 0.25, 1.5])), max_size=9))
def test_signs_are_all_tried(sums: list[float]) -> None:
    flips = list(itertools.product((-1, 1), repeat=len(sums)))
    as_far = sum(abs(sum(s * x for s, x in zip(f, sums))) >= abs(sum(sums)) - 1e-9 for f in flips)
    assert sign_test(sums) == pytest.approx(as_far / len(flips))


def test_many_graded_videos_are_tested_by_draws() -> None:
    random = np.random.default_rng(3)
    sums = random.normal(0.25, 1, 60)
    theirs = stats.permutation_test((sums,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1)
    assert sign_test(sums.tolist()) == pytest.approx(theirs.pvalue, abs=0.012)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """An adjusted p-value is the largest of Bonferroni's over all sets of tasks that have the task in them."""
    tasks = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(tasks, size)]
    for i, adjusted in enumerate(holm(p_values)):
        assert adjusted == pytest.approx(max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert all(adjusted[i] <= adjusted[j] for i, j in itertools.pairwise(order))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 400))
def test_the_score_interval_holds_its_estimate_and_mirrors(gained: int, lost: int, same: int) -> None:
    n = gained + lost + same
    low, high = score_interval(gained, lost, n, Z)
    assert -1 <= low <= (gained - lost) / n <= high <= 1 and low < high
    assert score_interval(lost, gained, n, Z) == pytest.approx((-high, -low), abs=1e-7)


def test_the_score_interval_at_its_ends_has_the_likelihood_of_its_quantile() -> None:
    """At both ends the score statistic is the quantile, with the most likely nuisance found by search."""
    from scipy import optimize

    gained, lost, n = 3, 14, 120
    for end in score_interval(gained, lost, n, Z):

        def against(q: float, end: float = end) -> float:
            return -(gained * math.log(q + end) + lost * math.log(q) + (n - gained - lost) * math.log(1 - 2 * q - end))

        bounds = (max(0.0, -end) + 1e-9, (1 - end) / 2 - 1e-9)
        q = optimize.minimize_scalar(against, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        score = (gained - lost - n * end) / math.sqrt(n * (2 * q + end - end * end))
        assert abs(score) == pytest.approx(Z, abs=1e-3)


def test_the_score_interval_without_a_difference() -> None:
    """The statistic's closed form there: low = -z^2 / (n + z^2)."""
    low, high = score_interval(0, 0, 208, Z)
    assert high == pytest.approx(Z * Z / (208 + Z * Z), abs=1e-6) and low == pytest.approx(-high, abs=1e-6)


@pytest.mark.parametrize("n, gain, loss", [(60, 0.05, 0.05), (60, 0.02, 0.12), (150, 0.01, 0.03), (30, 0.2, 0.4)])
def test_the_score_interval_covers(n: int, gain: float, loss: float) -> None:
    """Exactly: the probability of all counts whose interval holds the true difference."""
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            chance = stats.multinomial.pmf([gained, lost, n - gained - lost], n, [gain, loss, 1 - gain - loss])
            if chance > 1e-7:
                low, high = score_interval(gained, lost, n, Z)
                covered += chance * (low <= gain - loss <= high)
    assert 0.93 < covered < 0.985


def clustered(random: np.random.Generator, videos: int, each: int, gain: float, loss: float, together: float):
    """Right and wrong answers; with the chance `together` a question of a video has the fate of the video."""
    fates = random.choice([0, 1, -1], p=[1 - gain - loss, gain, loss], size=(videos, each + 1))
    fate = np.where(random.random((videos, each)) < together, fates[:, :1], fates[:, 1:]).ravel()
    a = np.where(fate == 0, random.random(fate.size) < 0.7, fate < 0).astype(float)
    b = np.where(fate == 0, a, fate > 0).astype(float)
    return a, b, np.repeat(np.arange(videos), each)


@pytest.mark.parametrize("videos, each, gain, loss, together", [(12, 6, 0.1, 0.2, 0.6), (40, 5, 0.05, 0.1, 0.5)])
def test_the_interval_by_videos_covers(videos: int, each: int, gain: float, loss: float, together: float) -> None:
    random = np.random.default_rng(1)
    trials = 500
    covered = plain = 0
    for _ in range(trials):
        a, b, of = clustered(random, videos, each, gain, loss, together)
        found = answered(a, b, of)
        covered += found.low <= gain - loss <= found.high
        assert found.gained is not None and found.lost is not None
        low, high = score_interval(found.gained, found.lost, len(a), Z)
        plain += low <= gain - loss <= high
    assert 0.92 < covered / trials < 0.99
    assert plain < covered - 0.05 * trials, "the simulation has no clusters to speak of"


@pytest.mark.parametrize("videos", [8, 30])
def test_the_bootstrap_covers(videos: int) -> None:
    random = np.random.default_rng(2)
    trials, each = 300, 4
    covered = 0
    for _ in range(trials):
        shift = random.normal(-0.05, 0.1, (videos, 1)) + random.normal(0, 0.1, (videos, each))
        low, high = paired.bootstrap_interval(shift.sum(1), np.full(videos, each))
        covered += low <= -0.05 <= high
    assert 0.915 < covered / trials < 0.985


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_swapping_the_two_mirrors_everything(videos: int, each: int, seed: int, graded: bool) -> None:
    random = np.random.default_rng(seed)
    a, b, of = clustered(random, videos, each, 0.1, 0.2, 0.5)
    if graded:
        a, b = a * 0.75, b * 0.5
    one, two = answered(a, b, of), answered(b, a, of)
    assert one.difference == pytest.approx(-two.difference)
    assert (one.dense, one.other) == (two.other, two.dense)
    assert (one.p_value, one.mcnemar, one.design_effect) == pytest.approx((two.p_value, two.mcnemar, two.design_effect))
    close = 1e-6 if one.gained is not None else 0.05  # the bootstrap's quantiles are of draws
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low), abs=close)


def test_one_question_a_video_has_no_design_effect() -> None:
    random = np.random.default_rng(5)
    a, b = (random.random(50) < 0.8).astype(float), (random.random(50) < 0.7).astype(float)
    found = answered(a, b)
    assert found.design_effect == 1.0 and not found.clusters_unknown
    assert found.p_value == pytest.approx(found.mcnemar)
    assert found.gained is not None and found.lost is not None
    assert (found.low, found.high) == pytest.approx(score_interval(found.gained, found.lost, 50, Z), abs=1e-5)


def test_videos_that_stand_and_fall_as_a_whole_count_as_one_question() -> None:
    of = np.repeat(np.arange(30), 5)
    a = np.ones(150)
    b = np.repeat(np.arange(30) % 3 > 0, 5).astype(float)
    assert answered(a, b, of).design_effect == pytest.approx(5, rel=0.05)


def test_one_video_tells_nothing() -> None:
    found = answered(np.ones(40), np.zeros(40), np.zeros(40, int))
    assert (found.low, found.high, found.p_value, found.verdict) == (-1, 1, 1, "not enough questions")


def test_verdicts() -> None:
    ones = np.ones(2000)
    few_lost = ones.copy()
    few_lost[:4] = 0
    many_lost = ones.copy()
    many_lost[:200] = 0
    assert answered(ones, few_lost).sentence == "yes"
    assert answered(ones, many_lost).sentence == "no"
    unsure = answered(ones[:100], ones[:100])
    assert unsure.sentence == "not enough questions, 389 would do"
    assert unsure.would_do == 389 and answered(np.ones(389), np.ones(389)).verdict == "yes"
    lost = ones.copy()
    lost[:20] = 0
    assert answered(ones, lost).sentence == "not enough questions, and no number would do"  # just the margin
    assert answered(ones, lost, margin=0.03).sentence == "yes"


@pytest.mark.parametrize("discordant, margin", [(0.04, 0.01), (0.2, 0.03)])
def test_the_number_that_would_do_does(discordant: float, margin: float) -> None:
    random = np.random.default_rng(4)
    needed = paired.questions_needed(discordant, 2000, 1.0, margin)
    assert needed is not None
    yes = 0
    for _ in range(400):
        gained, lost, _same = random.multinomial(needed, [discordant / 2, discordant / 2, 1 - discordant])
        yes += score_interval(gained, lost, needed, Z)[0] > -margin
    assert 0.74 < yes / 400 < 0.86


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="2 questions were answered by one"):
        compare("t", {1: 1.0, 2: 0.0}, {1: 1.0, 3: 0.0}, {})
    with pytest.raises(ValueError, match="no question"):
        compare("t", {}, {}, {})
    with pytest.raises(ValueError, match="from 0 to 1"):
        compare("t", {1: 1.0}, {1: 7.0}, {1: 1})
    with pytest.raises(ValueError, match="margin"):
        compare("t", {1: 1.0}, {1: 1.0}, {1: 1}, margin=0)


def test_correction_leaves_the_rest() -> None:
    first, second = answered(np.ones(9), np.zeros(9)), answered(np.ones(9), np.ones(9))
    both = paired.corrected([first, second])
    assert [found.holm for found in both] == pytest.approx(holm([first.p_value, second.p_value]))
    assert [found.p_value for found in both] == [first.p_value, second.p_value]
