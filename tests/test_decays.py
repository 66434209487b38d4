"""Decays that change in time: the weights of an average sum to 1 at every step, whoever sets the decay and when.

The averages are those of `_numerics`: m^_t = m^_{t-1} + c_t (g_t - m^_{t-1}) with c_t = (1 - b_t) / (1 - b_t^t).
"""

import functools
import inspect

import cases
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam.parts import EMA, RMS, Gradient, Mean, Mixture, Nesterov, Unit

STEPS = 60
COUNT = np.arange(STEPS)
# name -> what is decayed, and by how much at each step
TABLES = {
    "b1 from .9 to .99": {"b1": np.where(COUNT < 20, 0.9, 0.99)},
    "b1 from .99 to .5": {"b1": np.where(COUNT < 20, 0.99, 0.5)},
    "b1 rises": {"b1": np.linspace(0.5, 0.95, STEPS)},
    "b2 of PaLM": {"b2": 1 - (COUNT + 1.0) ** -0.8},
    "both": {"b1": np.linspace(0.5, 0.95, STEPS), "b2": np.where(COUNT < 20, 0.999, 0.9)},
}
FULL = {name: {"b1": np.full(STEPS, 0.9), "b2": np.full(STEPS, 0.999)} | table for name, table in TABLES.items()}
STACKED = {b: jnp.asarray(np.stack([table[b] for table in FULL.values()]), jnp.float32) for b in ("b1", "b2")}


def at(table):
    """The schedule that reads its values off an array."""
    return lambda count: table[jnp.minimum(count, len(table) - 1)]


def decays_of(name):
    """The names of a preset's corrected decays."""
    return {"centered_adam": {"b": "b1"}, "rmsprop": {"decay": "b2"}}.get(name, {"b1": "b1", "b2": "b2"})


OPTIONS = {"rmsprop": {"bias_correction": True}}
# presets that take the step -alpha under a constant gradient while their decays stay; Infinity has no weights
SURE = ("adam", "adamw", "amsgrad", "adamax", "adamaxw", "centered_adam", "rmsprop")


@pytest.mark.parametrize("storage", ["float32", "packed"])
@pytest.mark.parametrize("how", ["scheduled", "injected"])
@pytest.mark.parametrize("name", SURE)
def test_a_constant_gradient_is_followed_at_its_rate(name, how, storage):
    """Every step is -alpha, under each of the tables at once."""
    if storage == "packed" and name in ("amsgrad", "rmsprop"):
        pytest.skip("keeps more, or less, than two numbers")
    make = functools.partial(cases.PRESETS[name][0], **OPTIONS.get(name, {}), storage=storage)
    if "weight_decay" in inspect.signature(make).parameters:
        make = functools.partial(make, weight_decay=0.0)

    def steps(tables):
        decays = {arg: at(tables[b]) for arg, b in decays_of(name).items()}
        if how == "injected":
            tx = optax.inject_hyperparams(cases.PRESETS[name][0])(0.5, **make.keywords, **decays)
        else:
            tx = make(0.5, **decays)
        ones = jnp.ones(3)
        return jax.lax.scan(lambda s, g: tx.update(g, s, ones)[::-1], tx.init(ones), jnp.ones((STEPS, 3)))[1]

    found = jax.jit(jax.vmap(steps))(STACKED)
    np.testing.assert_allclose(found, -0.5, rtol=1e-6)


def test_numbers_set_by_hand_take_effect_and_nothing_else_does():
    """As `advise` wants it: in the middle of a run, in the state of `inject_hyperparams`."""
    tx, w = optax.inject_hyperparams(snr_adam.adamw)(1e-2, weight_decay=0.0), jnp.ones(2)
    state, update = tx.init(w), jax.jit(tx.update)
    for t in range(40):
        if t == 10:
            state.hyperparams.update(b1=jnp.float32(0.656), b2=jnp.float32(0.996))
        if t == 25:
            state.hyperparams.update(b1=jnp.float32(0.99), b2=jnp.float32(0.9999))
        u, state = update(w, state, w)
        np.testing.assert_allclose(u, -1e-2, rtol=1e-6)


def weights(bs, corrected=True):
    """The weight of every gradient after every step, (steps, steps), in 60 digits."""
    with mpmath.workdps(60):
        found, row = [], [mpmath.mpf(0)] * len(bs)
        for t, b in enumerate(bs, 1):
            b = mpmath.mpf(float(np.float32(b)))
            c = (1 - b) / (1 - b**t) if corrected else 1 - b
            row = [w * (1 - c) for w in row]
            row[t - 1] = c
            found.append(list(row))
        return found


def as_floats(rows):
    return np.array([[float(x) for x in row] for row in rows])


def impulses(signal, noise):
    """An impulse at step k in element k shows the weight of gradient k at every later step."""
    tx = snr_adam.scale_by_snr(signal, noise)
    return cases.run(tx, jnp.zeros(STEPS), jnp.eye(STEPS))[0]


@pytest.mark.parametrize("table", TABLES)
def test_weights_are_those_of_the_recursion_in_60_digits(table):
    b1, b2 = (FULL[table][b] for b in ("b1", "b2"))
    first, second = weights(b1), weights(b2)
    with mpmath.workdps(60):
        assert max(abs(sum(row) - 1) for row in first + second) < 1e-50
    schedule = at(jnp.asarray(b1, jnp.float32))
    for signal in (EMA(schedule), Mean(schedule)):
        np.testing.assert_allclose(impulses(signal, Unit()), as_floats(first), rtol=0, atol=1e-6)
    # of v^: gradients of the size of their own noise, 1 / sqrt(weight), where they have any
    got = impulses(Gradient(), RMS(at(jnp.asarray(b2, jnp.float32)), eps=1e-8))
    newest = np.array([float(row[t]) for t, row in enumerate(second)])
    np.testing.assert_allclose(np.diag(got), newest**-0.5, rtol=1e-6)


def test_a_nesterov_signal_and_a_mixture_keep_their_definitions():
    """With the weights of m^: b1 (1-b1^t)/(1-b1^{t+1}) m^ + (1-b1)/(1-b1^t) g, and m1^ + alpha m2."""
    b1 = FULL["b1 from .9 to .99"]["b1"]
    b, t, first = np.float32(b1).astype(float)[:, None], (COUNT + 1.0)[:, None], as_floats(weights(b1))
    schedule = at(jnp.asarray(b1, jnp.float32))
    want = b * (1 - b**t) / (1 - b ** (t + 1)) * first + (1 - b) / (1 - b**t) * np.eye(STEPS)
    np.testing.assert_allclose(impulses(Nesterov(schedule), Unit()), want, rtol=0, atol=1e-6)
    slow = as_floats(weights(b1[::-1], corrected=False))
    mixture = Mixture(schedule, at(jnp.asarray(b1[::-1].copy(), jnp.float32)), 2.0)
    np.testing.assert_allclose(impulses(mixture, Unit()), first + 2 * slow, rtol=0, atol=1e-6)


SIGNALS = {"EMA": EMA, "uncorrected": lambda b: EMA(b, debias=False), "Mean": Mean, "Nesterov": Nesterov}
SIGNALS |= {"Nesterov, uncorrected": lambda b: Nesterov(b, debias=False), "Mixture": lambda b: Mixture(b, b, 2.0)}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_floor_is_the_sum_of_squared_weights(name, x64):
    signal = SIGNALS[name](at(jnp.asarray(FULL["b1 from .9 to .99"]["b1"])))
    want, steps = np.sum(np.square(impulses(signal, Unit())), axis=1), [1, 2, 20, 22, STEPS]
    np.testing.assert_allclose([signal.floor(t) for t in steps], want[np.array(steps) - 1], rtol=1e-9)


@pytest.mark.parametrize("storage", ["float32", "packed"])
@pytest.mark.parametrize("how", ["scheduled", "injected"])
def test_pure_noise_stands_on_the_floor_that_is_shown(how, storage):
    """E|m^|^2 is the floor's square, to 2 %, also right after a jump."""
    size, table = 60_000, FULL["both"] | {"b1": FULL["b1 from .9 to .99"]["b1"]}
    decays = {b: at(jnp.asarray(table[b], jnp.float32)) for b in ("b1", "b2")}
    make = optax.inject_hyperparams(snr_adam.adam, static_args="storage") if how == "injected" else snr_adam.adam
    tx, w = snr_adam.observe(make(0.0, **decays, storage=storage), every=1), jnp.zeros(size)
    step = jax.jit(lambda key, state: tx.update(jax.random.normal(key, (size,)), state, w)[1])
    state, want = tx.init(w), np.sum(np.square(as_floats(weights(table["b1"]))), axis=1)
    for t, key in enumerate(jax.random.split(jax.random.key(0), STEPS), 1):
        state = step(key, state)
        if t in (1, 2, 10, 20, 21, 25, 40, STEPS):
            found = snr_adam.report(state).total
            assert found["floor"] ** 2 == pytest.approx(want[t - 1], rel=1e-5)
            assert found["signal"] ** 2 / size == pytest.approx(found["floor"] ** 2, rel=0.02)


CENTERED = {"centered": True, "bias_correction": True, "initial_scale": 0.1}


@pytest.mark.parametrize(
    ("name", "options"),
    [("yogi", {}), ("adabelief", {}), ("radam", {}), ("nadam", {}), ("rmsprop", CENTERED), ("amsgrad", {})],
)
def test_an_injected_decay_that_stays_is_a_constant_one(name, options, x64):
    """In float64 to the last digits: what is kept is another number, the step is not."""
    make, grads = functools.partial(cases.PRESETS[name][0], 0.1, **options), cases.stacked(80)["block"][0]
    params = jnp.ones(7)
    want, got = (cases.run(tx, params, grads)[0] for tx in (make(), make(**kept(name))))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def kept(name):
    """The default decays of a preset, as schedules."""
    defaults = inspect.signature(cases.PRESETS[name][0]).parameters
    names = [b for b in ("b1", "b2", "decay") if b in defaults]
    return {b: functools.partial(lambda x, count: x + 0.0 * count, defaults[b].default) for b in names}


def test_the_state_has_the_structure_of_optax_under_every_option():
    w, schedule = cases.tree(), optax.constant_schedule(0.9)
    plain = optax.adam(0.1).init(w)[0]
    states = [snr_adam.adam(0.1, **x).init(w)[0] for x in ({}, {"b1": schedule}, {"b1": schedule, "b2": schedule})]
    states.append(optax.inject_hyperparams(snr_adam.adam)(0.1).init(w).inner_state[0])
    for state in states:
        assert jax.tree.structure(tuple(state)) == jax.tree.structure(tuple(plain))


def test_a_schedule_of_plain_numbers_may_change_too():
    """Outside of jit a schedule may give floats: it is a schedule all the same."""
    tx, w = snr_adam.adam(1.0, b1=lambda count: 0.9 if int(count) < 5 else 0.99), jnp.ones(2)
    state = tx.init(w)
    for _ in range(9):
        u, state = tx.update(w, state)
        np.testing.assert_allclose(u, -1.0, rtol=1e-6)
