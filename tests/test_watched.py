"""What people watch beside signal and noise, against a recursion in NumPy: rates, norms, spikes, what is lost.

In every form in which a look is made: afterwards, as on CPU, at every step or at some, and in the step, as on GPU.
"""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_reports import measured

import snr_adam
from snr_adam.telemetry import _spikes as spikes

STEPS, CLIP, B1, B2, EPS = 54, 30.0, 0.9, 0.999, 1e-8
SHAPES = {"a": (6, 5), "b": (7,), "c": (130,)}
LARGE = 2.0**24  # the weights in every other place: what is added to them is lost
NAMES = tuple(SHAPES)
DETAILS = {"relative_gradient", "largest_gradient", "largest_signal", "largest_update", "lost_updates", "update_rms"}


def rate_at(count):
    return 0.01 / (1 + count)


def gradients() -> dict[str, np.ndarray]:
    """Noise around a mean, every third element of b always 0; two steps are not finite; at 40 spikes begin in c."""
    rng = np.random.default_rng(0)
    gs = {name: rng.normal(size=(STEPS, *shape)) + 0.5 for name, shape in SHAPES.items()}
    gs["b"][:, ::3] = 0.0
    gs["a"][[9, 20], 0, 0] = np.nan
    gs["c"][40:42] *= 30.0
    gs["a"][41] *= 100.0
    return {name: g.astype("float32") for name, g in gs.items()}


def weights() -> dict[str, np.ndarray]:
    return {name: np.where(np.arange(np.prod(s)) % 2, LARGE, 1.0).reshape(s) for name, s in SHAPES.items()}


OURS = {"eps": EPS, "weight_decay": 0.0}
TXS = {
    "guard outside": lambda every: snr_adam.guard(snr_adam.observe(snr_adam.adamw(rate_at, **OURS), every), CLIP),
    "guard inside": lambda every: snr_adam.observe(snr_adam.guard(snr_adam.adamw(rate_at, **OURS), CLIP), every),
    "packed": lambda every: snr_adam.guard(
        snr_adam.observe(snr_adam.adamw(rate_at, **OURS, storage="packed"), every), CLIP
    ),
    "injected": lambda every: snr_adam.guard(
        snr_adam.observe(optax.inject_hyperparams(optax.adam)(rate_at, eps=EPS), every), CLIP
    ),
}


def reports(tx) -> list:
    """The report after every step of a scan."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), state

    params = {name: jnp.asarray(p, jnp.float32) for name, p in weights().items()}
    grads = {name: jnp.asarray(g) for name, g in gradients().items()}
    scan = cases.quick_jit(lambda p, gs: jax.lax.scan(step, (p, tx.init(p)), gs)[1])
    states = jax.device_get(scan(params, grads))
    return [snr_adam.report(jax.tree.map(lambda x, i=i: x[i], states)) for i in range(STEPS)]


def norm(x) -> float:
    return float(np.sqrt(np.sum(np.square(np.concatenate([np.ravel(y) for y in x])))))


def expected(every: int) -> list:
    """By step: None where nothing is looked at, else {name: {quantity: number}} with "total"."""
    gs, p = gradients(), weights()
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v, found, count, looks = {name: np.zeros(shape) for name, shape in SHAPES.items()}, [], 0, 0
    clipped, seen = 0.0, {name: Heights() for name in (*NAMES, "total")}
    for i in range(STEPS):
        g = {name: gs[name][i].astype(float) for name in NAMES}
        if not all(np.isfinite(x).all() for x in g.values()):
            found.append(None)
            continue
        due, count = count % (6 * every) < 6, count + 1
        scale = min(1.0, CLIP / norm(g.values()))
        old = m
        g = {name: scale * x for name, x in g.items()}
        m = {name: B1 * m[name] + (1 - B1) * g[name] for name in NAMES}
        v = {name: B2 * v[name] + (1 - B2) * g[name] ** 2 for name in NAMES}
        signal = {name: x / (1 - B1**count) for name, x in m.items()}
        square = {name: x / (1 - B2**count) for name, x in v.items()}
        rate = rate_at(count - 1)
        u = {name: -rate * signal[name] / (np.sqrt(square[name]) + EPS) for name in NAMES}
        moved = {name: (p[name] + u[name]).astype("float32") for name in NAMES}
        row = {}
        if due:
            looks += 1
            if looks > 1:
                clipped += max(2 / looks, 1 / 80) * ((scale < 1) - clipped)
            for name in (*NAMES, "total"):

                def of(x, name=name):
                    return np.concatenate([np.ravel(x[key]) for key in (NAMES if name == "total" else (name,))])

                seen[name].look(norm([of(g)]) / scale, count)
                pseudo = norm([of(signal)]) / np.sqrt(np.sum(of(square)))
                length = norm([of(old)]) * norm([of(g)])
                row[name] = {
                    "learning_rate": rate,
                    "effective_rate": rate * pseudo,
                    "step_gradient_norm": norm([of(g)]),
                    "unclipped_norm": norm([of(g)]) / scale,
                    "clipped": clipped if looks > 1 else np.nan,
                    "skipped_share": (i + 1 - count) / (i + 1),
                    "cosine": np.sum(of(old) * of(g)) / length if length else np.nan,
                    "zero_gradients": np.mean(of(g) == 0),
                    "relative_gradient": np.sqrt(
                        np.mean(np.divide(of(g) ** 2, of(square), where=of(square) > 0, out=np.zeros_like(of(g))))
                    ),
                    "largest_gradient": np.max(np.abs(of(g))),
                    "largest_signal": np.max(np.abs(of(signal))),
                    "largest_update": np.max(np.abs(of(u))),
                    "update_rms": np.sqrt(np.mean(of(u) ** 2)),
                    "lost_updates": np.sum((of(moved) == of(p)) & (of(u) != 0)) / np.sum(of(u) != 0),
                    **seen[name].numbers(),
                }
        p = moved
        found.append(row or None)
    return found


class Heights:
    """Mean and variance of the log of norms, and the newest spike."""

    def __init__(self):
        self.level, self.spread, self.looks, self.z = 0.0, 0.0, 0, np.nan
        self.began = self.latest = self.peak = np.nan

    def look(self, size, step):
        change, deviation = np.log(size) - self.level, np.sqrt(self.spread + 1e-6)
        self.z = np.nan
        if self.looks >= 20:
            self.z = change / deviation
            change = np.clip(change, -6 * deviation, 6 * deviation)
        self.looks += 1
        gain = max(2 / (self.looks + 1), 1 / 80)
        self.level, self.spread = self.level + gain * change, (1 - gain) * (self.spread + gain * change**2)
        if self.z > 6:
            if not step - self.latest <= 20:
                self.began, self.peak = step, self.z
            self.latest, self.peak = step, max(self.peak, self.z)

    def numbers(self):
        return {"spike": self.z, "spike_step": self.began, "spike_peak": self.peak}


CASES = [(name, 1, "cpu") for name in TXS] + [("guard outside", 3, "cpu")]
CASES += [(name, 1, "default") for name in ("guard outside", "packed")]
LONG = [("guard inside", 1, "default"), ("injected", 1, "default"), ("guard outside", 3, "default")]


@pytest.mark.parametrize(
    ("name", "every", "where"), [*CASES, *(pytest.param(*x, marks=pytest.mark.slow) for x in LONG)]
)
def test_every_number_is_that_of_a_recursion(name, every, where, monkeypatch):
    """Behind a clip, with steps that are skipped, in a scan. On accelerators there are no details."""
    if where == "default":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, default, **_: default(*xs))
    made, absent = reports(TXS[name](every)), {*DETAILS, "zero_gradients"} if where == "default" else set()
    near = {"packed": 2e-2}.get(name, 2e-4)
    told = dict.fromkeys(next(filter(None, expected(1)))["total"], 0)
    for i, row in enumerate(expected(every)):
        if row is None:
            continue
        assert made[i].looked == made[i].step
        for layer, numbers in row.items():
            got = made[i].total if layer == "total" else made[i].rows[NAMES.index(layer)]
            for key, want in numbers.items():
                if (key in DETAILS and made[i].detailed != made[i].step) or key in absent:
                    continue
                wide = 0.1 if key in ("spike", "spike_peak") and name == "packed" else near
                little = 1e-2 if key == "cosine" and name == "packed" else wide / 20
                assert got[key] == pytest.approx(want, rel=wide, abs=little, nan_ok=True), (i, layer, key)
                told[key] += np.isfinite(want)
    at_least = {"spike": 20, "spike_step": 12, "spike_peak": 12} if every == 1 else {"spike": 0, "spike_step": 0}
    for key, times in told.items():
        least = at_least.get(key, 20) if key not in absent else 0
        assert times >= (least if every == 1 or "spike" not in key else 0), key
    assert all(np.isnan(made[-1].total[key]) for key in absent)
    if every == 1:
        assert made[30].first_spike is None
        assert made[-1].first_spike == "c"
        assert made[41].columns["spike_step"].tolist() == pytest.approx([40, np.nan, 39], nan_ok=True)


@cases.quick_jit
def followed(powers):
    """What is known of spikes after each of a row of looks, (T, L + 1) by name."""

    def look(old, x):
        new = spikes.after(spikes.Spikes(*old), x[1], jnp.full_like(x[1], jnp.nan), x[0])
        return new, new

    times = jnp.arange(1, len(powers) + 1)
    start = jnp.stack(spikes.none(powers.shape[1] + 1))
    return spikes.Spikes(*jnp.moveaxis(jax.lax.scan(look, start, (times, powers))[1], 1, 0))


def test_noise_and_levels_that_drift_are_no_spikes():
    """In 400,000 looks at norms that scatter by 10 and by 50 % there are at most 2; growth and decay are none."""
    rng = np.random.default_rng(0)
    scatter = np.exp(2 * rng.normal(size=(2000, 200)) * np.where(np.arange(200) < 100, 0.1, 0.5))
    assert np.sum(np.asarray(followed(scatter).z) > spikes.LEAST) <= 2
    drift = np.exp(2 * np.outer(np.arange(2000), [0.01, -0.01]) / 10) * (1 + 0.2 * rng.normal(size=(2000, 2))) ** 2
    assert not np.any(np.asarray(followed(drift).z) > spikes.LEAST)
    still = followed(np.ones((100, 1)))
    np.testing.assert_allclose(still.z[spikes.FEW :], 0, atol=1e-3)


def test_spikes_do_not_hide_the_next_and_a_new_level_is_learned():
    rng = np.random.default_rng(1)
    powers = np.exp(0.2 * rng.normal(size=(300, 1)))
    powers[[100, 101, 102, 130, 140]] *= 100
    powers[200:] *= 100
    found = followed(powers)
    began = np.asarray(found.began)[:, 0]
    assert np.isnan(began[99])
    assert [began[t] for t in (100, 129, 130, 199)] == [101, 101, 131, 131]  # 140 belongs to 130
    assert began[200] == 201
    assert not np.any(found.z[215:] > spikes.LEAST)


def test_a_gradient_of_zeros_is_no_level():
    """It is as if it had not been looked at."""
    rng = np.random.default_rng(2)
    powers = np.exp(0.2 * rng.normal(size=(60, 1)))
    sparse = np.zeros((120, 1))
    sparse[1::2] = powers
    got, want = followed(sparse), followed(powers)
    np.testing.assert_allclose(got.z[1::2], want.z, rtol=1e-6)
    assert np.all(np.isnan(got.z[::2]))


@pytest.mark.parametrize(("dtype", "lost"), [("float32", 0.0), ("bfloat16", 1.0)])
def test_updates_that_bfloat16_weights_lose(dtype, lost):
    """Steps of 1e-3 at weights of 1, whose neighbours are .0039 below and .0078 above; `carry_remainder` keeps them."""
    p = jnp.ones(50, dtype)
    txs = {"alone": snr_adam.observe(snr_adam.adam(1e-3))}
    txs["carried"] = snr_adam.carry_remainder(snr_adam.observe(snr_adam.adam(1e-3)))
    for name, tx in txs.items():
        _, state = cases.quick_jit(tx.update)(jnp.ones(50, dtype), tx.init(p), p)
        assert snr_adam.report(state).total["lost_updates"] == (lost if name == "alone" else 0.0)


def test_what_nobody_says_is_not_known():
    """The rate of an optimizer that hides it, what is clipped where nothing clips, what is lost without weights."""
    tx = snr_adam.observe(optax.adam(0.1))
    _, state = cases.quick_jit(tx.update)(jnp.ones(3), tx.init(jnp.ones(3)))
    found = snr_adam.report(state).total
    unknown = ("learning_rate", "effective_rate", "clipped", "unclipped_norm", "lost_updates", "cosine", "spike")
    assert [key for key in unknown if not np.isnan(found[key])] == []
    assert found["step_gradient_norm"] == pytest.approx(3**0.5)


def test_the_first_of_several_spikes():
    """The one that began first, of two at one step the larger; those of long ago do not count."""
    nan = np.nan
    for began, peak, first in (
        ([90.0, 85, 80, 10], [7.0, 8, 9, 50], "c"),
        ([80.0, nan, 80, 50], [7.0, nan, 9, 50], "c"),
        ([nan, 5, nan, nan], [nan, 7, nan, nan], "b"),
        ([nan] * 4, [nan] * 4, None),
    ):
        assert measured(spike_step=began, spike_peak=peak).first_spike == first
