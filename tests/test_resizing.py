"""A run goes on with more layers, fewer, or of another size: what was there keeps its bits, what is new is fresh."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam.parts import EMA, RMS, Shared
from snr_adam.state import resize

OLD = {"embedding": jnp.ones((4, 3)), "layers": [jnp.ones((3, 3))], "out": jnp.ones(3)}
NEW = {
    "embedding": jnp.ones((6, 3)),
    "head": jnp.full((3, 2), 2.0),
    "layers": [jnp.ones((3, 3))] * 2,
    "out": jnp.ones(2),
}
OPTIMIZERS = {
    "float32": snr_adam.adamw(0.1),
    "bfloat16": snr_adam.adamw(0.1, storage="bfloat16"),
    "packed": snr_adam.adamw(0.1, storage="packed"),
    "two in nu": snr_adam.amsgrad(0.1),
    "two in mu": snr_adam.ademamix(0.1),
    "shared": snr_adam.descend(0.1, EMA(), Shared(RMS(), {"embedding": 1, "head": 0})),
    "of Optax": optax.adamw(optax.linear_schedule(0.1, 0.01, 100)),
    "injected": optax.inject_hyperparams(snr_adam.adam)(optax.linear_schedule(0.1, 0.01, 100)),
    "guarded": snr_adam.guard(snr_adam.adamw(0.1, storage="packed"), clip_norm=1.0, spikes=snr_adam.Spikes()),
    "observed": snr_adam.guard(snr_adam.observe(snr_adam.adamw(0.1))),
    "observed, shared": snr_adam.observe(snr_adam.descend(0.1, EMA(), Shared(RMS(), {"embedding": 1}))),
    "averaged": snr_adam.averaged(snr_adam.adam(0.1)),
    "accumulated": snr_adam.accumulate(snr_adam.adam(0.1), 2),
    "masked": optax.masked(snr_adam.adam(0.1), lambda params: {k: k != "out" for k in params}),
}


def gradients(params, step):
    return jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(step).normal(size=p.shape), p.dtype), params)


def train(tx, params, state, steps, first=0):
    update = cases.quick_jit(tx.update)
    for step in range(first, first + steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def avals(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def by_path(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_there_keeps_its_bits(name):
    """In every storage and wrapper, each entry by its path; the run then goes on."""
    tx = OPTIMIZERS[name]
    _, state = train(tx, OLD, tx.init(OLD), 3)
    new = resize(state, tx, NEW)
    fresh = tx.init(NEW)
    assert avals(new) == avals(fresh)
    if "observed" in name:  # what it shows begins anew
        old, got, fresh = (optax.tree.get_all_with_path(x, "inner")[-1][1] for x in (state, new, fresh))
    else:
        old, got = state, new
    old, got, fresh = map(by_path, (old, got, fresh))
    assert any("layers'][1]" in key or "nu.v" in key for key in got)
    for key, x in got.items():
        before = old.get(key)
        if "shared" in name and "nu.v" in key:
            continue
        want = fresh[key].copy()
        if ".average" in key:
            want[...] = 2.0 if "head" in key else 1.0
        if before is not None:
            both = tuple(slice(min(sizes)) for sizes in zip(before.shape, x.shape, strict=True))
            want[both] = before[both]
        assert x.tobytes() == want.tobytes(), key
    train(tx, NEW, new, 2, 3)


def test_noise_that_is_shared_finds_its_parameter():
    """Its arrays lie in the order of the leaves, between which new ones have come."""
    tx = OPTIMIZERS["shared"]
    _, state = train(tx, OLD, tx.init(OLD), 3)
    new = resize(state, tx, NEW)
    embedding, layer, out = state.nu.v
    assert [x.shape for x in new.nu.v] == [(6, 1), (1, 2), (3, 3), (3, 3), (2,)]
    np.testing.assert_array_equal(new.nu.v[0], np.concatenate([embedding, np.zeros((2, 1))]))
    np.testing.assert_array_equal(new.nu.v[2], layer)
    np.testing.assert_array_equal(new.nu.v[4], out[:2])


def test_there_and_back_is_the_same_state():
    for name in ("float32", "packed", "of Optax", "averaged", "shared"):
        tx, small = OPTIMIZERS[name], {"out": OLD["out"], "embedding": OLD["embedding"]}
        _, state = train(tx, small, tx.init(small), 2)
        again = resize(resize(state, tx, {**OLD, "embedding": jnp.ones((9, 3))}), tx, small)
        assert snr_adam.state.manifest(again) == snr_adam.state.manifest(state)


def test_the_last_bad_leaf_keeps_its_name():
    tx = snr_adam.guard(snr_adam.adam(0.1))
    state = tx.init(OLD)
    bad = {**OLD, "out": OLD["out"] * jnp.nan}
    _, state = tx.update(bad, state, OLD)
    assert snr_adam.health(state, OLD).last_bad == "out"
    assert snr_adam.health(resize(state, tx, NEW), NEW).last_bad == "out"
    gone = {k: v for k, v in NEW.items() if k != "out"}
    assert int(resize(state, tx, gone).last_bad) == -1


def test_an_average_of_new_weights_begins_with_them():
    tx = snr_adam.averaged(optax.sgd(0.1), 0.9)
    _, state = train(tx, OLD, tx.init(OLD), 3)
    state = resize(state, tx, NEW)
    np.testing.assert_allclose(snr_adam.averaged_params(state, NEW)["head"], 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: (snr_adam.adam(0.1), snr_adam.adamax(0.1), NEW), r"made by \['EMA/RMS'\] .* tx makes one by"),
        (lambda: (optax.sgd(0.1, momentum=0.9), optax.adam(0.1), NEW), "of which there is nothing in the state"),
        (lambda: (snr_adam.adam(0.1), snr_adam.guard(snr_adam.adam(0.1)), NEW), "of which there is nothing"),
        (
            lambda: (snr_adam.adam(0.1), snr_adam.adam(0.1, storage="bfloat16"), NEW),
            r"resize: \[0\].mu\['embedding'\] is float32\[4, 3\] in the state and bfloat16\[6, 3\] for these",
        ),
        (
            lambda: (snr_adam.adam(0.1), snr_adam.adam(0.1), {"embedding": jnp.ones(4)}),
            r"is float32\[4, 3\] in the state and float32\[4\] for these parameters",
        ),
    ],
)
def test_what_is_no_state_of_the_optimizer_is_refused(make, match):
    old, tx, params = make()
    with pytest.raises(ValueError, match=match):
        resize(old.init(OLD), tx, params)
