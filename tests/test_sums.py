"""Sums over leaves: together or in vectors they are the same sums, of every shape."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from snr_adam.telemetry import _sums as sums

CASES = [
    *(((), None), ((0,), None), ((1,), None), ((7,), None), ((4096 * 2,), None), ((4096 * 64,), None), ((0, 3), None)),
    *(((3, 5), None), ((3, 5), 0), ((3, 5), 1), ((6, 128), None), ((6, 128), 0), ((6, 128), 1)),
    *(((64 * 16, 64), None), ((64 * 17 + 1, 64), None), ((1028, 72), None), ((1032, 64), 1), ((64 * 16, 64), 0)),
    *(((2, 512, 65), 0), ((2, 513, 64), 2), ((2, 512, 64), 1), ((2**16,), None), ((2**17 + 64 * 8,), None)),
    *(((2, 3, 64), None), ((2, 3, 64), 1), ((2, 3, 64), 2), ((2, 64, 3), 0)),
]
HOW = {
    "together": lambda xs, axis: sums.together(xs, axis),
    "in vectors": lambda xs, axis: sums.in_vectors(xs, axis),
}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_every_element_is_summed_once(shape, axis, how, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
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


SHARED = [
    *(((rows, 512), P("x")) for rows in (1024, 1032, 1040, 1004)),  # 1,040 are sixteens, but not on each of 4 devices
    *(((rows, 512), P(None, "x")) for rows in (1024, 1025)),
    *(((size,), P("x")) for size in (2**18, 2**18 + 1024)),
]


@pytest.mark.parametrize(("shape", "spec"), SHARED, ids=str)
def test_devices_exchange_their_sums_and_nothing_else(shape, spec):
    """Whether or not the number of rows suits the devices, which the compiler alone knows."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(lambda g: sums.in_vectors([g * g, g], None)).lower(x).compile().as_text()
    operations = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    sent = re.findall(rf" = (\(.*?\)|\S+) (?:{operations})(?:-start)?\(", text)
    assert sent
    sizes = [math.prod(map(int, filter(None, found.split(",")))) for found in re.findall(r"f32\[([\d,]*)\]", str(sent))]
    assert max(sizes) < x.size / 64


def test_one_device_holds_the_rows_of_one_array_at_a_time(monkeypatch):
    """And the sums are the same bits as where several devices take them side by side."""
    xs = [jnp.sin(jnp.arange(2.0**18) + i).reshape(512, 512) for i in range(8)]

    def total(xs):
        parts: list = []
        for x in xs:
            parts.append(sums.in_vectors([x * x, x], None, parts[-1] if parts else None))
        return sums.join(parts, 2)

    monkeypatch.setattr(jax, "device_count", lambda: 4)
    several = jax.jit(lambda xs: total(xs)).lower(xs).compile()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    one = jax.jit(lambda xs: total(xs)).lower(xs).compile()
    np.testing.assert_array_equal(one(xs), several(xs))
    held = [x.memory_analysis().temp_size_in_bytes / xs[0].nbytes for x in (one, several)]
    assert held[0] < 0.2 < 0.9 < held[1]  # 2 / 16 of one array, or of each


def test_leaves_are_joined_side_by_side():
    assert sums.join([jnp.ones((2, 1)), jnp.ones((2, 3))], 2).shape == (2, 4)
    assert sums.join([], 12).shape == (12, 0)
