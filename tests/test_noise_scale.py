"""The noise scale: known ones are found, and what cannot be told is not told."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import fast_jit, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import snr_adam
from snr_adam.telemetry.noise_scale import (
    NoiseScale,
    from_groups,
    from_moments,
    from_scalars,
    l1_from_moments,
    microbatches,
    replicas,
)

DECAYS = [(0.9, 0.999), (0.95, 0.95), (0.9, 0.9), (0.0, 0.9)]
DIM = 400
MEAN = np.linspace(-0.2, 0.3, DIM)
SPREAD = np.linspace(0.5, 1.5, DIM)  # standard deviations of one example
TRACE, POWER = (SPREAD**2).sum(), (MEAN**2).sum()
TRUE = TRACE / POWER  # 46 examples
D_EFF = TRACE**2 / (SPREAD**4).sum()


def examples(seed: int, *shape: int) -> np.ndarray:
    """Normal vectors x of known mean and covariance, which are the gradients of `loss` at w = 0."""
    noise = np.random.default_rng(seed).standard_normal((*shape, DIM))
    return (MEAN + SPREAD * noise).astype("float32")


def loss(w, x):
    return jnp.mean(jnp.sum(w["a"] * x[..., :100], -1) + jnp.sum(w["b"][0] * x[..., 100:], -1))


PARAMS = {"a": jnp.zeros(100), "b": [jnp.zeros(300)]}


def norm_sq(x):
    return (np.asarray(x, float) ** 2).sum(-1)


# what is said


@pytest.mark.parametrize(
    ("scalars", "said"),
    [
        ((4.0, 1.0, 0.1), "96 +- 13"),
        ((4.0, 0.201, 0.1), "605 +- 317"),
        ((4.0, 0.199, 0.1), ">= 289"),
        ((4.0, 0.0, 0.1), ">= 608"),
        ((4.0, -3.0, 0.1), ">= 608"),
        ((4.0, 1.0, 5.0), ">= 0"),
        ((4.0, 5.0, 0.1), "0 +- 0.51"),
        ((4.0, 1.0, np.nan), "96 +- ?"),
        ((4.0, -1.0, np.nan), ">= ?"),
        ((0.0, 0.0, 0.0), ">= ?"),
        ((np.nan, 1.0, 0.1), "nan +- ?"),
        (([4.0, 4.0], [1.0, 0.0], [0.1, 0.1]), "[96 +- 13, >= 608]"),
    ],
)
def test_what_is_said_of_two_scalars(scalars, said):
    assert str(from_scalars(*scalars, batch_size=32)) == said


positive = st.just(0.0) | st.floats(1e-9, 1e6)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(positive, positive | st.floats(-1e6, 0), positive, st.integers(1, 10**6))
def test_never_negative_and_never_beyond_the_limit(power, persistent, error, batch_size):
    value, spread, limit, _ = from_scalars(power, persistent, error, batch_size=batch_size)
    assert value >= 0
    assert spread >= 0
    assert not limit < 0
    assert np.isinf(value) or not value > limit
    assert np.isinf(value) == (persistent <= 2 * error)


def test_of_arrays_elementwise():
    power, persistent, error = np.random.default_rng(0).uniform(-0.2, 1, (3, 50)) * [[10], [1], [0.3]]
    whole = from_scalars(power, persistent, abs(error), batch_size=8)
    for i in range(50):
        one = from_scalars(power[i], persistent[i], abs(error[i]), batch_size=8)
        assert one[:3] == tuple(float(x[i]) for x in whole[:3])


# groups


@pytest.mark.parametrize(("n", "size"), [(2, 16), (4, 8), (8, 1), (32, 1)])
def test_groups_are_unbiased(n, size):
    """Over 1,000 steps tr(Sigma) and |G|^2 average to the truth within 3 of their standard errors, and 1 % and 4 %."""
    g = MEAN + (examples(100 + n, 1000, n) - MEAN) / math.sqrt(size)
    q, a = norm_sq(g).mean(1), norm_sq(g.mean(1))
    found = from_groups(q, a, n, size)
    trace, power = size * n / (n - 1) * (q - a), (n * a - q) / (n - 1)
    for x, true, share in ((trace, TRACE, 0.01), (power, POWER, 0.04)):
        assert abs(x.mean() - true) < min(3 * x.std() / math.sqrt(len(x)), share * true)
    assert found.value == pytest.approx(trace.mean() / power.mean(), rel=1e-9)
    assert found.error == pytest.approx((found.value + size) * power.std() / math.sqrt(len(g)) / power.mean(), rel=0.01)
    assert abs(found.value - TRUE) < 3 * found.error


def test_error_of_one_step_is_that_of_normal_noise():
    """The spread of |G|^2 from one step of 8 groups is what `from_groups` says of each, given d_eff."""
    g = examples(0, 2000, 8) + MEAN
    q, a = norm_sq(g).mean(1), norm_sq(g.mean(1))
    value, error = np.array([from_groups(*each, 8, 1, d_eff=D_EFF)[:2] for each in zip(q, a, strict=True)]).T
    # value + b is q / |G|^2: its error is that of |G|^2, relatively
    assert np.median(error / (value + 1)) == pytest.approx(np.std((8 * a - q) / 7) / (4 * POWER), rel=0.15)
    assert 0.93 < np.mean(np.abs(value - TRUE / 4) < 2 * error) < 0.99


def test_a_bound_is_claimed_where_there_is_no_signal_and_it_holds():
    """Pure noise is told as such in 97 % of runs; whatever the signal, at most 3 % of runs claim too high a bound."""
    persistent = np.random.default_rng(0).normal(0, 0.1, 4000)
    assert np.mean(np.isinf(from_scalars(4.0, persistent, 0.1).value)) > 0.97
    for true in (0.02, 0.1, 0.2, 0.3):
        found = from_scalars(4.0, true + persistent, 0.1)
        assert np.mean(np.isinf(found.value) & (found.limit > 4.0 / true - 1)) < 0.03, true


def test_one_group_is_refused():
    with pytest.raises(ValueError, match="n=1"):
        from_groups(1.0, 1.0, 1, 8)


def test_given_error_of_averages_is_used():
    given, own = from_groups(5.0, 3.0, 8, 4, error=0.1), from_groups(5.0, 3.0, 8, 4)
    assert given.value == own.value
    assert given.error == pytest.approx(own.error * 0.1 / (own.error / (own.value + 4) * (8 * 3 - 5) / 7))


# micro-batches and replicas


@pytest.mark.parametrize("at_once", [1, 2, None])
@pytest.mark.parametrize("size", [1, 4])
def test_microbatches_show_groups_and_give_the_gradient_of_the_whole(size, at_once):
    x = jnp.asarray(examples(3, 16))
    (value, groups), grads = quick_jit(microbatches(loss, size, at_once=at_once))(PARAMS, x)
    whole = jax.value_and_grad(loss)(PARAMS, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (value, grads), whole)
    assert (int(groups.n), int(groups.batch_size)) == (16 // size, size)
    assert float(groups.mean_sq) == pytest.approx(norm_sq(x.mean(0)), rel=1e-5)
    # Optax takes every n-th example into a group
    means = np.asarray(x).reshape(size, -1, DIM).mean(0)
    assert float(groups.groups_sq) == pytest.approx(norm_sq(means).mean(), rel=1e-5)
    assert from_groups(*groups).value >= 0


def test_microbatches_find_a_known_noise_scale_in_a_scan():
    """One program: 100 steps of 64 examples, in groups of 8 and one by one. Within 10 % of the truth."""
    x = jnp.asarray(examples(5, 100, 64), "float32")
    for size in (1, 8):
        step = microbatches(loss, size, at_once=None)
        groups = jax.jit(lambda x, step=step: jax.lax.scan(lambda c, x: (c, step(PARAMS, x)[0][1]), 0, x)[1])(x)
        found = from_groups(*groups)
        assert found.value == pytest.approx(TRUE, rel=0.1)
        assert abs(found.value - TRUE) < 3 * found.error


def test_microbatches_take_several_arrays():
    def weighted(w, x, y):
        return jnp.mean((x @ w - y["y"]) ** 2)

    x, y, w = jnp.asarray(examples(1, 12)), {"y": jnp.arange(12.0)}, jnp.full(DIM, 0.1)
    (value, groups), grads = microbatches(weighted, 3)(w, x, y)
    expected = jax.value_and_grad(weighted)(w, x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), (value, grads), expected)
    assert int(groups.n) == 4


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("axes", ["data", ("data", "model")])
def test_replicas_show_what_microbatches_do(axes, check):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    n = 8 if isinstance(axes, tuple) else 4
    x = jnp.asarray(examples(7, 16))
    spec = PartitionSpec(axes)
    step = jax.shard_map(
        replicas(loss, axes), mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=check
    )
    (value, groups), grads = quick_jit(step)(PARAMS, x)
    whole = jax.value_and_grad(loss)(PARAMS, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (value, grads), whole)
    assert (int(groups.n), int(groups.batch_size)) == (n, 16 // n)
    means = np.asarray(x).reshape(n, -1, DIM).mean(1)
    assert float(groups.groups_sq) == pytest.approx(norm_sq(means).mean(), rel=1e-5)
    assert float(groups.mean_sq) == pytest.approx(norm_sq(x.mean(0)), rel=1e-5)


# moments


@functools.partial(fast_jit, static_argnames=("decays", "steps"))
def moments(mean, spread, decays, steps, seed=0):
    """Bias-corrected averages of `steps` normal gradients and of their squares."""
    b1, b2 = decays

    def step(carry, key):
        m, v = carry
        g = mean + spread * jax.random.normal(key, mean.shape)
        return (m + (1 - b1) * (g - m), v + (1 - b2) * (g * g - v)), None

    mean, spread = mean.astype("float32"), spread.astype("float32")
    keys = jax.random.split(jax.random.key(seed), steps)
    (m, v), _ = jax.lax.scan(step, (0 * mean, 0 * mean), keys)
    return m / (1 - b1**steps), v / (1 - b2**steps)


@pytest.mark.parametrize("decays", DECAYS[:3], ids=str)
@pytest.mark.parametrize("steps", [2, 300])
def test_moments_are_unbiased_at_every_step(decays, steps):
    """Over 200 runs the sums of `from_moments` average to the truth, also after two steps."""
    rho = float(snr_adam.parts.EMA(decays[0]).floor(steps))
    m, v = jax.vmap(lambda seed: moments(MEAN, SPREAD, decays, steps, seed))(jnp.arange(200))
    whole = from_moments({"x": m}, {"x": v}, rho, 32, d_eff=200 * D_EFF)
    assert abs(whole.value - 32 * TRUE) < 3 * whole.error
    assert whole.error < (0.05 if steps > 2 else 0.3) * whole.value
    assert whole.method == "moments"


def test_moments_and_groups_are_one_formula():
    g = examples(0, 8) + MEAN
    m, v = g.mean(0), (g**2).mean(0)
    groups = from_groups(norm_sq(g).mean(), norm_sq(m), 8, 4)
    both = from_moments(m, v, 1 / 8, 4)
    np.testing.assert_allclose(both[:3], groups[:3], rtol=1e-4)


@pytest.mark.parametrize(("b1", "times"), [(0.9, 63), (0.95, 133), (0.98, 342)])
def test_limit_of_one_state(b1, times):
    """(1-rho)/rho sqrt(d_eff/8) batches: what one state of Adam without signal can tell at most."""
    rho = float(snr_adam.parts.EMA(b1).floor(10**6))
    m, v = np.full(100, math.sqrt(rho)), np.ones(100)  # m^2 = rho v: no signal
    found = from_moments(m, v, rho, 1, d_eff=100)
    assert np.isinf(found.value)
    assert found.limit == pytest.approx(times, rel=0.05)


def test_moments_of_optax_adam_with_awkward_leaves():
    params = {"a": jnp.ones((3, 4), "bfloat16"), "b": None, "c": jnp.ones(5, "complex64"), "d": jnp.zeros((0, 2))}
    tx = optax.scale_by_adam(0.9, 0.9)
    state = tx.init(params)
    for t in range(5):
        grads = jax.tree.map(lambda p, t=t: (p * (1 + (-1) ** t / 2)).astype(p.dtype), params)
        _, state = tx.update(grads, state)
    m, v = (optax.tree.bias_correction(x, 0.9, state.count) for x in (state.mu, state.nu))
    found = from_moments(m, v, snr_adam.parts.EMA(0.9).floor(5), 32)
    a, b = ([np.asarray(x, complex).ravel() for x in jax.tree.leaves(tree)] for tree in (m, v))
    smoothed, power = sum((abs(x) ** 2).sum() for x in a), sum(x.real.sum() for x in b)
    rho = float(snr_adam.parts.EMA(0.9).floor(5))
    assert found.value == pytest.approx(32 * (power - smoothed) / (smoothed - rho * power), rel=0.02)
    assert l1_from_moments(m, v, rho, 32).value >= 0


@pytest.mark.parametrize("estimate", [from_moments, l1_from_moments])
@pytest.mark.parametrize("rho", [1.0, -0.1, math.nan])
def test_one_step_cannot_show_its_own_noise(estimate, rho):
    with pytest.raises(ValueError, match="rho="):
        estimate(jnp.ones(2), jnp.ones(2), rho, 32)


# the geometry of the sign

SHAPES = {
    "same": np.ones(4000),
    "normal": np.random.default_rng(0).normal(size=4000),
    "laplace": np.random.default_rng(0).laplace(size=4000),
    "heavy": np.random.default_rng(0).standard_t(3, size=4000),
}
SIGMA = np.exp(np.random.default_rng(1).normal(size=4000))


def signal_for(shape, times):
    """A mean gradient, |G| / sigma shaped so, whose l1 noise scale is `times` batches."""
    mean = SHAPES[shape] * SIGMA
    return mean * SIGMA.sum() / np.abs(mean).sum() / math.sqrt(times)


@pytest.mark.parametrize("decays", DECAYS[:3], ids=str)
@pytest.mark.parametrize("times", [1, 3, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_l1_reads_a_known_noise_scale(shape, times, decays):
    """Within 20 % of 1, 3 and 10 B, from one state of Adam."""
    m, v = moments(signal_for(shape, times), SIGMA, decays, 2000)
    found = l1_from_moments(m, v, float(snr_adam.parts.EMA(decays[0]).floor(2000)), 32)
    assert found.value == pytest.approx(32 * times, rel=0.2)


def test_raw_gradients_saturate_where_the_debiased_signal_does_not():
    """||sigma||_1^2 / ||g||_1^2 with the raw g of a batch, as published, reads 1.4 for a true 10, and 1.57 at most."""
    for times, least, most in ((10, 1.2, 1.5), (1e6, 1.5, 1.65)):
        g = signal_for("same", times) + SIGMA * np.random.default_rng(0).normal(size=4000)
        assert least < (SIGMA.sum() / np.abs(g).sum()) ** 2 < most


def test_l1_of_pure_noise_is_a_bound():
    m, v = moments(0 * SIGMA, SIGMA, (0.9, 0.9), 2000)
    found = l1_from_moments(m, v, 1 / 19, 32)
    assert np.isinf(found.value)
    assert found.limit > 10 * 32
    assert str(found).startswith(">= ")


def test_l1_without_noise_in_the_mean_is_exact():
    mean = signal_for("laplace", 7)
    found = l1_from_moments([mean[:100], mean[100:]], [(mean**2 + SIGMA**2)[:100], (mean**2 + SIGMA**2)[100:]], 0, 4)
    assert found.value == pytest.approx(28, rel=1e-4)
    assert found.error == 0


def test_result_is_a_named_tuple_of_four():
    assert NoiseScale._fields == ("value", "error", "limit", "method")
