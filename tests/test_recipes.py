"""Optimizers that are made alike are equal, hash alike and pickle; those that are not, are not."""

import copy
import pickle
import subprocess
import sys

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam.parts import EMA, RMS, Cast, Shared, TrustRatio

PRESETS = [name for name in snr_adam.__all__ if name in dir(snr_adam.optimizers) and not name.startswith("scale_by")]
RATE = jnp.float32(0.1)
SCHEDULE = optax.cosine_decay_schedule(0.1, 10)
MAKE = {
    **{name: (lambda name=name: getattr(snr_adam, name)(0.1)) for name in PRESETS},
    "scale_by_adam": lambda: snr_adam.scale_by_adam(b1=0.8, nesterov=True),
    "named and in place": lambda: snr_adam.adam(0.1, b2=0.99),
    "a schedule": lambda: snr_adam.adamw(SCHEDULE, weight_decay=SCHEDULE),
    "an array": lambda: snr_adam.adam(RATE),
    "a tree of rates": lambda: snr_adam.adam({"w": 0.1, "b": RATE}),
    "a mask": lambda: snr_adam.adamw(0.1, mask={"w": True, "b": False}),
    "a storage": lambda: snr_adam.adam(0.1, storage=Cast(nu="bfloat16")),
    "parts": lambda: snr_adam.descend(0.1, EMA(0.8), RMS(0.99, eps=1e-6), descent=TrustRatio()),
    "shared": lambda: snr_adam.scale_by_snr(EMA(), Shared(RMS(), {"w": 0})),
    "guarded": lambda: snr_adam.guard(snr_adam.adam(0.1), clip_norm=1.0),
    "observed": lambda: snr_adam.observe(snr_adam.adam(0.1), every=2, layer_axis={"w": 0}),
    "accumulated": lambda: snr_adam.accumulate(snr_adam.adam(0.1), 2),
    "carried": lambda: snr_adam.carry_remainder(snr_adam.adam(0.1), "8"),
    "rounded": lambda: snr_adam.precision.round_stochastically(),
    "all of them": lambda: snr_adam.guard(snr_adam.observe(snr_adam.carry_remainder(snr_adam.adamw(0.1))), 1.0, 3),
}
W = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
G = {"w": jnp.full((3, 2), 0.5), "b": jnp.array([1.0, -2.0])}


def stepped(tx):
    state = tx.init(W)
    for _ in range(2):
        updates, state = tx.update(G, state, W)
    return jax.tree.leaves((updates, state))


@pytest.mark.parametrize("name", MAKE)
def test_made_alike_they_are_equal(name):
    a, b = MAKE[name](), MAKE[name]()
    assert a == b
    assert hash(a) == hash(b)
    assert a.init != a.update
    assert a.update is not b.update


@pytest.mark.parametrize("name", MAKE)
def test_one_that_was_pickled_takes_the_same_steps(name):
    tx = MAKE[name]()
    there = cloudpickle.loads(cloudpickle.dumps(tx))
    assert there.init.recipe is there.update.recipe
    if name not in ("a schedule", "an array", "a tree of rates"):
        assert there == tx
        assert pickle.loads(pickle.dumps(tx)) == copy.deepcopy(tx) == tx
    for x, y in zip(stepped(tx), stepped(there), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_two_of_the_list_are_equal():
    made = [make() for make in MAKE.values()]
    assert len({*made}) == len(made)
    assert all(x != y for i, x in enumerate(made) for y in made[:i])


OTHERS = {
    "a number": (lambda: snr_adam.adam(0.1), lambda: snr_adam.adam(0.2)),
    "another argument": (lambda: snr_adam.adam(0.1, b1=0.5), lambda: snr_adam.adam(0.1, b2=0.5)),
    "another name": (lambda: snr_adam.adam(0.1), lambda: snr_adam.nadam(0.1)),
    "minus zero": (lambda: snr_adam.adam(0.0), lambda: snr_adam.adam(-0.0)),
    "a flag for a number": (lambda: snr_adam.adam(0.1, nesterov=True), lambda: snr_adam.adam(0.1, nesterov=False)),
    "two equal arrays": (lambda: snr_adam.adam(jnp.float32(0.1)), lambda: snr_adam.adam(jnp.float32(0.1))),
    "two functions": (lambda: snr_adam.adam(lambda t: 0.1), lambda: snr_adam.adam(lambda t: 0.1)),
    "a part": (lambda: snr_adam.scale_by_snr(EMA(0.9)), lambda: snr_adam.scale_by_snr(EMA(0.8))),
    "a rule of axes": (
        lambda: snr_adam.scale_by_snr(EMA(), Shared(RMS(), {"w": 0})),
        lambda: snr_adam.scale_by_snr(EMA(), Shared(RMS(), {"w": 1})),
    ),
    "what is inside": (lambda: snr_adam.guard(snr_adam.adam(0.1)), lambda: snr_adam.guard(snr_adam.adam(0.2))),
    "what is outside": (lambda: snr_adam.guard(snr_adam.adam(0.1)), lambda: snr_adam.observe(snr_adam.adam(0.1))),
    "a tree of rates": (lambda: snr_adam.adam({"w": 0.1, "b": 0.2}), lambda: snr_adam.adam({"w": 0.2, "b": 0.1})),
}


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_is_another_optimizer(other):
    one, two = (make() for make in OTHERS[other])
    assert one != two


def test_the_way_of_writing_makes_no_difference():
    assert snr_adam.adam(0.1) == snr_adam.adam(learning_rate=0.1) == snr_adam.adam(0.1, 0.9, b2=0.999)


def test_a_step_with_a_static_optimizer_is_traced_once():
    count = []

    def step(tx, grads, state, params):
        count.append(tx)
        return tx.update(grads, state, params)

    step = jax.jit(step, static_argnums=0)
    for k in (1, 1, 1, 2):
        tx = snr_adam.guard(snr_adam.observe(snr_adam.adamw(0.1 * k)), clip_norm=1.0)
        step(tx, G, tx.init(W), W)
    assert len(count) == 2


def test_another_process_makes_it_anew():
    """As Ray, Dask and submitit ship an optimizer: one of another seed for hashes."""
    tx = snr_adam.guard(snr_adam.adamw(optax.linear_schedule(0.1, 0.2, 10)), clip_norm=1.0)
    told = (
        "import sys, cloudpickle; tx = cloudpickle.load(sys.stdin.buffer); print(tx.update({}, tx.init({}), {})[0], tx)"
    )
    child = subprocess.run(
        [sys.executable, "-c", told], input=cloudpickle.dumps(tx), capture_output=True, check=True, timeout=300
    )
    assert child.stdout.decode().startswith("{} ")
    assert "<update of snr_adam's guard>" in child.stdout.decode()
