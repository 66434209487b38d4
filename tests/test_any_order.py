"""Wrappers in any order: the right numbers, or a refusal that names the right order.

Every ordered pair of WRAPPERS around this package's AdamW is run in three storages beside the same pair around Optax's:
the parameters are equal. Where one of the two is `observe`, its report is the one that it gives right around the
optimizer, inside of the other wrapper: what is reported is what the moments see, wherever one looks from.
"""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam

STORAGES = ("float32", "bfloat16", "packed")
STEPS, RATE = 6, 0.1
LABELS = {"a": "x", "b": "y", "c": "x"}


def forwards(tx):
    """A user's wrapper of two lines."""

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


# name -> a wrapper of an optimizer; that of Optax which takes a factory is in `product`
WRAPPERS = {
    "guard": lambda tx: snr_adam.guard(tx, clip_norm=2.0),
    "observe": snr_adam.observe,
    "carry_remainder": snr_adam.carry_remainder,
    "accumulate": lambda tx: snr_adam.accumulate(tx, 2),
    "inject_hyperparams": None,
    "clipped chain": lambda tx: optax.chain(optax.clip(0.8), tx),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False, "c": True}),
    "partition": lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.01)}, LABELS),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "user's": forwards,
}
WINDOWS = ("accumulate", "MultiSteps")
SKIPS = ("guard", "apply_if_finite")
TRIPLES = [
    ("guard", "observe", "carry_remainder"),
    ("observe", "guard", "carry_remainder"),
    ("carry_remainder", "observe", "guard"),
    ("guard", "clipped chain", "inject_hyperparams"),
    ("accumulate", "guard", "observe"),
    ("accumulate", "observe", "guard"),
    ("MultiSteps", "observe", "user's"),
    ("guard", "partition", "observe"),
    ("observe", "inject_hyperparams", "guard"),
    ("apply_if_finite", "masked", "observe"),
]


def product(names, make):
    """The wrappers, the first outermost, around make(learning_rate)."""
    name, *rest = (*names, None)
    if name is None:
        return make(RATE)
    if name == "inject_hyperparams":
        return optax.inject_hyperparams(
            lambda learning_rate: product(rest[:-1], functools.partial(_at, make, learning_rate))
        )(learning_rate=RATE)
    return WRAPPERS[name](product(rest[:-1], make))


def _at(make, learning_rate, _):
    return make(learning_rate)


def params(names=()):
    """Three leaves, one of them narrow where something makes up for its rounding."""
    narrow = jnp.bfloat16 if "carry_remainder" in names else jnp.float32
    return {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(2), "c": jnp.full(4, 0.5, narrow)}


def gradients(names):
    """Gradients of changing size; one step is not finite where something skips it."""
    rng = np.random.default_rng(0)
    steps = [
        jax.tree.map(lambda p: jnp.asarray(0.5 + rng.normal(size=p.shape), p.dtype), params(names))
        for _ in range(STEPS)
    ]
    if set(names) & set(SKIPS):
        steps[3]["a"] = steps[3]["a"].at[0, 0].set(jnp.nan)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *steps)


def run(txs: dict, names):
    """Parameters and state after all steps, of several optimizers in one program."""

    def all_steps(grads):
        def step(carry, g):
            new = {}
            for key, tx in txs.items():
                p, state = carry[key]
                u, state = tx.update(g, state, p)
                new[key] = optax.apply_updates(p, u), state
            return new, None

        return jax.lax.scan(step, {key: (params(names), tx.init(params(names))) for key, tx in txs.items()}, grads)[0]

    return cases.quick_jit(all_steps)(gradients(names))


def ours(storage):
    return lambda learning_rate: snr_adam.adamw(learning_rate, b2=0.99, weight_decay=0.01, storage=storage)


def optaxs(learning_rate):
    return optax.adamw(learning_rate, b2=0.99, weight_decay=0.01)


def refused(names, make) -> str | None:
    """What the product says if it is refused."""
    try:
        product(names, make).init(params(names))
    except ValueError as error:
        return str(error)
    return None


def expects_refusal(names) -> bool:
    """Whether `observe` is around something that keeps gradients from the moment."""
    around = names[names.index("observe") + 1 :] if "observe" in names else ()
    return bool(set(around) & set(WINDOWS))


def inside(names):
    """The same wrappers with `observe` right around the optimizer."""
    return (*(name for name in names if name != "observe"), "observe")


# a branch of Optax's wants the dtype of the gradients, carry_remainder gives updates that float32 needs: JAX refuses
UNEQUAL = [("apply_if_finite", "carry_remainder")]


def check(names, storages):
    if names in UNEQUAL:
        with pytest.raises(TypeError, match="dtypes do not match"):
            run({"ours": product(names, ours("float32"))}, names)
        return
    if expects_refusal(names):
        for storage in storages:
            assert "observe what sees whole batches instead: " in (refused(names, ours(storage)) or "")
        return
    txs = {storage: product(names, ours(storage)) for storage in storages}
    twin = tuple(name for name in names if name != "observe")  # around a clip of Optax's own optimizer it is refused
    txs["optax"] = product(twin, optaxs)
    if "observe" in names:
        txs |= {f"inside {storage}": product(inside(names), ours(storage)) for storage in storages}
    end = run(txs, names)
    moved = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x, float) - np.asarray(y, float)).max(), params(names), end["optax"][0]
    )
    for storage in storages:
        for key, p in end[storage][0].items():
            assert moved[key] > 0.005, "nothing moved, so nothing was compared"
            near = 2e-5 if storage == "float32" else 0.08
            grain = 2.0**-8 if p.dtype == jnp.bfloat16 else 0.0  # a bfloat16 parameter may land on its neighbour
            np.testing.assert_allclose(
                np.asarray(p, float),
                np.asarray(end["optax"][0][key], float),
                rtol=grain,
                atol=near * moved[key] + grain / 2,
            )
    if "observe" in names:
        for storage in storages:
            got, want = (snr_adam.report(end[key][1], 8) for key in (storage, f"inside {storage}"))
            assert got.names == want.names
            for key, column in want.columns.items():
                if key in THROUGH_NO_BRANCH and np.isnan(got.columns[key]).all():
                    continue
                near = 1e-5 if storage == "float32" else 2e-2
                if key in ("param_rms", "effective_step"):
                    near = 5e-3  # of the parameters as they are given to it: rounded ones outside of carry_remainder
                np.testing.assert_allclose(got.columns[key], column, rtol=near, atol=1e-6, err_msg=key)


THROUGH_NO_BRANCH = ("learning_rate", "effective_rate", "lost_updates", "unclipped_norm", "clipped")
"""What a step says of itself, and is not known where a branch, as that of `apply_if_finite`, lies between."""
PAIRS = list(itertools.permutations(WRAPPERS, 2))


@pytest.mark.parametrize("names", PAIRS, ids=" of ".join)
def test_pair(names):
    """In one of the storages, by turns."""
    check(names, STORAGES[PAIRS.index(names) % 3 :][:1])


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids=" of ".join)
def test_pair_in_every_storage(names):
    check(names, STORAGES)


@pytest.mark.parametrize("names", TRIPLES[:4], ids=" of ".join)
def test_triple(names):
    check(names, ("packed",))


@pytest.mark.slow
@pytest.mark.parametrize("names", TRIPLES, ids=" of ".join)
def test_triple_in_every_storage(names):
    check(names, STORAGES)


def test_a_refusal_names_the_order_to_use():
    """Also of a clip in front of another package's optimizer, whose moment then sees other gradients."""
    for names, text in {
        ("observe", "accumulate"): "snr_adam.accumulate(snr_adam.observe(tx), n)",
        ("observe", "MultiSteps"): "optax.MultiSteps(snr_adam.observe(tx), k)",
    }.items():
        assert text in refused(names, ours("float32"))
        assert text in refused(names, optaxs)
    every = optax.chain(optax.apply_every(4), snr_adam.adam(0.1))
    with pytest.raises(ValueError, match=r"optax.chain\(optax.apply_every\(k\), snr_adam.observe\(tx\)\)"):
        snr_adam.observe(every).init(params())
    tx, p = snr_adam.observe(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))), params()
    with pytest.raises(ValueError, match=r"optax.chain\(clip, observe\(tx\)\)"):
        tx.update(p, tx.init(p), p)
