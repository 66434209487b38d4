"""Adam's variants as their papers write them: in NumPy with 64 bits, line by line, without a part of the package."""

import functools
import itertools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam.parts import (
    EMA,
    RMS,
    Arctangent,
    CautiousDecay,
    CautiousUpdate,
    ClippedUpdate,
    CorrectedDecay,
    Decoupled,
    Hyperball,
    IndependentDecay,
    Previous,
    TrustRatio,
    Unit,
)

STEPS, RATE, DECAY, PEAK = 300, 0.01, 0.1, 0.03
B1, B2, EPS = 0.9, 0.999, 1e-8


def moments(s, g, t, b1=B1, b2=B2):
    """m^ and v^ of Algorithm 1 of Kingma & Ba."""
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g**2
    return s["m"] / (1 - b1**t), s["v"] / (1 - b2**t)


def norm(x):
    return np.sqrt(np.sum(x**2))


def adam_ratio(s, g, t):
    m, v = moments(s, g, t)
    return m / (np.sqrt(v) + EPS)


def stable_adamw(s, p, g, t, alpha):
    m, v = moments(s, g, t)
    rms = np.sqrt(np.mean(g**2 / np.maximum(v, EPS**2))) if g.size else 0.0
    eta = alpha / max(1.0, rms)
    return p - eta * DECAY * p - eta * m / (np.sqrt(v) + EPS)


def cautious_adamw(s, p, g, t, alpha):
    u = adam_ratio(s, g, t)
    phi = (u * g > 0).astype(float)
    return p - alpha * phi * phi.size / (np.sum(phi) + 1) * u - alpha * DECAY * p


def adamc(s, p, g, t, alpha):
    decay = alpha**2 / PEAK * DECAY if p.ndim > 1 else alpha * DECAY
    return p - alpha * adam_ratio(s, g, t) - decay * p


def adam_atan2(s, p, g, t, alpha):
    m, v = moments(s, g, t)
    return p - alpha * 1.3 * np.arctan2(m, 0.7 * np.sqrt(v)) - alpha * DECAY * p


def laprop(s, p, g, t, alpha):
    s["n"] = B2 * s.get("n", 0.0) + (1 - B2) * g**2
    s["m"] = B1 * s.get("m", 0.0) + (1 - B1) * g / (np.sqrt(s["n"] / (1 - B2**t)) + 1e-15)
    return p - alpha * s["m"] / (1 - B1**t) - alpha * DECAY * p


def adams(s, p, g, t, alpha):
    before = s.get("m", np.zeros_like(g))
    s["m"] = B1 * before + (1 - B1) * g
    v = 0.95 * before**2 + (1 - 0.95) * g**2
    return p - alpha * (s["m"] / (np.sqrt(v) + EPS) + DECAY * p)


def bcos(s, p, g, t, alpha):
    before = s.get("m", g)
    v = (1 - (1 - B1) ** 2) * before**2 + (1 - B1) ** 2 * g**2
    s["m"] = B1 * before + (1 - B1) * g
    return p - alpha * DECAY * p - alpha * s["m"] / (np.sqrt(v) + 1e-6)


def mars(s, p, g, t, alpha):
    c = g + 0.025 * 0.95 / (1 - 0.95) * (g - s.get("g", g))
    s["g"] = g
    c = c / norm(c) if norm(c) > 1 else c
    m, v = moments(s, c, t, 0.95, 0.99)
    return p - alpha * (m / (np.sqrt(v) + EPS) + DECAY * p)


def on_a_ball(p, u, alpha):
    def unit(x):
        return x / norm(x) if norm(x) > 0 else x

    return norm(p) * unit(p - alpha * norm(p) * unit(u))


def adamh(s, p, g, t, alpha):
    u = adam_ratio(s, g, t)
    return on_a_ball(p, u, alpha) if p.ndim > 1 else p - alpha * (u + DECAY * p)


def msvag(s, p, g, t, alpha):
    m, v = moments(s, g, t, B1, B1)
    rho = (1 - B1) * (1 + B1**t) / ((1 + B1) * (1 - B1**t))
    variance = (v - m**2) / (1 - rho) if t > 1 else np.zeros_like(g)
    return p - alpha * m * m**2 / (m**2 + rho * variance) - alpha * DECAY * p


TWINS = {
    "stable_adamw": (stable_adamw, {}),
    "cautious_adamw": (cautious_adamw, {}),
    "adamc": (adamc, {"peak": PEAK}),
    "adam_atan2": (adam_atan2, {"height": 1.3, "width": 0.7}),
    "laprop": (laprop, {}),
    "adams": (adams, {}),
    "bcos": (bcos, {}),
    "mars": (mars, {}),
    "adamh": (adamh, {}),
    "msvag": (msvag, {}),
}


# descents on their own and nested, over Adam's ratio r
def cautious_decay(s, p, g, t, alpha):
    r = adam_ratio(s, g, t)
    return p - alpha * (r + DECAY * (r * p >= 0) * p)


def independent_decay(s, p, g, t, alpha):
    return p - alpha * adam_ratio(s, g, t) - alpha / PEAK * DECAY * p


def corrected_decay(s, p, g, t, alpha):
    return p - alpha * adam_ratio(s, g, t) - alpha**2 / PEAK * DECAY * p


def trusted(p, u, alpha):
    return p - alpha * (norm(p) / norm(u) if norm(p) > 0 and norm(u) > 0 else 1.0) * u


def cautious_lamb(s, p, g, t, alpha):
    """Cautious decay inside of LAMB's norm."""
    r = adam_ratio(s, g, t)
    return trusted(p, r + DECAY * (r * p >= 0) * p, alpha)


def all_at_once(s, p, g, t, alpha):
    """Clipped, cautious, with corrected and cautious decay."""
    m, v = moments(s, g, t)
    r = m / (np.sqrt(v) + EPS)
    alpha = alpha / max(1.0, np.sqrt(np.mean(g**2 / np.maximum(v, EPS**2))) if g.size else 0.0)
    phi = r * g > 0
    r = r * phi * phi.size / (np.sum(phi) + 1)
    return p - alpha * r - alpha**2 / PEAK * DECAY * (r * p >= 0) * p


def atan2_on_a_ball(s, p, g, t, alpha):
    m, v = moments(s, g, t)
    return on_a_ball(p, 4 / np.pi * np.arctan2(m, np.sqrt(v) + EPS), alpha)


NESTED = {
    "cautious decay": (cautious_decay, CautiousDecay()),
    "independent decay": (independent_decay, IndependentDecay(PEAK)),
    "corrected decay": (corrected_decay, CorrectedDecay(PEAK)),
    "cautious LAMB": (cautious_lamb, CautiousDecay(TrustRatio())),
    "all at once": (all_at_once, ClippedUpdate(EPS, CautiousUpdate(CorrectedDecay(PEAK, CautiousDecay())))),
    "atan2 on a ball": (atan2_on_a_ball, Arctangent(then=Hyperball())),
}


def rate(t):
    """A schedule: what goes with alpha is told from what does not."""
    return RATE * (1 + 0.5 * np.cos(0.1 * t))


def by_hand(twin, params, grads):
    """The updates of each leaf, step by step, in float64, with parameters that move."""
    found = []
    for p, gs in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
        p, memory, us = np.asarray(p), {}, []
        for t, g in enumerate(np.asarray(gs), 1):
            new = np.asarray(twin(memory, p, g, t, rate(t - 1)))
            us.append(new - p)
            p = new
        found.append(np.stack(us))
    return found


@functools.cache
def problem():
    return cases.tree(), cases.stacked(STEPS)


def check(tx, twin):
    params, grads = problem()
    got = cases.run(tx, params, grads, {"xla_backend_optimization_level": 0})[0]
    for u, want in zip(jax.tree.leaves(got), by_hand(twin, params, grads), strict=True):
        np.testing.assert_allclose(u, want, rtol=1e-9, atol=1e-9 * RATE)


def scheduled(count):
    return RATE * (1 + 0.5 * jnp.cos(0.1 * count))


@pytest.mark.parametrize("name", TWINS)
def test_a_variant_is_its_papers_equation(name, x64):
    twin, options = TWINS[name]
    check(getattr(snr_adam, name)(scheduled, weight_decay=DECAY, **options), twin)


@pytest.mark.parametrize("name", NESTED)
def test_descents_are_their_equations_alone_and_nested(name, x64):
    twin, descent = NESTED[name]
    decay = 0.0 if "ball" in name else DECAY
    check(snr_adam.descend(scheduled, EMA(B1), RMS(B2, EPS), weight_decay=decay, descent=descent), twin)


def one_step(descent, decay=DECAY, dtype="float32", **how):
    """One float32 step of a fixed problem, after another one."""
    tx = snr_adam.descend(RATE, EMA(), RMS(), weight_decay=decay, descent=descent, **how)
    params, (first, second) = cases.tree(dtype=dtype), cases.gradients(2, dtype=dtype)
    _, state = tx.update(first, tx.init(params), params)
    return tx.update(second, state, params)[0]


@pytest.mark.parametrize("name", cases.DESCENTS)
def test_an_update_has_its_gradients_type_and_no_nan(name, strict_promotion):
    """Also of bfloat16, complex, empty and zero leaves, with debug_nans on."""
    decay = 0.0 if name == "hyperball" else DECAY
    params = {
        "half": jnp.ones((2, 3), jnp.bfloat16),
        "z": jnp.asarray([[1 + 2j, 0j]], jnp.complex64),
        "empty": jnp.zeros((0, 3)),
        "zero": jnp.zeros((2, 2)),
        "none": None,
        "one": jnp.float32(2.0),
    }
    tx = snr_adam.descend(RATE, weight_decay=decay, descent=cases.DESCENTS[name])
    state = tx.init(params)
    with jax.debug_nans(True):
        for scale in (1.0, 0.0, -1.0):
            grads = jax.tree.map(lambda p, scale=scale: (p + 0.5) * jnp.asarray(scale, p.dtype), params)
            updates, state = tx.update(grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (u.shape, u.dtype) == (p.shape, p.dtype)
        assert np.isfinite(np.asarray(u, np.complex64)).all()


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "packed"])
@pytest.mark.parametrize("name", cases.DESCENTS)
def test_a_rate_of_zero_moves_nothing(name, storage):
    tx = snr_adam.descend(0.0, descent=cases.DESCENTS[name], storage=storage)
    w = jnp.asarray([[0.5, -3.0, 0.0]])
    state = tx.init(w)
    for g in (w, 0 * w, 1e30 * w):
        updates, state = tx.update(g, state, w)
        np.testing.assert_array_equal(updates, 0)


@pytest.mark.parametrize("rule", [CautiousDecay(), CorrectedDecay(RATE), IndependentDecay(1.0), ClippedUpdate()])
def test_a_rule_that_has_nothing_to_change_changes_no_bit(rule):
    """Without decay, at the peak, or where the gradient is no larger than its noise."""
    decay = 0.0 if isinstance(rule, CautiousDecay) else DECAY
    plain, first = (snr_adam.descend(RATE, weight_decay=decay, descent=d) for d in (Decoupled(), rule))
    params, g = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([0.5, -3.0, 0.1])
    got, want = (tx.update(g, tx.init(params), params)[0] for tx in (first, plain))
    if isinstance(rule, ClippedUpdate):  # g^2 / v^ is 1 but for the rounding of v^
        np.testing.assert_allclose(got, want, rtol=1e-6)
    else:
        np.testing.assert_array_equal(got, want)


def test_a_gradient_fifty_times_too_large_moves_little():
    """StableAdamW's purpose: a jump is divided by its own size."""
    sizes = {}
    for name in ("adamw", "stable_adamw"):
        tx, w = getattr(snr_adam, name)(1.0, b2=0.99, weight_decay=0.0), jnp.zeros(100)
        g = jax.random.normal(jax.random.key(0), (31, 100)) * jnp.asarray([1.0] * 30 + [50.0])[:, None]
        u = cases.run(tx, w, g)[0][-1]
        sizes[name] = float(jnp.sqrt(jnp.mean(u * u)))
    assert sizes["stable_adamw"] < 0.25 * sizes["adamw"]


def test_a_ball_keeps_its_norm_over_many_steps():
    tx, w = snr_adam.adamh(0.1), jax.random.normal(jax.random.key(0), (20, 30))
    run = cases.run(tx, w, jax.random.normal(jax.random.key(1), (1000, 20, 30)))
    np.testing.assert_allclose(jnp.linalg.norm(run[1]), jnp.linalg.norm(w), rtol=1e-4)
    steps = jnp.linalg.norm(run[0], axis=(1, 2)) / jnp.linalg.norm(w)
    assert 0.05 < steps.min() < steps.max() < 0.1001  # what points away from the centre is taken back


@pytest.mark.parametrize(("name", "bytes_each"), [("adams", 4), ("bcos", 4), ("adamw", 8)])
def test_what_a_state_takes(name, bytes_each):
    w = jnp.zeros(1000)
    for storage, each in (("float32", bytes_each), ("bfloat16", bytes_each // 2)):
        state = getattr(snr_adam, name)(0.1, storage=storage).init(w)
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == 1000 * each + 4


@pytest.mark.parametrize("name", ["adams", "bcos"])
def test_without_a_second_moment_bfloat16_is_near(name):
    """m' is read off a rounded m: the noise hardly sees it."""
    g = 0.3 + jax.random.normal(jax.random.key(0), (60, 2000))
    narrow, wide = (
        cases.run(getattr(snr_adam, name)(1.0, weight_decay=0.0, storage=x), g[0], g)[0][-1]
        for x in ("bfloat16", "float32")
    )
    assert float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide)) < 0.01


def test_weight_decay_may_be_a_tree():
    """A prefix of the parameters, with schedules in it, under a mask too; what is 0 needs no parameters."""
    params, g = cases.tree(), next(cases.gradients(1))
    tree = {"scalar": 0.0, "one": 0.5, "block": lambda count: 0.25, "empty": 0.0}
    plain, tx = snr_adam.adamw(0.1, weight_decay=0.0), snr_adam.adamw(0.1, weight_decay=tree)
    us, base = (x.update(g, x.init(params), params)[0] for x in (tx, plain))
    each = {"scalar": 0.0, "one": 0.5, "block": [0.25, 0.25], "empty": 0.0}
    want = jax.tree.map(lambda u, p, d: u - 0.1 * d * p, base, params, each)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), us, want)
    masked = snr_adam.adamw(0.1, weight_decay=tree, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    us = masked.update(g, masked.init(params), params)[0]
    np.testing.assert_array_equal(us["one"], base["one"])
    np.testing.assert_allclose(us["block"][1], want["block"][1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"weight_decay at one=-1\.0: must be a finite number >= 0"):
        snr_adam.adamw(0.1, weight_decay=tree | {"one": -1.0})
    with pytest.raises(ValueError, match="the tree given as weight_decay"):
        tx.update(g["block"], snr_adam.adamw(0.1).init(g["block"]), g["block"])
    alone = snr_adam.adamw(0.1, weight_decay={"a": 0.0})
    assert alone.update({"a": g["one"]}, alone.init({"a": g["one"]}))[0]["a"].shape == (1,)


def test_a_descent_may_be_a_tree_or_a_function():
    params, g = cases.tree(), next(cases.gradients(1))
    tree = {"scalar": Decoupled(), "one": Arctangent(), "block": [Decoupled(), TrustRatio()], "empty": Decoupled()}
    found = {}
    for name, descent in {"tree": tree, "function": lambda params: tree}.items():
        tx = snr_adam.adamw(0.1, descent=descent)
        found[name] = tx.update(g, tx.init(params), params)[0]
    jax.tree.map(np.testing.assert_array_equal, *found.values())
    lamb, adamw = snr_adam.lamb(0.1, weight_decay=1e-4, eps=1e-8), snr_adam.adamw(0.1)
    for tx, at in ((lamb, 1), (adamw, 0)):
        want = tx.update(g, tx.init(params), params)[0]
        np.testing.assert_array_equal(found["tree"]["block"][at], want["block"][at])
    injected = optax.inject_hyperparams(snr_adam.adamw)(0.1, descent=lambda params: tree)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        injected.update(g, injected.init(params), params)[0],
        found["tree"],
    )
    with pytest.raises(TypeError, match=r"descent at block=0\.5 is of type float"):
        snr_adam.adamw(0.1, descent=tree | {"block": 0.5})


REFUSED = {
    "decay on a ball": (lambda: one_step(Hyperball()), "nothing to decay. Give weight_decay=0.0"),
    "decay of no size": (lambda: CorrectedDecay(0.1, Hyperball()), "Hyperball has no decay: leave one out"),
    "two sizes": (
        lambda: CorrectedDecay(0.1, CautiousDecay(IndependentDecay(0.1))),
        "IndependentDecay says how large the decay is, too: leave one out",
    ),
    "no peak": (lambda: CorrectedDecay(0.0), "CorrectedDecay: peak=0.0: must be a finite number > 0"),
    "a schedule without a peak": (lambda: snr_adam.adamc(scheduled), "needs peak="),
    "clipped by nothing": (lambda: first_step(EMA(), Unit()), "here nothing divides"),
    "clipped by an older noise": (lambda: first_step(EMA(), Previous()), "here nothing divides"),
    "no memory": (lambda: snr_adam.adams(0.1, b1=0.0), "FromMean: b1=0: must be above 0"),
    "no variance": (lambda: snr_adam.msvag(0.1, b=0.0), "Adapted: b2=0: must be above 0"),
    "packed without v": (
        lambda: snr_adam.adams(0.1, storage="packed").init(jnp.ones(2)),
        "keeps one moment and no moment. Use storage='bfloat16'",
    ),
}


def first_step(signal, noise):
    tx = snr_adam.descend(0.1, signal, noise, descent=ClippedUpdate())
    return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name):
    make, says = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


def test_a_mixture_of_moments_is_shown_as_what_the_noise_sees():
    """MARS's look: |m^| and sqrt(v^) of the gradients as it corrected them."""
    tx, w = snr_adam.observe(snr_adam.mars(1e-3, weight_decay=0.0), every=1), jnp.zeros((3, 4))
    state = tx.init(w)
    update = jax.jit(tx.update)
    for g in itertools.repeat(jnp.full((3, 4), 0.01), 5):
        _, state = update(g, state, w)
    total = snr_adam.report(state).total
    assert total["signal"] == pytest.approx(0.01 * 12**0.5, rel=1e-5)
    assert total["noise"] == pytest.approx(0.01 * 12**0.5, rel=1e-5)


def test_a_run_of_optax_goes_on_in_a_variant():
    """The states of variants with two moments lie as AdamW's."""
    params, grads = cases.tree(), list(cases.gradients(3))
    state = optax.adamw(0.1).init(params)
    for g in grads:
        _, state = optax.adamw(0.1).update(g, state, params)
    for name in ("stable_adamw", "cautious_adamw", "adam_atan2", "adamc", "adamh"):
        tx = getattr(snr_adam, name)(0.1)
        moved = snr_adam.from_optax(state, tx.init(params))
        assert jax.tree.structure(moved) == jax.tree.structure(tx.init(params))
        jax.tree.map(np.testing.assert_array_equal, moved[0].mu, state[0].mu)


def test_the_eps_of_stable_adamw_is_that_of_its_mean_also_when_it_is_injected():
    """With gradients under eps the mean is small, and with an eps of 1e-8 in it the step would be shorter."""
    w, grads = jnp.ones(2), [jnp.array([1e-3, 2e-3]), jnp.array([0.4, 0.5])]
    steps = []
    for make in (snr_adam.stable_adamw, optax.inject_hyperparams(snr_adam.stable_adamw)):
        tx = make(0.1, eps=0.5)
        state = tx.init(w)
        for g in grads:
            u, state = cases.quick_jit(tx.update)(g, state, w)
        steps.append(u)
    np.testing.assert_allclose(*steps, rtol=1e-6)
    with pytest.raises(TypeError, match="stable_adamw: eps is a schedule"):
        snr_adam.stable_adamw(0.1, eps=lambda count: 1e-8)
