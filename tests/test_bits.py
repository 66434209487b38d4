"""The same bits however a step is run: compiled alone, in a scan, in two programs, donated, sharded, cut into leaves.

A compiler is free to fuse a product with the addition behind it into one rounding, and does so in one program and not
in another. Every sum of a step therefore has one product at most, and an update ends in a division or an addition, so
that nothing is left to choose. What the algebra itself forbids is listed in `EXCEPTIONS`. (Run operation by operation,
outside of jit, nothing is fused at all, and the bits are others.)
"""

import functools

import jax
import numpy as np
import optax
import pytest
from cases import PRESETS, SUMS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

STEPS, SIZE = 20, 1024
VARIANTS = {
    "adam, nesterov, schedule": lambda: PRESETS["adam"][0](optax.linear_schedule(0.1, 0.01, STEPS), nesterov=True),
    "adamw, bfloat16 signal": lambda: PRESETS["adamw"][0](0.1, mu_dtype="bfloat16"),
    "adopt, nesterov": lambda: PRESETS["adopt"][0](0.1, nesterov=True, use_clipping=False),
    "radam, nesterov": lambda: PRESETS["radam"][0](0.1, nesterov=True),
    "rmsprop, centered": lambda: PRESETS["rmsprop"][0](0.1, centered=True),
    "rmsprop, momentum": lambda: PRESETS["rmsprop"][0](0.1, momentum=0.9, eps_in_sqrt=False),
}
NAMES = [*PRESETS, *VARIANTS]

NORM = "the step takes a norm, a mean or a count over the leaf: a sum in another order, over a piece another number"
ELSEWHERE = ("sharded over 2", "sharded over 8", "sharded, explicit axes", "leaf lengths")
EXCEPTIONS = {
    **{(name, form): NORM for name in SUMS for form in ELSEWHERE},
    (
        "adamw, bfloat16 signal",
        "leaf lengths",
    ): "rounding is stochastic, drawn from the leaf's number and the place in it",
    ("yogi", "mirror"): "the signal starts at +1e-6, as in Optax",
}


@functools.cache
def _problem():
    """Parameters (1024,) and gradients (20, 1024) whose elements have sizes from 1e-10 to 1e9."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-10, 9, SIZE)
    return rng.normal(size=SIZE).astype("float32"), (rng.normal(size=(STEPS, SIZE)) * size).astype("float32")


def _step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _loop(step, params, state, gradients):
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def _alone(tx, params, gradients, **options):
    return _loop(jax.jit(_step(tx), **options), params, tx.init(params), gradients)


def _scan(tx, params, gradients):
    step = _step(tx)
    run = jax.jit(lambda *carry: jax.lax.scan(lambda c, g: (step(*c, g), None), carry, gradients)[0])
    return run(params, tx.init(params))


_apply = jax.jit(optax.apply_updates)


def _two_programs(tx, params, gradients):
    update = jax.jit(tx.update)

    def step(params, state, grads):
        updates, state = update(grads, state, params)
        return _apply(params, updates), state

    return _loop(step, params, tx.init(params), gradients)


def _donated(tx, params, gradients):
    return _alone(tx, jax.numpy.array(params), gradients, donate_argnums=(0, 1))


def _sharded(devices, axis, tx, params, gradients):
    split = NamedSharding(jax.make_mesh((devices,), ("x",), axis_types=(axis,)), PartitionSpec("x"))
    with jax.set_mesh(split.mesh):
        params, state = _alone(tx, *jax.device_put((params, list(gradients)), split))
    assert params.sharding.is_equivalent_to(split, 1)
    return params, state


def _cut(x):
    """16 leaves of length 1, one of 3 and one of 1000; a scalar as it is."""
    return [*np.split(x[:16], 16), x[16:19], x[19:1019]] if np.ndim(x) else x


FORMS = {
    "scan": _scan,
    "update and apply apart": _two_programs,
    "donated": _donated,
    "sharded over 2": functools.partial(_sharded, 2, AxisType.Auto),
    "sharded over 8": functools.partial(_sharded, 8, AxisType.Auto),
    "sharded, explicit axes": functools.partial(_sharded, 4, AxisType.Explicit),
}


def _make(name):
    return VARIANTS[name]() if name in VARIANTS else PRESETS[name][0](0.1)


@functools.cache
def _compiled(name):
    tx = _make(name)
    return tx, jax.jit(_step(tx))


def _one_step_each(name, params, gradients):
    """Parameters and state after 20 calls of one compiled step, as NumPy arrays."""
    tx, step = _compiled(name)
    return jax.device_get(_loop(step, params, tx.init(params), gradients))


@functools.cache
def _reference(name):
    return _one_step_each(name, *_problem())


def _assert_same_bits(got, want):
    got, want = jax.device_get(got), jax.device_get(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes(), f"{jax.tree_util.keystr(path)}: {np.sum(x != y)} of {x.size} differ"


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in PRESETS for form in FORMS]
    + [(name, form) for name in VARIANTS for form in ("scan", "update and apply apart")],
)
def test_a_form_does_not_change_bits(name, form):
    got = FORMS[form](_make(name), *_problem())
    if (name, form) in EXCEPTIONS:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), got, _reference(name))
    else:
        _assert_same_bits(got, _reference(name))


@pytest.mark.parametrize("name", [name for name in NAMES if (name, "leaf lengths") not in EXCEPTIONS])
def test_a_leaf_of_another_length_has_the_same_bits(name):
    params, gradients = _problem()
    got = _alone(_make(name), _cut(params), [_cut(g) for g in gradients])
    _assert_same_bits(got, jax.tree.map(_cut, _reference(name)))


@pytest.mark.parametrize("name", [name for name in NAMES if (name, "mirror") not in EXCEPTIONS])
def test_negated_gradients_give_the_mirror_image(name):
    params, gradients = _problem()
    mirrored, state = _one_step_each(name, -params, -gradients)
    expected, expected_state = _reference(name)
    np.testing.assert_array_equal(mirrored, -expected)
    assert not np.array_equal(expected, params)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_array_equal(abs(x), abs(y))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, -y), state[0].mu, expected_state[0].mu)
