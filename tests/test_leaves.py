"""Awkward leaves: none, masked, empty, scalar, Python numbers, complex, half precision, shapes without values."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam

MADE = {name: preset for name, (preset, _) in cases.PRESETS.items()}
LAST = 2**31 - 1  # where int32 counts stop


def moments(state):
    """The first state of a preset's chain holds all moments."""
    return state[0].mu, state[0].nu


def with_count(state, count):
    """The state with every step count set."""
    return optax.tree.set(state, count=jnp.asarray(count, jnp.int32))


def run(tx, params, grads, steps=3, jit=cases.quick_jit):
    """The last update and state of a few jitted steps with the same gradients."""

    @jit
    def last(params, grads):
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(grads, state, params)
        return updates, state

    return last(params, grads)


@pytest.mark.parametrize("name", MADE)
def test_every_kind_of_leaf(name):
    def fill(x):
        return {
            "none": None,
            "masked": optax.MaskedNode(),
            "nested": ({"scalar": jnp.full((), x), "one": jnp.full(1, x)}, [jnp.zeros((0, 3)), jnp.full((7, 300), x)]),
            "python": x,
            "nothing": [(), {}],
        }

    params, grads = fill(2.0), fill(-0.5)
    tx = MADE[name](0.1)
    updates, state = run(tx, params, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert u.shape == jnp.shape(g)
        assert u.dtype == jnp.float32
        if name not in ("cautious_adamw", "adamh"):  # of one element half a step; of a matrix a turn
            np.testing.assert_allclose(u, np.full(u.shape, updates["python"]), rtol=1e-6)  # no leaf is special
    assert updates["python"] > 0
    for moment in moments(state):
        for x in jax.tree.leaves(moment):
            assert x.dtype == jnp.float32


@pytest.mark.parametrize("name", MADE)
def test_python_numbers_need_no_jit(name):
    tx = MADE[name](0.1)
    updates, state = tx.update({"w": 0.5}, tx.init({"w": 1.0}), {"w": 1.0})
    again, _ = tx.update({"w": 0.5}, state, {"w": 1.0})
    assert updates["w"].dtype == again["w"].dtype == jnp.float32


@pytest.mark.parametrize("name", MADE)
def test_a_gradient_of_none_leaves_its_moments_alone(name):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = MADE[name](0.1)
    before = tx.update(params, tx.init(params), params)[1]
    updates, after = tx.update({"a": jnp.ones(3), "b": None}, before, params)
    assert updates["b"] is None
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for x, y in zip(jax.tree.leaves(moments(before)), jax.tree.leaves(moments(after)), strict=True):
        if x.shape == (2,):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", MADE)
def test_complex_moments_are_those_of_the_pair_of_reals(name):
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, 5)).astype(np.float32)
    z = jnp.asarray(pair[0] + 1j * pair[1])
    tx = MADE[name](0.1)
    updates, state = run(tx, z, z, jit=jax.jit)
    _, reals = run(tx, jnp.asarray(pair), jnp.asarray(pair), jit=jax.jit)
    assert updates.dtype == jnp.complex64
    assert bool(jnp.isfinite(updates).all())
    for mu, real in zip(jax.tree.leaves(state[0].mu), jax.tree.leaves(reals[0].mu), strict=True):
        assert mu.dtype == jnp.complex64
        if name == "yogi":  # from 1e-6, not 1e-6 + 1e-6i
            np.testing.assert_allclose(jnp.stack([mu.real, mu.imag]), real, rtol=1e-4)
        elif name == "mars":  # its norm is a sum in another order
            np.testing.assert_allclose(jnp.stack([mu.real, mu.imag]), real, rtol=1e-5)
        elif name not in ("adopt", "laprop"):  # quotients: the noise of a complex number is one for both parts
            np.testing.assert_array_equal(jnp.stack([mu.real, mu.imag]), real)
    for nu, real in zip(jax.tree.leaves(state[0].nu), jax.tree.leaves(reals[0].nu), strict=True):
        assert nu.dtype == jnp.float32
        if name not in ("adamax", "adamaxw"):  # a maximum does not add up
            start = 1e-6 if name == "yogi" else 0.0  # both parts start there
            np.testing.assert_allclose(nu, real.sum(0) - start, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in MADE if name != "yogi"])
def test_float16_with_zero_gradients_stands_still(name):
    zeros = jnp.zeros(3, jnp.float16)
    updates, _ = run(MADE[name](0.1), zeros, zeros)
    assert updates.dtype == jnp.float16
    np.testing.assert_array_equal(updates, zeros)


def test_yogi_with_zero_gradients_moves_a_little():
    """Its moments start at 1e-6, as in Optax: finite, and smaller with every step."""
    zeros = jnp.zeros(3, jnp.float16)
    first, later = (run(MADE["yogi"](0.1), zeros, zeros, steps)[0] for steps in (1, 20))
    assert (np.abs(later) < np.abs(first)).all()
    assert (np.abs(first) < 1e-3).all()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("param", "grad"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")])
def test_mixed_precision(name, param, grad):
    """Moments are float32 whatever the rest is, and the update is the float32 one in the gradient's dtype."""
    p, g = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([0.25, 0.5, -4.0])  # exact in every dtype
    updates, state = run(MADE[name](0.1), p.astype(param), g.astype(grad), jit=jax.jit)
    reference, expected = run(MADE[name](0.1), p, g, jit=jax.jit)
    assert updates.dtype == jnp.dtype(grad)
    np.testing.assert_array_equal(updates, reference.astype(grad))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", MADE)
def test_init_on_shapes_allocates_nothing(name):
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)  # 2 TiB
    params = {"huge": huge, "scalar": jax.ShapeDtypeStruct((), jnp.float32), "none": None}
    state = MADE[name](0.1).init(params)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    expected = jax.eval_shape(MADE[name](0.1).init, params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]


@pytest.mark.parametrize("name", MADE)
def test_the_count_stops_at_its_last_value(name):
    g = jnp.asarray([0.5, -2.0])
    tx = MADE[name](0.1)
    _, state = run(tx, g, g)
    step = cases.quick_jit(tx.update)
    state = with_count(state, LAST - 1)
    for _ in range(3):
        updates, state = step(g, state, g)
        assert int(state[0].count) == LAST
        assert state[0].count.dtype == jnp.int32
        assert bool(jnp.isfinite(updates).all())
        assert (jnp.sign(updates) == -jnp.sign(g)).all()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("leaf", [jnp.arange(3), 3, np.ones(2, bool)], ids=["array", "python", "bool"])
def test_integers_are_refused_by_name(name, leaf):
    good, bad = {"layer": [jnp.ones(2), jnp.ones(3)]}, {"layer": [jnp.ones(2), leaf]}
    tx = MADE[name](0.1)
    with pytest.raises(TypeError, match=r"parameter layer/1 .*(int|bool)"):
        tx.init(bad)
    with pytest.raises(TypeError, match=r"gradient layer/1 .*(int|bool)"):
        tx.update(bad, tx.init(good), good)


@pytest.mark.parametrize("name", MADE)
def test_wrong_shapes_are_refused_by_name(name):
    """Shapes that would broadcast, in silence, to a larger parameter or a larger moment."""
    params = {"layer": [jnp.ones(2), jnp.ones(3)]}
    tx = MADE[name](0.1)
    state = tx.init(params)
    for shape in ((1,), (), (2, 3)):
        wrong = {"layer": [jnp.ones(2), jnp.ones(shape)]}
        with pytest.raises(ValueError, match=r"gradient layer/1 has shape"):
            tx.update(wrong, state, params)
        with pytest.raises(ValueError, match=r"gradient layer/1 has shape .*parameter"):
            tx.update(params, state, wrong)


def test_a_gradient_whose_parameter_was_none_is_refused_by_name():
    tx = snr_adam.adam(0.1)
    state = tx.init({"w": jnp.ones(2), "frozen": None})
    with pytest.raises(ValueError, match=r"gradient frozen"):
        tx.update({"w": jnp.ones(2), "frozen": jnp.ones(2)}, state)


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb"])
def test_a_mask_may_be_made_of_frozen_parameters(name):
    """`jax.tree.map` over the parameters leaves None where they have None."""
    params = {"w": jnp.ones(2), "frozen": None}
    tx = MADE[name](0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 0, params))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["frozen"] is None


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb"])
def test_missing_parameters_are_asked_for(name):
    tx = MADE[name](0.1)
    with pytest.raises(ValueError, match="need the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("name", MADE)
def test_a_tree_without_leaves(name):
    tx = MADE[name](0.1)
    for empty in ({}, (), {"a": None, "b": optax.MaskedNode()}):
        updates, state = tx.update(empty, tx.init(empty), empty)
        assert updates == empty
        assert int(state[0].count) == 1


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "packed"])
def test_moments_start_sharded_like_their_parameter(storage):
    """Also outside of jit: else a model that fits eight devices would need its whole state on one."""
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    state = snr_adam.adam(1e-3, storage=storage).init({"w": jax.device_put(jnp.zeros((3, 16)), split)})[0]
    moments = jax.tree.leaves((state.mu, state.nu))
    assert moments
    assert all(x.sharding.is_equivalent_to(split, x.ndim) for x in moments)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_thawed_leaf_steps_as_after_zeros(storage):
    """While its gradient is None a leaf rests, bit for bit; then one count serves all leaves, as after zeros."""
    tx, w = snr_adam.adam(1.0, storage=storage), {"a": jnp.ones(2), "b": jnp.ones(2)}
    update, rest, zeros = jax.jit(tx.update), tx.init(w), tx.init(w)
    for _ in range(100):
        u, rest = update({"a": jnp.ones(2), "b": None}, rest, w)
        _, zeros = update({"a": jnp.ones(2), "b": jnp.zeros(2)}, zeros, w)
        assert u["b"] is None
    assert not np.any(rest[0].mu["b"])
    sizes = []
    for _ in range(20):
        (one, rest), (other, zeros) = (update(w, state, w) for state in (rest, zeros))
        np.testing.assert_array_equal(one["b"], other["b"])
        sizes.append(abs(float(one["b"][0])))
    if storage == "float32":
        first = 0.1 / (1 - 0.9**101) / np.sqrt(0.001 / (1 - 0.999**101))
        assert np.isclose(sizes[0], first, rtol=1e-4)
        np.testing.assert_allclose(one["a"], -1, rtol=1e-3)


def test_a_leaf_thawed_late_steps_as_documented():
    """3.2 learning rates at first, 6.6 at most, with a count that is far along."""
    tx, w = snr_adam.adam(1.0), jnp.ones(2)
    chain = tx.init(w)
    state = (chain[0]._replace(count=jnp.int32(10**6)), *chain[1:])
    sizes = []
    for _ in range(40):
        u, state = tx.update(w, state, w)
        sizes.append(-float(u[0]))
    assert (round(sizes[0], 1), round(max(sizes), 1)) == (3.2, 6.6)
