"""Every preset is its Optax namesake: the same arguments and, in float64, the same updates for 300 steps.

`adam` is compared with the definition itself too, worked out in 60 digits.
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

STEPS = 300
NAMESAKES = [name for name, (_, theirs) in cases.PRESETS.items() if theirs]
EMPTY = inspect.Parameter.empty


def big(tree):
    """A mask as a function of the parameters: all but scalars."""
    return jax.tree.map(lambda x: x.ndim > 0, tree)


# Options that change the algebra; numbers are varied by the schedules below.
OPTIONS = [
    *((name, {"nesterov": True}) for name in ("adam", "adabelief", "radam", "adopt")),
    ("nadam", {"nesterov": False}),
    *((name, {"b1": 0.0}) for name in ("adam", "nadam", "adopt")),
    *((name, {"eps_root": 1e-2}) for name in ("adam", "amsgrad", "adabelief", "radam", "ademamix", "lamb")),
    ("amsgrad", {"bias_correction_mu": False}),
    ("amsgrad", {"bias_correction_nu": False}),
    ("radam", {"threshold": 40.0}),
    ("adopt", {"use_clipping": False}),
    ("adopt", {"use_clipping": False, "nesterov": True}),
    ("adopt", {"clip_value_fn": lambda count: 0.5 + count}),
    ("rmsprop", {"eps_in_sqrt": False, "bias_correction": True, "initial_scale": 0.1}),
    ("rmsprop", {"centered": True}),
    # corrected, around a mean of one gradient, Optax's v - m^2 is 0 but for its rounding: give it something to hold
    ("rmsprop", {"centered": True, "bias_correction": True, "initial_scale": 0.1}),
    ("rmsprop", {"centered": True, "eps_in_sqrt": False, "momentum": 0.9, "nesterov": True}),
    ("rmsprop", {"momentum": 0.9}),
]


def label(name, options):
    """The test's id."""
    return "-".join([name, *(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())])


def check_same(ours, theirs):
    """To 1e-9 of each number; one that cancels to almost nothing to 1e-12 of the largest in its leaf."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-9, atol=1e-12 * np.abs(b).max(initial=0.0)), ours, theirs
    )


@functools.cache
def gradients():
    return jax.tree.map(np.asarray, cases.stacked(STEPS))


def check_twins(theirs, *ours, part=lambda tree: tree["block"][0]):
    """Same updates and same last parameters, on a part of the tree: an array of 7, unless said otherwise."""
    args = part(cases.tree()), part(gradients()), cases.QUICK
    expected = cases.run(theirs, *args)[:2]
    for tx in ours:
        check_same(cases.run(tx, *args)[:2], expected)


def whole(tree):
    """All of it."""
    return tree


@pytest.mark.parametrize("name", NAMESAKES)
def test_updates_are_optaxs_by_default(name, x64):
    preset, namesake = cases.PRESETS[name]
    check_twins(namesake(0.01), preset(0.01), part=whole)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[label(*each) for each in OPTIONS])
def test_updates_are_optaxs_with_every_option(name, options, x64):
    preset, namesake = cases.PRESETS[name]
    check_twins(namesake(0.01, **options), preset(0.01, **options))


@pytest.mark.parametrize("name", ["adamw", "nadamw", "adamaxw", "lion", "ademamix", "lamb"])
@pytest.mark.parametrize("mask", [{"scalar": False, "one": True}, big], ids=["tree", "function"])
def test_masks_are_optaxs(name, mask, x64):
    preset, namesake = cases.PRESETS[name]
    options = {"learning_rate": 0.01, "weight_decay": 0.3, "mask": mask}
    check_twins(namesake(**options), preset(**options), part=lambda tree: {k: tree[k] for k in ("scalar", "one")})


def test_a_mask_may_be_a_prefix(x64):
    preset, namesake = cases.PRESETS["adamw"]
    options = {
        "learning_rate": 0.01,
        "weight_decay": 0.3,
        "mask": {**dict.fromkeys(cases.tree(), False), "block": True},
    }
    check_twins(namesake(**options), preset(**options), part=whole)


@pytest.mark.parametrize("name", ["adam", "nadamw", "amsgrad", "lion", "adopt"])
def test_mu_dtype_is_how_the_signal_rests(name, x64):
    """Optax steps with mu before it is rounded, this package with the mu it keeps: a few of bfloat16's
    steps of 2^-8 apart."""
    preset, namesake = cases.PRESETS[name]
    # from constant signs, so that Lion does not turn a rounding into the opposite step
    params, grads = cases.tree()["block"][0], abs(gradients()["block"][0])
    ours, _, state = cases.run(preset(0.01, mu_dtype="bfloat16"), params, grads, cases.QUICK)
    theirs, _, _ = cases.run(namesake(0.01, mu_dtype="bfloat16"), params, grads, cases.QUICK)
    assert {x.dtype for x in jax.tree.leaves(state[0].mu)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(ours, theirs, rtol=2**-4, atol=0.01 * 2**-8)


CORRECTED = ("b1", "b2")
"""Decays of averages that Optax divides by 1 - b(t)^t, whatever b was before; see `test_decays.py`."""


def schedules(preset):
    """A schedule for every number that may have one: decays and what must not fall wander to one side of their
    default. Not for decays whose averages are corrected: there Optax's weights do not sum to 1."""

    def swing(name, x, t):
        wave = 1 + jnp.cos(t * 0.1 + len(name))
        return x - (1 - x) * wave if name in ("b1", "b2", "b3", "decay") else x * (1 + 0.5 * wave)

    numbers = {name: p.default for name, p in inspect.signature(preset).parameters.items()}
    numbers["learning_rate"] = 0.01
    left_out = ("initial_scale", *(() if preset in (snr_adam.lion, snr_adam.adopt) else CORRECTED))
    return {
        name: functools.partial(swing, name, x)
        for name, x in numbers.items()
        if isinstance(x, float) and name not in left_out
    }


@pytest.mark.parametrize("name", NAMESAKES)
def test_schedules_are_those_of_inject_hyperparams(name, x64):
    preset, namesake = cases.PRESETS[name]
    static = [arg for arg in inspect.signature(preset).parameters if arg == "clip_value_fn"]
    theirs = optax.inject_hyperparams(namesake, static)(**schedules(preset))
    check_twins(theirs, preset(**schedules(preset)), optax.inject_hyperparams(preset, static)(**schedules(preset)))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_learning_rate_per_leaf(name, x64):
    preset, _ = cases.PRESETS[name]
    rates = {"scalar": 0.1, "one": jnp.asarray(0.02), "block": optax.linear_schedule(0.1, 0.01, 100), "empty": 1.0}
    each = optax.partition({leaf: preset(rate) for leaf, rate in rates.items()}, {leaf: leaf for leaf in rates})
    check_twins(each, preset(rates), part=whole)


@pytest.mark.parametrize("name", NAMESAKES)
def test_signature_is_optaxs_plus_storage(name):
    preset, namesake = cases.PRESETS[name]
    ours, theirs = (dict(inspect.signature(f).parameters) for f in (preset, namesake))
    storage = ours.pop("storage")
    assert (storage.kind, storage.default) == (inspect.Parameter.KEYWORD_ONLY, "float32")
    if name == "adamw":
        descent = ours.pop("descent")
        assert (descent.kind, descent.default) == (inspect.Parameter.KEYWORD_ONLY, snr_adam.parts.Decoupled())
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    for arg, p in ours.items():
        default = theirs[arg].default
        if callable(default) and default is not EMPTY:  # a function: compared by what it does
            assert [p.default(t) for t in range(9)] == [default(t) for t in range(9)]
        else:
            assert (type(p.default), p.default) == (type(default), default), arg


@pytest.mark.parametrize(
    "options", [{}, {"b1": 0.95, "b2": 0.999999, "eps": 1e-4, "eps_root": 1e-6}], ids=["default", "other"]
)
def test_adam_is_its_definition_in_60_digits(options, x64):
    g = np.stack([np.ravel(g) for g in gradients()["block"][0]]).astype(np.float64)
    updates, _, _ = cases.run(cases.PRESETS["adam"][0](1.0, **options), jnp.zeros(g.shape[1]), jnp.asarray(g))
    np.testing.assert_allclose(updates, adam_in_60_digits(g, **options), rtol=0, atol=1e-12)


def adam_in_60_digits(gradients, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Kingma & Ba's Algorithm 1, line by line, with alpha = 1."""
    with mpmath.workdps(60):
        b1, b2, eps, eps_root = map(mpmath.mpf, (b1, b2, eps, eps_root))
        m = v = [mpmath.mpf(0)] * gradients.shape[1]
        updates = []
        for t, g in enumerate(gradients, 1):
            g = [mpmath.mpf(float(x)) for x in g]
            m = [b1 * a + (1 - b1) * x for a, x in zip(m, g, strict=True)]
            v = [b2 * a + (1 - b2) * x * x for a, x in zip(v, g, strict=True)]
            k1, k2 = 1 / (1 - b1**t), 1 / (1 - b2**t)
            updates.append([-k1 * a / (mpmath.sqrt(k2 * c + eps_root) + eps) for a, c in zip(m, v, strict=True)])
        return np.array(updates, dtype=np.float64)
