"""Denominators that measure a spread around a mean; their contract is that of `noise.py`.

Belief      v of the prediction error g_t - m_t                        AdaBelief (Zhuang et al. 2020)
Deviation   sqrt(v - m^2) around a mean of its own                     centred RMSProp (Graves 2013)
Spread      sqrt(s + m^2), s the variance around `signal.Mean`         Adam with b1 = b2 (Orvieto & Gower 2025)
Adapted     1 + rho s / m^2, which shrinks what is mostly noise        M-SVAG (Balles & Hennig 2018)

and one that has no memory but the signal's mean:

FromMean    sqrt(b2 m_{t-1}^2 + (1-b2) g_t^2)                          AdamS (Zhang et al. 2025), BCOS
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam._checks import check_fields
from snr_adam._derivatives import quotient
from snr_adam._numerics import (
    Average,
    Hyper,
    Scalar,
    abs_sq,
    decay_at,
    eps_at,
    kept_at,
    lerp,
    moment_like,
    root,
    square_like,
    square_onto,
)
from snr_adam._tree import exportable
from snr_adam.noise import Squares
from snr_adam.signal import Gradient, Mean, Sign


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

    def at(self, t, dtype):
        k = super().at(t, dtype)
        return k if k.v.sum is None else k._replace(eps_root=k.eps_root / k.v.sum)

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
        return kept_at(self.decay, t, dtype, self.debias, self.initial), eps_at(self.eps, t, dtype)

    def update(self, state, g, k, center):
        gain = k[0].gain
        s = (1.0 - gain) * (state.s + gain * abs_sq(g - state.m))
        s = s if k[0].start is None else s + k[0].start * state.s
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
        return _around_mean(self.b2, signal)

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


@dataclass(frozen=True)
class Adapted:
    """1 + rho s^ / m^^2, around `signal.Mean`: m^ over it is m^ m^^2 / (m^^2 + rho s^), close to m^ where m^ is signal.

    s^ = (v^ - m^^2) / (1 - rho) estimates the variance of one gradient, and rho s^ that of m^: rho is the floor of the
    signal, (1-b)(1+b^t) / ((1+b)(1-b^t)). Kept is v^ - m^^2 itself, as in `Spread`. After one gradient nothing is known
    of a variance: the noise is 1. It has no unit, so the step has that of the gradient, as in plain descent.
    """

    b2: Hyper = 0.9

    def __post_init__(self):
        check_fields(self)
        if isinstance(self.b2, (int, float)) and self.b2 == 0:
            raise ValueError("Adapted: b2=0: must be above 0, or there is no variance; 0.9 is usual")

    def misfit(self, signal):
        return _around_mean(self.b2, signal)

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        keep, weight, *_ = Spread(self.b2, 1e-8).at(t, dtype)
        k, n = decay_at(self.b2, t, dtype), jnp.maximum(t, 2).astype(dtype)
        # rho / (1 - rho) = (1-b)(1+b^t) / (2 b (1 - b^{t-1}))
        ratio = k.gain * (1.0 + jnp.exp(n * k.log)) / (-2.0 * (1.0 - k.gain) * jnp.expm1((n - 1.0) * k.log))
        return keep, weight, jnp.where(t == 1, 0.0, ratio).astype(dtype)

    def update(self, s, g, k, center):
        keep, weight, _ = k
        return keep * s + weight * abs_sq(g - center)

    def estimate(self, s, g, k, center):
        square = jnp.asarray(abs_sq(center), s.dtype)
        return 1.0 + quotient(k[2] * s, jnp.maximum(square, float(jnp.finfo(s.dtype).tiny)))


class _OfMean(NamedTuple):
    """What leads from m_t and g_t back to m_{t-1}, the weight of g_t^2 in v, and eps."""

    back: Scalar
    gain: Scalar
    eps: Scalar


@dataclass(frozen=True)
class FromMean:
    """sqrt(b2 m_{t-1}^2 + (1-b2) g_t^2) + eps, with the m of a signal of decay b1: there is no second moment to keep.

    b2 = None is 1 - (1-b1)^2, what E g_t^2 is given m_{t-1} if both are estimates of one mean (BCOS-c). m_{t-1} is read
    off m_t, as m_t - (1-b1)/b1 (g_t - m_t): reading it would cost a copy. So b1 may not be 0.
    """

    b1: Hyper = 0.9
    b2: Hyper | None = None
    eps: Hyper = 1e-8

    def __post_init__(self):
        if self.b2 is not None:
            check_fields(self)
        else:
            check_fields(FromMean(self.b1, 0.0, self.eps))
        if isinstance(self.b1, (int, float)) and self.b1 == 0:
            raise ValueError("FromMean: b1=0: must be above 0, or m keeps nothing to measure with; 0.9 is usual")

    def misfit(self, signal):
        if isinstance(signal, (Gradient, Mean, Sign)) or not _same(getattr(signal, "b1", self.b1), self.b1):
            return f"it reads m_(t-1) off the moving average that the signal keeps: use EMA({self.b1})"
        return None

    def init(self, p):
        return ()

    def at(self, t, dtype):
        gain = decay_at(self.b1, t, dtype).gain
        newest = gain * gain if self.b2 is None else decay_at(self.b2, t, dtype).gain
        return _OfMean(-gain / (1.0 - gain), newest, eps_at(self.eps, t, dtype))

    def update(self, state, g, k, center):
        return state

    def estimate(self, state, g, k: _OfMean, center):
        before = lerp(jnp.broadcast_to(jnp.asarray(center, g.dtype), g.shape), g, k.back)
        return root(lerp(abs_sq(before), abs_sq(g), k.gain), k.eps)


def _around_mean(b2: Hyper, signal) -> str | None:
    if isinstance(signal, Mean) and _same(signal.b1, b2):
        return None
    return f"it measures around the corrected mean, of the same decay: use Mean({b2})"


def _same(a: Hyper, b: Hyper) -> bool:
    """Whether two decays are one; of two traced ones nobody knows."""
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True
    return bool(a == b) if callable(a) or callable(b) else float(a) == float(b)
