"""The arithmetic that every estimator shares, written so that float32 loses nothing.

An exponential moving average with decay b and its bias correction are

    m_t = m_{t-1} + (1 - b) (g_t - m_{t-1})          k_t = 1 / (1 - b^t) = -1 / expm1(t log b)

Where b may change from step to step, 1 - b^t is no longer the sum of m's weights: after a step from .9 to .99 it is too
small by a factor of 5. There the corrected average is kept in m's place,

    m^_t = m^_{t-1} + c_t (g_t - m^_{t-1})           c_t = (1 - b_t) / (1 - b_t^t),  c_1 = 1

whose weights sum to 1 whatever the c_t are, and which is k_t m_t where b stays what it is.

The textbook forms `b*m + (1-b)*g` and `1 - b**t` are the same on paper. In float32 they are not: the two rounded
constants b and 1-b no longer sum to 1: float32(1-b) / (1 - float32(b)) is off by 1.3e-5 at b = .999, 1.3e-2 at .999999.
The form above has one constant, so its fixed point is exact, and one product that feeds the addition, so a compiler may
fuse them or not fuse them in the same way everywhere: the bits do not depend on the loop around the step.

Numbers that are known when the optimizer is built are held as Python floats and reach the device rounded once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._checks import check_value, in_range
from snr_adam._derivatives import expm1, log_of, sqrt, within

Scalar = float | jax.Array
Hyper = Scalar | np.floating | Callable[[Any], Any]
"""A hyper-parameter: a number, a traced scalar, or a schedule (a function of the number of steps taken so far)."""


def compute_dtype(*arrays) -> Any:
    """The real dtype to compute in: float64 if any of `arrays` has 64-bit components, else float32."""
    return jnp.dtype("float64" if any(jnp.finfo(x.dtype).bits == 64 for x in arrays) else "float32")


def complex_like(dtype) -> Any:
    """The complex dtype with parts of this real one. Not `jnp.result_type`, which strict promotion forbids to mix."""
    return np.result_type(dtype, np.complex64)


def widen(x) -> jax.Array:
    """x in the dtype that it is computed in, complex if x is."""
    dtype = compute_dtype(x)
    return x.astype(complex_like(dtype) if jnp.iscomplexobj(x) else dtype)


def moment_like(p, initial: Scalar = 0.0) -> jax.Array:
    """A new array shaped and sharded like `p`, in the dtype p is computed in, complex if p is."""
    dtype = compute_dtype(p)
    return _full_like(p, initial, complex_like(dtype) if jnp.iscomplexobj(p) else dtype)


def square_like(p, initial: Scalar = 0.0) -> jax.Array:
    """The same for a moment of |g|^2: always real."""
    return _full_like(p, initial, compute_dtype(p))


def _full_like(p, initial: Scalar, dtype) -> jax.Array:
    """A new array also for a scalar p, of which JAX would give `initial` back: one buffer cannot be donated twice."""
    full = jnp.full_like(p, initial, dtype=dtype)
    return jnp.array(full, copy=True) if isinstance(initial, jax.Array) else full


def value_at(hyper: Hyper, t: jax.Array, dtype=None) -> Any:
    """The value of a hyper-parameter at step t = 1, 2, ...: a Python float if it is known now, else an array (of
    `dtype`)."""
    if callable(hyper):
        schedule, hyper = hyper, hyper(t - 1)
        check_value("alpha", schedule, hyper, dtype)
    if isinstance(hyper, (int, float, np.generic, np.ndarray)):
        return float(hyper)
    return jnp.asarray(hyper, dtype)


def eps_at(eps: Hyper, t: jax.Array, dtype) -> Any:
    """The value of an eps."""
    return value_at(in_range("eps", eps, dtype), t, dtype)


class Decay(NamedTuple):
    """One step of a moving average of decay b.

    gain: the weight of what is new, 1 - b, or c_t of an average that is kept corrected.
    debias: what corrects the average as it is kept: 1 / (1 - b^t), or 1.0; 0.0 where nobody knows.
    log: log b.
    sum: 1 - b^t of an average that is kept corrected, else None: times this it is what the others keep.
    start: what the first step of such an average keeps of an initial value, b / (1 - b); None if that was 0.
    """

    gain: Scalar
    debias: Scalar
    log: Scalar
    sum: Scalar | None = None
    start: Scalar | None = None


def decay_at(b: Hyper, t: jax.Array, dtype) -> Decay:
    """The numbers of a moving average at step t >= 1, accurate for b arbitrarily close to 1."""
    now = value_at(in_range("b", b, dtype), t, dtype)
    gain = 1.0 - now  # exact for arrays in [1/2, 1], so that log1p sees the same b as the gain does
    log_b = (math.log(now) if now else -math.inf) if isinstance(now, float) else log_of(now, gain)
    return Decay(gain, -1.0 / expm1(t.astype(dtype) * log_b), log_b)


def may_change(b: Hyper) -> bool:
    """Whether b is a schedule, or an array, which the next step may get another of (`optax.inject_hyperparams`)."""
    return not isinstance(b, (int, float, np.generic, np.ndarray))


def corrected_gain(k: Decay, t: jax.Array, dtype) -> jax.Array:
    """c_t, the gain of an average that is kept corrected; 1 at t = 1."""
    gain = k.gain * k.debias
    return jnp.where((t == 1) | (gain > 1.0), 1.0, gain).astype(dtype)  # no minimum: at a tie it has half a derivative


def kept_at(b: Hyper, t: jax.Array, dtype, corrected: bool = True, initial: Scalar = 0.0) -> Decay:
    """The numbers of an average as it is kept at step t: corrected where b may change and a correction is wanted."""
    k = decay_at(b, t, dtype)
    if not may_change(b):
        return k
    if not corrected:
        return k._replace(debias=0.0)
    gain = corrected_gain(k, t, dtype)
    known = isinstance(initial, (int, float)) and initial == 0
    start = None if known else jnp.where(t == 1, (1.0 - k.gain) * k.debias, 0.0).astype(dtype)
    return Decay(gain, 1.0, k.log, 1.0 / k.debias, start)


def weights_of(b: Hyper, t: int, corrected: bool = True) -> np.ndarray:
    """The weights of gradients 1 to t in such an average after step t, as NumPy computes them in float64."""
    found = np.zeros(t)
    for i in range(1, t + 1):
        now = float(value_at(b, jnp.int32(i)))
        gain = 1.0 - now
        gain = gain / (1.0 - now**i) if corrected else gain
        found[:i] *= 1.0 - gain
        found[i - 1] = gain
    return found


class Average(NamedTuple):
    """How a moment follows what it averages: x_t = x_{t-1} + gain y_t - leak x_{t-1}, and what corrects its bias.

    gain, leak: equal for an average, whose weights sum to 1 in the long run; 1 and 1 - b for a sum b x + y.
    debias: x_t times this is an average whose weights sum to 1.
    """

    gain: Scalar
    leak: Scalar
    debias: Scalar


def times(x: jax.Array, by: Scalar) -> jax.Array:
    """x by for real `by`, as a pair of reals would be; a complex product would add the other part times 0."""
    return jax.lax.complex(by * x.real, by * x.imag) if jnp.iscomplexobj(x) else by * x


def lerp(old: jax.Array, new: jax.Array, gain: Scalar) -> jax.Array:
    """old + gain (new - old)."""
    return old + times(new - old, gain)


def follow(old: jax.Array, new: jax.Array, k: Decay) -> jax.Array:
    """The average after one more number."""
    now = lerp(old, new, k.gain)
    return now if k.start is None else now + times(old, k.start)


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|^2, real also for complex x."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def mean_onto(v, x: jax.Array) -> jax.Array:
    """x in the shape of v: averaged over the axes along which v has one entry for all of x."""
    axes = tuple(axis for axis, size in enumerate(v.shape) if size == 1 and x.shape[axis] != 1)
    return jnp.mean(x, axes, keepdims=True) if axes else x


def largest(dtype) -> float:
    """The largest gradient that is told from larger ones: 2^56 = 7.2e16; float64: 2^448. 2^15 of its squares can be
    summed."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 7 // 16)


def saturate(x: jax.Array, scale: Scalar = 1.0) -> jax.Array:
    """x, its parts cut off at +-`largest` times a scale, infinities included; NaN stays NaN.

    One square that overflows makes v infinite and the step 0 or NaN for ever. Cut off before the signal and the noise
    see it, such a gradient has the ratio that a huge one should have, and v forgets it, though from 2^112 to 1 takes it
    78 / (1 - b2) steps. `guard` skips infinities instead.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(saturate(x.real, scale), saturate(x.imag, scale))
    limit = largest(x.dtype) * scale
    return within(x, np.asarray(limit, x.dtype) if isinstance(limit, float) else jnp.asarray(limit, x.dtype))


def root(v: jax.Array, eps: Scalar = 0.0) -> jax.Array:
    """sqrt(v) + eps of a second moment v, with a sqrt(v) of at least 2^-63 (float64: 2^-511).

    Squares of anything smaller are no normal numbers, and are 0 on most machines. Where v was lost in this way and the
    signal was not, x / sqrt(v) would be infinite, or NaN once both are gone. An eps that hides 2^-63 does as well.
    The result is never a bare root: x / sqrt(y) is compiled as a product, see `_compiler.unseen_zero`.
    """
    tiny, known = float(jnp.finfo(v.dtype).tiny), isinstance(eps, float)
    if known and eps * float(jnp.finfo(v.dtype).eps) > math.sqrt(tiny):
        return sqrt(v) + eps
    noise = sqrt(v + tiny)
    return jnp.maximum(noise, math.sqrt(tiny)) if known and eps == 0 else noise + eps


def square_onto(v: jax.Array, x: jax.Array) -> jax.Array:
    """|x|^2 in the shape of v."""
    square = abs_sq(x)
    mean = mean_onto(v, square)
    # the sum over the axes may overflow; their mean is at most this, for complex x and differences of two gradients too
    return mean if mean is square else jnp.minimum(mean, 8 * largest(x.dtype) ** 2)


def divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """x / by for real `by`, as a pair of reals would be."""
    return jax.lax.complex(x.real / by, x.imag / by) if jnp.iscomplexobj(x) else x / by


@jax.custom_jvp
def scaled_ratio(x, k, by):
    """k x / by in one division, k a scalar array. Its derivative is that of the quotient also where k is 0."""
    return divide(x, (1.0 / k) * by)


@scaled_ratio.defjvp
def _(given, change):
    _, changed = jax.jvp(lambda x, k, by: divide(times(x, k), by), given, change)
    return scaled_ratio(*given), changed


def _langevin(y):
    """coth(y) - 1/y for 0 <= y <= 1/8, by its series: the closed form loses all digits there."""
    z = y * y
    return y * (1 / 3 - z * (1 / 45 - z * (2 / 945 - z * (1 / 4725 - z * (2 / 93555)))))


def length(k: Decay, t):
    """rho_t = 2/(1-b) - 1 - 2 t b^t / (1-b^t), the length of the simple average that an EMA of t steps amounts to.

    With x = -t log b the large terms are coth(x/2t) and t coth(x/2) - t. While x is small both are near 2t/x, which is
    1000 times their difference at b = .999: there the common part is taken out by hand.
    """
    x = -k.log * t
    young = t + _langevin(-0.5 * k.log) - t * _langevin(0.5 * jnp.minimum(x, 0.25))
    return jnp.where(x < 0.25, young, 2.0 / k.gain - 1.0 - 2.0 * t / jnp.expm1(jnp.minimum(x, 80.0)))
