"""What a number over prompts or over seeds is worth: intervals, tests, corrections, what could have been seen.

    over seeds      paired_t: how training varies. Each seed is one observation; all answer the same prompts.
    over prompts    interval, interval_of_differences: how another draw of prompts would vary, for the one model that
                    was trained.

The two answer different questions and neither holds the other: a table says which it prints.
"""
import math
from functools import cache, lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

DRAWS = 2000                    # resamples of a bootstrap
FEW = 10                        # prompts that differ from the rest, below which resamples say too little of them


# ---------------------------------------------------------------- Student's t

def t_cdf(t, freedom):
    """P(T <= t) of Student's t with `freedom` degrees of freedom, by the incomplete beta function
    (Abramowitz & Stegun 26.7.1)."""
    tail = 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)
    return 1 - tail if t > 0 else tail


@cache
def t_quantile(p, freedom):
    """The t below which the share `p` lies, by bisection."""
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    low = 0.0
    high = 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if t_cdf(middle, freedom) < p:
            low = middle
        else:
            high = middle
    return high


def _incomplete_beta(x, a, b):
    """The regularised I_x(a, b), by its continued fraction (Abramowitz & Stegun 26.5.8), which converges fast for x
    below its mean."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = 1.0
    for m in range(200, 0, -1):     # from behind: 1 + d1 / (1 + d2 / (1 + ..
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    return math.exp(log_front) / (a * fraction)


# ---------------------------------------------------------------- over seeds

class Paired(NamedTuple):
    """Differences of two methods, one a seed: their mean, its 95 % t-interval, the two-sided p of no difference, their
    standard deviation and number. Of one seed the interval is infinite. Without any spread there is no test, and p is
    nan."""
    mean: float
    low: float
    high: float
    p: float
    sd: float
    n: int


def paired_t(differences):
    """(n,) differences, one a seed -> Paired."""
    differences = np.asarray(differences, dtype=float)
    n = len(differences)
    mean = float(differences.mean())
    if n < 2:
        return Paired(mean, -math.inf, math.inf, math.nan, 0.0, n)
    sd = float(differences.std(ddof=1))
    error = sd / math.sqrt(n)
    half = t_quantile(0.975, n - 1) * error
    if error > 1e-12:                           # of equal differences rounding leaves less
        p = 2 * t_cdf(-abs(mean) / error, n - 1)
    else:
        p = math.nan
    return Paired(mean, mean - half, mean + half, p, sd, n)


def holm(ps):
    """p-values of one family -> adjusted ones, each to be held against the level of the whole family (Holm 1979).

    Raises ValueError for a p that is none, as that of one seed or without spread.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    for p in ps:
        if not 0 <= p <= 1:
            raise ValueError(f"ps={ps}: {p} must lie in [0, 1]")
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def power_of(difference, sd, n, level=0.05):
    """The chance that a paired t-test over n seeds, of differences with this standard deviation, finds a true
    difference: the noncentral t, integrated over the deviation that is seen."""
    freedom = n - 1
    threshold = t_quantile(1 - level / 2, freedom)
    shift = difference / (sd / math.sqrt(n))
    # seen deviation / sd has density 2 x f(freedom x^2) freedom, f the chi-square one
    seen = np.linspace(1e-6, 1 + 12 / math.sqrt(2 * freedom), 4001)
    log_density = freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2) + math.log(2)
    density = np.exp(log_density + (freedom - 1) * np.log(seen) - freedom * seen ** 2 / 2)
    normal = NormalDist()
    above = np.array([normal.cdf(shift - threshold * x) for x in seen])
    below = np.array([normal.cdf(-shift - threshold * x) for x in seen])
    # The trapezoid rule, whose name is another in numpy 1.
    found = density * (above + below)
    return float((found[1:] + found[:-1]).sum() / 2 * (seen[1] - seen[0]))


def minimum_detectable(sd, n, level=0.05, power=0.8):
    """The smallest true difference that a paired t-test over n seeds finds with this chance; infinite for one seed."""
    if n < 2:
        return math.inf
    return sd * _standard_detectable(n, level, power)


@lru_cache
def _standard_detectable(n, level, power):
    """Of differences with standard deviation 1, by bisection."""
    low = 0.0
    high = 1.0
    while power_of(high, 1.0, n, level) < power:
        high *= 2
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if power_of(middle, 1.0, n, level) < power:
            low = middle
        else:
            high = middle
    return high


# ---------------------------------------------------------------- over prompts

def interval(values):
    """(n,) shares in [0, 1], one a prompt -> (mean, low, high), 95 %, of their mean. Several completions of a prompt
    are not independent, so the prompt is the unit.

    The bootstrap, but Wilson's interval where the bootstrap misses the truth too often: for shares of 0 and 1, and
    where fewer than FEW prompts differ from the commonest value. There, as of pass@4 near 1, intervals by the bootstrap
    held the truth in as few as 2 of 100 simulations, and that of equal values is a point.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if {*values.tolist()} <= {0.0, 1.0}:
        return mean, *wilson(mean, len(values))
    if len(values) > 1 and _are_alike(values):
        return mean, *wilson(mean, len(values))
    return bootstrap(values)


def interval_of_differences(values):
    """(n,) differences of shares, one a prompt -> (mean, low, high), 95 %, of their mean: the bootstrap, but
    `score_interval` where that misses the truth too often, for differences of one completion each, which are -1, 0 and
    1, and where nearly all are equal, as in `interval`."""
    values = np.asarray(values, dtype=float)
    if len(values) > 1 and ({*values.tolist()} <= {-1.0, 0.0, 1.0} or _are_alike(values)):
        return score_interval(values)
    return bootstrap(values)


def _are_alike(values):
    """Whether too few values differ from the commonest one for resamples to tell how often such do."""
    _, counts = np.unique(values.round(9), return_counts=True)
    return len(values) - counts.max() < FEW


def wilson(share, n):
    """The share of n prompts -> (low, high) of Wilson's score interval (1927), 95 %. Of a mean of values between 0 and
    1 it is rather too wide, since none vary more than those that are 0 or 1."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)             # rounding may pass the ends


def score_interval(values):
    """(n,) differences in [-1, 1], one a prompt -> (mean, low, high), 95 %: Wilson's limits of what is gained and of
    what is lost, joined by MOVER with the correlation of the two (Zou & Donner 2008, Statistics in Medicine 27,
    p. 1693). Rather too wide where values lie between -1, 0 and 1, as Wilson's is. Raises ValueError for other
    values."""
    values = np.asarray(values, dtype=float)
    furthest = values[np.abs(values).argmax()]
    if abs(furthest) > 1 + 1e-9:
        raise ValueError(f"values: {furthest:g} must lie in [-1, 1]")
    n = len(values)
    above = np.maximum(values, 0)
    below = np.maximum(-values, 0)
    gain = float(above.mean())
    loss = float(below.mean())
    least_gain, most_gain = wilson(gain, n)
    least_loss, most_loss = wilson(loss, n)
    # No prompt gains and loses, so that the covariance of the two is 0 - gain * loss.
    spread = float(above.std() * below.std())
    correlation = -gain * loss / spread if spread else 0.0
    low = _joined(gain - least_gain, most_loss - loss, correlation)
    high = _joined(most_gain - gain, loss - least_loss, correlation)
    mean = float(values.mean())
    return mean, mean - low, mean + high


def _joined(one, other, correlation):
    """How far the difference of two quantities lies from its limit, from how far each of them does."""
    return math.sqrt(one ** 2 - 2 * correlation * one * other + other ** 2)


def bootstrap(values):
    """(n,) values, one a prompt -> (mean, low, high): the BCa bootstrap (Efron & Tibshirani 1993, chapter 14) of their
    mean, 95 %, which corrects for the skew that accuracies near 1 have. Its draws are the same for all values of one n,
    so that nothing random is in a table.

    Resampled means are stretched by sqrt(n / (n - 1)) around the mean: unstretched, they are as narrow as if the
    deviation of the values were known. For one prompt the interval is infinite. Where nearly all values are equal, as
    of pass@8 near 1, no bootstrap knows of the rare others, and its interval is too narrow: see `interval`.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = float(values.mean())
    if n < 2:
        return mean, -math.inf, math.inf
    off = values - mean
    if not np.abs(off).max() > 1e-12:
        return mean, mean, mean
    means = _resamples(n) @ values / n
    ties = np.abs(means - mean) < 1e-12
    bias = NormalDist().inv_cdf(float(((means < mean) & ~ties).mean() + 0.5 * ties.mean()))
    skew = float((off ** 3).sum() / (6 * (off ** 2).sum() ** 1.5))
    shares = []
    for z in (-1.959964, 1.959964):
        shares.append(100 * NormalDist().cdf(bias + (bias + z) / (1 - skew * (bias + z))))
    low, high = mean + math.sqrt(n / (n - 1)) * (np.percentile(means, shares) - mean)
    return mean, float(low), float(high)


@lru_cache(maxsize=8)
def _resamples(n):
    """(DRAWS, n): how often each of n prompts is in each resample."""
    rng = np.random.default_rng(n)
    return rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float32)


def pass_at_k(right, k):
    """right (n, G) of 0 and 1, completions of n prompts -> (n,): the chance that k of them hold a right one.

    Unbiased, 1 - C(G - c, k) / C(G, k) with c right ones (Chen et al. 2021, arXiv 2107.03374, eq. 1). Raises ValueError
    for k beyond the G that were sampled.
    """
    right = np.asarray(right)
    G = right.shape[1]
    if not 1 <= k <= G:
        raise ValueError(f"pass@{k}: k must lie between 1 and the {G} completions of a prompt")
    missing = [1 - math.comb(G - c, k) / math.comb(G, k) for c in range(G + 1)]
    return np.array(missing)[right.sum(1)]


def cover_at(right, tau):
    """right (n, G) -> (n,): whether at least the share tau of a prompt's completions is right.

    Cover@tau (arXiv 2510.08325) is the share of prompts that a model solves with probability tau or more. Here that
    probability is the share that was seen, whose noise moves prompts over the threshold both ways. Reaching tau counts,
    so the estimate is mostly too high: with G of 8 and probabilities spread evenly over [0, 1] it is (9 - 8 tau) / 9 in
    place of 1 - tau, .78 for .75 at tau .25 and .11 for 0 at tau 1, where it is pass^G, the mean of the G-th powers. So
    it compares methods of equal G, and is no measure of its own.
    """
    right = np.asarray(right)
    return (right.mean(1) >= tau - 1e-9).astype(float)


# ---------------------------------------------------------------- skewed answers

def constant_guess(gold, kinds):
    """Gold answers and question kinds of n prompts -> {kind: (the commonest answer, its share)}: what a constant answer
    to each kind earns."""
    by_kind = {}
    for answer, kind in zip(gold, kinds):
        counts = by_kind.setdefault(kind, {})
        counts[answer] = counts.get(answer, 0) + 1
    guesses = {}
    for kind, counts in sorted(by_kind.items()):
        answer = max(sorted(counts), key=counts.get)
        guesses[kind] = answer, counts[answer] / sum(counts.values())
    return guesses


def best_constant(gold):
    """Gold answers of n prompts -> (the commonest, its share): what one constant answer to all of them earns."""
    [found] = constant_guess(gold, ["all"] * len(gold)).values()
    return found


def macro_average(values, kinds):
    """(n,) values and question kinds of n prompts -> the mean over kinds of the means of each."""
    values = np.asarray(values, dtype=float)
    kinds = np.asarray(kinds)
    return float(np.mean([values[kinds == kind].mean() for kind in sorted({*kinds.tolist()})]))
