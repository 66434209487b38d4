"""`accumulate` against one large batch, against Optax's MultiSteps, and in bytes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gradients, quick_jit, tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import snr_adam
from snr_adam.accumulation import AccumulateState

EVERY = 4


def _step(tx, apply_state=False):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        if apply_state:
            return snr_adam.accumulation.apply_accumulated(params, state), state
        return optax.apply_updates(params, updates), state

    return step


def _run(step, params, state, pieces):
    for grads in pieces:
        params, state = step(params, state, grads)
    return params, state


def _assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


def _means(pieces):
    return [
        jax.tree.map(lambda *g: np.mean(np.asarray(g, np.float64), 0).astype("float32"), *pieces[i : i + EVERY])
        for i in range(0, len(pieces), EVERY)
    ]


@pytest.mark.parametrize(
    "inner", [snr_adam.adamw(0.1), snr_adam.lion(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))]
)
def test_the_result_is_that_of_one_large_batch(inner):
    """Three steps of four pieces each, against three steps with the mean taken in float64."""
    tx, pieces = snr_adam.accumulate(inner, EVERY), list(gradients(3 * EVERY))
    params, state = _run(quick_jit(_step(tx)), tree(), tx.init(tree()), pieces)
    want, want_inner = _run(quick_jit(_step(inner)), tree(), inner.init(tree()), _means(pieces))
    for x, y in zip(jax.tree.leaves((params, state.inner)), jax.tree.leaves((want, want_inner)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
    assert (state.count, state.steps) == (0, 3)


def test_a_piece_that_only_accumulates_changes_nothing_else():
    tx = snr_adam.accumulate(snr_adam.adamw(0.1), EVERY)
    step = quick_jit(tx.update)
    state = tx.init(tree())
    for i, grads in enumerate(gradients(2 * EVERY), 1):
        updates, new = step(grads, state, tree())
        assert new.count == i % EVERY
        if i % EVERY:
            assert all(not np.any(u) for u in jax.tree.leaves(updates))
            _assert_equal(new.inner, state.inner)
            _assert_equal((new.piece_sq, new.mean_sq), (state.piece_sq, state.mean_sq))
        else:
            assert all(np.all(u) for u in jax.tree.leaves(updates))
        state = new


def test_leftovers_of_a_step_do_not_enter_the_next_sum():
    """Even if they are not finite."""
    tx = snr_adam.accumulate(optax.sgd(1.0), 2)
    state = tx.init(jnp.zeros(2))
    seen = []
    for g in (jnp.inf, 0.0, 1.0, 3.0):
        updates, state = tx.update(jnp.full(2, g), state)
        seen.append(updates[0])
    np.testing.assert_array_equal(seen, [0.0, -jnp.inf, 0.0, -2.0])


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_apply_accumulated_gives_the_bits_of_apply_updates(storage):
    tx, pieces = snr_adam.accumulate(snr_adam.adamw(0.1, storage=storage), 3), list(gradients(7))
    runs = [_run(jax.jit(_step(tx, way)), tree(), tx.init(tree()), pieces) for way in (False, True)]
    _assert_equal(*runs)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *pieces)
    scan = jax.jit(lambda c: jax.lax.scan(lambda c, g: (_step(tx)(*c, g), None), c, grads)[0])
    _assert_equal(scan((tree(), tx.init(tree()))), runs[0])


def test_a_schedule_of_pieces():
    """1 piece for the first step, then 2, then 3."""
    tx = snr_adam.accumulate(optax.sgd(1.0), lambda steps: steps + 1)
    state, moved = tx.init(jnp.zeros(())), []
    for g in range(1, 7):
        updates, state = tx.update(jnp.float32(g), state)
        moved.append(float(updates))
    assert moved == [-1.0, 0.0, -2.5, 0.0, 0.0, -5.0]


@pytest.mark.parametrize("every", [0, -2])
def test_less_than_one_piece_is_refused(every):
    with pytest.raises(ValueError, match=f"every={every}"):
        snr_adam.accumulate(optax.sgd(1.0), every)


def test_the_squares_are_those_of_the_last_piece_and_of_the_mean():
    """And together they find the noise that was put in: their expectations are those of the docstring."""
    size, n, b, rng = 4096, 4, 8, np.random.default_rng(0)
    mean, tx = 0.05, snr_adam.accumulate(optax.sgd(0.0), n)
    step, state, found = quick_jit(tx.update), tx.init(jnp.zeros(size)), []
    for _ in range(30):
        pieces = rng.normal(mean, 1.0, (n, b, size)).mean(1).astype("float32")
        for g in pieces:
            _, state = step(g, state)
        np.testing.assert_allclose(state.piece_sq, np.sum(np.square(pieces[-1], dtype=float)), rtol=1e-5)
        np.testing.assert_allclose(state.mean_sq, np.sum(pieces.mean(0, dtype=float) ** 2), rtol=1e-5)
        found.append((state.piece_sq, state.mean_sq))
    found = np.array(found, float).T
    scale = snr_adam.telemetry.noise_scale.from_groups(*found, n, b)
    assert scale.value == pytest.approx(1 / mean**2, rel=0.25)  # tr(Sigma) / |G|^2, in examples
    assert abs(scale.value - 1 / mean**2) < 3 * scale.error
    q, a = found.mean(1)
    assert b * n / (n - 1) * (q - a) == pytest.approx(size, rel=0.02)  # tr(Sigma)


def test_bfloat16_gradients_are_summed_in_float32():
    """256 pieces of 2^-8 after one of 1: in bfloat16 the sum would stay at 1. Updates keep the inner's dtype."""
    for inner, dtype in ((optax.sgd(1.0), jnp.bfloat16), (snr_adam.carry_remainder(optax.sgd(1.0)), jnp.float32)):
        tx, w = snr_adam.accumulate(inner, 257), jnp.zeros((), jnp.bfloat16)
        step, state = quick_jit(tx.update), tx.init(w)
        for g in [1.0] + 256 * [2.0**-8]:
            updates, state = step(jnp.bfloat16(g), state, w)
        assert updates.dtype == dtype
        np.testing.assert_allclose(float(updates), -2.0 / 257, rtol=2**-8)


def test_the_state_keeps_its_types():
    """Through a step, for awkward leaves, None and abstract parameters."""
    tx = snr_adam.accumulate(snr_adam.adamw(0.1), 2)
    params = {**tree(), "none": None, "half": jnp.ones(3, jnp.bfloat16)}
    state = tx.init(params)
    assert isinstance(state, AccumulateState)
    shapes = jax.eval_shape(tx.init, params)
    for new in (shapes, tx.init(shapes_of(params)), jax.eval_shape(tx.update, params, state, params)[1]):
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(new)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(state)
        ]
    assert not any(x.weak_type for x in jax.tree.leaves(jax.eval_shape(tx.update, params, state, params)[1]))


def shapes_of(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


# --- bytes ---

SIZE = 2**18


def _compiled(tx, waits=False, apply_state=True):
    """The donated step over one large leaf; with `waits` the program that is left when every cond waits."""
    p = jnp.ones(SIZE)
    state = jax.eval_shape(tx.init, p)
    with pytest.MonkeyPatch.context() as patch:
        if waits:
            patch.setattr(jax.lax, "cond", lambda _, run, wait, *args: wait(*args))
        return jax.jit(_step(tx, apply_state), donate_argnums=(0, 1)).lower(p, state, p).compile()


def _moved(compiled):
    return compiled.cost_analysis()["bytes accessed"] / SIZE


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_a_piece_that_only_accumulates_moves_12_bytes_per_parameter(storage):
    """Gradient in, sum in, sum out; with `optax.apply_updates` behind it that function's own 12 as well."""
    tx = snr_adam.accumulate(snr_adam.adamw(1e-3, storage=storage), EVERY)
    assert _moved(_compiled(tx, waits=True)) == pytest.approx(12, abs=0.01)
    assert _moved(_compiled(tx, waits=True, apply_state=False)) == pytest.approx(24, abs=0.01)


@pytest.mark.parametrize("apply_state", [False, True])
@pytest.mark.parametrize(("storage", "moved"), [("float32", 72), ("packed", 56)])
def test_the_whole_has_no_temporaries_and_no_copies(storage, moved, apply_state):
    """Both branches together, as XLA counts; Optax's MultiSteps is at 92, with 12 bytes of temporaries."""
    compiled = _compiled(snr_adam.accumulate(snr_adam.adamw(1e-3, storage=storage), EVERY), apply_state=apply_state)
    assert _moved(compiled) == pytest.approx(moved, abs=0.01)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * SIZE
    assert not re.findall(rf"copy\S* = f32\[{SIZE}\]", compiled.as_text())
    optaxs = _compiled(optax.MultiSteps(optax.adamw(1e-3), EVERY), apply_state=False)
    assert _moved(optaxs) > 1.25 * moved
    assert optaxs.memory_analysis().temp_size_in_bytes > 8 * SIZE


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("policy", ["like parameters", "zero1"])
def test_sharded_it_is_the_same(axis, policy):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    tx, rng = snr_adam.accumulate(snr_adam.adamw(0.1, storage="packed"), 2), np.random.default_rng(0)
    place = NamedSharding(mesh, P("data") if policy == "like parameters" else P())
    params, pieces = np.ones((256, 128), "float32"), rng.normal(size=(4, 256, 128)).astype("float32")
    want = _run(jax.jit(_step(tx)), params, tx.init(params), pieces)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, place)
        shardings = snr_adam.state.state_sharding(tx, params, mesh, policy)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(_step(tx), out_shardings=(place, shardings))
        got = _run(step, params, state, jax.device_put(list(pieces), place))
    np.testing.assert_array_equal(got[0], want[0])
    _assert_equal(got[1].inner, jax.device_get(want[1].inner))
    np.testing.assert_allclose(got[1].mean_sq, want[1].mean_sq, rtol=1e-6)
