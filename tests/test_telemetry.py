"""`observe` changes nothing, costs nearly nothing, and its numbers are right: the floor, the corrected SNR, its error.

Truth is known where gradients are drawn: g = G + x with |G|^2 / tr(Sigma) given.
"""

import contextlib
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import fast_jit, gradients, quick_jit, tree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import snr_adam
from snr_adam.telemetry._averages import Last
from snr_adam.telemetry._outside import averages_of

OPTIMIZERS = {
    "optax.adam": lambda: optax.adam(0.01),
    "optax.adamw": lambda: optax.adamw(0.01),
    "optax.lion": lambda: optax.lion(0.01),
    "optax.sgd": lambda: optax.sgd(0.01, momentum=0.9),
    "optax.sgd, nesterov": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "optax.amsgrad": lambda: optax.amsgrad(0.01),
    "snr_adam.adamw": lambda: snr_adam.adamw(0.01),
    "snr_adam.adamw, packed": lambda: snr_adam.adamw(0.01, storage="packed"),
    "snr_adam.adamw, bfloat16": lambda: snr_adam.adamw(0.01, storage="bfloat16"),
    "snr_adam.ademamix": lambda: snr_adam.ademamix(0.01),
    "snr_adam.centered_adam": lambda: snr_adam.centered_adam(0.01),
    "snr_adam.lamb": lambda: snr_adam.lamb(0.01),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.5), snr_adam.adamw(0.01)),
    "scaled, trust ratio": lambda: optax.chain(optax.scale(0.5), optax.lamb(0.01)),
    "masked": lambda: optax.masked(optax.adam(0.01), {"scalar": True, "one": False, "block": True, "empty": True}),
    "partition": lambda: optax.partition(
        {"x": optax.adam(0.01), "y": optax.sgd(0.1, momentum=0.5)},
        {"scalar": "x", "one": "y", "block": ["x", "y"], "empty": "x"},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(0.01),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(0.01), 3),
}


def _train(tx, params, grads):
    """Updates of every step, and the last parameters and state; state donated, update and apply apart.

    In one program XLA rounds `params + alpha * x` of Optax's updates once or twice, as it likes, with and without any
    company: see `_compiler.unseen_zero`, which is why this package's own updates do not have that.
    """
    update = jax.jit(tx.update, donate_argnums=1)
    state, seen = tx.init(params), []
    for g in grads:
        updates, state = update(g, state, params)
        params = _apply(params, updates)
        seen.append(updates)
    return jax.device_get((params, seen)), state


def _train_donating_all(tx, params, grads):
    """The same in one program."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state, updates

    params, state, seen = jax.tree.map(jnp.array, params), tx.init(params), []
    for g in grads:
        params, state, updates = step(params, state, g)
        seen.append(updates)
    return jax.device_get((params, seen)), state


_apply = jax.jit(optax.apply_updates)


def _assert_same_bits(got, want):
    got, want = jax.device_get(got), jax.device_get(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_changes(name):
    """Parameters, updates and the inner state are the same bits with and without."""
    grads = list(gradients(8))
    train = _train_donating_all if name.startswith("snr_adam") else _train
    want, inner = train(OPTIMIZERS[name](), tree(), grads)
    got, state = train(snr_adam.observe(OPTIMIZERS[name](), every=2), tree(), grads)
    _assert_same_bits(got, want)
    _assert_same_bits(state.inner, inner)
    assert state.count == 8
    assert state.seen > 3


def test_nothing_changes_inside_multi_steps():
    grads = list(gradients(8))
    want, inner = _train(optax.MultiSteps(snr_adam.adamw(0.01), 2), tree(), grads)
    got, state = _train(optax.MultiSteps(snr_adam.observe(snr_adam.adamw(0.01)), 2), tree(), grads)
    _assert_same_bits(got, want)
    _assert_same_bits(state.inner_opt_state.inner, inner.inner_opt_state)
    assert snr_adam.report(state).step == 4


other = pytest.mark.xfail(jax.__version_info__ >= (0, 12), reason="there |g|^2 of complex g is fused in another way")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", pytest.param("complex64", marks=other)])
def test_nothing_changes_for_other_dtypes(dtype):
    grads = list(gradients(6, dtype=dtype))
    tx = snr_adam.adamw(0.01)
    want, inner = _train(tx, tree(dtype=dtype), grads)
    got, state = _train(snr_adam.observe(tx), tree(dtype=dtype), grads)
    _assert_same_bits(got, want)
    _assert_same_bits(state.inner, inner)
    assert np.all(np.isfinite(snr_adam.report(state).columns["gradient_norm"]))


def test_the_state_is_a_fixed_point_also_for_none_and_empty_leaves():
    params = {"a": jnp.ones((3, 2)), "frozen": None, "empty": jnp.zeros((0, 2)), "s": jnp.float32(1.0)}
    tx = snr_adam.observe(optax.adam(0.1))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(6):
        _, after = update(params, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        state = after
    assert update._cache_size() == 1
    assert snr_adam.report(state).names == ("a", "empty", "s")
    _, loop = jax.lax.scan(lambda s, _: (tx.update(params, s, params)[1], None), tx.init(params), length=6)
    assert loop is None
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert jax.tree.map(jnp.shape, tx.init(shapes)) == jax.tree.map(jnp.shape, tx.init(params))


def test_donated_state_shares_no_buffers():
    tx = snr_adam.observe(optax.adam(0.1))
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tx.init(jnp.ones(3)))]
    assert len(set(pointers)) == len(pointers)


BIG = (4096, 4096)


def _compiled(tx, shape=BIG):
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(p, jax.eval_shape(tx.init, p), p).compile()


@pytest.mark.parametrize(
    ("name", "extra", "kept"),
    [
        ("snr_adam.adamw", 28, 0),  # g, m and v; rarely, one more pass over g, m, v and p
        ("snr_adam.adamw, packed", 20, 0),
        ("optax.sgd", 40, 8),  # whose update ends in a product, so it is not made to wait for the look
    ],
)
def test_no_temporaries_and_no_byte_too_many(name, extra, kept):
    """XLA counts both branches of each `cond`: what a step costs in which everything is due."""
    plain, observed = _compiled(OPTIMIZERS[name]()), _compiled(snr_adam.observe(OPTIMIZERS[name](), 10))
    size = np.prod(BIG)
    temporary = [x.memory_analysis().temp_size_in_bytes / size for x in (plain, observed)]
    assert temporary[1] < temporary[0] + kept + 0.011  # the sums of rows
    moved = [x.cost_analysis()["bytes accessed"] / size for x in (plain, observed)]
    assert moved[1] - moved[0] < extra + 1


def test_memory_grows_with_layers_and_not_with_parameters():
    tx = snr_adam.observe(optax.adam(0.1))

    def own(params):
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, params)._replace(inner=None)))

    small, large = [jnp.zeros(3)] * 10, [jax.ShapeDtypeStruct((3000, 3000), jnp.float32)] * 10
    assert own(small) == own(large) < (60 + 6 * 128) * 11  # sketches of a burst, and some rows


def _sharded(axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    split = NamedSharding(mesh, PartitionSpec("x"))
    with jax.set_mesh(mesh):
        params = jax.device_put({"a": jnp.ones((8, 6)), "b": jnp.ones(8)}, split)
        grads = [
            jax.tree.map(lambda x, t=t: jnp.sin(x * t + jnp.arange(x.size).reshape(x.shape)), params) for t in range(6)
        ]
        tx = snr_adam.observe(snr_adam.adamw(0.1), layer_axis={"a": 0})
        state = quick_jit(tx.init)(params)
        update = quick_jit(tx.update)
        for g in grads:
            _, state = update(g, state, params)
        text = update.lower(grads[0], state, params).compile().as_text()
    return snr_adam.report(state), text


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_and_replicated_report_the_same(axis_type):
    params = {"a": jnp.ones((8, 6)), "b": jnp.ones(8)}
    grads = [
        jax.tree.map(lambda x, t=t: jnp.sin(x * t + jnp.arange(x.size).reshape(x.shape)), params) for t in range(6)
    ]
    tx = snr_adam.observe(snr_adam.adamw(0.1), layer_axis={"a": 0})
    state = tx.init(params)
    update = quick_jit(tx.update)
    for g in grads:
        _, state = update(g, state, params)
    want, (got, _) = snr_adam.report(state), _sharded(axis_type)
    assert got.names == want.names
    for key in want.columns:
        np.testing.assert_allclose(got.columns[key], want.columns[key], rtol=2e-3, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_an_observation_is_one_all_reduce(storage):
    """However many leaves there are: one in the branch that looks; of details the sums are another one, and the largest
    elements."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    shapes = [(16, 512)] * 5 + [(768, 64)] * 2  # of 768 rows a device has 96, which are no whole sketch
    params = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows) for shape in shapes]
    tx = snr_adam.observe(snr_adam.adamw(0.1, storage=storage), every=10)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile().as_text()
    names = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    assert names == ["all-reduce"] * 3
    branches = [part for part in text.split("\n\n") if " all-reduce(" in part]
    assert len(branches) == 2
    assert not any("ENTRY" in part for part in branches)


with contextlib.suppress(ValueError):  # Optax leaves this to its users; raises if it is done
    jax.export.register_namedtuple_serialization(optax.EmptyState, serialized_name="optax.EmptyState")


def test_an_exported_step_runs():
    params = jnp.arange(4.0)
    tx = snr_adam.observe(snr_adam.adamw(0.1))
    state, step = tx.init(params), jax.jit(tx.update)
    data = jax.export.export(step)(params, state, params).serialize()
    got = jax.export.deserialize(data).call(params, state, params)
    _assert_same_bits(got, step(params, state, params))


# ---------------------------------------------------------------------------------------------------------------------

SIZE, STEPS = 400, 150
DECAYS = [(0.9, 0.999), (0.95, 0.95), (0.9, 0.9)]
KINDS = {
    "adam": lambda b1, b2: optax.adam(1e-3, b1, b2),
    "lion": lambda b1, b2: optax.lion(1e-3, b1, b2),
    "momentum": lambda b1, b2: optax.sgd(1e-3, momentum=b1),
}


@functools.partial(fast_jit, static_argnums=(0, 2, 3))
def _many(tx, snr, runs, steps, key):
    """The states after `steps` gradients of the given SNR, of `runs` independent runs."""

    def one(key):
        def step(carry, key):
            params, state = carry
            g = jnp.sqrt(snr) + jax.random.normal(key, (SIZE,))
            updates, state = tx.update(g, state, params)
            return (params + updates, state), None

        zeros = jnp.zeros(SIZE)
        return jax.lax.scan(step, (zeros, tx.init(zeros)), jax.random.split(key, steps))[0][1]

    return jax.vmap(one)(jax.random.split(key, runs))


def _reports(tx, snr, runs, steps=STEPS):
    states = jax.device_get(_many(snr_adam.observe(tx), snr, runs, steps, jax.random.key(1)))
    return [snr_adam.report(jax.tree.map(lambda x, i=i: x[i], states)).total for i in range(runs)]


def _assert_right(tx, snr, runs, slack):
    """Inside the 95 % interval in 90 % of the runs, and unbiased within 5 % of max(SNR, .02) and `slack` errors."""
    totals = _reports(tx, snr, runs)
    value, error, low, high = (np.array([x[f"snr{end}"] for x in totals]) for end in ("", "_error", "_low", "_high"))
    assert np.mean((low <= snr) & (snr <= high)) >= 0.9
    assert abs(np.mean(value) - snr) < 0.05 * max(snr, 0.02) + slack * np.std(value) / runs**0.5
    assert 0.8 < np.median(error) / np.std(value) < 2.5  # an interval, and not just a wide one
    persistent, power = (np.array([total[key] for total in totals]) for key in ("persistent", "gradient_norm"))
    share, true = persistent / power**2, snr / (1 + snr)  # all that is signal persists, where parameters stand still
    assert abs(np.mean(share) - true) < 0.05 * max(snr, 0.02) + 2 * np.std(share) / runs**0.5
    if snr == 0:
        assert np.mean(low > 0) <= 0.04


@pytest.mark.parametrize("snr", [0.0, 0.1, 10.0])
def test_the_snr_is_right(snr):
    _assert_right(KINDS["adam"](0.9, 0.999), snr, runs=200, slack=2)


@pytest.mark.slow
@pytest.mark.parametrize("snr", [0.0, 0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_snr_is_right_for_every_momentum(kind, decays, snr):
    # where momentum finds a signal and the lags do not, the SNR is at least its lower end, and so a little high
    _assert_right(KINDS[kind](*decays), snr, runs=200, slack=5 if snr == 0.01 else 2)


@pytest.mark.parametrize("decays", [DECAYS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in DECAYS[1:])])
def test_five_percent_of_noise_is_significant(decays):
    found = [total["significant"] for total in _reports(KINDS["adam"](*decays), 0.0, runs=60)]
    assert abs(np.mean(found) - 0.05) < 0.007


def test_elements_without_gradient_are_not_counted():
    """Nine elements in ten never have a gradient; they would halve and more the share."""
    tx = snr_adam.observe(optax.adam(1e-3))
    on = jnp.arange(4000) % 10 == 0

    def step(state, key):
        return tx.update(on * (0.3 + jax.random.normal(key, on.shape)), state)[1], None

    state = fast_jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 200))[0])(
        tx.init(jnp.zeros(4000))
    )
    assert Last(*state.last).counted == 400
    assert 0.15 < snr_adam.report(state).total["significant"] < 0.35


@pytest.mark.parametrize("dense", [1.0, 0.85, 0.3, 0.05])
def test_sparse_noise_is_not_called_significant(dense):
    """Rows that have a gradient now and then: 5 +- 1 % of pure noise, or nothing said."""
    tx = snr_adam.observe(snr_adam.adam(1e-3))

    def step(state, key):
        noise, there = (jax.random.fold_in(key, i) for i in (0, 1))
        g = jax.random.normal(noise, (400, 20)) * (jax.random.uniform(there, (400, 1)) < dense)
        return tx.update(g, state)[1], None

    keys = jax.random.split(jax.random.key(3), 96)
    state = quick_jit(lambda s: jax.lax.scan(step, s, keys)[0])(tx.init(jnp.zeros((400, 20))))
    found = snr_adam.report(state).total["significant"]
    assert np.isnan(found) if dense < 0.5 else abs(found - 0.05) < 0.01


@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_the_floor_is_what_pure_noise_shows(kind):
    totals = _reports(KINDS[kind](0.9, 0.9), 0.0, runs=40)
    pseudo, floor = (np.mean([total[key] for total in totals]) for key in ("pseudo_snr", "floor"))
    assert floor == pytest.approx(np.sqrt(0.1 / 1.9), rel=1e-3)
    assert pseudo == pytest.approx(floor, rel=0.03)


EMA, SQUARE = (0.1, 0.1), (0.001, 0.001)
FOUND = {
    "adamw": (optax.adamw(0.1), EMA, SQUARE),
    "other decays": (optax.adamw(0.1, b1=0.95, b2=0.9999), (0.05, 0.05), (0.0001, 0.0001)),
    "nadam": (optax.nadam(0.1), EMA, SQUARE),
    "a narrow m": (optax.adam(0.1, mu_dtype="bfloat16"), EMA, SQUARE),
    "a schedule": (optax.adam(lambda count: 0.1 / (1 + count)), EMA, SQUARE),
    "lion": (optax.lion(0.1), (0.01, 0.01), None),
    "momentum": (optax.sgd(0.1, momentum=0.9), (1.0, 0.1), None),
    "half the gradient": (optax.chain(optax.scale(0.5), optax.adam(0.1)), (0.05, 0.1), (0.00025, 0.001)),
    "yogi": (optax.yogi(0.1), EMA, None),
    "adabelief": (optax.adabelief(0.1), EMA, None),
    "adamax": (optax.adamax(0.1), EMA, None),
    "rmsprop": (optax.rmsprop(0.1, momentum=0.9), None, None),
    "decay before": (optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1)), None, None),
    "wants more": (optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()), None, None),
}


@pytest.mark.parametrize("name", FOUND)
def test_decays_of_other_optimizers_are_found(name):
    """Exactly, without the run's own gradients; where a moment is no linear average there are none."""
    tx, *expected = FOUND[name]
    for found in averages_of(tx, [jnp.ones((3, 2)), None, jnp.ones(())], jax.tree.structure((0, 0, 0)))[::2]:
        for average, numbers in zip(found, expected, strict=True):
            assert (average and average[:2]) == (numbers and pytest.approx(numbers, rel=1e-9)), (average, numbers)


@pytest.mark.parametrize("name", ["optax.adamw", "clip", "snr_adam.centered_adam", "snr_adam.adamw, packed"])
def test_the_snr_does_not_depend_on_what_the_optimizer_does(name):
    tx = OPTIMIZERS[name]()
    totals = _reports(tx, 0.5, runs=10)
    assert np.mean([total["snr"] for total in totals]) == pytest.approx(0.5, rel=0.07)


def test_a_moment_of_other_things_than_gradients_is_not_used():
    """ADOPT averages gradients divided by their noise: <m, g> is no power. The lags do not ask a moment."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=300) * np.logspace(-2, 2, 300), "float32") for _ in range(20)]
    _, state = _train(snr_adam.observe(snr_adam.adopt(1e-3)), jnp.ones(300), grads)
    found = snr_adam.report(state).total
    assert {key for key, x in found.items() if np.isnan(x)} >= {"persistent", "persistence", "signal", "pseudo_snr"}
    assert found["snr_low"] <= 0 < found["snr_high"]
    assert found["gradient_norm"] > 0


def test_a_step_that_is_not_finite_leaves_no_trace():
    tx = snr_adam.observe(optax.apply_if_finite(optax.adam(0.1), 5))
    grads = [jnp.full(3, 1.0 + t) for t in range(5)]
    _, want = _train(tx, jnp.ones(3), grads)
    _, got = _train(tx, jnp.ones(3), [*grads, jnp.full(3, jnp.nan)])
    _assert_same_bits((got.means, got.last), (want.means, want.last))


def test_a_running_optimizer_can_be_observed_from_now_on():
    """Its moments are full of gradients that were never seen."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(1.0 + rng.normal(size=3000), "float32") for _ in range(146)]
    plain = optax.adam(1e-3)
    _, inner = _train(plain, jnp.ones(3000), grads[:50])
    tx = snr_adam.observe(plain)
    state = tx.init(jnp.ones(3000))._replace(inner=inner)
    update = jax.jit(tx.update)
    for g in grads[50:]:
        _, state = update(g, state, jnp.ones(3000))
    assert snr_adam.report(state).total["snr"] == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_every_must_be_a_number_of_steps(every):
    with pytest.raises(ValueError, match="every"):
        snr_adam.observe(optax.adam(0.1), every=every)


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.rmsprop(0.1)])
def test_without_a_first_moment_there_is_an_error_that_names_what_is_there(tx):
    with pytest.raises(ValueError, match="keep no first moment"):
        snr_adam.observe(tx).init(jnp.ones(3))


def test_multi_steps_goes_outside():
    with pytest.raises(ValueError, match=r"instead: optax.MultiSteps\(snr_adam.observe\(tx\), k\)"):
        snr_adam.observe(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()).init(jnp.ones(3))
