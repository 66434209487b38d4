"""What is tied to another array keeps its bits and its derivative (`snr_adam._compiler.after`, `beside`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snr_adam import _compiler

X = np.array([0.0, -0.0, 1.5, -np.inf, np.nan, 1e-45], np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_a_tie_keeps_every_bit(dtype):
    x = jnp.asarray(X, dtype)
    tied = jax.jit(lambda x: _compiler.beside(x, 3 * x.real, jnp.int32(1)))(x)
    assert tied.dtype == x.dtype
    assert np.asarray(tied).tobytes() == np.asarray(x).tobytes()


def test_a_tie_has_the_derivative_of_what_it_ties():
    slope = jax.grad(lambda x: jnp.sum(3 * _compiler.beside(x, x * x, jnp.int32(7))))(jnp.ones(4))
    np.testing.assert_array_equal(slope, 3.0)


def test_moments_of_other_shapes_tie_nothing():
    u = jnp.asarray(X)
    new = {"v": u, "shared": jnp.ones((1, 6)), "words": jnp.ones(6, jnp.uint32)}
    assert np.asarray(_compiler.with_moments(u, new, jnp.int32(1))).tobytes() == X.tobytes()
