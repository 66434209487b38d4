"""One read of all gradients: their global norm, and the first leaf that is not finite."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._compiler import one_by_one
from snr_adam._derivatives import sqrt
from snr_adam._numerics import compute_dtype, largest, widen


class Norm(NamedTuple):
    """bad: int32, number of the first leaf that is not finite, -1 if there is none. norm: that of all gradients."""

    bad: Any
    norm: Any


def is_place(x) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def norm_of(leaves: list) -> Norm:
    """The norm of all gradients; `leaves` has an entry for each that is None or masked too: they count."""
    gs = [_tree.jax_array(g) if not is_place(g) and is_real(g) else None for g in leaves]
    numbers = [i for i, g in enumerate(gs) if not is_place(leaves[i])]
    gs = [gs[i] for i in numbers]
    dtype, one = compute_dtype(*(g for g in gs if g is not None)), jnp.float32(1.0)
    squares = [jnp.zeros((), dtype)]
    for g in gs:
        g, one = one_by_one(g, one)
        squares.append(jnp.zeros((), dtype) if g is None else _square(g, one, dtype))
    squares = jnp.stack(squares)
    bad = jnp.isnan(squares)
    first = jnp.where(jnp.any(bad), jnp.argmax(bad), 0).astype(jnp.int32) - 1
    if numbers != list(range(len(numbers))):
        first = jnp.asarray([-1, *numbers], jnp.int32)[first + 1]
    return Norm(first, sqrt(jnp.sum(squares)) * _unit(dtype))


def is_real(g) -> bool:
    """Whether there is anything to look at: integers and the float0 beside them are finite."""
    return jnp.issubdtype(jnp.result_type(g), jnp.inexact)


def _unit(dtype) -> float:
    """What gradients are measured in before they are squared, so that 2^31 squares of the largest have a finite sum."""
    return 2.0 ** (jnp.finfo(dtype).maxexp // 16)


def _square(g, one, dtype):
    """|g|^2 of a whole leaf, cut off, in the units of `dtype`: finite if all of g is, else NaN.

    g - g is 0, or NaN where g is not finite. XLA's reductions on a CPU take in arithmetic and min, but no select and no
    clamp: those would first write an array as large as the leaf.
    """
    if jnp.iscomplexobj(g):
        return _square(g.real, one, dtype) + _square(g.imag, one, dtype)
    g = widen(g)
    one = one.astype(g.dtype)
    x = jnp.minimum(jnp.abs(g), largest(g.dtype) * one) + (g - g)
    x = x * (one / _unit(g.dtype))
    return jnp.sum(x * x).astype(dtype) * (_unit(g.dtype) / _unit(dtype)) ** 2
