"""What the ratio can be: with b1 = b2 the true signal-to-noise ratio in disguise, and how large it ever gets.

With one decay, m and v are mean and mean square under the same weights, so v = m^2 + s with s the variance, and

    m / sqrt(v) = sign(m) SNR / sqrt(1 + SNR^2),    SNR = |m| / sqrt(s)          (Orvieto & Gower 2025)

which is at most 1. With two decays Cauchy and Schwarz bound it at step t, with r = b1^2 / b2, by

    (1 - b1) / (1 - b1^t)  sqrt((1 - b2^t) / (1 - b2)  (1 - r^t) / (1 - r))  <  (1 - b1) / sqrt((1 - b2) (1 - r))

reached by gradients that grow as (b2 / b1)^k, whose weighted squares are all alike.
"""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snr_adam import adam, centered_adam, scale_by_snr
from snr_adam.parts import EMA, RMS, Mean, Spread

STEPS, WIDTH = 200, 32
SHORT = 16  # the length of the sequences that Hypothesis makes up


def weights(b, steps):
    """(t, k): the weight of gradient k in the bias-corrected average after step t."""
    t, k = np.arange(1, steps + 1)[:, None], np.arange(1, steps + 1)
    return np.where(k <= t, (1 - b) * b ** np.maximum(t - k, 0.0) / -np.expm1(t * np.log(b)), 0.0)


def updates_of(tx, gradients):
    gradients = jnp.asarray(gradients)
    return np.asarray(cases.run(tx, jnp.zeros_like(gradients[0]), gradients, cases.FAST)[0])


@pytest.mark.parametrize("b", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("make", ["centered_adam", "adam"])
def test_equal_decays_give_the_true_ratio(b, make):
    mean = np.linspace(0.0, 5.0, WIDTH)
    g = (np.random.default_rng(0).normal(size=(STEPS, WIDTH)) + mean).astype(np.float32)
    tx = centered_adam(1.0, b, eps=1e-30) if make == "centered_adam" else adam(1.0, b, b, eps=1e-30)
    w = weights(b, STEPS)
    m = w @ g.astype(np.float64)
    s = np.stack([row @ (g - center) ** 2 for row, center in zip(w, m, strict=True)])
    with np.errstate(divide="ignore"):
        snr = abs(m) / np.sqrt(s)  # infinite at the first step
        expected = np.sign(m) / np.sqrt(1 + snr**-2.0)
    np.testing.assert_allclose(-updates_of(tx, g), expected, rtol=0, atol=1e-6)


def test_the_state_of_centered_adam_is_the_ratio():
    g = cases.tree(3, jnp.float32)["block"][1][:, None] * jnp.arange(1.0, 9.0)[:, None]
    g = jnp.concatenate([g, 2 - g])
    updates, _, state = cases.run(scale_by_snr(Mean(0.9), Spread(0.9, eps=0.0)), jnp.zeros_like(g[0]), g, cases.QUICK)
    snr = abs(state.mu) / jnp.sqrt(state.nu)
    np.testing.assert_allclose(updates[-1], jnp.sign(state.mu) * snr / jnp.sqrt(1 + snr**2), rtol=0, atol=1e-6)


def bound(t, b1, b2):
    """The largest |m^| / sqrt(v^) at step t; t = inf gives the supremum."""
    t, r = np.asarray(t, np.float64), b1 * b1 / b2
    return (1 - b1) / (1 - b1**t) * np.sqrt((1 - b2**t) / (1 - b2) * (1 - r**t) / (1 - r))


def test_the_bound_is_reached():
    b1, b2 = 0.9, 0.999
    supremum = bound(np.inf, b1, b2)
    assert round(float(supremum), 2) == 7.27
    growing = (b2 / b1) ** np.arange(-300.0, 1.0)
    tx = scale_by_snr(EMA(b1), RMS(b2, eps=0.0))
    t = np.arange(1, len(growing) + 1)
    # from the start the sequence is the worst one at every step
    np.testing.assert_allclose(updates_of(tx, growing.astype(np.float32)), bound(t, b1, b2), rtol=2e-6)
    # after a long silence, in which v^ forgets that it began, it reaches the supremum
    silence = np.full(20_000, 1e-15)
    late = updates_of(tx, np.concatenate([silence, growing]).astype(np.float32))
    assert supremum * (1 - 2e-6) < late[-1]
    assert late.max() < supremum * (1 + 2e-6)


def adversaries():
    """Gradients (SHORT, WIDTH) that try to be worst: growing at many rates, alone, late, constant, alternating, huge,
    tiny."""
    k = np.arange(SHORT)[:, None]
    rate = np.linspace(0.5, 4.0, WIDTH)
    return {
        "growing": rate ** (k - SHORT),
        "alternating": (-rate) ** (k - SHORT),
        "one": np.where(k == np.arange(WIDTH) % SHORT, 1e3, 0.0),
        "step": np.where(k < np.arange(WIDTH) % SHORT, 1e-3, 1e3),
        "constant": np.broadcast_to(10 ** np.linspace(-8, 15, WIDTH), (SHORT, WIDTH)),
        "almost constant": 1 + 1e-7 * np.random.default_rng(0).integers(-2, 3, (SHORT, WIDTH)),
        "scales": np.random.default_rng(1).normal(size=(SHORT, WIDTH))
        * 10 ** np.random.default_rng(2).uniform(-9, 9, (SHORT, WIDTH)),
    }


# name -> transformation, its bound, and what float32 may add to it: nothing where variance and mean are kept apart
BOUNDED = {
    "centered .95": (scale_by_snr(Mean(0.95), Spread(0.95)), 1.0, 0.0),
    "centered .5": (scale_by_snr(Mean(0.5), Spread(0.5)), 1.0, 0.0),
    "equal .95": (scale_by_snr(EMA(0.95), RMS(0.95)), 1.0, 1e-6),
    "adam": (scale_by_snr(EMA(0.9), RMS(0.999)), float(bound(np.inf, 0.9, 0.999)), 1e-6),
}
SCANS = {
    name: jax.jit(lambda g, tx=tx: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1])
    for name, (tx, _, _) in BOUNDED.items()
}


def check_bound(name, gradients):
    _, limit, rounding = BOUNDED[name]
    updates = np.asarray(SCANS[name](jnp.asarray(gradients, jnp.float32)))
    assert np.abs(updates).max() <= limit * (1 + rounding)


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("adversary", adversaries())
def test_the_bound_is_never_passed(name, adversary):
    check_bound(name, adversaries()[adversary])


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=SHORT, max_size=SHORT))
def test_no_sequence_passes_the_bound(name, sequence):
    rate = np.linspace(0.5, 2.0, WIDTH) ** np.arange(SHORT)[:, None]
    check_bound(name, np.array(sequence)[:, None] * rate)
