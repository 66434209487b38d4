"""Sudden large gradients and losses are skipped or clipped, good steps are taken, and a new level is learnt."""

import functools
import math
import pickle

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam import Spikes, guard, health
from snr_adam.spikes import Usual, nothing_yet

STEPS, BAD = 400, (130, 131, 200, 310, 399)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


@functools.cache
def program(tx):
    """All steps in one program; the gradients that are given pull back towards 0, as a loss would."""

    def step(carry, given):
        params, state = carry
        updates, new = tx.update(jax.tree.map(lambda g, p: g + 0.1 * p, given, params), state, params)
        return (optax.apply_updates(params, updates), new), new.spikes - state.spikes

    return cases.quick_jit(lambda carry, gradients: jax.lax.scan(step, carry, gradients))


def train(tx, gradients, carry=None):
    """Parameters and state after all steps, and which of them were spikes; gradients are a stack."""
    params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
    carry, spikes = program(tx)((params, tx.init(params)) if carry is None else carry, gradients)
    return carry, np.flatnonzero(spikes)


def noisy(seed=0):
    """Gradients of a falling length, with the noise of small batches."""
    rng = np.random.default_rng(seed)
    size = (1 + 4 * np.exp(-np.arange(STEPS) / 60)) * np.exp(0.2 * rng.standard_t(6, STEPS))
    return {
        "w": (rng.normal(size=(STEPS, 8, 4)) * size[:, None, None]).astype(np.float32),
        "b": (rng.normal(size=(STEPS, 4)) * size[:, None]).astype(np.float32),
    }


def planted(gradients, at=BAD, by=50.0):
    factor = np.ones(STEPS, np.float32)
    factor[list(at)] = by
    return {"w": gradients["w"] * factor[:, None, None], "b": gradients["b"] * factor[:, None]}


def test_five_bad_batches_are_skipped_and_training_is_as_without_them():
    """All five, no good one, in eight runs; one of them stopped and resumed: the same bits."""
    tx = guard(snr_adam.adamw(0.01, storage="packed"), clip_norm=20.0, spikes=Spikes())
    for seed in range(8):
        (params, state), at = train(tx, planted(noisy(seed)))
        assert at.tolist() == list(BAD)
    without = jax.tree.map(lambda x: np.delete(x, BAD, axis=0), noisy(seed))
    (want, plain), _ = train(guard(snr_adam.adamw(0.01, storage="packed"), clip_norm=20.0), without)
    assert bits((params, state.inner)) == bits((want, plain.inner))
    assert (int(state.skipped), int(state.count), int(state.spikes)) == (0, STEPS - 5, 5)
    said = str(health(state, params))
    assert said.startswith("no non-finite step skipped; 5 spikes in norm or loss, skipped or clipped; gradient norm ")
    half = pickle.loads(
        pickle.dumps(jax.device_get(train(tx, {k: x[:131] for k, x in planted(noisy(seed)).items()})[0]))
    )
    again, _ = train(tx, {k: x[131:] for k, x in planted(noisy(seed)).items()}, half)
    assert bits(again) == bits((params, state))


def judged(spikes, norms, values=None):
    """Every verdict on these norms and losses."""

    def step(usual, given):
        seen = spikes.judge(usual, *given, True)
        return seen.usual, (seen.spike, seen.limit)

    norms = jnp.asarray(norms, jnp.float32)
    values = None if values is None else jnp.asarray(values, jnp.float32)
    return cases.quick_jit(lambda: jax.lax.scan(step, nothing_yet(), (norms, values)))()


def test_a_judgement_is_its_equation():
    """In float64, written from the docstring."""
    rng = np.random.default_rng(3)
    norms, values = np.exp(0.3 * rng.normal(size=200)), 2 + 0.1 * rng.normal(size=200)
    norms[[60, 61, 150]] *= 40
    values[[80, 199]] = 9.0
    spikes = Spikes(z=5.0, warmup=40, decay=0.95)
    usual, (at, limits) = judged(spikes, norms, values)
    for row, (x, least) in enumerate(((np.log(norms), lambda m: 0.02), (values, lambda m: 0.02 * abs(m)))):
        mean, variance, found = x[0], 0.0, [False]
        ends = []
        for n in range(2, 201):
            w = max(math.sqrt(variance), least(mean))
            found.append(x[n - 1] - mean > 5 * w and n > 40)
            ends.append(mean + 5 * w)
            d, c = np.clip(x[n - 1] - mean, -5 * w, 5 * w), 0.05 / (1 - 0.95**n)
            mean, variance = mean + c * d, (1 - c) * (variance + c * d * d)
        np.testing.assert_allclose([usual.mean[row], usual.variance[row]], [mean, variance], rtol=2e-5)
        assert np.flatnonzero(found).tolist() == [[60, 61, 150], [80, 199]][row]
        if row == 0:
            np.testing.assert_allclose(limits[60], np.exp(ends[59]), rtol=1e-4)
    assert np.flatnonzero(at).tolist() == [60, 61, 80, 150, 199]
    assert np.isinf(limits).sum() == 195


def test_a_new_level_is_taken_after_as_many_steps_as_the_docstring_says():
    """At most three steps later, whatever the spread, and for a rise to 1e30 too; nothing is a spike before."""
    noise = np.random.default_rng(1).normal(size=1000)
    for spread, rise in ((0.0, 50.0), (0.05, 50.0), (0.1, 3.0), (0.1, 50.0), (0.1, 1e30), (0.3, 1e4)):
        norms = np.exp(spread * noise)
        norms[500:] *= rise
        at = np.flatnonzero(judged(Spikes(), norms)[1][0])
        least, f = 4 * max(spread, 0.02), math.sqrt(0.98 * (1 + 0.02 * 16))
        assert at[0] == 500
        assert at[-1] < 500 + math.log(math.log(rise) / least) / math.log(f) + 3
    assert not judged(Spikes(), np.exp(0.01 * np.arange(1000.0)))[1][0].any()  # a trend is no spike
    assert not judged(Spikes(), np.ones(300))[1][0].any()


def test_what_is_learnt_and_what_is_not():
    """Nothing from gradients of zeros, from losses that are not finite, or from steps that are not finite or held."""
    tx = guard(optax.sgd(1.0), max_consecutive=2, spikes=Spikes(warmup=2, z=3.0))
    update, w = cases.quick_jit(tx.update), jnp.ones(2)
    state = tx.init(w)
    ones, nan = jnp.ones(2), jnp.asarray([1.0, jnp.nan])
    for _ in range(3):
        _, state = update(ones, state, w, value=jnp.float32(2.0))
    assert np.array_equal(state.usual.seen, [3, 3])
    for g, value in ((jnp.zeros(2), jnp.nan), (nan, 2.0)):
        u, after = update(g, state, w, value=jnp.float32(value))
        assert bits(after.usual) == bits(state.usual)
        np.testing.assert_array_equal(u, 0)
    u, after = update(ones, after, w, value=jnp.float32(5.0))  # a spike, between two steps that are not finite
    assert (int(after.consecutive), int(after.skipped), int(after.spikes), int(after.count)) == (1, 1, 1, 3)
    np.testing.assert_array_equal(u, 0)
    _, after = update(nan, after, w, value=jnp.float32(2.0))
    assert bool(after.holding)
    _, held = update(100 * ones, after, w, value=jnp.float32(2.0))
    assert int(held.spikes) == 1
    assert bits(held.usual) == bits(after.usual)
    u, freed = update(100 * ones, held._replace(holding=jnp.asarray(False)), w, value=jnp.float32(2.0))
    assert (bool(freed.holding), int(freed.spikes)) == (False, 2)


@pytest.mark.parametrize("make", [lambda: optax.sgd(1.0), lambda: snr_adam.adamw(0.1)])
def test_clipped_instead(make):
    """To the longest norm that is no spike; where the loss spikes, to the usual one. The step is taken."""
    spikes = Spikes(z=4.0, warmup=3, then="clip")
    tx, plain, w = guard(make(), clip_norm=3.0, spikes=spikes), make(), jnp.ones(2)
    update, ones = cases.quick_jit(tx.update), jnp.asarray([0.6, 0.8])
    state, inner = tx.init(w), plain.init(w)
    for g, value, clipped in (
        (ones, 1.0, 1.0),
        (ones, 1.0, 1.0),
        (ones, 1.0, 1.0),
        (50 * ones, 1.0, math.exp(4 * 0.02) / 50),
        (jnp.zeros(2), 9.0, 1.0),
    ):
        u, state = update(g, state, w, value=jnp.float32(value))
        v, inner = plain.update(g * jnp.float32(clipped), inner, w)
        np.testing.assert_allclose(u, v, rtol=1e-4)
    usual = float(jnp.exp(state.usual.mean[0]))
    u, after = update(2 * ones, state, w, value=jnp.float32(jnp.inf))
    v, _ = plain.update(usual * ones, inner, w)
    np.testing.assert_allclose(u, v, rtol=1e-4)
    assert (int(after.skipped), int(after.spikes), int(after.count)) == (0, 3, 6)


def test_a_guard_in_a_guard_learns_nothing_from_what_the_other_skips():
    tx = guard(guard(optax.sgd(1.0), spikes=Spikes(warmup=3)), spikes=Spikes(warmup=3))
    update, w = cases.quick_jit(tx.update), jnp.ones(2)
    state = tx.init(w)
    for _ in range(4):
        _, state = update(w, state, w)
    _, after = update(100 * w, state, w)
    assert bits(after.inner) == bits(state.inner)
    assert int(after.spikes) == 1


def test_a_clip_norm_may_be_a_schedule_of_the_steps_taken():
    """That of a skipped step serves the next one; the numbers are those of the clip norm at each step."""
    schedule = optax.linear_schedule(1.0, 0.25, 3)
    tx, w = guard(optax.sgd(1.0), clip_norm=schedule), jnp.ones(2)
    update, state, g = cases.quick_jit(tx.update), tx.init(w), jnp.asarray([3.0, 4.0])
    lengths = []
    for step in range(5):
        u, state = update(g * jnp.nan if step == 2 else g, state, w)
        lengths.append(float(jnp.linalg.norm(u)))
    np.testing.assert_allclose(lengths, [1.0, 0.75, 0.0, 0.5, 0.25], rtol=1e-6)
    with pytest.raises(ValueError, match=r"clip_norm: the value of schedule .* is -1.0: must be a finite number > 0"):
        guard(optax.sgd(1.0), clip_norm=lambda count: -1.0).update(g, state, w)


@pytest.mark.parametrize("then", ["skip", "clip"])
def test_no_byte_moves_for_it(then):
    """Beside a guard that clips: the norm is there. Nor is an array kept."""
    size, p = 2**18, jax.ShapeDtypeStruct((2**18,), jnp.float32)

    def cost(tx):
        def step(params, state, grads, value):
            updates, state = tx.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        made = jax.jit(step, donate_argnums=(0, 1)).lower(
            p, jax.eval_shape(tx.init, p), p, jax.ShapeDtypeStruct((), "f4")
        )
        made = made.compile()
        return made.cost_analysis()["bytes accessed"] / size, made.memory_analysis().temp_size_in_bytes

    plain, watched = (cost(guard(snr_adam.adamw(1e-3), clip_norm=1.0, spikes=x)) for x in (None, Spikes(then=then)))
    assert watched[0] <= plain[0] + 0.05
    assert watched[1] <= plain[1] + 4096


def test_the_derivative_of_a_clipped_step_is_that_of_its_differences(x64):
    def end(scale):
        tx = guard(optax.sgd(0.1), spikes=Spikes(z=2.0, warmup=2, then="clip"))

        def step(carry, k):
            w, state = carry
            u, state = tx.update(scale * k * w**2, state, w)
            return (optax.apply_updates(w, u), state), None

        w = jnp.ones(3)
        (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), jnp.asarray([1.0, 1.1, 0.0, 1.3, 20.0, 1.0]))
        return jnp.sum(w), state.spikes

    h = 1e-3  # the history is float32
    slope, spikes = cases.quick_jit(jax.grad(end, has_aux=True))(0.5)
    assert int(spikes) == 2
    high, low = (cases.quick_jit(end)(0.5 + x)[0] for x in (h, -h))
    np.testing.assert_allclose(slope, (high - low) / (2 * h), rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Spikes(z=1.0), ValueError, "Spikes: z=1.0: must be a finite number >= 2"),
        (lambda: Spikes(decay=1.0), ValueError, "Spikes: decay=1.0: must be in"),
        (lambda: Spikes(warmup=0), ValueError, "Spikes: warmup=0: must be an int >= 1"),
        (lambda: Spikes(then="drop"), ValueError, "Spikes: then='drop': must be 'skip' or 'clip'"),
        (lambda: guard(optax.sgd(0.1), spikes=4.0), TypeError, r"guard: spikes=4.0: give snr_adam.Spikes\(\)"),
        (
            lambda: guard(optax.sgd(0.1), spikes=Spikes()).update(
                jnp.ones(1), guard(optax.sgd(0.1)).init(jnp.ones(1)), value=jnp.ones(3)
            ),
            ValueError,
            r"guard: value has shape \(3,\): must be one number, the loss",
        ),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_one_may_be_asked_for_in_the_middle_of_a_run():
    """The state is the same with and without; the warm-up begins then."""
    w = jnp.ones(2)
    _, state = guard(optax.sgd(0.1)).update(w, guard(optax.sgd(0.1)).init(w), w)
    _, after = guard(optax.sgd(0.1), spikes=Spikes()).update(w, state, w)
    assert isinstance(after.usual, Usual)
    assert np.array_equal(after.usual.seen, [1, 0])
    assert jax.tree.structure(after) == jax.tree.structure(state)
