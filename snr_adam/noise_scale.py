"""The gradient noise scale: how many examples a batch needs before its gradient is mostly signal.

A gradient averaged over B examples is the true gradient G plus noise of covariance Sigma / B. The batch in which the
two are equally strong is the (simple) noise scale of McCandlish et al. 2018 (arXiv 1812.06162, eq. 2.9):

    B_simple = tr(Sigma) / |G|^2                 |g|^2 = |G|^2 + tr(Sigma) / B  on average

Nobody sees |G|^2: the square of any average of gradients contains the noise that is left in it. What all estimators
here need is the *persistent* part of the power |g|^2, in which no noise is left.
"""

from typing import Any, NamedTuple

import numpy as np


class NoiseScale(NamedTuple):
    """B_simple = tr(Sigma) / |G|^2, in examples. `str()` is "71 +- 12", or ">= 400" where no signal was found.

    value: never negative; inf where the signal is within 2 standard errors of none.
    error: the standard error of `value`; inf where it is inf, nan if unknown.
    limit: the largest value that could have been told from inf; where `value` is inf, what it exceeds at 2 sigma.
    method: how it was measured, in a word.
    """

    value: Any
    error: Any
    limit: Any
    method: str

    def __str__(self) -> str:
        each = [_text(*numbers) for numbers in np.broadcast(self.value, self.error, self.limit)]
        return each[0] if np.ndim(self.value) == 0 else f"[{', '.join(each)}]"


def _text(value, error, limit) -> str:
    if np.isinf(value):
        return ">= ?" if np.isnan(limit) else f">= {_number(limit)}"
    return f"{_number(value)} +- {'?' if np.isnan(error) else _number(error)}"


def _number(x) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def from_scalars(gradient_sq, persistent, persistent_error, *, batch_size=1.0, method="scalars") -> NoiseScale:
    """The noise scale from the power of the gradients and the persistent part of it.

    B_simple = B (A - L) / L,   A = E |g_t|^2,   L = E <m^_{t-1}, g_t>

    m^_{t-1} is the average of gradients before g_t, whose noise is independent of g_t's: L estimates |G|^2 with no
    noise in it, whatever the optimizer, and A - L estimates tr(Sigma) / B.

    Args:
      gradient_sq: A, the average over steps of the squared norm of the mini-batch gradient. A number or an array.
      persistent: L, the average over steps of the inner product with the bias-corrected momentum before it.
      persistent_error: the standard error of L.
      batch_size: B, the number of examples in a mini-batch. With 1, the result is in mini-batches.
      method: what to call it.

    Returns:
      A `NoiseScale` of the arguments' shape. L <= 2 standard errors gives the value inf, and more L than A gives 0.

    >>> print(from_scalars(4.0, 1.0, 0.1, batch_size=32))
    96 +- 13
    >>> print(from_scalars(4.0, -0.05, 0.1, batch_size=32))
    >= 608
    """
    power, signal, error, size = (np.asarray(x, float) for x in (gradient_sq, persistent, persistent_error, batch_size))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (signal > 0) & ~(signal <= 2 * error)
        value = np.where(found, size * np.maximum(power / signal - 1, 0), np.inf)
        spread = np.where(found, size * power / signal**2 * error, np.inf)
        least = 2 * error + np.where(found, 0, np.maximum(signal, 0))
        limit = size * np.maximum(power / least - 1, 0)
    missing = np.isnan(power) | np.isnan(signal)
    return NoiseScale(*(np.where(missing, np.nan, x)[()] for x in (value, spread, limit)), method)
