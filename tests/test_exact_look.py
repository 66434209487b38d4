"""Signal, noise and their ratio are those of the step looked at, with that step's own weights: exactly, from the first.

Where there is no noise the truth is known: a constant gradient is its own average, and in full-batch descent m^ and v^
of the state say what there is.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import snr_adam
from snr_adam.telemetry._averages import Last

ONES = jnp.ones((3, 4))


def seen(tx, params, grads):
    """The last look after every step, rows by name, each (steps, L); and every state's own moments."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), (observed(state).last, observed(state).inner)

    def observed(state):
        return next(x for x in jax.tree.leaves(state, is_leaf=is_observed) if is_observed(x))

    def is_observed(x):
        return isinstance(x, snr_adam.telemetry.ObserveState)

    rows, inner = cases.fast_jit(lambda p, gs: jax.lax.scan(step, (p, tx.init(p)), gs)[1])(params, grads)
    return Last(*np.moveaxis(np.asarray(rows, float), 1, 0)), inner


def is_linear(name) -> bool:
    """Whether the preset's signal averages gradients and its noise their squares."""
    return name not in ("adopt", "rmsprop", "adabelief", "yogi", "adamax", "adamaxw", "lion")


BRIEF = [(10, 0.9999)]
LONG = [(every, b2) for every in (1, 3, 10) for b2 in (0.95, 0.999, 0.9999) if (every, b2) not in BRIEF]


@pytest.mark.parametrize(("every", "b2"), [*BRIEF, *(pytest.param(*each, marks=pytest.mark.slow) for each in LONG)])
def test_a_constant_gradient_is_its_own_signal_and_noise(every, b2):
    """At every step from the first, for every preset with those moments and for Optax's."""
    brief = ("adamw", "amsgrad", "ademamix", "centered_adam") if (every, b2) in BRIEF else cases.PRESETS
    made = {name: cases.PRESETS[name][0] for name in brief if is_linear(name)}
    made |= {
        f"optax.{name}": getattr(optax, name) for name in ("adam", "adamw", "nadam")[: 1 if len(brief) == 4 else 3]
    }
    txs = {name: make(1e-3, **({"b": b2} if name == "centered_adam" else {"b2": b2})) for name, make in made.items()}
    txs |= {"lion": snr_adam.lion(1e-3), "optax.lion": optax.lion(1e-3), "optax.sgd": optax.sgd(1e-3, momentum=0.9)}
    txs |= {"packed": snr_adam.adamw(1e-3, b2=b2, storage="packed")}
    for name, tx in txs.items():
        last, _ = seen(snr_adam.observe(tx, every=every), ONES, jnp.ones((60, *ONES.shape)))
        near = {"packed": 4e-2, "yogi": 2e-3}.get(name, 1e-6)
        signal, noise = np.sqrt(last.signal_sq / ONES.size), np.sqrt(last.noise_sq / ONES.size)
        np.testing.assert_allclose(signal, 1, rtol=near, err_msg=name)
        np.testing.assert_allclose(noise, 1, rtol=near, err_msg=name)
        np.testing.assert_allclose(signal / noise, 1, rtol=near, err_msg=name)


@functools.cache
def digits():
    data = load_digits()
    return jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)


def full_batch(tx, steps: int, looks: int, spoil: bool):
    """Full-batch descent of a small network; pseudo_snr as reported and as the moments have it, `looks` times."""
    x, y = digits()
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(64, 16)) / 8, "float32"),
        "b": jnp.asarray(rng.normal(size=(16, 10)) / 4, "float32"),
    }

    def loss(p):
        scores = jax.nn.relu(x @ p["a"]) @ p["b"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y))

    def step(i, carry):
        p, state = carry
        g = jax.grad(loss)(p)
        g = jax.tree.map(lambda g: jnp.where(spoil & (i % 7 == 3), jnp.nan, g), g)
        u, state = tx.update(g, state, p)
        return optax.apply_updates(p, u), state

    run = cases.fast_jit(lambda carry, first: jax.lax.fori_loop(first, first + steps // looks, step, carry))
    carry, found = (params, tx.init(params)), []
    for k in range(looks):
        carry = run(carry, k * (steps // looks))
        found.append((snr_adam.report(carry[1]), jax.device_get(carry[1])))
    return found


def by_hand(state):
    """|m^| / sqrt(sum v^) per leaf, in float64, from the moments in the state."""
    inner = next(x for x in jax.tree.leaves(state, is_leaf=is_moments) if is_moments(x))
    t = int(inner.count)
    m, v = (jax.tree.map(lambda x: np.asarray(x, float), x) for x in (inner.mu, inner.nu))
    norms = zip(jax.tree.leaves(m), jax.tree.leaves(v), strict=True)
    ratios = [np.sqrt(np.sum((m / (1 - 0.9**t)) ** 2) / np.sum(v / (1 - 0.999**t))) for m, v in norms]
    return t, ratios


def is_moments(x) -> bool:
    return isinstance(x, (snr_adam.transform.ScaleBySnrState, optax.ScaleByAdamState))


GUARDED = {
    "plain": (lambda: snr_adam.observe(snr_adam.adam(3e-3), every=10), False),
    "optax.adam": (lambda: snr_adam.observe(optax.adam(3e-3)), False),
    "guard outside": (lambda: snr_adam.guard(snr_adam.observe(snr_adam.adam(3e-3)), clip_norm=0.3), True),
    "guard inside": (lambda: snr_adam.observe(snr_adam.guard(snr_adam.adam(3e-3), clip_norm=0.3)), True),
}


@pytest.mark.parametrize("name", GUARDED)
def test_full_batch_descent_shows_what_its_moments_are(name):
    """Also clipped, in both orders, with every seventh step not finite."""
    make, spoil = GUARDED[name]
    for report, state in full_batch(make(), 300, 6, spoil):
        t, ratios = by_hand(state)
        assert t == report.step
        np.testing.assert_allclose(report.columns["pseudo_snr"], ratios, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUARDED)
def test_full_batch_descent_shows_what_its_moments_are_for_long(name):
    make, spoil = GUARDED[name]
    for report, state in full_batch(make(), 3000, 60, spoil):
        np.testing.assert_allclose(report.columns["pseudo_snr"], by_hand(state)[1], rtol=1e-5)


NOISY = {
    "adamw": lambda: snr_adam.adamw(1e-3),
    "optax.adam": lambda: optax.adam(1e-3),
    "b1 = b2": lambda: snr_adam.adam(1e-3, 0.95, 0.95),
    "a schedule of b1": lambda: snr_adam.adam(1e-3, b1=lambda t: jnp.where(t < 20, 0.8, 0.95)),
    "packed": lambda: snr_adam.adamw(1e-3, storage="packed"),
}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", NOISY)
def test_pure_noise_stands_on_its_floor(name, every):
    """At steps 2 to 100; what a look shows is older than the step only where none was due."""
    size = 40_000
    grads = jax.random.normal(jax.random.key(0), (100, size))
    last, _ = seen(snr_adam.observe(NOISY[name](), every=every), jnp.zeros(size), grads)
    ratio = np.sqrt(last.signal_sq / last.noise_sq)[1:, 0]
    floor = np.sqrt(last.floor_sq)[1:, 0]
    assert np.all(abs(ratio / floor - 1) < 5 * np.sqrt(2 / size) + 0.01)
