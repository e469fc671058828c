"""Split conformal p-values: a verdict whose false-alarm rate is known without knowing the distribution.

Given scores s_1 … s_m of calibration images and an image exchangeable with them, the p-value
(1 + #{j: s_j ≥ s}) / (m + 1) is at most α with probability at most α. Sources: Vovk et al., "Algorithmic Learning in
a Random World" (2005); Bates et al., "Testing for outliers with conformal p-values" (arXiv 2104.08279);
Benjamini and Hochberg (1995). Plain numpy: the API computes verdicts without torch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
INTERVAL = 0.99
"""Probability that the stated interval of the false-positive rate covers."""


ROUNDING = 1 + 1e-12
"""Levels are products of decimal fractions: one that is on the grid must not fall beside it."""


class AlphaTooSmall(ValueError):
    """No p-value of this calibration can be as small as the level that was asked for."""


def p_values(sorted_scores_M: Floats, scores_N: Floats) -> Floats:
    """Conformal p-values (N,) of scores given those of the calibration images, sorted, (M,).

    Larger scores are more anomalous. A score that is not a number counts as the most anomalous one.
    """
    scores_N = np.nan_to_num(np.asarray(scores_N, np.float64), nan=np.inf, posinf=np.inf, neginf=-np.inf)
    at_least_N = len(sorted_scores_M) - np.searchsorted(sorted_scores_M, scores_N, side="left")
    return np.asarray((1 + at_least_N) / (len(sorted_scores_M) + 1), np.float64)


def smallest_alpha(num_scores: int) -> float:
    """1 / (m + 1): the smallest p-value there is, and so the smallest level that can flag anything."""
    return 1 / (num_scores + 1)


def rank_of(alpha: float, num_scores: int) -> int:
    """l = ⌊α(m + 1)⌋: an image is flagged when at most l − 1 calibration images score as high.

    Raises :class:`AlphaTooSmall` when that is 0, and ``ValueError`` when α is not in (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: got {alpha}, allowed is a number above 0 and below 1")
    # 0.07 · 100 is 7.000000000000001 in floating point and 0.29 · 100 is 28.999999999999996.
    rank = min(num_scores, math.floor(alpha * (num_scores + 1) * ROUNDING))
    if rank < 1:
        raise AlphaTooSmall(
            f"alpha: got {alpha:g}, allowed is {smallest_alpha(num_scores):.6g} and more: with {num_scores} "
            f"calibration images no p-value is below 1/{num_scores + 1}; calibrate with more images for a smaller one"
        )
    return rank


def threshold(sorted_scores_M: Floats, alpha: float) -> float:
    """The calibration score that a score must exceed for its p-value to be at most α; raises as :func:`rank_of`."""
    return float(sorted_scores_M[len(sorted_scores_M) - rank_of(alpha, len(sorted_scores_M))])


def alpha_of_threshold(sorted_scores_M: Floats, limit: float) -> float:
    """The level at which a given threshold flags: the p-value of a score just above it."""
    above = len(sorted_scores_M) - int(np.searchsorted(sorted_scores_M, limit, side="right"))
    return (1 + above) / (len(sorted_scores_M) + 1)


def benjamini_hochberg(p_N: Floats, alpha: float) -> NDArray[np.bool_]:
    """Which of N p-values to flag so that on average at most a share α of the flagged are false alarms.

    Valid for conformal p-values that share their calibration images, whose dependence is positive (Bates et al.).
    """
    count = len(p_N)
    order = np.argsort(p_N)
    below = np.nonzero(p_N[order] <= ROUNDING * alpha * np.arange(1, count + 1) / count)[0]
    flagged_N = np.zeros(count, np.bool_)
    if len(below):
        flagged_N[order[: below[-1] + 1]] = True
    return flagged_N


def exceedance_interval(num_above: int, num_scores: int, probability: float = INTERVAL) -> tuple[float, float]:
    """Bounds of the share of normal images beyond a threshold that was chosen without the calibration images.

    ``num_above`` of these are beyond it, a binomial count: the exact interval of Clopper and Pearson (1934).
    """
    tail, below = (1 - probability) / 2, num_scores - num_above
    low = beta_quantile(tail, num_above, below + 1) if num_above else 0.0
    return low, beta_quantile(1 - tail, num_above + 1, below) if below else 1.0


@lru_cache(maxsize=4096)
def false_positive_interval(alpha: float, num_scores: int, probability: float = INTERVAL) -> tuple[float, float]:
    """Bounds of the false-positive rate that this calibration really has at level α.

    Over calibration sets of m images it is Beta(l, m + 1 − l)-distributed for scores without ties, with mean at most α
    (Vovk 2012, arXiv 1209.2673). Raises as :func:`rank_of`.
    """
    rank = rank_of(alpha, num_scores)
    tail = (1 - probability) / 2
    return beta_quantile(tail, rank, num_scores + 1 - rank), beta_quantile(1 - tail, rank, num_scores + 1 - rank)


@lru_cache(maxsize=4096)
def beta_quantile(probability: float, successes: int, failures: int) -> float:
    """Quantile of Beta(a, b) with whole a, b ≥ 1: where P(Binomial(a + b − 1, x) ≥ a) reaches ``probability``."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _binomial_tail(successes, successes + failures - 1, middle) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _binomial_tail(at_least: int, count: int, probability: float) -> float:
    """P(Binomial(count, probability) ≥ at_least)."""
    if probability <= 0 or probability >= 1:
        return float(probability >= 1)
    terms = _log_choose(count) + np.arange(count + 1) * math.log(probability)
    terms += (count - np.arange(count + 1)) * math.log1p(-probability)
    return float(np.exp(terms[at_least:]).sum())


def _log_choose(count: int) -> Floats:
    """log of the binomial coefficients of ``count`` over 0 … count."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    return np.asarray(log_factorial[count] - log_factorial - log_factorial[::-1])


def beta_binomial_interval(
    alpha: float, num_scores: int, num_images: int, probability: float = INTERVAL
) -> tuple[int, int]:
    """How many of n further normal images are flagged at level α, with at least this probability between the two.

    The count is beta-binomial(n, l, m + 1 − l). Raises as :func:`rank_of`.
    """
    rank = rank_of(alpha, num_scores)
    counts = np.arange(num_images + 1, dtype=np.float64)
    log_mass = _log_choose(num_images) + _log_beta(counts + rank, num_images - counts + num_scores + 1 - rank)
    mass = np.exp(log_mass - _log_beta(np.array([float(rank)]), np.array([num_scores + 1.0 - rank])))
    cumulative, tail = np.cumsum(mass), (1 - probability) / 2
    low, high = np.searchsorted(cumulative, [tail, 1 - tail])
    return int(low), min(num_images, int(high))


def _log_beta(a: Floats, b: Floats) -> Floats:
    """log B(a, b), element by element."""
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return np.array([math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y) for x, y in pairs])
