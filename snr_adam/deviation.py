"""Denominators that measure a spread around a mean; their contract is that of `noise.py`.

Belief      v of the prediction error g_t - m_t                        AdaBelief (Zhuang et al. 2020)
Deviation   sqrt(v - m^2) around a mean of its own                     centred RMSProp (Graves 2013)
Spread      sqrt(s + m^2), s the variance around `signal.Mean`         Adam with b1 = b2 (Orvieto & Gower 2025)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam._checks import check_fields
from snr_adam._numerics import (
    Average,
    Hyper,
    Scalar,
    abs_sq,
    decay_at,
    eps_at,
    lerp,
    moment_like,
    root,
    square_like,
    square_onto,
)
from snr_adam._tree import exportable
from snr_adam.noise import Squares
from snr_adam.signal import Gradient, Mean


@dataclass(frozen=True)
class Belief(Squares):
    """Root of the moving average of (g - m_t)^2: how far the gradient is from what the signal believed.

    m_t holds part of g_t, so this reads 2 b1^2 / (1 + b1) of the true variance (0.853 at b1 = .9). As in the authors'
    code, eps_root is added to v at every step and stays in it.
    """

    b2: Hyper = 0.999
    eps: Hyper = 1e-16
    eps_root: Hyper = 1e-16

    def misfit(self, signal):
        if isinstance(signal, (Gradient, Mean)):
            return "it measures around the moving average that the signal keeps: use EMA, Nesterov or Mixture"
        return None

    def update(self, v, g, k, center):
        return lerp(v, square_onto(v, g - center), k.v.gain) + k.eps_root

    def estimate(self, v, g, k, center):
        return root(k.v.debias * v, k.eps)


@exportable
class MeanAndVariance(NamedTuple):
    """The running mean and the running variance around it of a `Deviation`."""

    m: Any
    s: Any


@dataclass(frozen=True)
class Deviation:
    """Standard deviation around a mean of its own, sqrt(v - m^2), with eps inside or outside of the root.

    v - m^2 is never formed: s_t = b s_{t-1} + b (1-b) (g_t - m_{t-1})^2 is the same number and cannot cancel.
    """

    decay: Hyper = 0.9
    eps: Hyper = 1e-8
    eps_in_sqrt: bool = True
    debias: bool = False
    initial: Scalar = 0.0
    __post_init__ = check_fields

    def init(self, p):
        return MeanAndVariance(moment_like(p), square_like(p, self.initial))

    def at(self, t, dtype):
        return decay_at(self.decay, t, dtype), eps_at(self.eps, t, dtype)

    def update(self, state, g, k, center):
        gain = k[0].gain
        s = (1.0 - gain) * (state.s + gain * abs_sq(g - state.m))
        return MeanAndVariance(lerp(state.m, g, gain), s)

    def estimate(self, state, g, k, center):
        (m, s), (k, eps) = state, k
        # bias-corrected, v - m^2 is k (s + m^2) - k^2 m^2
        variance = jnp.maximum(k.debias * (s - (k.debias - 1.0) * abs_sq(m)), 0.0) if self.debias else s
        return root(variance + eps) if self.eps_in_sqrt else root(variance, eps)


@dataclass(frozen=True)
class Spread:
    """sqrt(s_t + m_t^2) + eps with s_t the bias-corrected variance around `signal.Mean`, for b1 = b2 = b.

    s_t = (1-a) (s_{t-1} + a (g_t - m_{t-1})^2), a = (1-b)/(1-b^t), is West's weighted variance (1979). Then s + m^2 is
    v exactly, |signal| / noise is at most 1, and m^2 / s is the true signal-to-noise ratio with no subtraction.
    """

    b2: Hyper = 0.95
    eps: Hyper = 1e-8
    __post_init__ = check_fields

    def misfit(self, signal):
        if isinstance(signal, Mean) and _same(signal.b1, self.b2):
            return None
        return f"it measures around the corrected mean, of the same decay: use Mean({self.b2})"

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        k = decay_at(self.b2, t, dtype)
        # g - m_{t-1} = (g - m_t) / (1 - a); where a = 1, at t = 1, m_t is g and nothing is known of the spread
        a = jnp.minimum(k.gain * k.debias, 1.0)
        return (
            1.0 - a,
            jnp.where(a < 1.0, a / jnp.where(a < 1.0, 1.0 - a, 1.0), 0.0),
            eps_at(self.eps, t, dtype),
            a,
        )

    def update(self, s, g, k, center):
        keep, weight, *_ = k
        return keep * s + weight * abs_sq(g - center)

    def estimate(self, s, g, k, center):
        return root(s + abs_sq(center), k[2])

    def average(self, k):
        return Average(k[3], k[3], 1.0)  # no arithmetic: asked of a step in a branch, of which only constants are known

    def second(self, s, center):
        return s + abs_sq(center)


def _same(a: Hyper, b: Hyper) -> bool:
    """Whether two decays are one; of two traced ones nobody knows."""
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True
    return bool(a == b) if callable(a) or callable(b) else float(a) == float(b)
