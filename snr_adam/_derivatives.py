"""Derivatives of a step that JAX alone would get wrong: of rounding, and where a square is 0 or a root is taken of it.

A step may be differentiated, in meta-learning or to tune hyper-parameters. Each function here has the value, bit for
bit, of the plain expression that its docstring names; only the derivative is its own. Rounded moments have none and say
so: their derivative would rest rounded too, and be off by as much.
"""

import functools
import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def within(x, limit):
    """clamp(-limit, x, limit) for a scalar limit: JAX fails at its derivative where the limit has one too."""
    return jax.lax.clamp(-limit, x, limit)


@within.defjvp
def _(given, change):
    x, limit = given
    return within(x, limit), jnp.where(abs(x) < limit, change[0], jnp.sign(x) * change[1])


@jax.custom_jvp
def sqrt(x):
    """sqrt(x), x >= 0, whose derivative at 0 is 0.

    What is rooted here is a square, or a sum of squares, whose own derivative is 0 at 0: the product of the two is not
    the 0 * infinity = NaN that `jnp.sqrt` gives of a gradient of zeros or a parameter that starts at 0.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _(given, change):
    y = sqrt(given[0])
    return y, jnp.where(y > 0, change[0] * (0.5 / jnp.where(y > 0, y, 1.0)), 0.0)


@jax.custom_jvp
def quotient(x, by):
    """x / by, whose derivative does not divide by the square of `by`, which may be 0 where `by` is not."""
    return x / by


@quotient.defjvp
def _(given, change):
    y = quotient(*given)
    return y, (change[0] - y * change[1]) / given[1]


@jax.custom_jvp
def arctan2(y, x):
    """arctan2(y, x), not both 0, whose derivative is right also where the squares that it divides by are lost."""
    return jnp.arctan2(y, x)


@arctan2.defjvp
def _(given, change):
    (y, x), (dy, dx) = given, change
    size = jnp.maximum(abs(y), abs(x))
    a, b = y / size, x / size
    return arctan2(y, x), (b * dy - a * dx) / size / (a * a + b * b)


@jax.custom_jvp
def with_derivative_of(x, like):
    """x, which is `like` rounded, with the derivative of `like`: that of rounding itself is 0 (straight-through)."""
    del like
    return x


@with_derivative_of.defjvp
def _(given, change):
    return given[0], change[1].astype(given[0].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_derivative(what: str, x):
    """x, of which no derivative can be taken: TypeError, saying `what` it is that has none."""
    del what
    return x


@without_derivative.defjvp
def _(what, given, change):
    raise TypeError(
        f"{what}, and rounding has no derivative: to differentiate through the steps of an optimizer give it float32 "
        "parameters and storage='float32', without mu_dtype; or stop at the gradients with jax.lax.stop_gradient"
    )


@jax.custom_jvp
def log_of(b, gain):
    """log1p(-gain), which is log b of b = 1 - gain; for b = 0 the log of 1e-37.

    b^t is then 0 as it should be, and has its derivative there.
    """
    del b
    return jnp.where(gain < 1, jnp.log1p(-gain), math.log(1e-37))


@log_of.defjvp
def _(given, change):
    return log_of(*given), change[0] / jnp.maximum(given[0], 1e-37)


@jax.custom_jvp
def expm1(x):
    """expm1(x), with derivative e^x where JAX has expm1(x) + 1: nothing of it is left for x under -17."""
    return jnp.expm1(x)


@expm1.defjvp
def _(given, change):
    return expm1(*given), change[0] * jnp.exp(given[0])
