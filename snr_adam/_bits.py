"""Bits: random ones that are a function of a step, an array and a place, and rounding that uses them.

There is no key: a run that is resumed, or shared by another number of devices, sees the same bits. Everything is
integer arithmetic on whole 32-bit words, which every backend has and no backend rounds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._compiler import hidden
from snr_adam._tree import check_sizes


def mix(x):
    """Every bit of the result depends on every bit of x: Wellons' `lowbias32`, a bijection of 32-bit words."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Seed(NamedTuple):
    """Two uint32 words that are unrelated from step to step and from array to array."""

    before: jax.Array
    between: jax.Array


def seeds_at(count, arrays: int) -> list[Seed]:
    """The seeds of so many arrays at step `count`."""
    with np.errstate(over="ignore"):
        words = tuple(mix(np.arange(2 * arrays, dtype=np.uint32) + np.uint32(0x85EBCA6B)))
    given = hidden(count, lambda: words)
    before = mix(count.astype(jnp.uint32) ^ np.uint32(0x9E3779B9))
    between = mix(before)
    return [Seed(before ^ x, between ^ y) for x, y in zip(given[::2], given[1::2], strict=True)]


def element_index(shape: tuple[int, ...], first: jax.Array | None = None) -> jax.Array:
    """Each element's place in row-major order, also in a sharded array its place in the whole; uint32, modulo 2^32.

    first: a uint32 to start from (or several, along axes before those of the shape), times the size; 0 if None."""
    check_sizes("stochastic rounding numbers the elements of an array, whose sizes must be known", shape, 1)
    index = None if first is None else first.reshape(first.shape + (1,) * len(shape))
    for axis, size in enumerate(shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape[: axis + 1] + (1,) * (len(shape) - axis - 1), axis)
        index = place if index is None else index * np.uint32(size % 2**32) + place
    return jnp.zeros((), jnp.uint32) if index is None else index


def random_bits(shape: tuple[int, ...], stream: int, seed: Seed) -> jax.Array:
    """uint32 random bits for an array, a function of its seed, the stream's number and the element's index alone.

    There is no key to keep or to restore, and an element's bits do not depend on how many devices share the array.
    """
    with np.errstate(over="ignore"):
        before, between = mix(np.array([0, 1], np.uint32) + np.uint32(2 * stream))
    return _hash(shape, seed.before ^ before, seed.between ^ between)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all arrays of one shape
def _hash(shape: tuple[int, ...], before: jax.Array, between: jax.Array) -> jax.Array:
    return hashed(element_index(shape), before, between)


def hashed(index: jax.Array, before: jax.Array, between: jax.Array) -> jax.Array:
    """A hash of an index.

    The seed enters twice, before and between the two rounds, so that no two seeds use shifted copies of one sequence.
    The second round is RC6's bijection x (2x + 1) (Rivest et al. 1998): being quadratic it does with one product what
    takes two products by constants, as the chi-square tests show.
    """
    x = (index ^ before) * np.uint32(0x9E3779B1)
    x = x ^ (x >> 16) ^ between
    x = x * (x + x + np.uint32(1))
    return x ^ (x >> 16)


def sign_bits(shape: tuple[int, ...], seed: Seed) -> jax.Array:
    """uint32 whose two highest bits are random, for an array, or several whose seeds lie along a first axis.

    Half of what `hashed` does: its second half is for the lower bits, and costs time to compile and to run. The highest
    bits of neighbours are as good as independent, which with less than this they are not (`tests/test_lags.py`).
    """
    x = element_index(shape, seed.before) * np.uint32(0x9E3779B1)
    x = x ^ (x >> 16) ^ seed.between.reshape(seed.between.shape + (1,) * len(shape))
    return x * np.uint32(0x846CA68B)


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
