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
import pytest

from snr_adam import scale_by_snr

PAIRS = {
    f"{signal}/{noise}": functools.partial(scale_by_snr, cases.SIGNALS[signal], cases.NOISES[noise])
    for signal in cases.SIGNALS
    for noise in cases.NOISES
}
PRESETS = {name: functools.partial(preset, 0.1) for name, (preset, _) in cases.PRESETS.items()}
ALL = {**PAIRS, **PRESETS}
# under 64 bits each estimator once: the numerators over RMS, the denominators under an EMA, and the presets
SOME = [name for name in ALL if name in PRESETS or name.startswith("ema/") or name.endswith("/rms")]


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

    once = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    state, updates = tx.init(params), []
    for g in grads:
        given, (state, u) = state, once(state, g)
        assert given[0].count.is_deleted()
        updates.append(u)
    seeds = jnp.stack([grads, grads[::-1]])
    mapped = jax.jit(jax.vmap(lambda grads: jax.lax.scan(step, tx.init(params), grads)[1]))(seeds)
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
    swept = jax.jit(jax.vmap(last))(jnp.asarray(decays))
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


@pytest.mark.parametrize("name", [name for name in cases.SIGNALS if name != "sign"])
def test_the_floor_is_the_sum_of_squared_weights(name, x64):
    """An impulse at step k, in element k, shows the weight that gradient k has in the signal of every later step."""
    signal, steps = cases.SIGNALS[name], 60
    weights, _, _ = cases.run(scale_by_snr(signal, cases.NOISES["unit"]), jnp.zeros(steps), jnp.eye(steps))
    floors = [signal.floor(t) for t in range(1, steps + 1)]
    np.testing.assert_allclose(floors, np.sum(np.square(weights), axis=1), rtol=1e-12)


def test_the_floor_of_a_sign_is_one():
    """A sign is never smaller for being noise."""
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(60, 50)), jnp.float32)
    updates, _, _ = cases.run(scale_by_snr(cases.SIGNALS["sign"], cases.NOISES["unit"]), noise[0], noise)
    assert cases.SIGNALS["sign"].floor(3) == np.mean(np.square(updates)) == 1.0


def without_units(estimator):
    """The estimator without the numbers that carry the gradient's unit."""
    units = {"eps", "eps_root", "initial"} & {field.name for field in dataclasses.fields(estimator)}
    return dataclasses.replace(estimator, **dict.fromkeys(units, 0.0))


@pytest.mark.parametrize("noise", [name for name in cases.NOISES if name != "unit"])
def test_the_ratio_has_no_unit(noise):
    """Gradients in a unit 2^20 times larger or smaller give the same bits, once nothing is added to the noise."""
    tx = scale_by_snr(cases.SIGNALS["ema"], without_units(cases.NOISES[noise]))
    grads = cases.stacked(20, dtype=jnp.float32)["block"][0]
    scan = jax.jit(lambda g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1])
    skip = 6 if noise == "rectified" else 1 if noise == "deviation_debiased" else 0  # no ratio, or x / 0, until then
    expected = np.asarray(scan(grads))[skip:]
    assert np.isfinite(expected).all()
    for scale in (2.0**20, 2.0**-20):
        np.testing.assert_array_equal(scan(scale * grads)[skip:], expected)


@pytest.mark.parametrize("name", PRESETS)
def test_the_step_is_proportional_to_the_learning_rate(name):
    preset, _ = cases.PRESETS[name]
    g = jnp.asarray([0.5, -3.0])
    one, two = (preset(rate).update(g, preset(rate).init(g), g)[0] for rate in (0.25, 0.5))
    np.testing.assert_array_equal(2 * one, two)


RATES = {
    "number": lambda preset: preset(0.0),
    "array": lambda preset: preset(jnp.float32(0.0)),
    "schedule": lambda preset: preset(lambda count: jnp.zeros(()) * count),
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
