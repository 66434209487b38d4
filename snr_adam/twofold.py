"""Numerators that keep two arrays per parameter; their contract is that of `signal.py`.

Mixture            a fast EMA + alpha times a slow one               AdEMAMix (Pagliardini et al. 2024, eq. 2)
VarianceReduced    the EMA of g_t + gamma b1/(1-b1) (g_t - g_{t-1})  MARS (Yuan et al. 2024, Algorithm 2)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from snr_adam._checks import check_fields
from snr_adam._derivatives import sqrt
from snr_adam._numerics import (
    Average,
    Decay,
    Hyper,
    Scalar,
    abs_sq,
    decay_at,
    divide,
    follow,
    kept_at,
    lerp,
    moment_like,
    times,
    value_at,
    weights_of,
)
from snr_adam._tree import exportable
from snr_adam.signal import uncorrected


@exportable
class FastAndSlow(NamedTuple):
    """The two moving averages of a `Mixture`."""

    m1: Any
    m2: Any


class _Mix(NamedTuple):
    fast: Decay
    slow: Scalar
    alpha: Scalar


@dataclass(frozen=True)
class Mixture:
    """m1 / (1 - b1^t) + alpha m2: a fast EMA and, without bias correction, a slow one of decay b3."""

    b1: Hyper = 0.9
    b3: Hyper = 0.9999
    alpha: Hyper = 5.0
    __post_init__ = check_fields

    def init(self, p):
        return FastAndSlow(moment_like(p), moment_like(p))

    def at(self, t, dtype):
        fast, slow = kept_at(self.b1, t, dtype), decay_at(self.b3, t, dtype)
        return _Mix(fast, slow.gain, value_at(self.alpha, t, dtype) / fast.debias)

    def update(self, m, g, k: _Mix):
        return FastAndSlow(lerp(m.m1, g, k.fast.gain), lerp(m.m2, g, k.slow))

    def estimate(self, m, g, k: _Mix):
        return m.m1 + times(m.m2, k.alpha), k.fast.debias

    def average(self, k: _Mix):
        return Average(k.fast.gain, k.fast.gain, k.fast.debias)

    def center(self, m, k: _Mix):
        return uncorrected(m.m1, k.fast)

    def floor(self, t):
        if any(map(callable, (self.b1, self.b3, self.alpha))):
            alpha = value_at(self.alpha, jnp.int32(t))
            return float(np.sum(np.square(weights_of(self.b1, t) + alpha * weights_of(self.b3, t, corrected=False))))
        b1, b3 = value_at(self.b1, t), value_at(self.b3, t)
        w1, w3 = (1 - b1) / (1 - b1**t), value_at(self.alpha, t) * (1 - b3)

        def overlap(x, y):
            return (1 - (x * y) ** t) / (1 - x * y)

        return w1 * w1 * overlap(b1, b1) + 2 * w1 * w3 * overlap(b1, b3) + w3 * w3 * overlap(b3, b3)


@exportable
class MeanAndGradient(NamedTuple):
    """The moving average of a `VarianceReduced` and the gradient of the step before."""

    m: Any
    g: Any


class _Correction(NamedTuple):
    m: Decay
    scale: Scalar


@dataclass(frozen=True)
class VarianceReduced:
    """The EMA of c_t / max(1, |c_t|), c_t = g_t + gamma b1/(1-b1) (g_t - g_{t-1}); the noise sees this too.

    |c| is the norm of one array. c_1 = g_1, as in the paper, where x_1 = x_0; the authors' code starts from g_0 = 0.
    As there by default, g_{t-1} is the gradient of the step before, of its own mini-batch ("MARS-approx"), not one
    computed anew.
    """

    b1: Hyper = 0.95
    gamma: Hyper = 0.025
    __post_init__ = check_fields

    def init(self, p):
        return MeanAndGradient(moment_like(p), moment_like(p))

    def at(self, t, dtype):
        gain = decay_at(self.b1, t, dtype).gain
        scale = value_at(self.gamma, t, dtype) * ((1.0 - gain) / gain)
        return _Correction(kept_at(self.b1, t, dtype), jnp.where(t == 1, 0.0, scale).astype(dtype))

    def sees(self, state, g, k: _Correction):
        c = g + times(g - state.g, k.scale)
        return divide(c, jnp.maximum(1.0, sqrt(jnp.sum(abs_sq(c)))))

    def update(self, state, g, k: _Correction):
        return MeanAndGradient(follow(state.m, self.sees(state, g, k), k.m), g)

    def estimate(self, state, g, k: _Correction):
        return state.m, k.m.debias

    def average(self, k: _Correction):
        return Average(k.m.gain, k.m.gain, k.m.debias)

    def center(self, state, k: _Correction):
        return uncorrected(state.m, k.m)
