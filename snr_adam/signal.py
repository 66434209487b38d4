"""Numerators: how the mean of the gradient is estimated.

The gradient of a mini-batch is the true gradient plus noise. A numerator turns the sequence g_1 ... g_t of one array
into an estimate of its mean, the *signal*:

    Gradient   g_t                                                   no memory: RMSProp, plain descent
    EMA        m_t / (1 - b1^t),  m_t = b1 m_{t-1} + (1-b1) g_t      Adam (Kingma & Ba 2014, Algorithm 1)
    Mean       the same number, kept as it is used                   with `noise.Spread` (Orvieto & Gower 2025)
    FromFirst  m_t = b1 m_{t-1} + (1-b1) g_t from m_1 = g_1 on       BCOS (Jiang & Xiao 2025)
    Nesterov   the EMA one step ahead                                NAdam (Dozat 2016)
    Sign       the sign of an interpolation                          Lion (Chen et al. 2023, Algorithm 2)

Those that keep two arrays are in `twofold.py`. A numerator is a frozen dataclass that knows one array, never a tree:

    init(p) -> state                         zeros like p; an array, a NamedTuple of arrays, or () for no memory
    at(t, dtype) -> numbers                  what step t = 1, 2, ... needs, computed once for all arrays
    update(state, g, numbers) -> state       the memory after g
    estimate(state, g, numbers) -> x, k      the signal k x: an array, from the memory after g, and a scalar

`estimate` is given the memory as it will rest (`storage.py`), so that a step reads what it has stored and nothing
twice. It leaves the product with the scalar to the caller, whose learning rate joins it: one product per element.

Methods that a signal may have, and which telemetry uses where they are there:

    floor(t) -> rho_t                        Var[signal] / Var[g] for independent gradients: what pure noise leaves
    average(numbers) -> Average              how the first array of the memory follows the gradients, if it is linear
    center(state, numbers) -> m              that array as a noise reads it: an average that is not corrected
    sees(state, g, numbers) -> x             what signal and noise are estimated from, if not g itself; `update` has g

Where a decay may change from step to step, averages that are corrected are kept corrected (`_numerics`): then m in the
state is m^, and the weights of the gradients in it sum to 1 at every step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from snr_adam._checks import check_fields
from snr_adam._numerics import (
    Average,
    Decay,
    Hyper,
    Scalar,
    decay_at,
    follow,
    kept_at,
    lerp,
    moment_like,
    times,
    value_at,
    weights_of,
)


@runtime_checkable
class Signal(Protocol):
    """What a numerator has; see the module."""

    def init(self, p, /) -> Any: ...

    def at(self, t, dtype, /) -> Any: ...

    def update(self, state, g, numbers, /) -> Any: ...

    def estimate(self, state, g, numbers, /) -> tuple[Any, Any]: ...


def _ema_floor(hyper: Hyper, t, corrected: bool = True):
    """(1-b)(1+b^t) / ((1+b)(1-b^t)): the sum of the squared weights of a bias-corrected EMA after t steps."""
    if callable(hyper):
        return float(np.sum(np.square(weights_of(hyper, t, corrected))))
    b = value_at(hyper, t)
    return (1 - b) * (1 + b**t) / ((1 + b) * (1 - b**t)) * (1.0 if corrected else (1 - b**t) ** 2)


def uncorrected(m, k: Decay):
    """An average as it would be if it were not kept corrected."""
    return m if k.sum is None else times(m, k.sum)


@dataclass(frozen=True)
class Gradient:
    """The raw gradient: a signal without memory, so all of the noise passes."""

    def init(self, p):
        return ()

    def at(self, t, dtype):
        return ()

    def update(self, state, g, numbers):
        return state

    def estimate(self, state, g, numbers):
        return g, 1.0

    def floor(self, t):
        return 1.0


@dataclass(frozen=True)
class EMA:
    """Exponential moving average with decay b1; `debias=False` leaves out the division by 1 - b1^t."""

    b1: Hyper = 0.9
    debias: bool = True
    initial: Scalar = 0.0
    __post_init__ = check_fields

    def init(self, p):
        return moment_like(p, self.initial)

    def at(self, t, dtype):
        return kept_at(self.b1, t, dtype, self.debias, self.initial)

    def update(self, m, g, k: Decay):
        return follow(m, g, k)

    def estimate(self, m, g, k: Decay):
        return m, k.debias if self.debias else 1.0

    def average(self, k: Decay):
        return Average(k.gain, k.gain, k.debias)

    def center(self, m, k: Decay):
        return uncorrected(m, k)

    def floor(self, t):
        return _ema_floor(self.b1, t, self.debias)


class _Kept:
    """For signals whose memory is the estimate itself: an average with one number, its gain, which is also its leak."""

    def init(self, p):
        return moment_like(p)

    def update(self, m, g, gain):
        return lerp(m, g, gain)

    def estimate(self, m, g, gain):
        return m, 1.0

    def average(self, gain):
        return Average(gain, gain, 1.0)


@dataclass(frozen=True)
class Mean(_Kept):
    """The bias-corrected EMA, stored corrected: m_t = m_{t-1} + (1-b1)/(1-b1^t) (g_t - m_{t-1}).

    The same estimate as `EMA`. Its state is the mean itself, which `noise.Spread` needs.
    """

    b1: Hyper = 0.95
    __post_init__ = check_fields

    def at(self, t, dtype):
        k = decay_at(self.b1, t, dtype)
        return k.gain * k.debias

    def floor(self, t):
        return _ema_floor(self.b1, t)


@dataclass(frozen=True)
class FromFirst(_Kept):
    """The EMA that starts at the first gradient: m_1 = g_1, whose weights sum to 1 without a correction."""

    b1: Hyper = 0.9
    __post_init__ = check_fields

    def at(self, t, dtype):
        return jnp.where(t == 1, 1.0, decay_at(self.b1, t, dtype).gain).astype(dtype)

    def floor(self, t):
        if callable(self.b1):
            raise ValueError("FromFirst.floor: of a decay that is a schedule there is no closed form")
        b = value_at(self.b1, t)
        newer = (1 - b) / (1 + b) * (1 - b ** (2 * (t - 1)))
        return newer + b ** (2 * (t - 1))


class _Lookahead(NamedTuple):
    m: Decay
    new: Scalar
    scale: Scalar
    ahead: Scalar


@dataclass(frozen=True)
class Nesterov:
    """The EMA as it would be if the newest gradient came once more: b1 m_t / (1-b1^{t+1}) + (1-b1) g_t / (1-b1^t)."""

    b1: Hyper = 0.9
    debias: bool = True
    __post_init__ = check_fields

    def init(self, p):
        return moment_like(p)

    def at(self, t, dtype):
        k, kept = decay_at(self.b1, t, dtype), kept_at(self.b1, t, dtype, self.debias)
        if not self.debias:
            return _Lookahead(kept, k.gain, 1.0, k.gain)
        after = -1.0 / jnp.expm1((t.astype(dtype) + 1.0) * k.log)
        # b1 k' m + (1-b1) k g = (b1 m + (1-b1) (k/k') g) k': one product per addition, see _numerics; kept corrected, m
        # is m^ / k
        scale = after if kept.sum is None else after * kept.sum
        return _Lookahead(kept, k.gain, scale, k.gain * k.debias / scale)

    def update(self, m, g, k: _Lookahead):
        return lerp(m, g, k.m.gain)

    def estimate(self, m, g, k: _Lookahead):
        return (m - times(m, k.new)) + times(g, k.ahead), k.scale

    def average(self, k: _Lookahead):
        return Average(k.m.gain, k.m.gain, k.m.debias)

    def center(self, m, k: _Lookahead):
        return uncorrected(m, k.m)

    def floor(self, t):
        b = value_at(self.b1, jnp.int32(t))
        if callable(self.b1):
            w = weights_of(self.b1, t, self.debias)
            ahead, now = (b * (1 - b**t) / (1 - b ** (t + 1)), (1 - b) / (1 - b**t)) if self.debias else (b, 1 - b)
            return float(np.sum(np.square(ahead * w + now * (np.arange(t) == t - 1))))
        c = 1 - b
        ahead, now = (b / (1 - b ** (t + 1)), c / (1 - b**t)) if self.debias else (b, c)
        older = (ahead * c * b) ** 2 * (1 - b ** (2 * (t - 1))) / (1 - b * b)
        return (ahead * c + now) ** 2 + older


class _Interpolation(NamedTuple):
    m: Decay
    ahead: Scalar


@dataclass(frozen=True)
class Sign:
    """sign(c_t), c_t = b1 m_{t-1} + (1-b1) g_t, then m_t = b2 m_{t-1} + (1-b2) g_t. Its size is 1: needs no noise.

    c_t is read off m_t, as m_t + (b2-b1)/b2 (g_t - m_t): reading m_{t-1} would cost a copy of it. So b2 may not be 0.
    """

    b1: Hyper = 0.9
    b2: Hyper = 0.99

    def __post_init__(self):
        check_fields(self)
        if isinstance(self.b2, (int, float)) and self.b2 == 0:
            raise ValueError("Sign: b2=0: must be above 0, or m keeps nothing of the gradients before; 0.99 is usual")

    def init(self, p):
        return moment_like(p)

    def at(self, t, dtype):
        look, m = decay_at(self.b1, t, dtype).gain, kept_at(self.b2, t, dtype, corrected=False)
        return _Interpolation(m, (look - m.gain) / (1.0 - m.gain))

    def update(self, m, g, k: _Interpolation):
        return lerp(m, g, k.m.gain)

    def estimate(self, m, g, k: _Interpolation):
        return jnp.sign(lerp(m, g, k.ahead)), 1.0

    def average(self, k: _Interpolation):
        return Average(k.m.gain, k.m.gain, k.m.debias)

    def floor(self, t):
        return 1.0
