"""Moments at rest: how far narrow storage moves the update, that it never stalls, and what stays exact.

Every law compares a storage with float32 moments fed the same gradients in the same scan.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PRESETS, QUICK, fast_jit, run, stacked, tree

import snr_adam
from snr_adam import scale_by_snr
from snr_adam.parts import EMA, RMS

NARROW = ("packed", "bfloat16")
TINY = float(jnp.finfo("float32").tiny)
# presets that do not keep exactly one signed and one non-negative moment, and what the error says that they keep
NOT_PACKED = {
    "amsgrad": "one moment and 2 moments (AverageAndMaximum)",
    "ademamix": "2 moments (FastAndSlow) and one moment",
    "rmsprop": "no moment and one moment",
    "lion": "one moment and no moment",
    "adams": "one moment and no moment",
    "bcos": "one moment and no moment",
    "mars": "2 moments (MeanAndGradient) and one moment",
}


def _normal(t, shape, scale=1.0):
    return scale * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), shape)


def _avals(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def _second(storage, state):
    """v of the one leaf of a state, as float32."""
    storage = snr_adam.storage.resolve(storage)
    return storage.decode(state.mu, state.nu, jnp.float32)[1]


def _twins(b2, storages, gradient, steps, see, last=None):
    """The mean of see([updates], [states]) over the `last` of `steps` steps, one optimizer for each of `storages`."""
    txs = [scale_by_snr(EMA(0.9), RMS(b2, eps=0.0), storage) for storage in storages]
    first = steps - (last or steps)

    @fast_jit
    def mean():
        def step(carry, t):
            states, total = carry
            pairs = [tx.update(gradient(t), s) for tx, s in zip(txs, states, strict=True)]
            us, states = [u for u, _ in pairs], [s for _, s in pairs]
            total = jax.tree.map(lambda a, b: a + jnp.where(t >= first, b, 0.0), total, see(us, states))
            return (states, total), None

        states = [tx.init(gradient(0)) for tx in txs]
        zero = jax.tree.map(jnp.zeros_like, see([gradient(0)] * len(txs), states))
        (states, total), _ = jax.lax.scan(step, (states, zero), jnp.arange(steps))
        return jax.tree.map(lambda x: x / (steps - first), total)

    return mean()


def _squares(us, states):
    """Mean squares over a row of the last update's difference from the first, and of the first."""
    return jax.tree.map(lambda full, u: jnp.stack([jnp.mean((u - full) ** 2, -1), jnp.mean(full**2, -1)]), us[0], us[1])


def _error(total):
    return np.sqrt(total[0] / total[1])


# line 2: the error of the update. Rounding errors pile up over 1/(1 - b2) steps; four times that settles to 2 %


@pytest.mark.parametrize(
    ("b2", "most", "shape", "steps"),
    [
        (0.95, 0.008, 32768, 400),
        (0.999, 0.016, 4096, 5000),
        pytest.param(0.9999, 0.019, 2048, 50_000, marks=pytest.mark.slow),
    ],
)
def test_error_of_the_packed_update(b2, most, shape, steps):
    error = _error(
        _twins(b2, ("float32", "packed"), lambda t: _normal(t, (shape,)), steps, _squares, max(steps // 10, 100))
    )
    print(f"packed, b2 = {b2}: {error:.3%}")
    assert most / 3 < error <= most


def test_error_from_a_settled_state_at_a_long_memory():
    """b2 = .9999 from v = 1 and m = 0, where the averages are going: v's own settling is skipped."""
    txs = [scale_by_snr(EMA(0.9), RMS(0.9999, eps=0.0), storage) for storage in ("float32", "packed")]

    @fast_jit
    def errors():
        def start(tx, storage):
            zero = jnp.zeros(1024)
            form = snr_adam.storage.resolve(storage)
            mu, nu = form.encode(zero, zero + 1.0, lambda *_: jnp.zeros(1024, jnp.uint32))
            nu = snr_adam.storage.mark(form, nu)
            return tx.init(zero)._replace(count=jnp.int32(1_000_000), mu=mu, nu=nu)

        def step(states, t):
            g = _normal(t, (1024,))
            (full, a), (u, b) = (tx.update(g, s) for tx, s in zip(txs, states, strict=True))
            return [a, b], jnp.stack([jnp.mean((u - full) ** 2), jnp.mean(full**2)])

        start = [start(tx, storage) for tx, storage in zip(txs, ("float32", "packed"), strict=True)]
        return jax.lax.scan(step, start, jnp.arange(25_000))[1]

    squares = np.asarray(errors())
    error = _error(squares[-4000:].mean(0))
    print(f"packed, b2 = 0.9999, settled start: {error:.3%}")
    assert 0.019 / 3 < error <= 0.019


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_error_is_the_same_at_every_power_of_two(b2):
    """No scale, no block, no neighbour enters: gradients 2^k times as large give the same updates, k = -40 to 40."""
    n = 512
    factors = [2.0**k for k in (0, -40, -13, 13, 40)]
    powers = 2.0 ** np.random.default_rng(0).integers(-40, 41, n).astype("float32")
    tx = scale_by_snr(EMA(0.9), RMS(b2, eps=0.0), "packed")

    @jax.jit
    def updates(factor):
        def step(state, t):
            u, state = tx.update(_normal(t, (n,)) * factor, state)
            return state, u

        return jax.lax.scan(step, tx.init(jnp.zeros(n)), jnp.arange(300))[1]

    first, *others, mixed = (updates(jnp.broadcast_to(jnp.float32(f), (n,))) for f in (*factors, powers))
    assert np.std(first) > 0.1
    for other in (*others, mixed):
        np.testing.assert_array_equal(other, first)


def _scale_errors(b2, n, steps, last):
    """The error for rows of gradients of scale 1e-15 to 1e15, and for one lognormal spread over 16 decades.

    Where v lies between two powers of two its resolution varies by a factor of two, so elements that all had one v
    would show that place and not the scale: each row's scales spread over a factor of four.
    """
    scales = 10.0 ** np.arange(-15, 16, 5)[:, None]
    within = 4.0 ** np.linspace(-0.5, 0.5, n)[None]
    spread = np.exp(np.random.default_rng(0).normal(0.0, 3.0, (1, n)))
    rows = jnp.asarray(np.concatenate([scales * within, spread]), "float32")

    def see(us, states):
        full, u = us
        return jnp.stack([jnp.mean((u - full) ** 2, -1), jnp.mean(full**2, -1)])

    total = _twins(b2, ("float32", "packed"), lambda t: rows * _normal(t, (1, n)), steps, see, last)
    return _error(total)


@pytest.mark.parametrize(
    ("b2", "n", "steps"),
    [(0.99, 2048, 800), pytest.param(0.999, 4096, 5000, marks=pytest.mark.slow)],
)
def test_error_does_not_depend_on_the_scale(b2, n, steps):
    errors = _scale_errors(b2, n, steps, steps // 4)
    print(f"packed, b2 = {b2}, scales 1e-15 to 1e15, lognormal: {errors}")
    assert np.all(abs(errors / np.median(errors) - 1.0) < 0.1)


# line 3: no stall


def test_no_stall_when_gradients_shrink():
    """Gradients a tenth as large from one step on: 6,000 steps later every storage has followed, at b2 = .999."""
    steps, n = 6000, 1024

    def gradient(t):
        return _normal(t, (n,), jnp.where(t < 3000, 1.0, 0.1))

    storages = ("float32", *NARROW)

    def see(us, states):
        return jnp.stack([jnp.mean(_second(storage, s)) for storage, s in zip(storages, states, strict=True)])

    full, *narrow = _twins(0.999, storages, gradient, 3000 + steps, see, 1)
    assert 0.01 < full < 0.015
    print("v over float32's after shrinking:", {s: float(v / full) for s, v in zip(NARROW, narrow, strict=True)})
    for v in narrow:
        assert abs(v / full - 1.0) < 0.02


def test_no_stall_on_the_way_up():
    """From v = 0 and g = 1, v is 1 after 10,000 steps."""

    def see(us, states):
        vs = [_second(storage, s) for storage, s in zip(NARROW, states, strict=True)]
        return jnp.stack([jnp.stack([jnp.mean(v), jnp.std(v)]) for v in vs])

    got = _twins(0.999, NARROW, lambda t: jnp.ones(2048), 10_000, see, 1)
    print("v at g = 1, mean and standard deviation:", dict(zip(NARROW, got.tolist(), strict=True)))
    np.testing.assert_allclose(got[:, 0], 1.0, atol=0.02)


# line 4: exact at zero, and bounded


@pytest.mark.parametrize("storage", NARROW)
def test_zero_stays_zero(storage):
    """10,000 steps without a gradient leave moments and updates at zero, bit for bit."""
    tx = snr_adam.adam(1.0, storage=storage)

    @jax.jit
    def after():
        def step(carry, _):
            state, moved = carry
            u, state = tx.update(jnp.zeros(300), state)
            return (state, moved | jnp.any(u != 0)), None

        return jax.lax.scan(step, (tx.init(jnp.zeros(300)), jnp.array(False)), length=10_000)[0]

    state, moved = after()
    assert not moved
    assert state[0].count == 10_000
    for x in jax.tree.leaves((state[0].mu, state[0].nu)):
        assert not np.any(np.asarray(x).view(np.uint8))


def _families(t):
    """Gradients that try to make a small v meet a large m: rows of 64 elements."""
    g = _normal(t, (64,))
    time, here = t.astype(jnp.float32), jnp.arange(64)
    return {
        "halving": g * 0.5**time,
        "fading": g * 0.98**time,
        "gone": jnp.where(t < 100, g, 0.0),
        "nearly gone": jnp.where(t < 100, g, 1e-20 * g),
        "outlying neighbours": g * jnp.where(here % 8 == 3, 1e6, 1e-6),
        "outlying once": jnp.where(t == 2500 + here, 1e6, 1e-6 * g),
        "outlying at times": jnp.where(t % 1000 == 10 * here, 1e6, 1e-6 * g),
        "alternating": jnp.where((t + here) % 2 == 0, 1.0, -1.0),
        "alternating, uneven": jnp.where(t % 2 == 0, 1.0, -1e-3) * (1.0 + here),
        "subnormal": g * 1e-39,
        "at the edge of v": g * jnp.logspace(-21, -17, 64),
    }


def test_updates_are_bounded():
    """max |update| / lr <= 4 over 3,000 steps of every family and storage, with Adam's own eps; NaN counts as
    infinite."""
    storages = ("float32", *NARROW)
    txs = [snr_adam.adam(1.0, storage=storage) for storage in storages]
    names = list(_families(jnp.int32(0)))

    @fast_jit
    def largest():
        def step(carry, t):
            g = jnp.stack(list(_families(t).values()))
            us, states = zip(*(tx.update(g, s) for tx, s in zip(txs, carry[0], strict=True)), strict=True)
            here = jnp.max(jnp.nan_to_num(abs(jnp.stack(us)), nan=jnp.inf), -1)
            return (states, jnp.maximum(carry[1], here)), None

        zeros = jnp.zeros((len(names), 64))
        start = tuple(tx.init(zeros) for tx in txs), jnp.zeros((len(txs), len(names)))
        return jax.lax.scan(step, start, jnp.arange(3000))[0][1]

    for storage, row in zip(storages, largest(), strict=True):
        most = dict(zip(names, row.tolist(), strict=True))
        print(f"max |update| / lr, {storage}: {most}")
        assert max(most.values()) <= 4.0, (storage, most)
        assert most["outlying once"] > 2.9  # the family does push


def test_v_is_zero_only_below_the_smallest_normal_number():
    """One encoding keeps every normal v above zero, whatever the bits; zero itself stays zero."""
    words = np.arange(0, 0x7F800000, 0x1357, dtype=np.uint32)
    v = np.concatenate([words.view("float32"), [TINY, np.nextafter(np.float32(TINY), 0)], np.zeros(1)]).astype("f4")
    for storage in map(snr_adam.storage.resolve, NARROW):
        for bits in (0, 0xFFFFFFFF, 0x80000000, 0x7FFF8000):
            mu, nu = storage.encode(v, v, lambda shape, stream, bits=bits: jnp.full(shape, bits, jnp.uint32))
            decoded = np.asarray(storage.decode(mu, nu, jnp.float32)[1])
            assert np.all(v[decoded == 0] < TINY)
            assert decoded[-1] == 0


@pytest.mark.parametrize("storage", NARROW)
def test_v_is_zero_only_where_float32_has_none(storage):
    """Over 300 steps at every scale at which v underflows: zero only where float32's v is below the normal numbers.

    Near that edge the two paths differ by the rounding error of v, some per cent: the tenth of an octave above the edge
    belongs to both.
    """
    scale = jnp.logspace(-23, -17, 2048)

    def see(us, states):
        full, v = _second("float32", states[0]), _second(storage, states[1])
        return jnp.stack([jnp.mean((v == 0) & (full >= 1.1 * TINY)), jnp.mean(full == 0), jnp.mean(v > 0)])

    wrong, none, some = _twins(0.999, ("float32", storage), lambda t: scale * _normal(t, (2048,)), 300, see)
    assert wrong == 0
    assert none > 0.1
    assert some > 0.1


# the presets, and what cannot be stored


@pytest.mark.parametrize("storage", NARROW)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_in_narrow_storage(name, storage):
    """A preset moves as it does in float32, up to the resolution of its moments, and its state keeps its avals."""
    make = PRESETS[name][0]
    if storage == "packed" and name in NOT_PACKED:
        with pytest.raises(ValueError, match="holds one signal moment and one noise moment") as error:
            make(0.01, storage=storage)
        assert f"this optimizer keeps {NOT_PACKED[name]}. Use storage='bfloat16'" in str(error.value)
        return
    tx, plain = make(0.01, storage=storage), make(0.01)
    p, *grads = jnp.asarray(np.random.default_rng(0).normal(size=(21, 1000)), "float32")
    (got, _, state), (want, _, _) = (run(each, p, jnp.stack(grads), QUICK) for each in (tx, plain))
    assert _avals(state) == _avals(tx.init(p))
    held = {x.dtype.name for x in jax.tree.leaves((state[0].mu, state[0].nu))}
    assert held == {"uint32" if storage == "packed" else "bfloat16"}
    error = np.sqrt(np.sum((got - want) ** 2) / np.sum(want**2))
    print(f"{name}, {storage}: {error:.2%}")
    assert 1e-4 < error < (0.2 if name == "lion" else 0.02)  # a sign near zero may flip


def test_a_moment_may_be_narrow_by_itself():
    """What is written elsewhere as `nu_dtype`: bfloat16 for v alone, float32 for the signal."""
    tx = snr_adam.adam(0.01, storage=snr_adam.parts.Cast(nu="bfloat16"))
    _, _, state = run(tx, tree(), stacked(5), QUICK)
    assert {x.dtype.name for x in jax.tree.leaves(state[0].mu)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(state[0].nu)} == {"bfloat16"}


def test_complex_moments():
    """No room for them in a word; beside a bfloat16 v they stay complex64."""
    p = jnp.ones(3, jnp.complex64)
    with pytest.raises(ValueError, match="no room for a complex moment: use storage='bfloat16'"):
        snr_adam.adam(0.01, storage="packed").init({"w": p})
    tx = snr_adam.adam(0.01, storage="bfloat16")
    u, state = tx.update(p, tx.init(p))
    assert (u.dtype, state[0].mu.dtype, state[0].nu.dtype) == (jnp.complex64, jnp.complex64, jnp.bfloat16)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: snr_adam.adam(0.01, storage="pack"),
            r"storage='pack' is no name of a storage: use one of the names \['bfloat16'",
        ),
        (lambda: snr_adam.adam(0.01, storage=None), "storage=None is of type NoneType, not a storage: use one"),
        (lambda: snr_adam.parts.Cast(nu="int8"), "a moment needs a floating dtype"),
        (lambda: snr_adam.adam(0.01, storage="packed", mu_dtype="bfloat16"), "both say how the signal rests"),
    ],
)
def test_errors_name_what_is_possible(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_every_preset_has_a_storage():
    assert [name for name, (make, _) in PRESETS.items() if "storage" not in inspect.signature(make).parameters] == []
