"""What XLA must not see through: every trick of this package that serves the compiler and not the reader.

Each says what XLA does without it; `tests/test_compiler.py` shows that on the compiled text. Without all of them the
numbers would be the same to rounding, but some bits would depend on the program around the step, and some steps would
copy arrays or compile for minutes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def unseen_zero(t: jax.Array, dtype) -> jax.Array:
    """-0.0 at every step t >= 1, which XLA cannot constant-fold: to be added to an update that may end in a product.

    x + -0.0 is x, bit for bit. But a backend may compile `p + alpha * m` with one rounding (a fused multiply-add) or
    with two, depending on the program around it. `p + (alpha * m + -0.0)` is rounded twice everywhere: what can still
    be fused, the product and the zero, rounds as the product does.
    """
    return jnp.where(t > 0, -0.0, 1.0).astype(dtype)


def never(x: jax.Array) -> jax.Array:
    """False, for a sum of squares x, which XLA does not know: whatever is chosen by it has to wait for x.

    `accumulate` overwrites a buffer with the update that is computed from it. Its squared norm is read in the same
    step; without an order between the two, XLA copies the whole buffer so that either may come first.
    """
    return x < 0


def hidden(count: jax.Array, make: Callable[[], Any]) -> Any:
    """make(), a tree of constants or small arrays, so that kernels of different leaves do not differ by them.

    XLA inlines a constant into the kernel that uses it, and compiles kernels that differ in one constant one by one:
    GPT-2's 148 leaves then take several times as long. As values that arrive in an array, leaves of one shape share
    one kernel. On CPU barriers are dropped before kernels are made; there the values come out of a branch that is
    always taken, because `count` is never negative.
    """

    def behind_a_branch(count):
        return jax.lax.cond(count < 0, lambda: jax.tree.map(jnp.zeros_like, make()), make)

    def behind_a_barrier(count):
        return jax.lax.optimization_barrier(make())

    return jax.lax.platform_dependent(count, cpu=behind_a_branch, default=behind_a_barrier)


def not_yet(t: jax.Array) -> jax.Array:
    """A uint32 0 at every step t >= 1, which XLA cannot constant-fold; see `after`."""
    return jnp.where(t > 0, 0, 1).astype(jnp.uint32)


def after(x: jax.Array, zero: jax.Array) -> jax.Array:
    """x, bit for bit, once the uint32 `zero` is known, which is 0 and which XLA does not know.

    A look on CPU reads the parameters after the new moments are there, in a branch, and the update is added to them in
    place. Without an order between the two, XLA copies the parameters, at every step. An integer operation, because a
    floating-point one could be fused with what comes after it and change its rounding. Its derivative is that of x.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(after(x.real, zero), after(x.imag, zero))
    return _after(x, zero) if jnp.issubdtype(x.dtype, jnp.floating) else x


@jax.custom_jvp
def _after(x, zero):
    word = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, word) | zero.astype(word), x.dtype)


@_after.defjvp
def _(given, change):
    return _after(*given), change[0]


def beside(x: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
    """x at step t, bit for bit, made in the kernel that makes y of the same shape; for TPU.

    XLA for TPU makes one kernel of several results where one of them needs the others. A sum that needs the moments
    alone gets a kernel of its own, with the sums of other leaves of its shape, and so does a moment that the update
    does not need: what both read is read twice.
    """
    return after(x, not_yet(t) & jax.lax.bitcast_convert_type(y.real.astype(jnp.float32), jnp.uint32))


def with_moments(u: jax.Array, moments, t: jax.Array) -> jax.Array:
    """The update u of step t, bit for bit, in the kernel that makes the new moments, though it needs only the old.

    Where the noise divides before the signal averages, v_t is in no update before the next step's. With 16-bit
    parameters on TPU its kernel would be one of its own: 28 bytes for 22.
    """

    def tied(u, *vs):
        return functools.reduce(lambda u, v: beside(u, v, t), vs, u)

    vs = [v for v in jax.tree.leaves(moments) if v.shape == u.shape and jnp.issubdtype(v.dtype, jnp.floating)]
    return jax.lax.platform_dependent(u, *vs, tpu=tied, default=lambda u, *_: u)


def one_by_one(x: Any, one: jax.Array) -> tuple[Any, jax.Array]:
    """The same two, in a way that ties `one` to x: for a loop over leaves that each use a shared scalar.

    In `guard` the limit at which gradients are cut off is a scalar. Leaves of one shape would share its broadcast, and
    a 16-bit gradient's float32 copy would be shared by the look and the step: both as whole arrays in memory.
    """
    return jax.lax.optimization_barrier((x, one))
