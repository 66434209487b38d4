"""float32 loses nothing: Adam's update against a float64 oracle, in units of 2^-23 of a unit update.

The oracle is the recursion in numpy with expm1, with the hyper-parameters as float64 and the gradients as float32 have
them; mpmath confirms it. Five families of gradients, each a way in which moments go wrong.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from snr_adam import _numerics, scale_by_snr
from snr_adam.parts import EMA, RMS

WIDTH = 256
ULP = 2.0**-23
B1, EPS = 0.9, 1e-8
LIMITS = {0.95: 4, 0.999: 12, 0.9999: 14, 0.999999: 160}


def draw(rng, steps, width=WIDTH):
    """float32 gradients, (steps, 5 families, width). The scales of the first family are those of its elements."""
    noise = rng.normal(size=(5, steps, width))
    scale = 10 ** np.random.default_rng(0).uniform(-6, 6, width)
    families = (
        noise[0] * scale,  # constant in time, 12 decades apart
        noise[1] * 10 ** rng.uniform(-6, 4, (steps, width)),  # another scale at every step
        np.abs(noise[2]),  # all positive: rounding errors of m do not cancel
        noise[3] * (rng.random((steps, width)) < 0.01),  # sparse
        np.abs(noise[4]) * (-1.0) ** np.arange(steps)[:, None],  # alternating: m nearly cancels
    )
    return np.stack(families, 1).astype(np.float32)


def oracle(gradients, b2, moments=(0.0, 0.0), start=0):
    """Adam's updates in float64, and the moments at the end."""
    m, v = moments
    updates = np.empty(gradients.shape)
    for i, g in enumerate(gradients.astype(np.float64)):
        t = start + i + 1
        m = m + (1 - B1) * (g - m)
        v = v + (1 - b2) * (g * g - v)
        k1, k2 = -1 / np.expm1(t * np.log(B1)), -1 / np.expm1(t * np.log(b2))
        updates[i] = k1 * m / (np.sqrt(k2 * v) + EPS)
    return updates, (m, v)


@functools.cache
def short():
    return draw(np.random.default_rng(1), 1000)


def worst_error(tx, b2):
    updates, _, _ = cases.run(tx, jnp.zeros(short().shape[1:]), jnp.asarray(short()))
    return np.abs(updates - oracle(short(), b2)[0]).max() / ULP


@pytest.mark.parametrize("b2", LIMITS)
def test_worst_error_over_a_thousand_steps(b2):
    assert worst_error(scale_by_snr(EMA(B1), RMS(b2, EPS)), b2) <= LIMITS[b2]


def test_the_usual_form_is_far_worse():
    """The limits bite: `b*m + (1-b)*g` with `1 - b**t` breaks them a hundredfold."""
    assert worst_error(optax.scale_by_adam(B1, 0.9999, EPS), 0.9999) > 100 * LIMITS[0.9999]


def test_worst_error_over_a_hundred_thousand_steps():
    b2, rng = 0.999, np.random.default_rng(2)
    tx = scale_by_snr(EMA(B1), RMS(b2, EPS))
    scan = jax.jit(lambda state, g: jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], state, g))
    state, moments, worst = tx.init(jnp.zeros((5, 32))), (0.0, 0.0), 0.0
    for start in range(0, 100_000, 5_000):
        g = draw(rng, 5_000, 32)
        state, updates = scan(state, jnp.asarray(g))
        exact, moments = oracle(g, b2, moments, start)
        worst = max(worst, np.abs(updates - exact).max() / ULP)
    assert worst <= 25


@pytest.mark.parametrize("b2", LIMITS)
def test_the_oracle_is_exact(b2):
    g = short()[:50, :, :4].reshape(50, -1)
    with mpmath.workdps(50):
        b1, decay = mpmath.mpf(B1), mpmath.mpf(b2)
        expected = np.empty(g.shape)
        for column in range(g.shape[1]):
            m = v = mpmath.mpf(0)
            for t, x in enumerate(map(mpmath.mpf, g[:, column].astype(float)), 1):
                m, v = b1 * m + (1 - b1) * x, decay * v + (1 - decay) * x * x
                root = mpmath.sqrt(v / (1 - decay**t))
                expected[t - 1, column] = m / (1 - b1**t) / (root + mpmath.mpf(EPS))
    # 1 - b2 alone carries 2^-53 / (1 - b2) of relative error, which the root halves
    np.testing.assert_allclose(oracle(g, b2)[0], expected, rtol=0, atol=1e-14 + 2.0**-53 / (1 - b2))


@pytest.mark.parametrize("traced", [False, True], ids=["float", "array"])
@pytest.mark.parametrize("b", [0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999, 0.999999])
def test_bias_corrections_keep_their_digits(b, traced):
    """1 - b^t of the b that was given: float64 for a Python float, float32 for an array."""
    t = jnp.arange(1, 11)
    if traced:
        debias = jax.jit(lambda b: _numerics.decay_at(b, t, jnp.float32).debias)(jnp.float32(b))
        b = float(np.float32(b))
    else:
        debias = _numerics.decay_at(b, t, jnp.float32).debias
    with mpmath.workdps(30):
        exact = [float(1 - mpmath.mpf(b) ** k) for k in range(1, 11)]
    assert debias.dtype == jnp.float32
    np.testing.assert_allclose(1 / np.asarray(debias, np.float64), exact, rtol=4e-7)
