"""Optimizers of `optax.contrib` in this package's wrappers and beside its own; docs/how_to/hybrid.md says how."""

import functools
import re
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import snr_adam

PAGE = (Path(__file__).parent.parent / "docs" / "how_to" / "hybrid.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_trains(capsys):
    """All rows are there, each with the floor of its own optimizer."""
    names: dict = {}
    exec(CODE, names)
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("step 200; snr, persistence and noise scale over about")
    assert "no step skipped" in out
    assert names["value"] < 1.0  # a guess costs log 32 = 3.5, knowing what can be known 0.7 or so
    report = snr_adam.report(names["state"], 64)
    assert report.names == ("deep", "embedding", "hidden", "norm", "out")
    floors = dict(zip(report.names, report.columns["floor"], strict=True))
    assert floors["hidden"] == floors["deep"] != floors["embedding"] == floors["out"]
    np.testing.assert_allclose(floors["out"], 0.229, atol=1e-3)
    assert np.isnan(report.columns["significant"])[[0, 2]].all()


PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
OPTIMIZERS = {
    "hybrid": lambda wrap=lambda tx: tx: wrap(
        optax.partition(
            {"x": optax.contrib.muon(0.1), "y": snr_adam.adamw(0.1, storage="packed")}, {"a": "x", "b": "y"}
        )
    ),
    "schedule_free": lambda wrap=lambda tx: tx: wrap(optax.contrib.schedule_free(snr_adam.adamw(0.1, b1=0.0), 0.1)),
    "prodigy": lambda wrap=lambda tx: tx: wrap(optax.contrib.prodigy(1.0)),
    "lookahead": lambda wrap=lambda tx: tx: wrap(optax.lookahead(snr_adam.adamw(0.1), 2, 0.5)),
    "inside of lookahead": lambda wrap=lambda tx: tx: optax.lookahead(wrap(snr_adam.adamw(0.1)), 2, 0.5),
    "inside of schedule_free": lambda wrap=lambda tx: tx: optax.contrib.schedule_free(
        wrap(snr_adam.adamw(0.1, b1=0.0)), 0.1
    ),
}


def start(name):
    return optax.LookaheadParams.init_synced(PARAMS) if "lookahead" in name else PARAMS


def train(name, tx, grads):
    params = start(name)
    state, update = tx.init(params), cases.quick_jit(tx.update)
    seen = []
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def gradients(steps=5):
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda p: jnp.asarray(0.5 + rng.normal(size=p.shape), p.dtype), PARAMS) for _ in range(steps)]


@functools.cache
def alone(name):
    return train(name, OPTIMIZERS[name](), gradients())


def close(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("name", ["hybrid", "schedule_free", "prodigy", "lookahead"])
def test_guarded_and_averaged(name):
    """A step that is not finite has not happened, whatever the optimizer keeps; the average is that of its weights."""
    tx = OPTIMIZERS[name](lambda tx: snr_adam.guard(snr_adam.averaged(tx, 0.9)))
    grads = gradients()
    bad = jax.tree.map(lambda g: g * jnp.nan, grads[0])
    seen, state = train(name, tx, [*grads[:2], bad, *grads[2:]])
    want, inner = alone(name)
    close((seen[-1], state.inner.inner), (want[-1], inner))
    assert int(state.skipped) == 1
    weights = 0.1 * 0.9 ** np.arange(4, -1, -1) / (1 - 0.9**5)
    close(snr_adam.averaged_params(state, seen[-1]), jax.tree.map(lambda *w: np.tensordot(weights, w, 1), *want))


@pytest.mark.parametrize("name", ["hybrid", "schedule_free", "inside of lookahead", "inside of schedule_free"])
def test_observed(name):
    """The steps are the same, and the report is of the gradients that it was given."""
    seen, state = train(name, OPTIMIZERS[name](snr_adam.observe), gradients())
    close(seen[-1], alone(name)[0][-1])
    report, plain = snr_adam.report(state, 8), snr_adam.report(observed_alone(), 8)
    assert (report.names, report.step) == (plain.names, 5)
    close(report.columns["gradient_norm"], plain.columns["gradient_norm"])
    assert np.all(report.columns["signal"] > 0)


@functools.cache
def observed_alone():
    return train("plain", snr_adam.observe(snr_adam.adamw(0.1)), gradients())[1]


def test_what_keeps_no_average_of_gradients_is_refused():
    for name in ("prodigy", "lookahead"):
        with pytest.raises(ValueError, match=r"observe: .* keep no first moment of the gradients"):
            snr_adam.observe(OPTIMIZERS[name]()).init(start(name))
