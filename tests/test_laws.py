"""What holds for every numerator over every denominator, and for every optimizer by name.

Types are checked by tracing alone, which is quick enough for all pairs; numbers for every preset.
"""

import dataclasses
import functools
import inspect

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam import scale_by_snr

PAIRS = {
    f"{signal}/{noise}": functools.partial(scale_by_snr, cases.SIGNALS[signal], cases.NOISES[noise])
    for signal in cases.SIGNALS
    for noise in cases.NOISES
    if cases.go_together(cases.SIGNALS[signal], cases.NOISES[noise])
}
PRESETS = {name: functools.partial(preset, 0.1) for name, (preset, _) in cases.PRESETS.items()}
ALL = {**PAIRS, **PRESETS}
ALL |= {f"storage {name}": functools.partial(scale_by_snr, storage=x) for name, x in cases.STORAGES.items()}
# under 64 bits each estimator once: the numerators over RMS, the denominators under an EMA, and the presets
SOME = [name for name in ALL if name in PRESETS or name.startswith(("ema/", "storage ")) or name.endswith("/rms")]


def mixed_tree():
    """A leaf of every real dtype; float64 too where there is one."""
    wide = jnp.result_type(float)
    return {
        **{dtype: jnp.ones((2, 3), dtype) for dtype in ("float32", "bfloat16", "float16")},
        "wide": jnp.ones((), wide),
        "empty": jnp.zeros((0, 3), wide),
        "none": None,
    }


def check_types(tx):
    """A conditional step in a scan keeps every type: `scan` and `cond` refuse a state whose types move.

    So a jitted step is never traced twice.
    """
    params = mixed_tree()

    def step(state, grads):
        def skip(grads, state):
            return jax.tree.map(jnp.zeros_like, grads), state

        def take(grads, state):
            return tx.update(grads, state, params)

        return jax.lax.cond(jnp.isfinite(grads["wide"]), take, skip, grads, state)[::-1]

    several = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    before, (after, updates) = jax.eval_shape(
        lambda s: (tx.init(params), jax.lax.scan(step, tx.init(params), s)), several
    )
    assert jax.tree.leaves(before)
    assert after == before  # weak types included
    assert not any(x.weak_type for x in jax.tree.leaves(after))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(several), strict=True):
        assert (u.shape, u.dtype) == (g.shape, g.dtype)


@pytest.mark.parametrize("name", ALL)
def test_types_are_a_fixed_point(name, strict_promotion):
    check_types(ALL[name]())


@pytest.mark.parametrize("name", SOME)
def test_types_are_a_fixed_point_in_64_bits(name, x64, strict_promotion):
    check_types(ALL[name]())


@pytest.mark.parametrize("name", PRESETS)
def test_one_trace_and_the_same_numbers_everywhere(name, strict_promotion):
    """Repeated, donated, scanned and mapped steps are one step, traced once."""
    tx = PRESETS[name]()
    chex.clear_trace_counter()
    params, grads = jnp.asarray([1.0, -2.0]), jnp.asarray([[0.5, -3.0], [0.25, 1.0], [-4.0, 0.125]])

    def step(state, g):
        return tx.update(g, state, params)[::-1]

    once = cases.quick_jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    state, updates = tx.init(params), []
    for g in grads:
        given, (state, u) = state, once(state, g)
        assert given[0].count.is_deleted()
        updates.append(u)
    seeds = jnp.stack([grads, grads[::-1]])
    mapped = cases.quick_jit(jax.vmap(lambda grads: jax.lax.scan(step, tx.init(params), grads)[1]))(seeds)
    np.testing.assert_allclose(mapped[0], jnp.stack(updates), rtol=1e-5)
    assert not np.allclose(mapped[0], mapped[1])


DECAYS = {
    name: next(b for b in ("b1", "b", "decay") if b in inspect.signature(make).parameters)
    for name, make in PRESETS.items()
}


@pytest.mark.parametrize("name", PRESETS)
def test_mapped_over_decays(name):
    """A decay may be a traced number: all runs of a sweep in one program."""
    g = jnp.asarray([0.5, -3.0])

    def last(decay):
        tx = PRESETS[name](**{DECAYS[name]: decay})
        state = tx.init(g)
        for scale in (1.0, -0.3, 0.1):
            updates, state = tx.update(scale * g, state, g)
        return updates

    decays = [0.5, 0.9, 0.99]
    swept = cases.quick_jit(jax.vmap(last))(jnp.asarray(decays))
    np.testing.assert_allclose(swept, jnp.stack([last(b) for b in decays]), rtol=2e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_no_nan_is_ever_formed(name):
    """Also of zeros, and also where it would be thrown away: `jax_debug_nans` has nothing to stop at."""
    g = jnp.asarray([0.0, 0.5, -3.0])
    tx = PRESETS[name]()
    with jax.debug_nans(True):
        state = tx.init(g)
        for _ in range(2):
            _, state = tx.update(g, state, g)


@pytest.mark.parametrize(
    "name", [name for name in cases.SIGNALS if hasattr(cases.SIGNALS[name], "floor") and name != "sign"]
)
def test_the_floor_is_the_sum_of_squared_weights(name, x64):
    """An impulse at step k, in element k, shows the weight that gradient k has in the signal of every later step."""
    signal, steps = cases.SIGNALS[name], 60
    weights, _, _ = cases.run(scale_by_snr(signal, cases.NOISES["unit"]), jnp.zeros(steps), jnp.eye(steps), cases.QUICK)
    floors = [signal.floor(t) for t in range(1, steps + 1)]
    np.testing.assert_allclose(floors, np.sum(np.square(weights), axis=1), rtol=1e-12)


def test_the_floor_of_a_sign_is_one():
    """A sign is never smaller for being noise."""
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(60, 50)), jnp.float32)
    updates, _, _ = cases.run(scale_by_snr(cases.SIGNALS["sign"], cases.NOISES["unit"]), noise[0], noise, cases.QUICK)
    assert cases.SIGNALS["sign"].floor(3) == np.mean(np.square(updates)) == 1.0


def without_units(estimator):
    """The estimator without the numbers that carry the gradient's unit."""
    units = {"eps", "eps_root", "initial"} & {field.name for field in dataclasses.fields(estimator)}
    return dataclasses.replace(estimator, **dict.fromkeys(units, 0.0))


@pytest.mark.parametrize("noise", [name for name in cases.NOISES if name not in ("unit", "adapted")])
def test_the_ratio_has_no_unit(noise):
    """Gradients in a unit 2^20 times larger or smaller give the same bits, once nothing is added to the noise."""
    tx = scale_by_snr(cases.signal_for(noise), without_units(cases.NOISES[noise]))
    grads = cases.stacked(20, dtype=jnp.float32)["block"][0]
    scan = cases.quick_jit(lambda g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1])
    skip = 6 if noise == "rectified" else 1 if noise == "deviation_debiased" else 0  # no ratio, or x / 0, until then
    expected = np.asarray(scan(grads))[skip:]
    assert np.isfinite(expected).all()
    for scale in (2.0**20, 2.0**-20):
        np.testing.assert_array_equal(scan(scale * grads)[skip:], expected)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "adamh"])
def test_the_step_is_proportional_to_the_learning_rate(name):
    preset, _ = cases.PRESETS[name]
    g = jnp.asarray([0.5, -3.0])
    one, two = (preset(rate).update(g, preset(rate).init(g), g)[0] for rate in (0.25, 0.5))
    np.testing.assert_array_equal(2 * one, two)


PEAK = {snr_adam.adamc: {"peak": 1.0}}  # a schedule needs it
RATES = {
    "number": lambda preset: preset(0.0),
    "array": lambda preset: preset(jnp.float32(0.0)),
    "schedule": lambda preset: preset(lambda count: jnp.zeros(()) * count, **PEAK.get(preset, {})),
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_learning_rate_of_zero_moves_nothing(name, rate):
    """Not even into NaN: a noise divided by such a rate is infinite."""
    tx = RATES[rate](cases.PRESETS[name][0])
    w = jnp.asarray([0.5, -3.0, 0.0])
    state = tx.init(w)
    for g in (w, 0 * w, 1e30 * w):
        updates, state = tx.update(g, state, w)
        np.testing.assert_array_equal(updates, 0)


@pytest.mark.parametrize("name", cases.NOISES)
def test_a_gradient_of_zero_moves_nothing(name):
    """Not at any step, and makes no NaN, whatever the noise of nothing is."""
    tx, zeros = scale_by_snr(cases.signal_for(name), cases.NOISES[name]), jnp.zeros((30, 3))
    updates, _, state = cases.run(tx, zeros[0], zeros)
    np.testing.assert_array_equal(updates, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def moments(dtype=jnp.float32):
    """m and v over nearly all exponents that a step can make, zeros among them."""
    rng = np.random.default_rng(0)
    m, v = (rng.normal(size=1000) * np.exp2(rng.uniform(-110, top, 1000)) for top in (50, 100))
    m[:3], v[:2] = 0, 0
    return jnp.asarray(m, dtype), jnp.asarray(abs(v), dtype)


@pytest.mark.parametrize("name", cases.STORAGES)
def test_what_was_decoded_encodes_to_the_same_bits(name):
    """Whatever the dither: so a step that is not taken changes nothing. Shapes and dtypes stay, decoded is float32."""
    storage, words = cases.STORAGES[name], jax.random.bits(jax.random.key(0), (4, 1000))
    m, v = moments()
    rest = storage.encode(m, v, lambda shape, stream: words[stream])
    dithers = [
        lambda *_: words[3],
        lambda *_: jnp.zeros(1000, jnp.uint32),
        lambda *_: jnp.full(1000, 2**32 - 1, "uint32"),
    ]
    decoded = storage.decode(*rest, jnp.float32)
    assert [(x.shape, x.dtype) for x in decoded] == [((1000,), jnp.float32)] * 2
    for dither in dithers:
        again = storage.encode(*decoded, dither)
        assert jax.tree.structure(again) == jax.tree.structure(rest)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(rest), strict=True):
            assert (x.shape, x.dtype) == ((1000,), y.dtype)
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", cases.STORAGES)
def test_what_was_decoded_is_what_was_encoded(name):
    """To the precision of the form, by every element, and zero exactly."""
    storage, (m, v) = cases.STORAGES[name], moments()
    words = jax.random.bits(jax.random.key(0), (3, 1000))
    decoded = storage.decode(*storage.encode(m, v, lambda shape, stream: words[stream]), jnp.float32)
    for x, y, part in zip(decoded, (m, v), ("mu", "nu"), strict=True):
        held = np.abs(y) <= 65504.0 if getattr(storage, part, None) == "float16" else np.full(1000, True)
        least = 2.0**-24 if getattr(storage, part, None) == "float16" else 0.0  # float16's smallest number
        np.testing.assert_allclose(x[held], y[held], rtol=0 if name == "float32" else 2.0**-7, atol=least)
        np.testing.assert_array_equal(x[np.asarray(y) == 0], 0)


def buffers(tree) -> list[int]:
    """Where the arrays of a state lie; an empty one lies nowhere."""
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if getattr(x, "size", 0)]


FRESH = {
    **PRESETS,
    **{f"storage {name}": functools.partial(snr_adam.adamw, 0.1, storage=x) for name, x in cases.STORAGES.items()},
    **{
        f"injected {name}": functools.partial(optax.inject_hyperparams(preset), 0.1)
        for name, (preset, _) in cases.PRESETS.items()
    },
    "accumulate": lambda: snr_adam.accumulate(snr_adam.adamw(0.1), 2),
    "guard": lambda: snr_adam.guard(snr_adam.adamw(0.1), 1.0),
    "observe": lambda: snr_adam.observe(snr_adam.adamw(0.1)),
    "carry_remainder": lambda: snr_adam.carry_remainder(snr_adam.adamw(0.1)),
    "all": lambda: snr_adam.carry_remainder(
        snr_adam.accumulate(snr_adam.guard(snr_adam.observe(snr_adam.adamw(0.1)), 1.0), 2)
    ),
}


def fresh(name):
    """An optimizer and its parameters."""
    return FRESH[name](), cases.tree(dtype=jnp.bfloat16 if name in ("carry_remainder", "all") else jnp.float32)


@pytest.mark.parametrize("name", FRESH)
def test_no_two_arrays_of_fresh_states_are_one_buffer(name):
    """Neither in one state nor in two, nor with the parameters: so any of them may be donated."""
    tx, params = fresh(name)
    states = [tx.init(params) for _ in range(2)]
    where = buffers((params, states))
    assert len(where) > 4
    assert len(set(where)) == len(where)


DONATED = (
    "accumulate",
    "guard",
    "observe",
    "carry_remainder",
    "all",
    "injected adamw",
    "injected lion",
    "storage packed",
)


@pytest.mark.parametrize("name", DONATED)
def test_two_fresh_states_are_donated_together(name):
    """Both are used up in one jitted step, which gives both the same."""
    tx, params = fresh(name)

    @functools.partial(cases.quick_jit, donate_argnums=(0, 1))
    def step(one, two):
        return [tx.update(params, state, params)[1] for state in (one, two)]

    states = [tx.init(params) for _ in range(2)]
    after = step(*states)
    assert all(x.is_deleted() for x in jax.tree.leaves(states) if x.size)
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_an_injected_decay_is_not_rounded_to_the_parameters():
    """In bfloat16 b2 = .999 is 1, and v stands still; also after two states were donated."""
    tx, w = optax.inject_hyperparams(snr_adam.adamw)(1e-3), jnp.ones(3, jnp.bfloat16)
    step = cases.quick_jit(lambda *states: [tx.update(w, state, w)[1] for state in states], donate_argnums=(0, 1))
    for state in step(tx.init(w), tx.init(w)):
        assert state.hyperparams["b2"] == np.float32(0.999)
        _, state = tx.update(0 * w, state, w)  # an average of 1 and 0, kept corrected
        np.testing.assert_allclose(state.inner_state[0].nu, 0.001 * 0.999 / (1 - 0.999**2), rtol=1e-4)
