"""A run that changes its package, its storage or its kind of learning rate goes on as if it had not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gradients, quick_jit, tree

import snr_adam
from snr_adam import from_optax, to_optax
from snr_adam.transform import SharedNoise

STEPS = 5
SCHEDULE = optax.exponential_decay(0.1, 1, 0.5)  # a count that is off by one is off by a factor of two
RATES = {"constant": 0.1, "scheduled": SCHEDULE}
NAMES = ("adam", "adamw", "nadamw")
CLOSE = {"float32": 1e-4, "bfloat16": 0.03, "packed": 0.03}


def big(params):
    """A mask: which parameters decay."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def _run(tx, state, params, grads):
    """Updates of all steps, and what is left."""
    step, all_updates = quick_jit(tx.update), []
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return all_updates, state, params


def _halves(theirs, ours, params=None, grads=None):
    """The second half of a run, as one optimizer takes it and as the other does that takes over."""
    params = tree() if params is None else params
    grads = list(gradients(2 * STEPS)) if grads is None else grads
    _, state, params = _run(theirs, theirs.init(params), params, grads[:STEPS])
    move = to_optax if "ScaleByAdamState" in str(jax.tree.structure(ours.init(params))) else from_optax
    moved = move(state, jax.eval_shape(ours.init, params))
    assert jax.tree.structure(moved) == jax.tree.structure(ours.init(params))
    avals = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (moved, jax.eval_shape(ours.init, params))]
    assert avals[0] == avals[1]
    return (_run(tx, s, params, grads[STEPS:])[0] for tx, s in ((theirs, state), (ours, moved)))


def _assert_close(got, want, rtol):
    """In units of the largest update of the step."""
    for us, vs in zip(got, want, strict=True):
        size = max(np.abs(v).max(initial=0.0) for v in jax.tree.leaves(vs))
        for u, v in zip(jax.tree.leaves(us), jax.tree.leaves(vs), strict=True):
            np.testing.assert_allclose(u, v, rtol=0, atol=rtol * size)


@pytest.mark.parametrize(("rate", "storage", "name"), [*itertools.product(RATES, CLOSE, NAMES)])
def test_there_and_back(rate, storage, name):
    """An Optax run goes on here, and a run from here goes on in Optax: the next steps are those of the first."""
    theirs = getattr(optax, name)(RATES[rate], **({} if name == "adam" else {"weight_decay": 0.1, "mask": big}))
    ours = getattr(snr_adam, name)(
        RATES[rate], storage=storage, **({} if name == "adam" else {"weight_decay": 0.1, "mask": big})
    )
    for pair in ((theirs, ours), (ours, theirs)):
        stayed, moved = _halves(*pair)
        _assert_close(moved, stayed, CLOSE[storage])


@pytest.mark.parametrize(("a", "b"), [*itertools.permutations([*CLOSE, "scheduled"], 2)])
def test_between_storages_and_learning_rates(a, b):
    """From each to each; the learning rate itself changes too, so the update is compared in units of it."""
    made = [
        snr_adam.adam(SCHEDULE if x == "scheduled" else 0.1, storage="float32" if x == "scheduled" else x)
        for x in (a, b)
    ]
    params, grads = tree(), list(gradients(2 * STEPS))
    _, state, params = _run(made[0], made[0].init(params), params, grads[:STEPS])
    moved = from_optax(state, made[1].init(params))
    got, want = (tx.update(grads[STEPS], s, params)[0] for tx, s in zip(made[::-1], (moved, state), strict=True))
    scale = {a: 1.0, b: 1.0} | {"scheduled": float(SCHEDULE(STEPS)) / 0.1}
    _assert_close([optax.tree.scale(1 / scale[b], got)], [optax.tree.scale(1 / scale[a], want)], 0.03)


@pytest.mark.parametrize("rate", RATES)
def test_optax_changes_its_learning_rate_on_the_way_through(rate):
    """optax.adam(constant) -> here -> optax.adam(schedule), and the other way round: both counters are right."""
    other = next(r for r in RATES if r != rate)
    params, grads = tree(), list(gradients(STEPS))
    _, state, _ = _run(optax.adam(RATES[rate]), optax.adam(RATES[rate]).init(params), params, grads)
    back = to_optax(from_optax(state), optax.adam(RATES[other]).init(params))
    assert jax.tree.structure(back) == jax.tree.structure(optax.adam(RATES[other]).init(params))
    counts = [int(x) for _, x in optax.tree.get_all_with_path(back, "count")]
    assert counts == [STEPS] * (2 if other == "scheduled" else 1)
    for x, y in zip(
        jax.tree.leaves((back[0].mu, back[0].nu)), jax.tree.leaves((state[0].mu, state[0].nu)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("storage", CLOSE)
def test_what_fits_comes_back_bit_for_bit(storage):
    tx = snr_adam.adamw(0.1, storage=storage)
    params = tree()
    _, state, _ = _run(tx, tx.init(params), params, gradients(3))
    back = from_optax(to_optax(state), state)
    assert snr_adam.state.manifest(back) == snr_adam.state.manifest(state)


@pytest.mark.parametrize("storage", ["bfloat16", "packed"])
def test_rounding_on_the_way_is_unbiased(storage):
    """The mean of 2^16 moments that all need rounding is kept; rounded to nearest it would be off by 0.1 % and more."""
    m, v = jnp.full(1 << 16, 1.0 + 2.0**-9), jnp.full(1 << 16, 1.0 + 2.0**-10)
    old = (optax.ScaleByAdamState(jnp.int32(5), m, v), optax.EmptyState())
    back = to_optax(from_optax(old, snr_adam.adam(0.1, storage=storage).init(m)))[0]
    for got, want in ((back.mu, m), (back.nu, v)):
        assert len(np.unique(got)) == 2
        assert abs(float(got.mean()) - float(want[0])) < 1e-4


def test_defaults_are_the_presets():
    """Without `like`: float32 moments, a constant learning rate, the layout of the preset of the same name."""
    params = tree()
    for name in ("adam", "adamw"):
        for rate in RATES.values():
            old = getattr(optax, name)(rate).init(params)
            ours = getattr(snr_adam, name)(rate).init(params)
            assert jax.tree.structure(from_optax(old)) == jax.tree.structure(ours)
        for storage in CLOSE:
            ours = getattr(snr_adam, name)(0.1, storage=storage).init(params)
            assert jax.tree.structure(to_optax(ours)) == jax.tree.structure(getattr(optax, name)(0.1).init(params))


WRAPPED = {
    "behind a clip": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"scalar": True, "one": False, "block": True, "empty": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)}, {"scalar": "a", "one": "b", "block": "a", "empty": "b"}
    ),
    "multi steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "if finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_is_around_comes_along(wrapped):
    wrap = WRAPPED[wrapped]
    stayed, moved = _halves(wrap(optax.adamw(SCHEDULE)), wrap(snr_adam.adamw(SCHEDULE)))
    _assert_close(moved, stayed, 1e-4)


PUT_AROUND = {
    "guard": lambda tx: snr_adam.guard(tx, clip_norm=1e6),
    "observe": snr_adam.observe,
    "averaged": snr_adam.averaged,
    "carry_remainder": snr_adam.carry_remainder,
    "guard of observe": lambda tx: snr_adam.guard(snr_adam.observe(tx), spikes=snr_adam.Spikes()),
    "chain in a guard": lambda tx: snr_adam.guard(optax.chain(optax.clip_by_global_norm(1e6), tx)),
}


@pytest.mark.parametrize("name", PUT_AROUND)
def test_a_wrapper_is_put_around_and_taken_off(name):
    """Into it from Optax, and out of it again: the next steps are those of the first, the wrapper has seen nothing."""
    wrap = PUT_AROUND[name]
    theirs, ours = optax.adamw(SCHEDULE), snr_adam.adamw(SCHEDULE)
    if name == "chain in a guard":
        theirs = optax.chain(optax.clip_by_global_norm(1e6), theirs)
    params, grads = tree(), list(gradients(2 * STEPS))
    _, state, params = _run(theirs, theirs.init(params), params, grads[:STEPS])
    moved = from_optax(state, wrap(ours).init(params))
    assert jax.tree.structure(moved) == jax.tree.structure(wrap(ours).init(params))
    stayed, _, _ = _run(theirs, state, params, grads[STEPS:])
    went, after, _ = _run(wrap(ours), moved, params, grads[STEPS:])
    _assert_close(went, stayed, 1e-4)
    if "observe" in name:
        shown = snr_adam.report(after)
        assert shown.step == 2 * STEPS
        np.testing.assert_allclose(shown.total["update_rms"], _rms(went[-1]), rtol=1e-3)
    if name == "carry_remainder":
        with pytest.raises(ValueError, match=r"CarryRemainderState at .* holds what the parameters have lost"):
            to_optax(moved, theirs.init(params))
    else:
        back = to_optax(moved, theirs.init(params))
        jax.tree.map(np.testing.assert_array_equal, back, state)


def _rms(updates):
    leaves = jax.tree.leaves(updates)
    return np.sqrt(sum(float(jnp.sum(u * u)) for u in leaves) / sum(u.size for u in leaves))


def test_into_accumulate_and_out_of_it_between_two_steps():
    """The schedule of microbatches goes on from Adam's count, and a sum that has begun is not thrown away."""
    tx, w = snr_adam.accumulate(snr_adam.adam(0.1), lambda steps: jnp.where(steps < 5, 1, 2)), jnp.ones(3)
    _, state, w = _run(optax.adam(0.1), optax.adam(0.1).init(w), w, [jnp.ones(3)] * 5)
    moved = from_optax(state, jax.eval_shape(tx.init, w))
    assert (int(moved.steps), int(moved.count)) == (5, 0)
    back = to_optax(moved, optax.adam(0.1).init(w))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    updates, moved = tx.update(jnp.ones(3), moved, w)
    assert not np.any(updates)
    with pytest.raises(ValueError, match="in the middle of a step, with 1 microbatches in its sum: move right after"):
        to_optax(moved, optax.adam(0.1).init(w))
    updates, moved = tx.update(jnp.ones(3), moved, w)
    np.testing.assert_allclose(updates, optax.adam(0.1).update(jnp.ones(3), state, w)[0], rtol=1e-5)
    with pytest.raises(ValueError, match="is not known from shapes alone: give as `like` what its `init` returns"):
        from_optax(state, jax.eval_shape(snr_adam.observe(snr_adam.adam(0.1)).init, w))


def test_injected_numbers_come_along():
    theirs, ours = (optax.inject_hyperparams(lib.adam)(learning_rate=SCHEDULE, eps=1e-6) for lib in (optax, snr_adam))
    stayed, moved = _halves(theirs, ours)
    _assert_close(moved, stayed, 1e-4)


def test_awkward_leaves():
    """None, complex, bfloat16 (whose moments Optax keeps in bfloat16)."""
    params = {"none": None, "z": jnp.ones(3, jnp.complex64), "h": jnp.ones((2, 3), jnp.bfloat16), "s": jnp.ones(())}
    stayed, moved = _halves(optax.adam(0.1), snr_adam.adam(0.1), params, [params] * (2 * STEPS))
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(stayed), strict=True):
        np.testing.assert_allclose(np.asarray(x, "c8"), np.asarray(y, "c8"), rtol=0.02)


def test_shared_noise_is_spread_and_averaged():
    tx = snr_adam.descend(0.1, snr_adam.parts.EMA(), snr_adam.parts.Shared(snr_adam.parts.RMS(), {"b": 0}))
    params, g = {"a": jnp.ones(3), "b": jnp.ones((4, 5))}, {"a": jnp.ones(3), "b": jnp.arange(20.0).reshape(4, 5)}
    shared = tx.update(g, tx.init(params), params)[1]
    full = to_optax(shared)
    assert full.nu["b"].shape == (4, 5)
    np.testing.assert_array_equal(full.nu["b"][2], shared.nu.v[1][0])
    _, own = snr_adam.adam(0.1).update(g, snr_adam.adam(0.1).init(params))
    again = from_optax(own[0], shared)
    assert isinstance(again.nu, SharedNoise)
    np.testing.assert_allclose(again.nu.v[1], own[0].nu["b"].mean(0, keepdims=True), rtol=1e-6)


def test_inside_jit():
    params = tree()
    tx = snr_adam.adam(SCHEDULE, storage="packed")
    old = optax.adam(SCHEDULE).init(params)
    moved = jax.jit(lambda s: from_optax(s, tx.init(params)))(old)
    assert jax.tree.structure(moved) == jax.tree.structure(tx.init(params))


P = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
Q = {"layer": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}}
APART = (
    optax.ScaleByAdamState(jnp.int32(5), P, P),
    optax.ScaleByScheduleState(jnp.int32(7)),
)
ERRORS = {
    "another model's shapes": (
        lambda: from_optax(optax.adam(0.1).init(P), snr_adam.adam(0.1).init(Q)),
        r"moments of layer/w have shape \(2, 3\), those of `like` \(3, 2\): give two states of one model",
    ),
    "another model's names": (
        lambda: from_optax(optax.adam(0.1).init(P), snr_adam.adam(0.1).init({"w": jnp.ones(3)})),
        "moments at 0 belong to parameters of structure .* give two states of one model",
    ),
    "another chain": (
        lambda: from_optax(optax.adam(0.1).init(P), snr_adam.adamw(0.1).init(P)),
        "the state at the tree itself is a tuple of 2 where `like` has a tuple of 3: give as `like` what",
    ),
    "another wrapper": (
        lambda: from_optax(optax.MultiSteps(optax.adam(0.1), 2).init(P), snr_adam.adam(0.1).init(P)),
        "is a MultiStepsState .* where `like` has a tuple",
    ),
    "two moments for one": (
        lambda: to_optax(snr_adam.amsgrad(0.1).init(P)),
        "the state at .* does not keep one m and one v per parameter .*its nu a AverageAndMaximum.*only",
    ),
    "no v": (lambda: to_optax(snr_adam.lion(0.1).init(P)), "does not keep one m and one v"),
    "no Adam": (
        lambda: from_optax(optax.sgd(0.1).init(P)),
        "state is a tuple of 2 and holds no state of an Adam: give what",
    ),
    "like of Optax": (
        lambda: from_optax(optax.adam(0.1).init(P), optax.adam(0.1).init(P)),
        "like is a tuple of 2 and holds no ScaleBySnrState: give what",
    ),
    "like of ours": (
        lambda: to_optax(optax.adam(0.1).init(P), snr_adam.adam(0.1).init(P)),
        "like is a tuple of 2 and holds no ScaleByAdamState: give what",
    ),
    "counters apart": (
        lambda: from_optax(APART),
        r"Adam has taken 5 steps, the schedule at 1 7; .* give the new optimizer schedule\(t \+ 2\)",
    ),
    "a schedule without Adam": (
        lambda: from_optax((APART[1], (APART[0], optax.EmptyState()))),
        "the schedule at 0 has no Adam beside it whose count could serve for both: give `like`",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_refused_by_name(case):
    convert, match = ERRORS[case]
    with pytest.raises(ValueError, match=match):
        convert()


def test_a_hand_built_chain_keeps_its_schedule():
    """A schedule behind `scale_by_snr` has a counter of its own here too: `like` says so."""
    chains = [
        optax.chain(scale, optax.scale_by_schedule(lambda t: -SCHEDULE(t)))
        for scale in (optax.scale_by_adam(), snr_adam.scale_by_snr())
    ]
    stayed, moved = _halves(*chains)
    _assert_close(moved, stayed, 1e-4)
