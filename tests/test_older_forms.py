"""Checkpoints that were saved in an older form of the states restore, and the run goes on.

`tests/data/states-0.1` was written by `files.save_state` before the package's second edition, after seven steps of
`cases.gradients`; `bits.json` beside it holds a hash of each saved run. `states-2` is of the second form, `states-3` of
the third.
"""

import hashlib
import json

import cases
import jax
import numpy as np
import optax
import pytest
from test_same_bits import DATA

import snr_adam
from snr_adam.parts import RMS, Shared
from snr_adam.state.files import restore_state, save_state
from snr_adam.state.forms import earlier

adamw = snr_adam.adamw
PLAIN = {
    "float32": ("float32", adamw(0.01)),
    "bfloat16": ("float32", adamw(0.01, storage="bfloat16")),
    "packed": ("float32", adamw(0.01, storage="packed")),
    "shared": ("float32", snr_adam.descend(0.01, noise=Shared(RMS(), {"block/1": 0}))),
    "guarded": ("float32", snr_adam.guard(adamw(0.01, storage="packed"), clip_norm=1.0)),
    "carried": ("bfloat16", snr_adam.carry_remainder(adamw(0.01, storage="packed"))),
    "accumulated": ("float32", snr_adam.accumulate(adamw(0.01), 3)),
}
OBSERVED = {
    "observed": ("float32", snr_adam.observe(adamw(0.01))),
    "observed packed": ("float32", snr_adam.guard(snr_adam.observe(adamw(0.01, storage="packed"), every=3))),
}
STEPS = 7


def start(dtype, tx):
    params = cases.tree(dtype=dtype)
    return params, tx.init(params)


def bits(tree) -> str:
    found = hashlib.blake2b(digest_size=8)
    for x in map(np.asarray, jax.tree.leaves(jax.device_get(tree))):
        found.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
    return found.hexdigest()


def old_states(name, runs, form="states-0.1"):
    return restore_state(DATA / form / name, {key: start(*run) for key, run in runs.items()})


GUARDED = {"guarded": PLAIN["guarded"], "observed packed": OBSERVED["observed packed"]}


def go_on(tx, params, state, steps: int):
    """So many more steps, with gradients that follow on the first seven."""
    dtype = jax.tree.leaves(params)[0].dtype
    for g in list(cases.gradients(STEPS + steps, dtype=dtype))[STEPS:]:
        updates, state = cases.quick_jit(tx.update)(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_every_bit_of_an_older_checkpoint_is_there():
    known = json.loads((DATA / "states-0.1" / "bits.json").read_text())
    states = old_states("plain", PLAIN)
    assert {name: bits(earlier(states[name], 1)) for name in PLAIN} == {name: known[name] for name in PLAIN}


def test_a_guard_of_the_third_form_goes_on(tmp_path):
    """Every bit is there, also of an `observe` inside of it; what it has learnt since begins anew, and is saved."""
    known = json.loads((DATA / "states-3" / "bits.json").read_text())
    states = old_states("guarded", GUARDED, "states-3")
    assert {name: bits(earlier(states[name], 3)) for name in GUARDED} == known
    for name, (dtype, tx) in GUARDED.items():
        assert jax.tree.structure(states[name]) == jax.tree.structure(start(dtype, tx))
        params, state = go_on(tx, *states[name], 2)
        assert (int(state.count), int(state.skipped), int(state.spikes)) == (2, 0, 0)
        save_state(tmp_path / name, 11, (params, state))
        assert bits(restore_state(tmp_path / name, start(dtype, tx))) == bits((params, state))


@pytest.mark.parametrize("form", ["states-0.1", "states-2", "states-3"])
@pytest.mark.parametrize("name", OBSERVED)
def test_an_observed_run_goes_on(name, form, tmp_path):
    """Its means go on from where they were, lags where there are none with the next whole burst; it is saved anew."""
    dtype, tx = OBSERVED[name]
    params, state = old_states("observed", OBSERVED, form)[name]
    report = snr_adam.report(state)
    assert report.step == STEPS
    assert np.all(report.columns["gradient_norm"][[0, 1, 3]] > 0)
    params, state = go_on(tx, params, state, 10)
    # the third form has lags; of the others' the burst of step 7 was not seen whole
    assert np.isfinite(snr_adam.report(state).total["snr"]) == (form == "states-3")
    params, state = go_on(tx, params, state, 7)
    report = snr_adam.report(state)
    assert report.step == STEPS + 17
    assert np.isfinite(report.total["pseudo_snr"])
    assert np.isfinite(report.total["snr"])
    save_state(tmp_path, 11, (params, state))
    assert bits(restore_state(tmp_path, start(dtype, tx))) == bits((params, state))


def test_a_form_of_the_future_is_refused(tmp_path, monkeypatch):
    import snr_adam.state.files as files

    monkeypatch.setattr(files, "FORM", files.FORM + 1)
    save_state(tmp_path, 1, {"w": np.ones(3)})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of form 6, and this version of snr_adam reads forms 1 to 5: take a newer"):
        restore_state(tmp_path, {"w": np.ones(3)})
