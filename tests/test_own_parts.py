"""Parts of a user's own are parts like any other: in every wrapper, under observation, and never read wrongly.

The parts are those of `own_parts.py`. What they make together is written down once more by hand, as a transformation
of Optax, and every wrapper around them is run beside the same wrapper around that one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_parts as own
import pytest
import test_any_order as orders
from test_lags import by_hand as of_lags

import snr_adam
from snr_adam import descend, observe, scale_by_snr
from snr_adam.parts import EMA, RMS, Packed, Shared
from snr_adam.state import share, suggest_sharing
from snr_adam.storage import InOwnForm

STORAGES = {"halves exchanged": own.HalvesExchanged(), "exchanged": own.Exchanged(), "root": own.Root()}
NEAR = {"halves exchanged": 0.08}  # of how far the parameters have moved; the others are float32
B1, B2, MOST, DECAY = 0.9, 0.99, 0.5, 0.01


def ours(signal, noise, storage="float32"):
    return lambda rate: descend(
        rate, signal, noise, weight_decay=DECAY, descent=own.Bounded(MOST), storage=STORAGES.get(storage, storage)
    )


class _ByHand(NamedTuple):
    t: jax.Array
    m: optax.Params
    n: optax.Params


def by_hand(size, corrected):
    """m^ / n^, bounded, with decay: `size` is what n averages of a gradient, and `corrected` makes the noise of it."""

    def make(rate):
        def init(params):
            return _ByHand(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

        def update(gs, state, params):
            t = state.t + 1
            m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, state.m, gs)
            n = jax.tree.map(lambda n, g: B2 * n + (1 - B2) * size(g), state.n, gs)

            def u(m, n, p):
                ratio = m / (1 - B1**t) / corrected(n / (1 - B2**t))
                return -rate * (jnp.clip(ratio, -MOST, MOST) + DECAY * p)

            return jax.tree.map(u, m, n, params), _ByHand(t, m, n)

        return optax.GradientTransformation(init, update)

    return make


HAND = {
    "root of squares": (own.Squares(B2), by_hand(jnp.square, lambda v: jnp.sqrt(v) + 1e-8)),
    "mean size": (own.MeanSize(B2), by_hand(jnp.abs, lambda n: n + 1e-8)),
}


@pytest.mark.parametrize("name", orders.WRAPPERS)
def test_in_every_wrapper(name):
    """A numerator, both denominators, a descent and every storage: as by hand, in the same wrapper."""
    names, twin = (name,), () if name == "observe" else (name,)
    txs = {
        (noise, storage): orders.product(names, ours(own.HeavyBall(B1), HAND[noise][0], storage))
        for noise, storage in [(noise, "float32") for noise in HAND] + [("root of squares", each) for each in STORAGES]
    }
    txs |= {(noise, "hand"): orders.product(twin, HAND[noise][1]) for noise in HAND}
    end = orders.run(txs, names)
    start = orders.params(names)
    for (noise, storage), (got, _) in end.items():
        want = end[noise, "hand"][0]
        for key in got:
            x, y, z = (np.asarray(p[key], float) for p in (got, want, start))
            moved, grain = np.abs(y - z).max(), 2.0**-8 if got[key].dtype == jnp.bfloat16 else 0.0
            assert moved > 0.005, "nothing moved, so nothing was compared"
            np.testing.assert_allclose(x, y, rtol=grain, atol=NEAR.get(storage, 2e-5) * moved + grain / 2)


STEPS, SIZE = 40, 32
GRADIENTS = np.asarray(0.5 + np.random.default_rng(0).normal(size=(STEPS, SIZE)), np.float32)
UNKNOWN = ("signal", "pseudo_snr", "floor", "significant", "persistent", "persistence")


def seen(signal, noise, storage="float32", whole=False):
    """What is reported of one leaf after all steps."""
    tx = observe(ours(signal, noise, storage)(0.1) if whole else scale_by_snr(signal, noise, storage))
    w, update = jnp.ones(SIZE), cases.quick_jit(tx.update)
    state = tx.init(w)
    for g in GRADIENTS:
        _, state = update(jnp.asarray(g), state, w)
    return {key: float(column[0]) for key, column in snr_adam.report(state).columns.items()}


def average(xs, b):
    """The corrected moving average after all steps, and the one before the last."""
    weights = (1 - b) * b ** np.arange(len(xs))[::-1]
    weights /= weights.sum()
    return np.tensordot(weights, xs, 1)


def snr_by_hand():
    """The SNR and the noise scale in batches: from lags alone, and those of six whole bursts."""
    bursts = GRADIENTS.astype(float)[: STEPS // 6 * 6].reshape(-1, 6, SIZE)
    found = of_lags([g @ g.T for g in bursts])
    share = max(found.signal, found.least) / found.power
    assert share - (found.half + found.slack) / found.power > 0, "no signal was found, so none is compared"
    return {"snr": share / (1 - share), "noise_scale": (1 - share) / share}


@pytest.mark.parametrize("noise", HAND)
def test_observed_as_by_hand(noise):
    """Signal, noise, ratio and floor are those of the last step, computed from all gradients at once."""
    got = seen(own.HeavyBall(B1), HAND[noise][0])
    gs = GRADIENTS.astype(float)
    n = {"root of squares": np.sqrt(average(gs**2, B2)), "mean size": average(abs(gs), B2)}[noise]
    want = {"signal": np.linalg.norm(average(gs, B1)), "noise": np.linalg.norm(n)}
    want |= {"pseudo_snr": want["signal"] / want["noise"], "update_rms": np.sqrt(np.mean((average(gs, B1) / n) ** 2))}
    # A and L are means over looks, in which the newest of n has the weight 2 / (n + 1); the first step is no look
    a, x = 0.0, 0.0
    for t in range(1, STEPS):
        a += 2 / (t + 1) * (np.sum(gs[t] ** 2) - a)
        x += 2 / (t + 1) * (average(gs[:t], B1) @ gs[t] - x)
    want |= {"gradient_norm": np.sqrt(a), "persistent": x} | snr_by_hand()
    want["floor"] = np.sqrt(EMA(B1).floor(STEPS)) if noise == "root of squares" else np.nan
    for key, value in want.items():
        rare = 0.2 if key == "update_rms" else 1e-4  # made at few looks only, on CPU
        np.testing.assert_allclose(got[key], value, rtol=rare, err_msg=key)
    assert np.isnan(got["significant"]) == (noise == "mean size")


def test_what_is_not_known_is_nan():
    """A numerator that does not say what it averages has no signal and nothing that is made of one; gradients have."""
    got = seen(own.ClippedMean(), own.Squares(B2))
    assert {key for key, value in got.items() if np.isnan(value)} >= set(UNKNOWN)
    for key, value in snr_by_hand().items():
        np.testing.assert_allclose(got[key], value, rtol=1e-4, err_msg=key)
    assert got["noise"] == pytest.approx(np.linalg.norm(np.sqrt(average(GRADIENTS**2, B2))), rel=1e-4)
    assert got["gradient_norm"] > 0


class Half(own.MeanSize):
    """A denominator that has `average` and forgot `second`."""

    def average(self, debias):
        return own.Average(1 - self.b, 1 - self.b, debias)


def test_half_of_what_telemetry_asks_is_nothing():
    np.testing.assert_equal(*(seen(own.HeavyBall(B1), noise) for noise in (Half(B2), own.MeanSize(B2))))


class PackedButExchanged(Packed):
    """A subclass, which may do anything."""

    encode = own.HalvesExchanged.encode
    decode = own.HalvesExchanged.decode


@pytest.mark.parametrize("whole", [False, True], ids=["scale_by_snr", "descend"])
@pytest.mark.parametrize(
    ("storage", "like", "near"),
    [
        (own.HalvesExchanged(), "packed", 0.02),
        (PackedButExchanged(), "packed", 0.02),
        (own.Exchanged(), "float32", 1e-6),
        (own.Root(), "float32", 1e-5),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "encode") else str(x),
)
def test_a_storage_is_read_by_itself_alone(storage, like, near, whole):
    """The report of a storage of one's own is that of a storage which keeps the same."""
    got, want = (seen(EMA(B1), RMS(B2), each, whole) for each in (storage, like))
    known = {key for key, value in want.items() if not np.isnan(value)}
    assert known >= {"signal", "noise", "floor", "snr", "persistence", "significant", "update_rms", "relative_gradient"}
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=near, err_msg=key)


PARAMS = {"w": jnp.ones((4, 8)), "b": jnp.zeros(3)}
CONVERSIONS = {
    "to_optax": lambda state, like: snr_adam.to_optax(state),
    "to_optax, given a form": lambda state, like: snr_adam.to_optax(state, optax.adam(0.1).init(PARAMS)),
    "from_optax, as the old one": lambda state, like: snr_adam.from_optax(state, like),
    "from_optax, as the new one": lambda state, like: snr_adam.from_optax(like, state),
    "share": lambda state, like: share(state, PARAMS, 0),
    "suggest_sharing": lambda state, like: suggest_sharing(state, PARAMS),
}


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("storage", [*STORAGES.values(), PackedButExchanged()], ids=lambda x: type(x).__name__)
def test_what_only_its_storage_can_read_is_not_converted(storage, convert):
    """Refused by the name of the mark: arrays of the right shapes and dtypes are not what they seem."""
    tx, like = snr_adam.adam(0.1, storage=storage), snr_adam.adam(0.1).init(PARAMS)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert isinstance(state[0].nu, InOwnForm)
    with pytest.raises(ValueError, match=r"InOwnForm.*(only its own optimizer|use storage)"):
        CONVERSIONS[convert](state, like)


def test_a_storage_of_ones_own_takes_no_shared_noise():
    """The mark of a shared noise would hide that of the storage."""
    with pytest.raises(ValueError, match=r"storage=Exchanged\(\): sharing needs .* 'float32' or 'bfloat16'"):
        scale_by_snr(noise=Shared(RMS(), 0), storage=own.Exchanged())


def test_where_the_step_is_hidden_the_order_is_named():
    """In a branch of Optax's only the state comes out, which nobody but the storage can read."""
    tx, w = observe(optax.apply_if_finite(snr_adam.adam(0.1, storage=own.Exchanged()), 5)), jnp.ones(3)
    with pytest.raises(ValueError, match=r"InOwnForm.*put observe right around that optimizer"):
        tx.update(w, tx.init(w), w)


@pytest.mark.parametrize("name", STORAGES)
def test_what_was_decoded_encodes_to_the_same_bits(name):
    """The law of a storage, see `storage.py`: a step that is not taken changes nothing."""
    storage, (m, v) = STORAGES[name], np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    words = jax.random.bits(jax.random.key(0), (3, 1000))
    rest = storage.encode(jnp.asarray(m), jnp.asarray(v * v), lambda *_: words[0])
    again = [storage.encode(*storage.decode(*rest, jnp.float32), lambda *_, i=i: words[i]) for i in (1, 2)]
    for other in again:
        jax.tree.map(np.testing.assert_array_equal, rest, other)


@dataclass(frozen=True)
class InTheSecondPlace:
    """A storage that leaves nothing in the first place."""

    def encode(self, mu, nu, dither):
        return own.HalvesExchanged().encode(mu, nu, dither)[::-1]

    def decode(self, mu, nu, dtype):
        return own.HalvesExchanged().decode(nu, mu, dtype)


def test_a_storage_may_leave_the_first_place_empty():
    np.testing.assert_equal(*(seen(EMA(B1), RMS(B2), each) for each in (InTheSecondPlace(), own.HalvesExchanged())))
