"""Sums over leaves: however they are taken, they are the same, of every shape; each element is sketched once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit

from snr_adam.telemetry import _sums as sums

CASES = [
    *(((), None), ((0,), None), ((1,), None), ((7,), None), ((4096 * 2,), None), ((4096 * 64,), None), ((0, 3), None)),
    *(((3, 5), None), ((3, 5), 0), ((3, 5), 1), ((6, 128), None), ((6, 128), 0), ((2, 513, 64), 2), ((2, 64, 3), 1)),
    *(((200, 5, 2), None), ((3, 200, 2), 0), ((128,), None), ((129,), None)),
]
TAKE = {"at once": sums.at_once, "one each": sums.one_each}


@functools.partial(quick_jit, static_argnums=(1, 2))
def _taken(xs, axis, how):
    return sums.together(xs, axis, TAKE[how])


@pytest.mark.parametrize("how", TAKE)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_every_element_is_summed_once(shape, axis, how):
    """Of all arrays but the last in a sum, of the last in one of 128 sums, which hold about equally many."""
    xs = [jnp.asarray(np.random.default_rng(i).integers(-8, 9, shape), jnp.float32) for i in range(4)]
    over = tuple(i for i in range(len(shape)) if i != axis)
    *expected, of_sketch = (np.sum(x, over).reshape(-1) for x in map(np.asarray, xs))
    got, sketch = _taken(xs, axis, how)
    np.testing.assert_array_equal(got, np.array(expected))
    assert sketch.shape == (1 if axis is None else shape[axis], 128)
    np.testing.assert_array_equal(np.sum(sketch, 1), of_sketch)
    _, counted = _taken([xs[0], jnp.ones(shape)], axis, how)
    slice_size = math.prod(shape) // len(counted)
    assert np.max(counted) == math.ceil(slice_size / 128)
    np.testing.assert_array_equal(np.sum(counted, 1), slice_size)


@pytest.mark.parametrize("shape", [(7,), (128,), (3, 60), (129,), (150, 2, 2)], ids=str)
def test_an_element_is_in_one_sum_of_a_sketch(shape):
    """And in a sum of its own, where there are no more than 128."""
    size = math.prod(shape)
    each = jnp.eye(size).reshape(size, *shape)
    places = quick_jit(jax.vmap(lambda x: sums.together([x, x], None)[1][0]))(each)
    np.testing.assert_array_equal(np.sort(places, 1)[:, -2:], [[0, 1]] * size)
    if size <= 128:
        assert len(np.unique(np.argmax(places, 1))) == size


@pytest.mark.parametrize("how", TAKE)
def test_doubles_are_summed_as_floats(how):
    with jax.enable_x64(True):
        x = jnp.ones((512, 512), jnp.float64)
        total, sketch = sums.together([x, 2 * x, x], None, TAKE[how])
    assert total.dtype == sketch.dtype == jnp.float32
    np.testing.assert_array_equal(total, [[2**18], [2**19]])


def test_arrays_of_fewer_dimensions_count_for_every_element():
    total, sketch = sums.together([jnp.ones((3, 50)), jnp.float32(2), jnp.float32(1)], 0)
    np.testing.assert_array_equal(total, [[50] * 3, [100] * 3])
    np.testing.assert_array_equal(np.sum(sketch, 1), [50] * 3)


def test_leaves_are_joined_side_by_side():
    found = [sums.rows([jnp.ones((2, 3))] * 3, 0), sums.rows([2 * jnp.ones(4)] * 3, None)]
    total, sketches = sums.joined(found)
    np.testing.assert_array_equal(total, [[3, 3, 8]] * 2)
    np.testing.assert_array_equal(np.sum(sketches, 1), [3, 3, 8])
