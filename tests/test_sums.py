"""Sums over leaves: however they are taken, they are the same sums, of every shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snr_adam.telemetry import _sums as sums

CASES = [
    *(((), None), ((0,), None), ((1,), None), ((7,), None), ((4096 * 2,), None), ((4096 * 64,), None), ((0, 3), None)),
    *(((3, 5), None), ((3, 5), 0), ((3, 5), 1), ((6, 128), None), ((6, 128), 0), ((2, 513, 64), 2), ((2, 64, 3), 1)),
]
HOW = {
    "together": sums.together,
    "in one reduction": lambda xs, axis: sums.columns([sums.in_one_reduction(xs, axis)]),
    "one by one": lambda xs, axis: sums.columns([sums.one_each(xs, axis)]),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_every_element_is_summed_once(shape, axis, how):
    xs = [jnp.asarray(np.random.default_rng(i).integers(-8, 9, shape), jnp.float32) for i in range(3)]
    over = tuple(i for i in range(len(shape)) if i != axis)
    expected = np.array([np.sum(x, over).reshape(-1) for x in map(np.asarray, xs)])
    np.testing.assert_array_equal(jax.jit(lambda xs: HOW[how](xs, axis))(xs), expected)


@pytest.mark.parametrize("how", HOW)
def test_doubles_are_summed_as_floats(how):
    with jax.enable_x64(True):
        x = jnp.ones((512, 512), jnp.float64)
        total = HOW[how]([x, 2 * x], None)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, [[2**18], [2**19]])


def test_leaves_are_joined_side_by_side():
    ones, twos = [jnp.ones((2, 3))] * 2, [2 * jnp.ones(4)] * 2
    np.testing.assert_array_equal(sums.joined([ones, twos], [0, None]), [[3, 3, 8]] * 2)
