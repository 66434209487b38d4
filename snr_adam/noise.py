"""Denominators: how the spread of the gradient is estimated.

    RMS         sqrt(v_t / (1 - b2^t) + eps_root) + eps                    Adam (Kingma & Ba 2014)
                with v_t = b2 v_{t-1} + (1-b2) g_t^2
    Maximum     the same with the largest v so far                         AMSGrad (Reddi et al. 2018)
    Infinity    max(b2 n_{t-1}, |g_t| + eps)                               AdaMax (Kingma & Ba 2014, section 7)
    Yogi        v - (1-b2) sign(v - g^2) g^2                               Yogi (Zaheer et al. 2018)
    Rectified   RMS / r_t once its own variance is finite, 1 before        RAdam (Liu et al. 2020)
    Unit        1                                                          Lion, plain descent

They estimate the *raw* second moment, mean^2 + variance, hence "pseudo" signal-to-noise ratio. Those that measure
around a mean are in `deviation.py`, those that divide before the signal averages in `quotient.py`; `shared.py` averages
v over axes.

A denominator is a frozen dataclass that knows one array, never a tree:

    init(p) -> state                                real, like |p|; an array, a NamedTuple of arrays, or ()
    at(t, dtype) -> numbers                         what step t = 1, 2, ... needs, computed once for all arrays
    update(state, g, numbers, center) -> state      the memory after g
    estimate(state, g, numbers, center) -> noise    from the memory after g, as it will rest (`storage.py`)

`center` is the moving average that the signal holds after g, by its own `center(state, numbers)` if it has one (0 if it
holds none). With `divides_first = True` the
estimate is made from the memory before g (with `divides_by_new = True` from that after g), and the signal averages
g / noise; otherwise its average is divided.

Where the noise is the root of an average of |g|^2, telemetry asks for that average, before its bias is corrected, by
`second(state, center) -> v`, and for how it follows |g|^2, by `average(numbers) -> Average`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
    eps_at,
    follow,
    kept_at,
    length,
    lerp,
    root,
    square_like,
    square_onto,
    value_at,
)
from snr_adam._tree import exportable


@runtime_checkable
class Noise(Protocol):
    """What a denominator has; see the module."""

    def init(self, p, /) -> Any: ...

    def at(self, t, dtype, /) -> Any: ...

    def update(self, state, g, numbers, center, /) -> Any: ...

    def estimate(self, state, g, numbers, center, /) -> Any: ...


def center(mu):
    """The moving average that a spread is measured around: the signal's first, 0 if it keeps none."""
    return next(iter(jax.tree.leaves(mu)), 0.0)


def squared(noise: Any, state, k, center, estimate):
    """The second moment that a noise is the root of, corrected, without eps; of other noises the estimate's square."""
    if not (hasattr(noise, "second") and hasattr(noise, "average")):
        return estimate * estimate
    return noise.average(k).debias * noise.second(state, center)


class _Numbers(NamedTuple):
    """What most denominators need at a step: the decay of v, and the two epsilons."""

    v: Decay
    eps: Scalar
    eps_root: Scalar


def numbers_at(b2, eps, eps_root, t, dtype, corrected: bool = True, initial: Scalar = 0.0) -> _Numbers:
    kept = kept_at(b2, t, dtype, corrected, initial)
    return _Numbers(kept, eps_at(eps, t, dtype), value_at(eps_root, t, dtype))


def _root(v, k: _Numbers, debias: bool = True):
    """sqrt(v / (1 - b2^t) + eps_root) + eps."""
    v = k.v.debias * v if debias else v
    return root(v if isinstance(k.eps_root, float) and k.eps_root == 0 else v + k.eps_root, k.eps)


class Squares:
    """What denominators share that keep squares."""

    __post_init__ = check_fields

    def init(self, p) -> Any:
        return square_like(p, getattr(self, "initial", 0.0))

    def at(self: Any, t, dtype) -> Any:
        corrected, initial = getattr(self, "debias", True), getattr(self, "initial", 0.0)
        return numbers_at(self.b2, self.eps, self.eps_root, t, dtype, corrected, initial)


class Averaged:
    """And those whose noise is the root of an average of |g|^2."""

    def average(self, k):
        return Average(k.v.gain, k.v.gain, k.v.debias if getattr(self, "debias", True) else 1.0)

    def second(self, state, center):
        return state


def noise_of(v, k: _Numbers):
    """The noise of an average of squares, corrected."""
    return _root(v, k)


@dataclass(frozen=True)
class RMS(Squares, Averaged):
    """Root of the moving average of squared gradients: the raw second moment, a pseudo noise."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    eps_root: Hyper = 0.0
    debias: bool = True
    initial: Scalar = 0.0

    def update(self, v, g, k, center):
        return follow(v, square_onto(v, g), k.v)

    def estimate(self, v, g, k, center):
        return _root(v, k, self.debias)


@exportable
class AverageAndMaximum(NamedTuple):
    """The moving average of a `Maximum` and the largest value its correction has had."""

    v: Any
    v_max: Any


@dataclass(frozen=True)
class Maximum(Squares, Averaged):
    """RMS that never falls: the root of the largest bias-corrected v so far."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    eps_root: Hyper = 0.0
    debias: bool = True

    def init(self, p):
        return AverageAndMaximum(square_like(p), square_like(p))

    def update(self, state, g, k, center):
        v = lerp(state.v, abs_sq(g), k.v.gain)
        v_max = jnp.maximum(state.v_max, v * k.v.debias if self.debias else v)
        return AverageAndMaximum(v, v_max)

    def estimate(self, state, g, k, center):
        return _root(state.v_max, k, debias=False)

    def second(self, state, center):
        return state.v


@dataclass(frozen=True)
class Infinity:
    """The exponentially forgotten maximum of |g|, the limit of a p-norm for large p. It needs no bias correction."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        return 1.0 - decay_at(self.b2, t, dtype).gain, eps_at(self.eps, t, dtype)

    def update(self, n, g, k, center):
        b2, eps = k
        return jnp.maximum(b2 * n, abs(g) + eps)

    def estimate(self, n, g, k, center):
        return n if not isinstance(k[1], float) or k[1] else jnp.maximum(n, float(jnp.finfo(n.dtype).tiny))


@dataclass(frozen=True)
class Yogi(Squares):
    """v moves towards g^2 by a step of size (1-b2) g^2 whatever the distance, so that it cannot fall quickly.

    Where b2 may change, v / (1 - b2^t) is kept, and multiplied by 1 - b2^{t-1} with the b2 of its own step.
    """

    b2: Hyper = 0.999
    eps: Hyper = 1e-3
    eps_root: Hyper = 0.0
    initial: Scalar = 1e-6

    def at(self, t, dtype):
        k, v = super().at(t, dtype), decay_at(self.b2, t, dtype)
        if k.v.sum is None:
            return _Steps(k, v.gain, None, None)
        before = jnp.where(t == 1, 1.0, -jnp.expm1((t - 1).astype(dtype) * v.log)).astype(dtype)
        return _Steps(k, v.gain, before, v.debias)

    def update(self, v, g, k: "_Steps", center):
        square = square_onto(v, g)
        old = v if k.before is None else k.before * v
        new = old - k.gain * (jnp.sign(old - square) * square)
        return new if k.after is None else k.after * new

    def estimate(self, v, g, k: "_Steps", center):
        return _root(v, k.root)


class _Steps(NamedTuple):
    """The size of a step of `Yogi`; before and after it, what takes a correction away and makes it again."""

    root: _Numbers
    gain: Scalar
    before: Scalar | None
    after: Scalar | None


class _Rectifier(NamedTuple):
    """1 / r and 0, or 0 and 1 while there is no r."""

    root: _Numbers
    scale: Scalar
    constant: Scalar


@dataclass(frozen=True)
class Rectified:
    """RMS divided by r_t, the rectification of its own variance; 1 while that is infinite (rho_t < threshold)."""

    b2: Hyper = 0.999
    eps: Hyper = 1e-8
    eps_root: Hyper = 0.0
    threshold: Hyper = 5.0
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        k, n = numbers_at(self.b2, self.eps, self.eps_root, t, dtype), t.astype(dtype)
        v = decay_at(self.b2, t, dtype)
        last = 2.0 / v.gain - 1.0
        rho = length(v, n)
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

    def second(self, state, center):
        return state


@dataclass(frozen=True)
class Unit:
    """No division: the step is the signal itself."""

    def init(self, p):
        return ()

    def at(self, t, dtype):
        return ()

    def update(self, state, g, k, center):
        return state

    def estimate(self, state, g, k, center):
        return 1.0
