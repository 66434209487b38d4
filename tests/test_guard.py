"""A bad step leaves everything as it was, bit for bit; a long gradient is clipped; and neither costs an array.

The laws run over optimizers of this package, whose steps take the verdict in, and foreign ones, which are put back.
"""

import contextlib
import functools

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import snr_adam
from snr_adam import guard, health, scale_by_snr
from snr_adam.guard import Health
from snr_adam.parts import RMS, Cast, Nesterov, Shared

schedule = optax.linear_schedule(0.1, 0.01, 20)
OURS = {
    "adamw, schedules": lambda: snr_adam.adamw(schedule, b2=optax.constant_schedule(0.99)),
    "packed": lambda: snr_adam.adamw(0.1, storage="packed"),
    "bfloat16": lambda: snr_adam.adamw(0.1, storage="bfloat16"),
    "cast float16": lambda: snr_adam.adamw(0.1, storage=Cast(mu="float16")),
    "parts": lambda: snr_adam.scale_by_snr(Nesterov(), Shared(RMS(), {"block/1": 0})),
    **{name: functools.partial(preset, 0.1) for name, (preset, _) in cases.PRESETS.items()},
}
FOREIGN = {
    "optax.adamw": lambda: optax.adamw(schedule),
    "optax.sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "chained": lambda: optax.chain(snr_adam.adamw(schedule), optax.add_decayed_weights(0.1), optax.scale(0.5)),
    "injected": lambda: optax.inject_hyperparams(snr_adam.adamw)(schedule),
    "carried": lambda: snr_adam.carry_remainder(snr_adam.adamw(0.1), "8"),
    "multi": lambda: optax.MultiSteps(snr_adam.adamw(0.1), 2).gradient_transformation(),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(0.1)),
    "rmsprop with momentum": lambda: snr_adam.rmsprop(0.1, momentum=0.9),
    "guarded twice": lambda: guard(snr_adam.adamw(0.1)),
    "observed": lambda: snr_adam.observe(snr_adam.adamw(0.1, storage="packed")),
}
ALL = {**OURS, **FOREIGN}
CLEAN, BAD = 4, (float("nan"), float("inf"), float("-inf"))


def params():
    """With zeros of both signs, which 0 as an update would make one."""
    return {**cases.tree(), "zeros": jnp.asarray([0.0, -0.0])}


def good(steps, seed=1):
    return [{**g, "zeros": jnp.asarray([1.0, 2.0])} for g in cases.gradients(steps, seed)]


def spoil(tree, value, number):
    """The tree with `value` as the last element of one leaf."""
    leaves, structure = jax.tree.flatten(tree)
    leaves[number] = leaves[number].reshape(-1).at[-1].set(value).reshape(leaves[number].shape)
    return structure.unflatten(leaves)


POSITIONS = [i for i, x in enumerate(jax.tree.leaves(params())) if x.size]


def trainer(tx, jit=jax.jit):
    @jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, gradients, step=None):
    step, carry = step or trainer(tx), (params(), tx.init(params()))
    for g in gradients:
        carry = step(*carry, g)
    return carry


def same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@functools.cache
def compiled(name, jit=jax.jit):
    tx = guard(ALL[name](), clip_norm=3.0)
    step = trainer(tx, jit)
    return tx, step, train(tx, good(CLEAN), step)


# of the presets, those whose steps differ in form; the others nightly
OFTEN = set(ALL) - set(cases.PRESETS) | {"adamw", "adopt", "ademamix", "lion", "lamb", "centered_adam"}


AS_USERS_DO = ("packed", "optax.adamw", "adopt")  # compiled


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_a_bad_step_has_not_happened(name):
    """At the first step, in the middle and many times in a row, and training goes on as if it had not been."""
    tx, step, (p, state) = compiled(name, jax.jit if name in AS_USERS_DO else cases.quick_jit)
    assert not np.array_equal(jax.device_get(p)["block"][0], params()["block"][0])
    for at, times in ((0, 1), (2, 1), (1, 5)):
        gradients = good(CLEAN)
        bad = [spoil(gradients[at], BAD[i % 3], POSITIONS[(at + i) % len(POSITIONS)]) for i in range(times)]
        got, after = train(tx, [*gradients[:at], *bad, *gradients[at:]], step)
        same_bits((got, after.inner, after.norm), (p, state.inner, state.norm))
        assert (int(after.skipped), int(after.consecutive)) == (times, 0)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["packed", "optax.adamw"])
def test_every_position_is_seen_and_remembered(name, value):
    _, step, (p, state) = compiled(name)
    for number in POSITIONS:
        leaf = jax.tree.leaves(good(1)[0])[number]
        for index in range(leaf.size):
            bad = jax.tree.leaves(good(1)[0])
            bad[number] = leaf.reshape(-1).at[index].set(value).reshape(leaf.shape)
            got, after = step(p, state, jax.tree.structure(params()).unflatten(bad))
            same_bits((got, after.inner), (p, state.inner))
            assert int(after.last_bad) == number
    assert health(after, params()).last_bad == "zeros"


@pytest.mark.parametrize("name", ["packed", "optax.adamw"])
def test_a_hundred_bad_steps_in_a_row(name):
    _, step, (p, state) = compiled(name)
    bad = spoil(good(1)[0], jnp.nan, 0)
    got, after = p, state
    for _ in range(100):
        got, after = step(got, after, bad)
    same_bits((got, after.inner), (p, state.inner))
    assert (int(after.skipped), int(after.consecutive), bool(after.holding)) == (100, 100, False)
    got, after = step(got, after, good(1)[0])
    assert int(after.consecutive) == 0
    same_bits((got, after.inner), (lambda x, s: (x, s.inner))(*step(p, state, good(1)[0])))


def test_after_the_limit_it_holds_until_released():
    tx = guard(snr_adam.adamw(0.1), max_consecutive=3)
    step, bad, fine = trainer(tx, cases.quick_jit), spoil(good(1)[0], jnp.inf, 1), good(1)[0]
    start = step(params(), tx.init(params()), fine)
    p, state = start
    for n in range(1, 6):
        p, state = step(p, state, bad)
        assert bool(state.holding) == (n >= 3)
    p, state = step(p, state, fine)
    same_bits((p, state.inner), (start[0], start[1].inner))
    assert int(state.skipped) == 6
    assert "HOLDING" in str(health(state, params()))
    p, state = step(p, optax.tree.set(state, holding=jnp.asarray(False)), fine)
    same_bits((p, state.inner), (lambda x, s: (x, s.inner))(*step(*start, fine)))
    assert int(state.consecutive) == 0


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ((0, 0, False, None, 12.3456), "no step skipped; gradient norm 12.3"),
        ((1, 0, False, "w", 2.0), "1 step skipped; last non-finite gradient: w"),
        ((2, 1, False, "a/b", 2.0), "2 steps skipped (1 in a row until now); last non-finite gradient: a/b"),
        (
            (70, 3, True, "w", 2.0),
            "70 steps skipped (3 in a row until now); last non-finite gradient: w; HOLDING: no step is taken until the "
            "state's `holding` is set to False",
        ),
    ],
)
def test_health_in_words(seen, said):
    """Each number under its own name."""
    assert str(Health(*seen)) == said


@pytest.mark.parametrize("name", ["packed", "adamw", "lion"])
def test_a_guard_changes_nothing_while_all_is_well(name):
    """Guarded and not, the same bits: not clipped means multiplied by 1."""
    got, state = train(guard(ALL[name](), clip_norm=1e6), good(CLEAN))
    want, inner = train(ALL[name](), good(CLEAN))
    same_bits((got, state.inner), (want, inner))
    assert str(health(state, params())).startswith("no step skipped")


@pytest.mark.parametrize("name", ["adamw", "lion", "optax.adamw"])
def test_clipping_is_that_of_optax(name):
    inner = ALL[name]()
    txs = guard(inner, clip_norm=0.5), optax.chain(optax.clip_by_global_norm(0.5), inner)
    (got, state), (want, (_, want_inner)) = (train(tx, good(CLEAN), trainer(tx, cases.quick_jit)) for tx in txs)
    for x, y in zip(jax.tree.leaves((got, state.inner)), jax.tree.leaves((want, want_inner)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state.norm, optax.tree.norm(good(CLEAN)[-1]), rtol=1e-6)
    assert state.norm > 0.5


@pytest.mark.parametrize("make", [snr_adam.adamw, optax.adamw])
@pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
def test_a_norm_that_overflows_does_not_erase_the_step(make, size):
    tx = guard(make(0.1, weight_decay=0.0), clip_norm=1.0)
    p = jnp.zeros(1000)
    updates, state = cases.quick_jit(tx.update)(jnp.full(1000, size), tx.init(p), p)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-4)
    assert int(state.skipped) == 0
    assert np.isfinite(state.norm)


@pytest.mark.parametrize("name", ["packed", "adamw, schedules", "bfloat16", "optax.adamw"])
def test_in_a_scan_with_clipping_the_bits_are_those_of_single_steps(name):
    gradients = good(6)
    gradients[3] = spoil(gradients[3], jnp.nan, POSITIONS[1])
    tx = guard(ALL[name](), clip_norm=0.5)
    want = train(tx, gradients)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    step = trainer(tx)
    got = jax.jit(lambda *carry: jax.lax.scan(lambda c, g: (step(*c, g), None), carry, stacked)[0])(
        params(), tx.init(params())
    )
    if name == "optax.adamw":  # Optax's own step has other bits in a scan
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), got, want)
    else:
        same_bits(got, want)
    assert int(got[1].skipped) == 1


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("make", [lambda: snr_adam.adamw(0.1, storage="packed"), lambda: optax.adamw(0.1)])
def test_sharded(make, axis):
    split = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(axis,)), PartitionSpec("x"))
    tx = guard(make(), clip_norm=1.0)
    p, g = jnp.linspace(-1.0, 1.0, 32), jnp.sin(jnp.arange(32.0))
    alone = cases.quick_jit(tx.update)(g, tx.init(p), p)
    with jax.set_mesh(split.mesh):
        sharded, grads = jax.device_put((p, g), split)
        step = trainer(tx, cases.quick_jit)
        first = step(sharded, tx.init(sharded), grads)
        second = step(*first, jax.device_put(g.at[17].set(jnp.nan), split))
        assert second[0].sharding.is_equivalent_to(split, 1)
        same_bits((second[0], second[1].inner), (first[0], first[1].inner))
    assert int(second[1].skipped) == 1
    np.testing.assert_allclose(first[0], p + alone[0], rtol=1e-6)


def test_in_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, guard(snr_adam.adamw(0.1, storage="packed"), clip_norm=1.0), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads)

    step(model, optimizer, jnp.ones((4, 3)))
    before = jax.device_get(nnx.as_pure((nnx.state(model), optimizer.opt_state)))
    step(model, optimizer, jnp.full((4, 3), jnp.nan))
    after = jax.device_get(nnx.as_pure((nnx.state(model), optimizer.opt_state)))
    same_bits((after[0], after[1].inner), (before[0], before[1].inner))
    assert health(after[1], nnx.as_pure(nnx.state(model))).last_bad == "bias"
    step(model, optimizer, jnp.ones((4, 3)))
    assert int(nnx.as_pure(optimizer.opt_state).inner[0].count) == 2


@pytest.mark.parametrize("name", ["carried", "carried outside"])
def test_narrow_parameters_keep_their_remainders(name):
    inner = snr_adam.adamw(0.1, storage="packed")
    tx = {
        "carried": lambda: guard(snr_adam.carry_remainder(inner)),
        "carried outside": lambda: snr_adam.carry_remainder(guard(inner)),
    }[name]()
    p = jnp.asarray([1.0, -2.0, 0.3], jnp.bfloat16)
    step, g = trainer(tx, cases.quick_jit), jnp.asarray([0.5, 1.0, -1.0], jnp.bfloat16)
    first = step(p, tx.init(p), g)
    second = step(*first, g.at[1].set(jnp.nan))
    whole = [snr_adam.precision.whole_weights(x, s.inner if name == "carried" else s) for x, s in (first, second)]
    same_bits((second[0], whole[1]), (first[0], whole[0]))
    assert not np.array_equal(p, first[0])


@pytest.mark.parametrize(
    ("dtype", "storage", "most"),
    [("float32", "packed", 30), ("float32", "float32", 46), ("float32", "bfloat16", 34), ("bfloat16", "packed", 22)],
)
@pytest.mark.parametrize("leaves", [1, 16])
def test_clipping_and_skipping_cost_one_read_of_the_gradients(dtype, storage, most, leaves):
    """Bytes per parameter of the whole step, parameters and state donated. Optax's chain moves 78 and copies 4."""
    size = 2**18
    shapes = {str(i): jax.ShapeDtypeStruct((size // leaves,), dtype) for i in range(leaves)}
    tx = guard(snr_adam.adamw(1e-3, storage=storage), clip_norm=1.0)
    step = jax.jit(trainer(tx).__wrapped__, donate_argnums=(0, 1))
    made = step.lower(shapes, jax.eval_shape(tx.init, shapes), shapes).compile()
    assert made.cost_analysis()["bytes accessed"] / size <= most
    assert made.memory_analysis().temp_size_in_bytes <= 4096


def test_its_state_is_a_fixed_point_and_can_be_exported():
    tx = guard(snr_adam.adamw(0.1), clip_norm=1.0, max_consecutive=5)
    p, state = params(), tx.init(params())
    step = trainer(tx)
    out = jax.eval_shape(step, p, state, p)
    assert jax.tree.map(lambda x: x.aval, state) == jax.tree.map(lambda x: jax.typeof(x), out[1])
    with contextlib.suppress(ValueError):  # another test may have
        jax.export.register_namedtuple_serialization(optax.EmptyState, serialized_name="optax.EmptyState")
    data = jax.export.export(step)(p, state, p).serialize()
    same_bits(jax.export.deserialize(data).call(p, state, p), step(p, state, p))


def test_mixed_dtypes_and_leaves_that_are_no_numbers(x64):
    """Each leaf is cut off at its own limit; integers are passed on."""
    tree = {"narrow": jnp.full(2, 3e38, "float32"), "wide": jnp.full(2, 1.0, "float64"), "whole": jnp.arange(2)}
    tx = guard(optax.sgd(1.0), clip_norm=1.0)
    update = cases.quick_jit(tx.update)
    updates, state = update(tree, tx.init(tree), tree)
    np.testing.assert_allclose(updates["narrow"], -(0.5**0.5), rtol=1e-6)
    assert [str(updates[x].dtype) for x in ("narrow", "wide")] == ["float32", "float64"]
    _, state = update({**tree, "wide": jnp.asarray([0.0, jnp.inf])}, state, tree)
    assert health(state, tree).last_bad == "wide"


def test_init_on_shapes():
    tx = guard(snr_adam.adam(0.1))
    abstract = tx.init(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tx.init(jnp.zeros(3))
    )


def test_none_masked_complex_and_empty_leaves():
    tree = {"none": None, "z": jnp.asarray([1 + 1j, -2j]), "masked": optax.MaskedNode(), "half": jnp.ones(2, "float16")}
    tx = guard(snr_adam.adam(0.1), clip_norm=0.1)
    update = cases.quick_jit(tx.update)
    _, state = update(tree, tx.init(tree), tree)
    np.testing.assert_allclose(state.norm, np.sqrt(1 + 1 + 4 + 1 + 1), rtol=1e-6)
    bad = {**tree, "z": jnp.asarray([1 + 1j, complex(0, jnp.inf)])}
    _, after = update(bad, state, tree)
    same_bits(after.inner, state.inner)
    assert health(after, tree).last_bad == "z"
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert int(state.skipped) == 0


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "packed", Cast(mu="float16")])
def test_what_was_decoded_encodes_to_the_same_bits(storage):
    """The law of storages that a held step rests on, over bit patterns of every size."""
    bits = np.random.default_rng(0).integers(0, 2**32, (2, 100_000), dtype=np.uint32)
    mu, nu = (jnp.asarray(x) for x in bits.view(np.float32))
    mu, nu = jnp.where(jnp.abs(mu) < 1e30, mu, 1.0), jnp.where(jnp.abs(nu) < 1e30, jnp.abs(nu), 1.0)
    rest = snr_adam.storage.resolve(storage)

    def dither(shape, stream, seed=0):
        return jnp.asarray(np.random.default_rng(seed + stream).integers(0, 2**32, shape, dtype=np.uint32))

    stored = rest.encode(mu, nu, dither)
    again = rest.encode(*rest.decode(*stored, jnp.float32), functools.partial(dither, seed=7))
    same_bits(again, stored)


@pytest.mark.parametrize("inner", [None, 1.0])
@pytest.mark.parametrize("outer", [None, 1.0, 3.0])
def test_a_guard_in_a_guard_clips_to_the_shorter_and_skips_for_both(inner, outer):
    clips = [x for x in (inner, outer) if x is not None]
    nested = guard(guard(snr_adam.adam(0.1), clip_norm=inner), clip_norm=outer, max_consecutive=2)
    once = guard(snr_adam.adam(0.1), clip_norm=min(clips) if clips else None)
    grads = [jnp.asarray([3.0, -4.0]), jnp.asarray([jnp.nan, 1.0]), jnp.asarray([0.3, 0.1]), jnp.asarray([5.0, 12.0])]
    w = {"nested": jnp.ones(2), "once": jnp.ones(2)}
    states = {"nested": nested.init(w["nested"]), "once": once.init(w["once"])}
    for g in grads:
        for name, tx in (("nested", nested), ("once", once)):
            u, states[name] = cases.quick_jit(tx.update)(g, states[name], w[name])
            w[name] = optax.apply_updates(w[name], u)
        np.testing.assert_allclose(w["nested"], w["once"], rtol=1e-5)
    assert states["nested"].skipped == states["once"].skipped == 1
    assert states["nested"].inner.inner[0].count == 3
    for _ in range(3):  # the outer one holds: what the inner one would take is not taken either
        u, states["nested"] = cases.quick_jit(nested.update)(grads[1], states["nested"], w["nested"])
    before = states["nested"].inner
    u, states["nested"] = cases.quick_jit(nested.update)(grads[0], states["nested"], w["nested"])
    np.testing.assert_array_equal(u, 0)
    jax.tree.map(np.testing.assert_array_equal, states["nested"].inner, before)


def forwards(tx):
    """A user's wrapper."""

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


WRAPPED = {
    "observe": lambda tx: guard(snr_adam.observe(tx), clip_norm=1.0),
    "inject_hyperparams": lambda tx: guard(optax.inject_hyperparams(snr_adam.adamw)(1e-3), clip_norm=1.0),
    "carry_remainder": lambda tx: guard(snr_adam.carry_remainder(tx), clip_norm=1.0),
    "a chain": lambda tx: guard(optax.chain(scale_by_snr(), optax.scale_by_learning_rate(1e-3)), clip_norm=1.0),
    "a user's": lambda tx: guard(forwards(tx), clip_norm=1.0),
    "inside observe": lambda tx: snr_adam.observe(guard(tx, clip_norm=1.0)),
    "rmsprop with momentum": lambda tx: guard(snr_adam.rmsprop(1e-3, momentum=0.9), clip_norm=1.0),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_no_wrapper_costs_a_copy_of_the_state(name):
    """The step takes the guard's verdict in, whatever lies between: 4 to 8 bytes per parameter if it did not."""
    tx, size = WRAPPED[name](snr_adam.adamw(1e-3)), 4096
    p = jax.ShapeDtypeStruct((size, size), jnp.float32)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(p, jax.eval_shape(tx.init, p), p).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.02 * size**2
