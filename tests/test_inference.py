"""Intervals, tests and corrections against simulations whose truth is known, and against enumeration."""
import math
from itertools import combinations

import numpy as np
import pytest

from rl.report import inference
from rl.report.inference import (best_constant, bootstrap, constant_guess, cover_at, holm, interval,
                                 interval_of_differences, macro_average, minimum_detectable, paired_t, pass_at_k,
                                 score_interval, t_cdf, t_quantile, wilson)

PROMPTS, SAMPLES = 200, 8


# ---------------------------------------------------------------- Student's t

def test_students_t_where_it_has_a_closed_form():
    for t in (-3.0, -0.5, 0.0, 0.2, 1.0, 9.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)            # Cauchy
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
        angle = math.atan(t / math.sqrt(3))
        of_three = 0.5 + (angle + math.sin(angle) * math.cos(angle)) / math.pi
        assert t_cdf(t, 3) == pytest.approx(of_three, abs=1e-12)
    assert t_cdf(1.96, 10 ** 6) == pytest.approx(0.5 * math.erfc(-1.96 / math.sqrt(2)), abs=1e-6)


@pytest.mark.parametrize("freedom, wanted", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (29, 2.04523)])
def test_its_quantiles_are_those_of_the_tables(freedom, wanted):
    assert t_quantile(0.975, freedom) == pytest.approx(wanted, rel=1e-5)
    assert t_quantile(0.025, freedom) == -t_quantile(0.975, freedom)


# ---------------------------------------------------------------- over seeds

def test_a_paired_t_by_hand():
    # 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3) with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14)
    found = paired_t([1, 2, 3])
    assert (found.mean, found.sd, found.n) == (2, 1, 3)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert found.high - 2 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5) == pytest.approx(2 - found.low, rel=1e-5)


def test_differences_without_spread_and_of_one_seed():
    # Two or three equal values are no evidence that others would be: a p of 0 would claim it. 0.1 + 0.2 is not 0.3.
    for equal in ([0.5, 0.5], [0.0, 0.0], [0.3, 0.1 + 0.2, 0.3]):
        assert math.isnan(paired_t(equal).p) and paired_t(equal).mean == pytest.approx(equal[0])
    one = paired_t([0.3])
    assert math.isnan(one.p) and (one.low, one.high) == (-math.inf, math.inf)


def trained(rng, seeds, spread, true=(0.80, 0.75)):
    """Accuracies (seeds, 2) of two methods that share the difficulty of their prompts; spread: deviation of a seed's
    own accuracy around the true one, for each method."""
    difficulty = rng.normal(0, 0.08, PROMPTS)
    found = np.empty((seeds, 2))
    for method in range(2):
        own = true[method] + spread * rng.standard_normal(seeds)
        chance = np.clip(own[:, None] + difficulty - difficulty.mean(), 0, 1)
        found[:, method] = (rng.binomial(SAMPLES, chance) / SAMPLES).mean(1)
    return found


def coverage_of_seeds(seeds, spread, simulations):
    rng = np.random.default_rng([seeds, round(1000 * spread)])
    inside = 0
    for _ in range(simulations):
        one, two = trained(rng, seeds, spread).T
        found = paired_t(one - two)
        inside += found.low <= 0.05 <= found.high
    return inside / simulations


CASES = pytest.mark.parametrize("spread", [0.005, 0.04])
SEEDS = pytest.mark.parametrize("seeds", [3, 5, 10])


@CASES
@SEEDS
def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says(seeds, spread):
    assert 0.92 <= coverage_of_seeds(seeds, spread, 500) <= 0.98


@pytest.mark.slow
@CASES
@SEEDS
def test_the_interval_over_seeds_in_two_thousand_simulations(seeds, spread):
    assert 0.93 <= coverage_of_seeds(seeds, spread, 2000) <= 0.97


def coverage_of_prompts(spread, simulations, metric, own=0.8, of=interval):
    """Of one seed's model, whose truth is its own accuracy, or pass@k, over all prompts that there could be."""
    rng = np.random.default_rng(round(1000 * spread))
    truth = metric(rng.binomial(1, chances(rng, own, spread, 400_000)[:, None], (400_000, SAMPLES))).mean()
    inside = 0
    for _ in range(simulations):
        right = rng.binomial(1, chances(rng, own, spread, PROMPTS)[:, None], (PROMPTS, SAMPLES))
        _, low, high = of(metric(right))
        inside += low <= truth <= high
    return inside / simulations


def chances(rng, own, spread, n):
    """The model's chance on each of n prompts: a beta distribution around its accuracy, narrow or nearly 0 and 1."""
    scale = 20 if spread < 0.01 else 0.5
    return rng.beta(own * scale, (1 - own) * scale, n)


METRICS = {"accuracy": lambda right: right.mean(1), "pass@2": lambda right: pass_at_k(right, 2),
           "pass@4": lambda right: pass_at_k(right, 4)}


PRINTED = pytest.mark.parametrize("metric, own", [("accuracy", 0.5), ("accuracy", 0.8), ("accuracy", 0.94),
                                                  ("pass@2", 0.5), ("pass@4", 0.5)])


@CASES
@PRINTED
def test_the_interval_over_prompts_holds_the_truth_as_often_as_it_says(metric, own, spread):
    assert 0.92 <= coverage_of_prompts(spread, 500, METRICS[metric], own) <= 0.98


@pytest.mark.slow
@CASES
@PRINTED
def test_the_interval_over_prompts_in_two_thousand_simulations(metric, own, spread):
    assert 0.93 <= coverage_of_prompts(spread, 2000, METRICS[metric], own) <= 0.97


@pytest.mark.parametrize("metric, own, spread", [("pass@4", 0.94, 0.005), ("pass@4", 0.98, 0.005),
                                                 ("pass@4", 0.98, 0.04), ("accuracy", 0.995, 0.04)])
def test_where_nearly_all_prompts_are_solved_no_bootstrap_does_but_score_limits(metric, own, spread):
    assert coverage_of_prompts(spread, 500, METRICS[metric], own, of=bootstrap) < 0.9
    assert coverage_of_prompts(spread, 500, METRICS[metric], own) >= 0.95


def coverage_of_differences(own, concentration, samples, simulations):
    """Of the paired difference of two arms on the same prompts, one 2 points better where a prompt is neither easy nor
    hard."""
    rng = np.random.default_rng(samples)

    def arms(n):
        chance = rng.beta(own * concentration, (1 - own) * concentration, n)
        return chance, np.clip(chance + 0.08 * chance * (1 - chance), 0, 1)

    one, two = arms(1_000_000)
    truth = (two - one).mean()
    inside = 0
    for _ in range(simulations):
        one, two = arms(PROMPTS)
        _, low, high = interval_of_differences((rng.binomial(samples, two) - rng.binomial(samples, one)) / samples)
        inside += low <= truth <= high
    return inside / simulations


SAMPLED = pytest.mark.parametrize("own, concentration, samples", [(0.5, 20, 8), (0.5, 0.5, 8), (0.8, 20, 8),
                                                                  (0.94, 20, 8), (0.5, 20, 1), (0.8, 0.5, 1),
                                                                  (0.94, 20, 1)])


@SAMPLED
def test_the_interval_of_a_paired_difference_over_prompts_does(own, concentration, samples):
    assert 0.92 <= coverage_of_differences(own, concentration, samples, 500) <= 0.98


@pytest.mark.slow
@SAMPLED
def test_the_interval_of_a_paired_difference_in_two_thousand_simulations(own, concentration, samples):
    assert 0.93 <= coverage_of_differences(own, concentration, samples, 2000) <= 0.97


@pytest.mark.parametrize("samples", [1, 8])
def test_the_interval_of_arms_that_differ_on_few_prompts_is_rather_too_wide(samples):
    assert coverage_of_differences(0.99, 0.5, samples, 500) >= 0.95


def false_tables(tables, seeds, spread, methods=6, splits=5):
    """The share of tables without any effect in which Holm's correction leaves a star: every method against one that
    all share, as in a comparison."""
    rng = np.random.default_rng(seeds)
    wrong = 0
    for _ in range(tables):
        values = 0.8 + spread * rng.standard_normal((methods + 1, splits, seeds)) + 0.01 * rng.standard_normal(
            (1, splits, 1))
        ps = [paired_t(of_cell).p for of_cell in (values[1:] - values[0]).reshape(-1, seeds)]
        wrong += min(holm(ps)) < 0.05
    return wrong / tables


def test_a_table_without_effects_has_a_star_in_at_most_six_of_a_hundred():
    assert false_tables(600, 5, 0.02) <= 0.06


@pytest.mark.slow
@CASES
@SEEDS
def test_five_thousand_tables_without_effects(seeds, spread):
    assert false_tables(5000, seeds, spread) <= 0.06


def test_uncorrected_the_same_tables_would_have_stars_in_most():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        ps = [paired_t(rng.standard_normal(5)).p for _ in range(30)]
        wrong += min(ps) < 0.05
    assert wrong > 60


def test_holm_by_hand():
    # In order .01 x 4, .02 x 3, .03 x 2, .9: and never less than the one before.
    assert holm([0.02, 0.9, 0.01, 0.03]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8]) and holm([]) == []
    with pytest.raises(ValueError, match="nan must lie in"):
        holm([0.01, math.nan])


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_smallest_detectable_difference_is_found_four_times_of_five(seeds):
    difference = minimum_detectable(0.02, seeds)
    seen = difference + 0.02 * np.random.default_rng(seeds).standard_normal((4000, seeds))
    found = np.mean([paired_t(of_seeds).p < 0.05 for of_seeds in seen])
    assert found == pytest.approx(0.8, abs=0.02)
    assert minimum_detectable(0.04, seeds) == pytest.approx(2 * difference) and math.isinf(minimum_detectable(1.0, 1))


# ---------------------------------------------------------------- over prompts

def test_the_bootstrap_of_four_by_hand():
    # Four draws of 0, 0.5, 1, 0.5 add up to half of a binomial(8, 0.5), 1 of which is its 2.5 % quantile (0: 0.4 %,
    # up to 1: 3.5 %): means from 1/8 to 7/8, stretched by sqrt(4 / 3) around 0.5.
    half = math.sqrt(4 / 3) * 3 / 8
    assert bootstrap([0.0, 0.5, 1.0, 0.5]) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-6)


def test_score_limits_by_hand():
    # None of 200: 3.8416 / 203.8416 = 0.018846. One half lost of 200: Wilson's limits of 0.0025.
    assert score_interval([0.0] * 200) == pytest.approx((0, -0.018846, 0.018846), abs=1e-6)
    least, most = wilson(0.0025, 200)
    assert score_interval([0.0] * 199 + [-0.5]) == pytest.approx(
        (-0.0025, -most, -0.0025 + math.hypot(0.018846, 0.0025 - least)), abs=1e-6)
    # Gain 1 in 10, loss 9 in 10, correlation -1: distances add up.
    (least_gain, most_gain), (least_loss, most_loss) = wilson(0.1, 10), wilson(0.9, 10)
    assert score_interval([-1.0] * 9 + [1.0]) == pytest.approx(
        (-0.8, -0.8 - (0.1 - least_gain) - (most_loss - 0.9), -0.8 + (most_gain - 0.1) + (0.9 - least_loss)))
    with pytest.raises(ValueError, match=r"^values: -1.5 must lie in \[-1, 1\]$"):
        score_interval([0.0, -1.5, 1.0])


def test_ten_prompts_unlike_the_others_are_enough_for_the_bootstrap():
    values = np.array([1.0] * 190 + [0.5] * 10)
    assert interval(values) == bootstrap(values)
    mean = (189 + 4.5) / 198
    assert interval(values[1:-1]) == pytest.approx((mean, *wilson(mean, 198)))
    lost = values - 1
    assert interval_of_differences(lost) == bootstrap(lost)
    assert interval_of_differences(lost[1:-1]) == score_interval(lost[1:-1]) != bootstrap(lost[1:-1])
    signs = [1.0, 0.0, -1.0, 0.0] * 50
    assert interval_of_differences(signs) == score_interval(signs) != bootstrap(signs)


def test_the_bootstrap_of_one_value_and_of_equal_ones():
    endless = (0.5, -math.inf, math.inf)
    assert bootstrap([0.5]) == interval([0.5]) == interval_of_differences([0.5]) == endless
    assert bootstrap([0.5] * 9) == pytest.approx((0.5, 0.5, 0.5))


def test_the_bootstrap_is_the_same_every_time(monkeypatch):
    values = np.linspace(0, 1, 50)
    first = bootstrap(values)
    inference._resamples.cache_clear()
    assert bootstrap(values) == first


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    right = np.random.default_rng(0).integers(0, 2, (20, 6))
    for prompt, value in zip(right, pass_at_k(right, k)):
        assert value == pytest.approx(np.mean([max(subset) for subset in combinations(prompt, k)]))


def test_pass_at_k_is_unbiased_where_the_best_of_the_first_k_is_but_noisier():
    rng = np.random.default_rng(0)
    right = rng.binomial(1, 0.3, (100_000, 8))
    assert pass_at_k(right, 4).mean() == pytest.approx(1 - 0.7 ** 4, abs=0.004)
    assert pass_at_k(right, 4).var() < right[:, :4].max(1).var() / 2
    with pytest.raises(ValueError, match="pass@9: k must lie between 1 and the 8 completions"):
        pass_at_k(right, 9)


def test_cover_counts_prompts_that_are_solved_so_often():
    right = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert [cover_at(right, tau).mean() for tau in (0.25, 0.5, 0.75, 1.0)] == [0.75, 0.5, 0.5, 0.25]
    # A prompt's chance spread evenly over [0, 1] makes every count of 8 alike likely: (9 - 8 tau) / 9, not 1 - tau.
    rng = np.random.default_rng(0)
    even = rng.binomial(1, rng.random((100_000, 1)), (100_000, 8))
    assert [cover_at(even, tau).mean() for tau in (0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [7 / 9, 5 / 9, 3 / 9, 1 / 9], abs=0.006)
    thirds = [[1, 1, 0]]
    assert cover_at(thirds, 2 / 3).tolist() == [1.0]            # whatever rounding makes of two thirds


# ---------------------------------------------------------------- skewed answers

def test_a_constant_guess_and_a_macro_average_by_hand():
    gold = ["one", "one", "two", "red cross", "blue cross"]
    kinds = ["count", "count", "count", "at", "at"]
    assert constant_guess(gold, kinds) == {"at": ("blue cross", 0.5), "count": ("one", 2 / 3)}
    assert best_constant(gold) == ("one", 0.4)
    assert macro_average([1, 1, 0, 0, 1], kinds) == pytest.approx((2 / 3 + 1 / 2) / 2)
