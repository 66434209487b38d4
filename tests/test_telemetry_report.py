"""What `report` and `metrics` read: through every wrapper and host, under the parameters' own names."""

import json
import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import snr_adam
from snr_adam.reports import metric_name

PARAMS = {"enc": {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}, "dec": jnp.ones((3, 5))}
NAMES = ("dec", "enc/b", "enc/w")


def _after(tx, params=PARAMS, steps=6):
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.sin(p + t + jnp.arange(p.size).reshape(p.shape)), params)
        _, state = update(grads, state, params)
    return state


WRAPPED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), snr_adam.observe(optax.adamw(0.1))),
    "around a chain": lambda: snr_adam.observe(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", snr_adam.observe(optax.adam(0.1)))),
    "MultiSteps": lambda: optax.MultiSteps(snr_adam.observe(optax.adam(0.1)), 2),
    "inject_hyperparams": lambda: snr_adam.observe(optax.inject_hyperparams(snr_adam.adamw)(0.1)),
    "apply_if_finite": lambda: optax.apply_if_finite(snr_adam.observe(snr_adam.adamw(0.1)), 3),
    "around partition": lambda: snr_adam.observe(
        optax.partition({"x": optax.adam(0.1), "y": optax.lion(0.1)}, {"enc": {"w": "x", "b": "y"}, "dec": "x"})
    ),
    "packed": lambda: snr_adam.observe(snr_adam.adamw(0.1, storage="packed")),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_is_found_wherever_it_is(name):
    got = snr_adam.report(_after(WRAPPED[name]()))
    assert got.names == NAMES
    assert np.all(got.columns["gradient_norm"] > 0)
    assert list(got.columns["size"]) == [15, 3, 12]


def test_masked_leaves_have_no_row():
    on = {"enc": {"w": True, "b": False}, "dec": True}
    assert snr_adam.report(_after(optax.masked(snr_adam.observe(optax.adam(0.1)), on))).names == ("dec", "enc/w")
    assert snr_adam.report(_after(snr_adam.observe(optax.masked(optax.adam(0.1), on)))).names == ("dec", "enc/w")


def test_a_state_without_telemetry_says_what_to_do():
    with pytest.raises(ValueError, match=re.escape("snr_adam.observe(tx)")):
        snr_adam.report(optax.adam(0.1).init(PARAMS))


def test_stacked_layers_are_reported_one_by_one():
    params = {"layers": {"kernel": jnp.ones((4, 3, 2))}, "head": jnp.ones(5)}
    stacked = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1), layer_axis={"layers": 0}), params))
    assert stacked.names == ("head", *(f"layers/kernel[{i}]" for i in range(4)))
    whole = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1)), params))
    joined = stacked.group({"head": "head", "layers": "layers"})
    for key in ("signal", "noise", "persistent", "gradient_norm", "snr", "update_rms", "significant"):
        np.testing.assert_allclose(joined.columns[key], [whole.columns[key][0], whole.columns[key][1]], rtol=1e-4)


def test_groups_are_ratios_of_sums():
    got = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1))))
    everything = got.group(["."])
    for key in ("snr", "pseudo_snr", "noise_scale", "significant", "effective_step"):
        np.testing.assert_allclose(everything.columns[key][0], got.total[key], rtol=1e-4, err_msg=key)
    assert got.group({"encoder": "^enc", "none": "xyz"}).names == ("encoder",)


def test_the_table_and_its_forms():
    got = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1))), batch_size=32)
    lines = str(got).split("\n")
    assert len({len(line) for line in lines[1:7]}) == 1  # aligned
    assert all(name in str(got) for name in (*NAMES, "total", "examples"))
    assert [row["name"] for row in got.rows] == list(NAMES)
    assert json.loads(json.dumps(got.to_dict()))["names"] == list(NAMES)
    batches = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1))))
    np.testing.assert_allclose(got.columns["noise_scale"], 32 * batches.columns["noise_scale"])


def test_metrics_are_plain_finite_floats_under_clean_names():
    state = _after(snr_adam.observe(optax.adam(0.1)), {"mlp/~/linear_0": {"w": jnp.ones((2, 3))}})
    few, many = snr_adam.metrics(state), snr_adam.metrics(state, "x/", layers=True)
    assert len(few) < 30
    assert all(type(x) is float and np.isfinite(x) for x in many.values())
    assert few["snr/snr"] == snr_adam.report(state).total["snr"]
    assert "x/snr/mlp/linear_0/w" in many
    assert all(re.fullmatch(r"[\w\-./ ]+", key) and "//" not in key for key in many)
    assert metric_name("layers/kernel[3]") == "layers/kernel.3"


def test_nnx():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, snr_adam.observe(snr_adam.adamw(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(m(jnp.ones((2, 4))) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(4):
        step(model, optimizer)
    for state in (optimizer.opt_state, nnx.as_pure(optimizer.opt_state)):
        assert snr_adam.report(state).names == ("bias", "kernel")
    assert snr_adam.report(optimizer.opt_state).step == 4


def test_equinox_and_haiku():
    model = eqx.filter(eqx.nn.Linear(4, 3, key=jax.random.key(0)), eqx.is_inexact_array)
    assert snr_adam.report(_after(snr_adam.observe(optax.adam(0.1)), model)).names == ("weight", "bias")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([3])(x)))
    params = net.init(jax.random.key(0), jnp.ones((2, 4)))
    names = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1)), params)).names
    assert names == ("mlp/~/linear_0/b", "mlp/~/linear_0/w")
