"""Denominators: how the spread of the gradient is estimated.

    RMS         sqrt(v_t / (1 - b2^t) + eps_root) + eps                    Adam (Kingma & Ba 2014)
                with v_t = b2 v_{t-1} + (1-b2) g_t^2
    Maximum     the same with the largest v so far                         AMSGrad (Reddi et al. 2018)
    Infinity    max(b2 n_{t-1}, |g_t| + eps)                               AdaMax (Kingma & Ba 2014, section 7)
    Belief      v of the prediction error g_t - m_t                        AdaBelief (Zhuang et al. 2020)
    Yogi        v - (1-b2) sign(v - g^2) g^2                               Yogi (Zaheer et al. 2018)
    Rectified   RMS / r_t once its own variance is finite, 1 before        RAdam (Liu et al. 2020)
    Previous    sqrt(v_{t-1}), which divides before the signal averages    ADOPT (Taniguchi et al. 2024)
    Deviation   sqrt(v - m^2) around a mean of its own                     centred RMSProp (Graves 2013)
    Spread      sqrt(s + m^2), s the variance around `signal.Mean`         Adam with b1 = b2 (Orvieto & Gower 2025)
    Unit        1                                                          Lion, plain descent
    Shared      any of the first, with v averaged over axes                SlimAdam (Kalra et al. 2025)

All but Belief and Deviation estimate the *raw* second moment, mean^2 + variance, hence "pseudo" signal-to-noise ratio.

A denominator is a frozen dataclass that knows one array, never a tree:

    init(p) -> state                                real, like |p|; an array, a NamedTuple of arrays, or ()
    at(t, dtype) -> numbers                         what step t = 1, 2, ... needs, computed once for all arrays
    update(state, g, numbers, center) -> state      the memory after g
    estimate(state, g, numbers, center) -> noise    from the memory after g, as it will rest (`storage.py`)

where `center` is the moving average that the signal holds after g (0 if it holds none). With `divides_first = True`
the estimate is made from the memory before g, and g / noise is what the signal averages; otherwise the signal's average
is divided.

Two more, which telemetry uses where they are there, because then the noise is the root of an average of |g|^2:

    average(numbers) -> Average                     how that average follows |g|^2
    second(state, center) -> v                      that average, before its bias is corrected
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from snr_adam._checks import check_fields
from snr_adam._numerics import (
    Average,
    Decay,
    Hyper,
    Scalar,
    abs_sq,
    decay_at,
    lerp,
    moment_like,
    root,
    square_like,
    square_onto,
    value_at,
)
from snr_adam._tree import exportable


@runtime_checkable
class Noise(Protocol):
    """What a denominator has; see the module."""

    def init(self, p) -> Any: ...

    def at(self, t, dtype) -> Any: ...

    def update(self, state, g, numbers, center) -> Any: ...

    def estimate(self, state, g, numbers, center) -> Any: ...


def center(mu):
    """The moving average that a spread is measured around: the signal's first, 0 if it keeps none."""
    return next(iter(jax.tree.leaves(mu)), 0.0)


class _Numbers(NamedTuple):
    """What most denominators need at a step: the decay of v, and the two epsilons."""

    v: Decay
    eps: Scalar
    eps_root: Scalar


def _numbers_at(b2, eps, eps_root, t, dtype) -> _Numbers:
    return _Numbers(decay_at(b2, t, dtype), value_at(eps, t, dtype), value_at(eps_root, t, dtype))


def _root(v, k: _Numbers, debias: bool = True):
    """sqrt(v / (1 - b2^t) + eps_root) + eps."""
    v = k.v.debias * v if debias else v
    return root(v if isinstance(k.eps_root, float) and k.eps_root == 0 else v + k.eps_root, k.eps)


@dataclass(frozen=True)
class RMS:
    """Root of the moving average of squared gradients: the raw second moment, a pseudo noise."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    eps_root: Hyper = 0.0
    debias: bool = True
    initial: Scalar = 0.0
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p, self.initial)

    def at(self, t, dtype):
        return _numbers_at(self.b2, self.eps, self.eps_root, t, dtype)

    def update(self, v, g, k, center):
        return lerp(v, square_onto(v, g), k.v.gain)

    def estimate(self, v, g, k, center):
        return _root(v, k, self.debias)

    def average(self, k):
        return Average(k.v.gain, k.v.gain, k.v.debias if self.debias else 1.0)

    def second(self, v, center):
        return v


@exportable
class AverageAndMaximum(NamedTuple):
    """The moving average of a `Maximum` and the largest value its correction has had."""

    v: Any
    v_max: Any


@dataclass(frozen=True)
class Maximum:
    """RMS that never falls: the root of the largest bias-corrected v so far."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    eps_root: Hyper = 0.0
    debias: bool = True
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return AverageAndMaximum(square_like(p), square_like(p))

    def at(self, t, dtype):
        return _numbers_at(self.b2, self.eps, self.eps_root, t, dtype)

    def update(self, state, g, k, center):
        v = lerp(state.v, abs_sq(g), k.v.gain)
        v_max = jnp.maximum(state.v_max, v * k.v.debias if self.debias else v)
        return AverageAndMaximum(v, v_max)

    def estimate(self, state, g, k, center):
        return _root(state.v_max, k, debias=False)

    def average(self, k):
        return Average(k.v.gain, k.v.gain, k.v.debias if self.debias else 1.0)

    def second(self, state, center):
        return state.v


@dataclass(frozen=True)
class Infinity:
    """The exponentially forgotten maximum of |g|, the limit of a p-norm for large p. It needs no bias correction."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        return 1.0 - decay_at(self.b2, t, dtype).gain, value_at(self.eps, t, dtype)

    def update(self, n, g, k, center):
        b2, eps = k
        return jnp.maximum(b2 * n, abs(g) + eps)

    def estimate(self, n, g, k, center):
        return n


@dataclass(frozen=True)
class Belief:
    """Root of the moving average of (g - m_t)^2: how far the gradient is from what the signal believed.

    m_t holds part of g_t, so this reads 2 b1^2 / (1 + b1) of the true variance (0.853 at b1 = .9). As in the authors'
    code, eps_root is added to v at every step and stays in it.
    """

    b2: Hyper = 0.999
    eps: Hyper = 1e-16
    eps_root: Hyper = 1e-16
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        return _numbers_at(self.b2, self.eps, self.eps_root, t, dtype)

    def update(self, v, g, k, center):
        return lerp(v, square_onto(v, g - center), k.v.gain) + k.eps_root

    def estimate(self, v, g, k, center):
        return root(k.v.debias * v, k.eps)


@dataclass(frozen=True)
class Yogi:
    """v moves towards g^2 by a step of size (1-b2) g^2 whatever the distance, so that it cannot fall quickly."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-3
    eps_root: Hyper = 0.0
    initial: Scalar = 1e-6
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p, self.initial)

    def at(self, t, dtype):
        return _numbers_at(self.b2, self.eps, self.eps_root, t, dtype)

    def update(self, v, g, k, center):
        square = square_onto(v, g)
        return v - k.v.gain * (jnp.sign(v - square) * square)

    def estimate(self, v, g, k, center):
        return _root(v, k)


class _Rectifier(NamedTuple):
    """1 / r and 0, or 0 and 1 while there is no r."""

    root: _Numbers
    scale: Scalar
    constant: Scalar


def _langevin(y):
    """coth(y) - 1/y for 0 <= y <= 1/8, by its series: the closed form loses all digits there."""
    z = y * y
    return y * (1 / 3 - z * (1 / 45 - z * (2 / 945 - z * (1 / 4725 - z * (2 / 93555)))))


def _rho(k: Decay, t):
    """rho_t = 2/(1-b) - 1 - 2 t b^t / (1-b^t), the length of the simple average that an EMA of t steps amounts to.

    With x = -t log b the large terms are coth(x/2t) and t coth(x/2) - t. While x is small both are near 2t/x, which is
    1000 times their difference at b = .999: there the common part is taken out by hand.
    """
    x = -k.log * t
    young = t + _langevin(-0.5 * k.log) - t * _langevin(0.5 * jnp.minimum(x, 0.25))
    return jnp.where(x < 0.25, young, 2.0 / k.gain - 1.0 - 2.0 * t / jnp.expm1(x))


@dataclass(frozen=True)
class Rectified:
    """RMS divided by r_t, the rectification of its own variance; 1 as long as that variance is infinite (rho_t <
    threshold)."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    eps_root: Hyper = 0.0
    threshold: Hyper = 5.0
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        k, n = _numbers_at(self.b2, self.eps, self.eps_root, t, dtype), t.astype(dtype)
        last = 2.0 / k.v.gain - 1.0
        rho = _rho(k.v, n)
        on = rho >= value_at(self.threshold, t, dtype)
        rho = jnp.where(on, rho, last)  # no root of a negative number where r is not used
        inverse_r = jnp.sqrt((last - 4.0) * (last - 2.0) * rho / ((rho - 4.0) * (rho - 2.0) * last))
        return _Rectifier(k, jnp.where(on, inverse_r, 0.0), jnp.where(on, 0.0, 1.0).astype(dtype))

    def update(self, v, g, k: _Rectifier, center):
        return lerp(v, square_onto(v, g), k.root.v.gain)

    def estimate(self, v, g, k: _Rectifier, center):
        return _root(v, k.root) * k.scale + k.constant  # a choice would be compiled as two quotients, one by 1

    def average(self, k: _Rectifier):
        return Average(k.root.v.gain, k.root.v.gain, k.root.v.debias)

    def second(self, v, center):
        return v


class _Before(NamedTuple):
    gain: Scalar
    eps: Scalar
    inverse_clip: Scalar | None
    first: Any


@dataclass(frozen=True)
class Previous:
    """max(sqrt(v_{t-1}), eps): the noise as it was before this gradient, so that the two are independent.

    The quotient g / noise is clipped to +-clip(t - 1), by raising the noise to |g| / clip. The first gradient only
    fills v_1 = g_1^2: its noise is infinite and nothing moves.
    """

    b2: Hyper = 0.9999
    eps: Hyper = 1e-6
    clip: Hyper | None = None
    divides_first: ClassVar[bool] = True
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        first = t == 1
        gain = jnp.where(first, 1.0, decay_at(self.b2, t, dtype).gain).astype(dtype)
        clip = self.clip((t - 1).astype(dtype)) if callable(self.clip) else self.clip
        # not 0 at first, which makes 0 / 0 where g is 0; inverted here, because a division by a scalar is compiled as a
        # product with its inverse, but not for leaves of one element
        inverse_clip = None if clip is None else 1.0 / jnp.where(first, 1.0, clip)
        return _Before(gain, value_at(self.eps, t, dtype), inverse_clip, first)

    def update(self, v, g, k: _Before, center):
        return lerp(v, square_onto(v, g), k.gain)

    def estimate(self, v, g, k: _Before, center):
        noise = jnp.maximum(root(v), k.eps)
        if k.inverse_clip is not None:
            noise = jnp.maximum(noise, abs(g) * k.inverse_clip)
        return jnp.where(k.first, jnp.inf, noise)


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
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return MeanAndVariance(moment_like(p), square_like(p, self.initial))

    def at(self, t, dtype):
        return decay_at(self.decay, t, dtype), value_at(self.eps, t, dtype)

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
    divides_first: ClassVar[bool] = False
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        k = decay_at(self.b2, t, dtype)
        # g - m_{t-1} = (g - m_t) / (1 - a); where a = 1, at t = 1, m_t is g and nothing is known of the spread
        a = jnp.minimum(k.gain * k.debias, 1.0)
        return 1.0 - a, jnp.where(a < 1.0, a / (1.0 - a), 0.0), value_at(self.eps, t, dtype)

    def update(self, s, g, k, center):
        keep, weight, _ = k
        return keep * s + weight * abs_sq(g - center)

    def estimate(self, s, g, k, center):
        return root(s + abs_sq(center), k[2])

    def average(self, k):
        return Average(1.0 - k[0], 1.0 - k[0], 1.0)

    def second(self, s, center):
        return s + abs_sq(center)


@dataclass(frozen=True)
class Unit:
    """No division: the step is the signal itself."""

    divides_first: ClassVar[bool] = False

    def init(self, p):
        return ()

    def at(self, t, dtype):
        return ()

    def update(self, state, g, k, center):
        return state

    def estimate(self, state, g, k, center):
        return 1.0


@dataclass(frozen=True)
class Shared:
    """Another denominator whose v is the mean of g^2 over some axes of each parameter: one noise for many elements.

    Where v varies little along an axis its elements can share one number, which saves nearly all of v's memory
    (SlimAdam, Kalra et al. 2025; Adam-mini, Zhang et al. 2024). What may be shared is measured, not guessed:
    `sharing.suggest_sharing` on a running state.

    Args:
      noise: a denominator that keeps one array per parameter, such as `RMS`.
      axes: which axes of a parameter share. An int or a tuple of ints for all parameters; or a dict from patterns
        (regular expressions, searched in the path "layer/kernel", first match wins) to such axes; or a function of
        (path, shape) to such axes. Parameters without a match share nothing. Leave out an axis that stacks layers.
    """

    noise: Any
    axes: Any

    def axes_of(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of the parameter at `path` that share."""
        axes = self.axes
        if callable(axes):
            axes = axes(path, shape)
        elif isinstance(axes, Mapping):
            axes = next((found for pattern, found in axes.items() if re.search(pattern, path)), ())
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(f"Shared: axes {axes} for parameter {path!r} of shape {shape}: an axis is out of range")
        return tuple(sorted({axis % len(shape) for axis in axes}))
