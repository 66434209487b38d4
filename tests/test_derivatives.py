"""Derivatives through steps: those of the exact recursion, by finite differences in 64 bits, or a refusal by name.

A loss after a few steps is a function of hyper-parameters and of the weights that it started from. What a step computes
in float32 is differentiated by JAX, and compared with the slope of the same steps in float64.
"""

import functools
import inspect

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam import accumulate, adam, adamw, carry_remainder, guard, observe, scale_by_snr
from snr_adam._numerics import decay_at, length
from snr_adam.parts import EMA, RMS, Cast
from snr_adam.precision import round_stochastically, whole_weights

STEPS = 7  # RAdam with b2 = .9 rectifies from step 6 on
H = 1e-6
# away from their defaults, so that each has a slope worth comparing
VALUES = {
    "learning_rate": 0.07,
    "b1": 0.8,
    "b2": 0.9,
    "b3": 0.97,
    "b": 0.8,
    "decay": 0.9,
    "eps": 0.02,
    "eps_root": 0.01,
    "weight_decay": 0.3,
    "alpha": 2.0,
    "momentum": 0.6,
    "clip_norm": 1.5,
    "gamma": 0.1,
    "peak": 0.2,
    "height": 1.2,
    "width": 0.7,
}
START = (0.8, -1.3, 2.1, 0.4, -0.6)


def loss(p):
    """Smooth, of several scales, and of gradients that change sign on the way."""
    return jnp.sum(jnp.sin(1.7 * p["w"]) + 0.3 * p["w"] ** 2) + jnp.sum((p["b"] - 0.1) ** 2 * jnp.exp(0.2 * p["b"]))


def outcome(make, names, values, start, steps=STEPS, dtype=None):
    """The loss after the steps of make(**hyper-parameters) from these weights."""
    params = {"w": start[:3], "b": start[3:]}
    params = params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)
    tx = make(**dict(zip(names, values, strict=True)))

    def step(carry, _):
        params, state = carry
        u, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, u), state), None

    return loss(jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0])


def slopes(make, names):
    """d outcome / d (values, start) by central differences in 64 bits."""
    with jax.enable_x64(True):
        x = np.array([*(VALUES[name] for name in names), *START])
        moves = np.concatenate([H * np.eye(x.size), -H * np.eye(x.size)])
        n = len(names)
        ends = jax.jit(jax.vmap(lambda x: outcome(make, names, x[:n], x[n:])))(x + moves)
        up, down = np.asarray(ends).reshape(2, -1)
        return (up - down) / (2 * H)


def derivatives(make, names):
    """The same by JAX, in float32."""
    values = jnp.asarray([VALUES[name] for name in names], jnp.float32)
    both = jax.jit(jax.grad(lambda v, s: outcome(make, names, v, s), (0, 1)))(values, jnp.asarray(START, jnp.float32))
    return np.concatenate(both)


def assert_right(make, names):
    want, got = slopes(make, names), derivatives(make, names)
    assert np.count_nonzero(want) > len(START) / 2
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def known(make) -> list[str]:
    """The hyper-parameters of a preset that are numbers, and have a value here."""
    return [name for name in inspect.signature(make).parameters if name in VALUES]


OFTEN = ("adamw", "lamb", "centered_adam")
PRESETS = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in cases.PRESETS]


@pytest.mark.parametrize("name", PRESETS)
def test_derivatives_are_those_of_the_recursion(name):
    """With respect to every number that a preset takes, and to the weights at the start."""
    make = cases.PRESETS[name][0]
    assert_right(make, [x for x in known(make) if x != "momentum"])


def with_descent(descent, learning_rate, weight_decay=0.3):
    return snr_adam.descend(learning_rate, EMA(0.8), RMS(0.9, 0.02), weight_decay=weight_decay, descent=descent)


TURNS = {name: part for name, part in cases.DESCENTS.items() if name not in ("decoupled", "trust_ratio")}
SELDOM = [name if name == "hyperball" else pytest.param(name, marks=pytest.mark.slow) for name in TURNS]


@pytest.mark.parametrize("name", SELDOM)
def test_derivatives_are_those_of_the_descent(name):
    decay = {"weight_decay": 0.0} if name == "hyperball" else {}
    names = ["learning_rate"] if decay else ["learning_rate", "weight_decay"]
    assert_right(functools.partial(with_descent, TURNS[name], **decay), names)


@pytest.mark.parametrize("name", cases.DESCENTS)
def test_a_descent_has_a_derivative_at_zero(name):
    """Of weights, gradients and steps of 0: none is NaN."""

    def end(p, g):
        tx = with_descent(cases.DESCENTS[name], 0.1, 0.0 if name == "hyperball" else 0.3)
        state = tx.init(p)
        for _ in range(2):
            u, state = tx.update(g, state, p)
            p = optax.apply_updates(p, u)
        return jnp.sum(p)

    zeros, ones = jnp.zeros(3), jnp.ones(3)
    slope = jax.jit(jax.grad(end, (0, 1)))
    assert all(np.isfinite(x).all() for pair in ((zeros, zeros), (ones, zeros), (zeros, ones)) for x in slope(*pair))


SMALL = {
    "adam_atan2": lambda: snr_adam.adam_atan2(0.1, width=0.5),
    "mars": lambda: snr_adam.mars(0.1),
    "msvag": lambda: snr_adam.msvag(0.1),
    "stable_adamw": lambda: snr_adam.stable_adamw(0.1, eps=1e-30),
}


@pytest.mark.parametrize("size", [1e-10, 1e-15, 1e-22])
@pytest.mark.parametrize("name", SMALL)
def test_small_gradients_have_a_derivative(name, size):
    """Whose squares, or the squares of these, are lost."""

    def end(g):
        tx, p = SMALL[name](), jnp.ones(3)
        state, total = tx.init(p), 0.0
        for scale in (1.0, 0.5, -2.0):
            u, state = tx.update(scale * g, state, p)
            total = total + jnp.sum(u)
        return total

    assert np.isfinite(jax.jit(jax.grad(end))(size * jnp.arange(1.0, 4))).all()


def zero_at_first(b1):
    return adam(lambda t: jnp.where(t < 1, 0.0, 0.1), b1, eps=0.1)


WRAPPED = {
    "guard": (lambda b1, clip_norm: guard(adam(0.1, b1), clip_norm), ["b1", "clip_norm"]),
    "observe": (lambda learning_rate, b1: observe(adam(learning_rate, b1)), ["learning_rate", "b1"]),
    "observe of optax": (lambda learning_rate: observe(optax.adam(learning_rate)), ["learning_rate"]),
    "observe in guard": (lambda b1, clip_norm: guard(observe(adam(0.1, b1)), clip_norm), ["b1", "clip_norm"]),
    "accumulate": (lambda b1: accumulate(adam(0.1, b1), 2), ["b1"]),
    "a learning rate of 0": (zero_at_first, ["b1"]),
    "rmsprop with momentum": (snr_adam.rmsprop, ["learning_rate", "decay", "eps", "momentum"]),
    "carry_remainder of float32": (lambda b1: carry_remainder(adam(0.1, b1)), ["b1"]),
    "the parts": (lambda b1, b2: optax.chain(scale_by_snr(EMA(b1), RMS(b2)), optax.scale(-0.1)), ["b1", "b2"]),
}
EVERY_TIME = ("observe in guard", "a learning rate of 0")


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in WRAPPED]
)
def test_derivatives_through_wrappers(name):
    assert_right(*WRAPPED[name])


def meta_gradient(make, dtype=None):
    """The shapes of d outcome / d start: all that is refused is refused while it is traced."""
    return jax.eval_shape(
        jax.grad(lambda start: outcome(make, (), (), start, 2, dtype).astype(jnp.float32)), jnp.asarray(START)
    )


def is_stored(make) -> bool:
    """Whether the storage can hold what the preset keeps."""
    try:
        return make().init(jnp.ones(2)) is not None
    except ValueError:
        return False


NARROW = {
    f"{name}, {storage}": functools.partial(preset, 0.1, storage=storage)
    for name, (preset, _) in cases.PRESETS.items()
    for storage in ("bfloat16", "packed")
}
NARROW = {name: make for name, make in NARROW.items() if is_stored(make)}
NARROW |= {
    "mu_dtype": lambda: adamw(0.1, mu_dtype="bfloat16"),
    "mu_dtype float16": lambda: adamw(0.1, mu_dtype="float16"),
    "noise alone": lambda: scale_by_snr(storage=Cast(nu="bfloat16")),
    "in a guard": lambda: guard(adamw(0.1, storage="packed"), 1.0),
    "observed": lambda: observe(adamw(0.1, storage="bfloat16")),
}


@pytest.mark.parametrize("name", NARROW)
def test_rounded_moments_refuse(name):
    """Rounding has derivative 0, and what derivative one would say it has cannot rest in 16 bits to three digits."""
    with pytest.raises(TypeError, match=r"rounded, and rounding has no der|storage='packed' rounds its .* float32"):
        meta_gradient(NARROW[name])


def test_remainders_refuse():
    with pytest.raises(TypeError, match="carry_remainder keeps the bits of a weight apart, and rounding has no"):
        meta_gradient(lambda: carry_remainder(adam(0.1)), jnp.bfloat16)


def test_what_does_not_reach_the_moments_is_not_refused():
    """A learning rate's slope with the gradients held fixed, as first-order methods take it."""

    def end(rate):
        tx, w = adam(rate, storage="packed"), jnp.ones(3)
        state = tx.init(w)
        for _ in range(2):
            u, state = tx.update(jax.lax.stop_gradient(w), state, w)
            w = w + u
        return jnp.sum(w)

    assert np.isclose(jax.grad(end)(0.1), -6.0, rtol=0.05)


def test_rounded_weights_have_the_derivative_of_what_is_rounded():
    """`round_stochastically` as the conversion to 16 bits, and `whole_weights` as the parameters."""
    tx, w = round_stochastically(), jnp.ones(2, jnp.bfloat16)
    got = jax.grad(lambda u: jnp.sum(tx.update(u, tx.init(w), w)[0]))(jnp.full(2, 0.01))
    assert np.array_equal(got, [1, 1])
    state = carry_remainder(adam(0.1)).init(w)
    assert np.array_equal(jax.grad(lambda w: jnp.sum(whole_weights(w, state)))(w), [1, 1])


def test_statistics_have_no_derivative():
    """Nor have sketches, of a leaf that is kept whole and of one that is not."""
    tx, w = observe(adam(0.1)), {"few": jnp.ones(3), "many": jnp.ones(300)}

    def seen(w):
        _, state = tx.update(w, tx.init(w), w)
        return sum(jnp.sum(jnp.nan_to_num(x)) for x in (state.means, state.last, state.memory, state.sketches))

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(seen))(w)))


@pytest.mark.parametrize("name", cases.PRESETS)
def test_zeros_have_a_derivative(name):
    """Weights at 0, gradients that are 0 whatever the weights, and a first step of 0: finite slopes, and right ones."""
    make, options = cases.PRESETS[name][0], {"peak": 0.1} if name == "adamc" else {}

    def end(w):
        tx, p = make(lambda t: jnp.where(t < 1, 0.0, 0.1), **options), {"dead": w, "zero": 0 * w}
        state = tx.init(p)
        for _ in range(3):
            g = {"dead": 0 * p["dead"], "zero": p["zero"] + 1}
            u, state = tx.update(g, state, p)
            p = optax.apply_updates(p, u)
        return jnp.sum(p["dead"]) + 0 * jnp.sum(p["zero"])

    w, h = jnp.asarray([1.0, -2.0]), 2.0**-8
    value, slope = jax.jit(jax.value_and_grad(end))(w)
    np.testing.assert_allclose(slope, [(end(w.at[i].add(h)) - value) / h for i in range(2)], rtol=1e-3)


def test_a_gradient_of_zero_has_the_slope_of_the_step():
    """u = g / (|g| + eps) at its middle: 1 / eps."""
    tx = scale_by_snr(EMA(0.9), RMS(0.999, eps=0.5))
    assert np.isclose(jax.grad(lambda g: tx.update(g, tx.init(g))[0])(0.0), 2.0)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_decay_of_zero_has_a_slope(steps):
    """At step 1 m^ / (1 - b) is g whatever b; at step 2 it is (g + b g_1) / (1 + b), of slope g_1 - g at b = 0."""

    def end(b1):
        tx, u = scale_by_snr(EMA(b1), snr_adam.parts.Unit()), 0.0
        state = tx.init(jnp.float32(0))
        for g in (3.0, 5.0)[:steps]:
            u, state = tx.update(jnp.float32(g), state)
        return u

    assert np.isclose(jax.grad(end)(0.0), (0.0, -2.0)[steps - 1], atol=1e-4)


def test_long_runs_of_radam_have_a_slope():
    """b^t is long gone from rho_t, which is 2 / (1-b) - 1; e^(-t log b) must not overflow in its derivative."""

    def end(b2):
        t = jnp.int32(5000)
        return length(decay_at(b2, t, jnp.float32), t.astype(jnp.float32))

    assert np.isclose(jax.grad(end)(0.9), 200.0, rtol=1e-3)
