"""Sums over leaves: together, apart, in chains and in rows they are the same sums, of every shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snr_adam import sums

CASES = [
    *(((), None), ((1,), None), ((7,), None), ((4096 * 2,), None), ((4096 * 64,), None), ((0, 3), None)),
    *(((3, 5), None), ((3, 5), 0), ((3, 5), 1), ((6, 128), None), ((6, 128), 0), ((6, 128), 1)),
    *(((2, 3, 64), None), ((2, 3, 64), 1), ((2, 3, 64), 2), ((2, 64, 3), 0)),
]
HOW = {
    "together": lambda xs, axis: sums.together(xs, axis),
    "in chains": lambda xs, axis: sums.together(xs, axis, chains=4),
    "apart": lambda xs, axis: sums.apart(xs, axis),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_every_element_is_summed_once(shape, axis, how):
    xs = [jnp.asarray(np.random.default_rng(i).integers(-8, 9, shape), jnp.float32) for i in range(3)]
    over = tuple(i for i in range(len(shape)) if i != axis)
    expected = np.array([np.sum(x, over).reshape(-1) for x in map(np.asarray, xs)])
    np.testing.assert_array_equal(jax.jit(HOW[how], static_argnums=1)(xs, axis), expected)


def test_leaves_are_joined_side_by_side():
    assert sums.join([jnp.ones((2, 1)), jnp.ones((2, 3))], 2).shape == (2, 4)
    assert sums.join([], 12).shape == (12, 0)
