"""The arithmetic that every estimator shares, written so that float32 loses nothing.

An exponential moving average with decay b and its bias correction are

    m_t = m_{t-1} + (1 - b) (g_t - m_{t-1})          k_t = 1 / (1 - b^t) = -1 / expm1(t log b)

The textbook forms `b*m + (1-b)*g` and `1 - b**t` are the same on paper. In float32 they are not: the two rounded
constants b and 1-b no longer sum to 1: float32(1-b) / (1 - float32(b)) is off by 1.3e-5 at b = .999, 1.3e-2 at .999999.
The form above has one constant, so its fixed point is exact, and one product that feeds the addition, so a compiler may
fuse them or not fuse them in the same way everywhere: the bits do not depend on the loop around the step.

Numbers that are known when the optimizer is built are held as Python floats and reach the device rounded once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._checks import check_scalar

Scalar = float | jax.Array
Hyper = Scalar | Callable[[Any], Any]
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
    return jnp.full_like(p, initial, dtype=complex_like(dtype) if jnp.iscomplexobj(p) else dtype)


def square_like(p, initial: Scalar = 0.0) -> jax.Array:
    """The same for a moment of |g|^2: always real."""
    return jnp.full_like(p, initial, dtype=compute_dtype(p))


def value_at(hyper: Hyper, t: jax.Array, dtype=None) -> Any:
    """The value of a hyper-parameter at step t = 1, 2, ...: a Python float if it is known now, else an array (of
    `dtype`)."""
    if callable(hyper):
        schedule, hyper = hyper, hyper(t - 1)
        check_scalar(f"the value of schedule {getattr(schedule, '__name__', schedule)}", hyper, "one real number")
    if isinstance(hyper, (int, float, np.generic, np.ndarray)):
        return float(hyper)
    return jnp.asarray(hyper, dtype)


class Decay(NamedTuple):
    """One step of a moving average of decay b: the weight 1 - b of what is new, 1 / (1 - b^t), and log b."""

    gain: Scalar
    debias: Scalar
    log: Scalar


def decay_at(b: Hyper, t: jax.Array, dtype) -> Decay:
    """The numbers of a moving average at step t >= 1, accurate for b arbitrarily close to 1."""
    now = value_at(b, t, dtype)
    gain = 1.0 - now  # exact for arrays in [1/2, 1], so that log1p sees the same b as the gain does
    log_b = (math.log(now) if now else -math.inf) if isinstance(now, float) else jnp.log1p(-gain)
    return Decay(gain, -1.0 / jnp.expm1(t.astype(dtype) * log_b), log_b)


def times(x: jax.Array, by: Scalar) -> jax.Array:
    """x by for real `by`, as a pair of reals would be; a complex product would add the other part times 0."""
    return jax.lax.complex(by * x.real, by * x.imag) if jnp.iscomplexobj(x) else by * x


def unseen_zero(t: jax.Array, dtype) -> jax.Array:
    """-0 at every step t >= 1, which no compiler can know: to be added to an update that may end in a product.

    x + -0 is x, bit for bit. But p + alpha * m is rounded once or twice, as the compiler likes, p + (alpha * m + -0)
    always twice: what it can still fuse, the product and the zero, rounds as the product does.
    """
    return jnp.where(t > 0, -0.0, 1.0).astype(dtype)


def lerp(old: jax.Array, new: jax.Array, gain: Scalar) -> jax.Array:
    """old + gain (new - old)."""
    return old + times(new - old, gain)


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
    limit = jnp.asarray(largest(x.dtype) * scale, x.dtype)
    return jax.lax.clamp(-limit, x, limit)


def root(v: jax.Array, eps: Scalar = 0.0) -> jax.Array:
    """sqrt(v) + eps of a second moment v, with a sqrt(v) of at least 2^-63 (float64: 2^-511).

    Squares of anything smaller are no normal numbers, and are 0 on most machines. Where v was lost in this way and the
    signal was not, x / sqrt(v) would be infinite, or NaN once both are gone. An eps that hides 2^-63 does as well.
    The result is never a bare root: x / sqrt(y) is compiled as a product, see `unseen_zero`.
    """
    tiny, known = float(jnp.finfo(v.dtype).tiny), isinstance(eps, float)
    if known and eps * float(jnp.finfo(v.dtype).eps) > math.sqrt(tiny):
        return jnp.sqrt(v) + eps
    noise = jnp.sqrt(v + tiny)
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


def mix(x):
    """Every bit of the result depends on every bit of x: Wellons' `lowbias32`, a bijection of 32-bit words."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Seed(NamedTuple):
    """Two uint32 words that are unrelated from step to step and from array to array."""

    before: jax.Array
    between: jax.Array


def hidden(count, make: Callable[[], Any]) -> Any:
    """make(), a tree of arrays; on CPU out of a branch that is always taken, for `count` is never negative.

    The compiler then does not see constants, or places in a vector, that differ from leaf to leaf. The loops over
    arrays of one shape are equal, and XLA compiles them once.
    """

    def behind_a_branch(count):
        return jax.lax.cond(count < 0, lambda: jax.tree.map(jnp.zeros_like, make()), make)

    return jax.lax.platform_dependent(count, cpu=behind_a_branch, default=lambda count: make())


def seeds_at(count, arrays: int) -> list[Seed]:
    """The seeds of so many arrays at step `count`."""
    with np.errstate(over="ignore"):
        words = tuple(mix(np.arange(2 * arrays, dtype=np.uint32) + np.uint32(0x85EBCA6B)))
    given = hidden(count, lambda: words)
    before = mix(count.astype(jnp.uint32) ^ np.uint32(0x9E3779B9))
    between = mix(before)
    return [Seed(before ^ x, between ^ y) for x, y in zip(given[::2], given[1::2], strict=True)]


def element_index(shape: tuple[int, ...]) -> jax.Array:
    """Each element's place in row-major order, also in a sharded array its place in the whole; uint32, modulo 2^32."""
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index * np.uint32(size % 2**32) + place if axis else place
    return index


def random_bits(shape: tuple[int, ...], stream: int, seed: Seed) -> jax.Array:
    """uint32 random bits for an array, a function of its seed, the stream's number and the element's index alone.

    There is no key to keep or to restore, and an element's bits do not depend on how many devices share the array.
    """
    with np.errstate(over="ignore"):
        before, between = mix(np.array([0, 1], np.uint32) + np.uint32(2 * stream))
    return _hash(shape, seed.before ^ before, seed.between ^ between)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all arrays of one shape
def _hash(shape: tuple[int, ...], before: jax.Array, between: jax.Array) -> jax.Array:
    """A hash of every element's place.

    The seed enters twice, before and between the two rounds, so that no two seeds use shifted copies of one sequence.
    The second round is RC6's bijection x (2x + 1) (Rivest et al. 1998): being quadratic it does with one product what
    takes two products by constants, as the chi-square tests show.
    """
    x = (element_index(shape) ^ before) * np.uint32(0x9E3779B1)
    x = x ^ (x >> 16) ^ between
    x = x * (x + x + np.uint32(1))
    return x ^ (x >> 16)


def word_of(x: jax.Array) -> jax.Array:
    """The bits of a float32 array as uint32."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def float_of(word: jax.Array) -> jax.Array:
    """The inverse of `word_of`."""
    return jax.lax.bitcast_convert_type(word, jnp.float32)


def round_to(dtype, x: jax.Array, bits: jax.Array | None = None) -> jax.Array:
    """x in `dtype`; with `bits` (uint32), float32 is rounded to bfloat16 or float16 stochastically, by the low 16 bits.

    The mean over uniform bits is exactly x. Zero, infinity, NaN and values that `dtype` can hold
    are kept. Below float16's smallest normal number, 2^-14, rounding is to nearest.
    """
    dtype = jnp.dtype(dtype)
    dropped = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}.get(dtype)
    if bits is None or dropped is None or x.dtype == dtype:
        return x.astype(dtype)
    mask = (1 << dropped) - 1
    up = word_of(x) + ((bits & 0xFFFF) >> (16 - dropped))
    return float_of(up & np.uint32(0xFFFFFFFF ^ mask)).astype(dtype)
