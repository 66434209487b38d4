"""The gradient noise scale: how many examples a batch needs before its gradient is half signal.

A gradient averaged over B examples is the true gradient G plus noise of covariance Sigma / B. The batch in which the
two are equally strong is the (simple) noise scale of McCandlish et al. 2018 (arXiv 1812.06162, eq. 2.9):

    B_simple = tr(Sigma) / |G|^2                 E |g|^2 = |G|^2 + tr(Sigma) / B

The difficulty is |G|^2: the square of every average of gradients holds some of the noise. So each method here is a way
to see how much of the power A = |g|^2 is signal, S = |G|^2; then B_simple = B (A - S) / S.

    report         the lags of successive gradients (`columns`), of any observed optimizer, at any learning rate
    from_groups    n gradients of b examples, from micro-batches, replicas or single examples (McCandlish, appendix A.1)
    from_moments   Adam's m and v, less the share rho of the noise that passes m (Balles & Hennig 2018 for b1 = b2)
    l1_from_moments    the same in Adam's own geometry, ||sigma||_1^2 / ||G||_1^2 (Naganuma et al. 2026)
    from_scalars   any other estimate of S, with its error

With n groups rho is 1/n, so the three in the middle are one formula. S may come out as nothing but chance, or negative.
Then there is no number to report, but a bound: B_simple is above `low`. And before a ratio is formed, A and S are
averaged over steps, each by itself: the mean of ratios is not the ratio of means.

What is averaged in m is taken to stay. At ordinary learning rates it does not: G turns round every few steps, momentum
keeps little of it, and the noise in m has itself moved the parameters. So the two methods from moments are for timid
learning rates and for averages at fixed parameters; the others hold at any. All of it measures gradients: clipping and
L2 decay before the measurement distort it, so measure before them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._numerics import abs_sq, widen
from snr_adam.telemetry.groups import Groups as Groups
from snr_adam.telemetry.groups import microbatches as microbatches
from snr_adam.telemetry.groups import replicas as replicas
from snr_adam.telemetry.groups import squared_norm, total

D_EFF = 10.0
"""In how many directions noise is spread, tr(Sigma)^2 / tr(Sigma^2), unless one knows better. Only standard errors use
it. It is far below the number of parameters: 13 for a network new to ten digits (`tests/test_examples.py`), of which
the diagonal of Sigma, all that v knows, would say 155 and promise an error 3.5 times too small."""


class NoiseScale(NamedTuple):
    """B_simple = tr(Sigma) / |G|^2 in examples. `str()` is "71 (54 to 103)", or ">= 400" where no signal was found.

    value: never negative; inf where no signal was found.
    error: the standard error of `value`, inf where that is; nan if unknown. Relative to it that of the SNR.
    low, high: the ends of its 95 % interval; `high` is inf where `value` is, which then is above `low`.
    method: how it was measured, in a word.
    """

    value: Any
    error: Any
    low: Any
    high: Any
    method: str

    def __str__(self) -> str:
        each = [_text(*numbers) for numbers in np.broadcast(self.value, self.low, self.high)]
        return each[0] if np.ndim(self.value) == 0 else f"[{', '.join(each)}]"


def _text(value, low, high) -> str:
    if np.isinf(value):
        return ">= ?" if np.isnan(low) else f">= {_number(low)}"
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _number(x) -> str:
    return "?" if np.isnan(x) else f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _divide(power, signal, least, most, error, size, method) -> NoiseScale:
    """B (A - S) / S where S, which is between `least` and `most`, is above 0."""
    power, signal, least, most, error, size = (np.asarray(x, float) for x in (power, signal, least, most, error, size))

    def scale(signal):
        return size * np.maximum(power / signal - 1, 0)

    with np.errstate(all="ignore"):
        found = (signal > 0) & ~(least <= 0)
        value = np.where(found, scale(signal), np.inf)
        spread = np.where(found, size * (power / signal) * (error / signal), np.inf)
        ends = scale(np.maximum(most, 0)), np.where(found, scale(least), np.inf)
    missing = np.isnan(power) | np.isnan(signal)
    value, spread, low, high = (np.where(missing, np.nan, x)[()] for x in (value, spread, *ends))
    return NoiseScale(value, spread, low, high, method)


def from_scalars(gradient_sq, signal_sq, signal_sq_error, *, batch_size=1.0, method="scalars") -> NoiseScale:
    """The noise scale from the power of the gradients and the part of it that is signal.

    B_simple = B (A - S) / S,   A = E |g|^2,   S = |G|^2

    Args:
      gradient_sq: A, the average over steps of the squared norm of the mini-batch gradient. A number or an array.
      signal_sq: S, an unbiased estimate of the squared norm of the true gradient; it may be negative. Likewise.
      signal_sq_error: the standard error of S. That of A is neglected: near no signal it is much smaller.
      batch_size: B, the number of examples in a mini-batch. With 1 the result is in mini-batches.
      method: what to call it.

    Returns:
      A `NoiseScale` of the arguments' shape, on the host. Where S is within 2 standard errors of 0, or negative, the
      value is inf; where it is more than A, 0.

    Raises:
      ValueError: if `batch_size` is not above 0.

    >>> print(from_scalars(4.0, 1.0, 0.1, batch_size=32))
    96 (75 to 128)
    >>> print(from_scalars(4.0, -0.05, 0.1, batch_size=32))
    >= 608
    """
    if not np.all(np.asarray(batch_size) > 0):
        raise ValueError(f"batch_size={batch_size}: the number of examples in a gradient is above 0")
    signal, error = np.asarray(signal_sq, float), np.asarray(signal_sq_error, float)
    ends = signal - 2 * error, np.maximum(signal, 0) + 2 * error
    return _divide(gradient_sq, signal, *ends, error, batch_size, method)


def _less_floor(power, smoothed, rho):
    """S from the power of one gradient and of an average that noise passes with a share rho of its variance."""
    return (smoothed - rho * power) / (1 - rho)


def _model_error(power, persistent, rho, d_eff):
    """The standard error of that S, for Gaussian noise of equal size in d_eff directions.

    S is quadratic in an average gradient of noise power rho T, so its variance is 2 rho T (rho T + 2 S) / d_eff.
    """
    noise = rho * np.maximum(power - persistent, 0)
    return np.sqrt(2 * noise * (noise + 2 * np.maximum(persistent, 0)) / d_eff) / (1 - rho)


def from_groups(groups_sq, mean_sq, n, batch_size, *, error=None, d_eff=D_EFF, method="groups") -> NoiseScale:
    """The noise scale from n gradients of b examples each: micro-batches, replicas or, with b = 1, single examples.

    |G|^2 = (n A - Q) / (n - 1),   tr(Sigma) = b n / (n - 1) (Q - A),   both unbiased

    Args:
      groups_sq: Q, the mean over groups of the squared norm of their gradients. A number, or one per step.
      mean_sq: A, the squared norm of the mean of the groups' gradients. Likewise.
      n: the number of groups, at least 2.
      batch_size: b, the number of examples in one group.
      error: the standard error of |G|^2, if Q and A are averages over steps (say, moving ones). By default it is
        measured where Q and A hold several steps, and else that of one step of Gaussian noise.
      d_eff: the number of directions in which that Gaussian noise is spread.
      method: what to call it.

    Returns:
      A `NoiseScale`, on the host.

    Raises:
      ValueError: if there are fewer than two groups.

    >>> print(from_groups(5.0, 3.0, n=8, batch_size=4))
    3.4 (0.97 to 10)

    Reference: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.
    """
    q, a, n, b = (np.asarray(x, float) for x in (groups_sq, mean_sq, n, batch_size))
    if not np.all(n >= 2):
        raise ValueError(f"n={n}: one gradient does not show its own noise, use at least 2 groups")
    persistent = _less_floor(q, a, 1 / n)
    power, mean = np.mean(q), np.mean(persistent)
    if error is None and persistent.size > 1:
        error = np.std(persistent, ddof=1) / math.sqrt(persistent.size)
    elif error is None:
        error = _model_error(power, mean, 1 / np.mean(n), d_eff)
    return from_scalars(power, mean, error, batch_size=np.mean(b), method=method)


def from_moments(m, v, rho, batch_size, *, d_eff=D_EFF) -> NoiseScale:
    """The noise scale from the averages of a gradient and of its square: Adam's, or those over groups.

    B_simple = B sum(v - m^2) / sum(m^2 - rho v)

    A share rho of the noise passes m. For a moving average it is `EMA(b1).floor(t)`, 1/19 for b1 = .9; for a mean over
    n groups it is 1/n. v must be of the same time as m: with b2 = .999 it lags by 1,000 steps, and while gradients
    shrink the result is too large. Adam with b1 = b2 does not have that error, nor has `report`.

    Args:
      m: the average gradient, bias-corrected. A tree of arrays. For Adam `optax.tree.bias_correction(mu, b1, count)`.
      v: the average squared gradient, bias-corrected. A tree of the same structure and shapes, or its sum.
      rho: Var[m] / Var[g], at least 0 and less than 1. 0 if m and v are means over all the data there is.
      batch_size: B, the number of examples behind one gradient.
      d_eff: the number of directions in which the noise is spread; without signal `low` is B (1-rho)/rho sqrt(d_eff/8).

    Returns:
      A `NoiseScale`, on the host.

    Raises:
      ValueError: if rho is not in [0, 1).

    >>> print(from_moments(jnp.array([1.0, -1.0]), jnp.array([4.0, 4.0]), rho=1 / 19, batch_size=32))
    122 (62 to 379)

    Reference: Balles & Hennig 2018, arXiv 1705.07774, for b1 = b2. It holds for all, as E v^ does not depend on b2.
    """
    rho = _checked(rho)
    smoothed, power = (float(x) for x in _sums(m, v))
    persistent = _less_floor(power, smoothed, rho)
    error = _model_error(power, persistent, rho, d_eff)
    return from_scalars(power, persistent, error, batch_size=batch_size, method="moments")


def l1_from_moments(m, v, rho, batch_size, *, d_eff=D_EFF) -> NoiseScale:
    """The noise scale in the geometry of the sign, which Adam's steps follow: sums of sizes in place of squares.

    B_l1 = B ||sigma||_1^2 / ||G||_1^2,   sigma^2 = (v - m^2) / (1 - rho)
    |G| = |m| - s e^{-z^2/2} (0.93 - 0.73 z^2),   s^2 = rho sigma^2,   z = m / s

    |m| is too large on average, by 0.8 s where there is no signal; raw |g| in its place makes the estimate saturate at
    1.57 B. The subtracted term leaves 0.4 s at G = 0, at most 0.1 s from G = s/2 on and nothing at large G, and `low`
    knows of the rest. At b1 = .9 a true 10 B reads as 8.5 to 11 B whether G / sigma is the same everywhere or spread
    like a normal, Laplace or t3 distribution over the parameters, and as 7 B if half of them have no signal.

    Args:
      m: the average gradient, bias-corrected. A tree of arrays. The smaller its rho, the farther one sees.
      v: the average squared gradient, bias-corrected. A tree of the same structure and shapes.
      rho: Var[m] / Var[g], as for `from_moments`.
      batch_size: B, the number of examples behind one gradient.
      d_eff: the number of directions in which the noise is spread.

    Returns:
      A `NoiseScale`, on the host.

    Raises:
      ValueError: if rho is not in [0, 1).

    >>> print(l1_from_moments(jnp.array([1.0, -1.0]), jnp.array([2.0, 2.0]), rho=0.05, batch_size=32))
    34 (18 to 80)

    Reference: Naganuma et al. 2026, arXiv 2602.03001, for B_l1; the debiased signal is ours.
    """
    rho = _checked(rho)
    sigma, signal = (max(float(x), 0.0) for x in _absolute_sums(m, v, rho))
    passed = math.sqrt(rho) * sigma
    error = passed / math.sqrt(d_eff)
    least = max(signal - 2 * math.hypot(0.4 * passed, error), 0.0) ** 2
    ends = least, (signal + 2 * error) ** 2
    return _divide(sigma**2 + signal**2, signal**2, *ends, 2 * signal * error, batch_size, "l1 moments")


def _checked(rho) -> float:
    if not 0 <= rho < 1:
        raise ValueError(
            f"rho={rho}: the share of the noise that passes the average m must be at least 0 and less than 1; "
            "after one step it is 1, as one gradient does not show its own noise"
        )
    return float(rho)


@jax.jit
def _sums(m, v):
    return squared_norm(m), total(jnp.sum(widen(x).real) for x in jax.tree.leaves(v))


@jax.jit
def _absolute_sums(m, v, rho):
    """||sigma||_1 and the debiased ||G||_1."""

    def sums(m, v):
        square, v = abs_sq(widen(m)), widen(v).real
        variance = jnp.maximum(v - square, 0) / (1 - rho)
        passed = rho * variance
        z2 = square / jnp.where(passed > 0, passed, 1)
        bias = jnp.where(passed > 0, jnp.sqrt(passed) * jnp.exp(-z2 / 2) * (0.93 - 0.73 * z2), 0)
        return jnp.sum(jnp.sqrt(variance)), jnp.sum(jnp.sqrt(square) - bias)

    pairs = zip(jax.tree.leaves(m), jax.tree.leaves(v), strict=True)
    sigma, signal = zip(*(sums(*pair) for pair in pairs), strict=True)
    return total(sigma), total(signal)
