"""In the libraries that hold models and checkpoints: Flax NNX and Linen, Equinox, Haiku, Orbax, and `jax.export`."""

import contextlib
import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import PRESETS, quick_jit
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

SOME = ("adamw", "amsgrad", "ademamix", "lion")  # one tree each in mu and nu, two in nu, two in mu, none in nu
X = np.linspace(-1.0, 1.0, 32, dtype="float32").reshape(8, 4)
Y = np.sin(2.0 * X)
STEPS = 20


def _assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def _assert_falls(losses):
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.7 * losses[0]


def _plain(tx, params, loss):
    """The losses of the same training on a plain tree of parameters."""

    @quick_jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(value)
    return np.array(losses)


class Net(nnx.Module):
    """Two layers; the second one's kernel is sharded over the axis x, if asked for."""

    def __init__(self, sharded=False):
        init = nnx.initializers.normal(0.5)
        self.a = nnx.Linear(4, 16, kernel_init=init, rngs=nnx.Rngs(0))
        init = nnx.with_partitioning(init, (None, "x")) if sharded else init
        self.b = nnx.Linear(16, 4, kernel_init=init, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


def _nnx_loss(model):
    return jnp.mean((model(X) - Y) ** 2)


@functools.cache
def _plain_net(name):
    graph, params = nnx.split(Net())
    return _plain(PRESETS[name][0](0.05), nnx.as_pure(params), lambda p: _nnx_loss(nnx.merge(graph, p)))


def _train_nnx(name, sharded=False):
    """Losses, the optimizer's state, the second kernel's sharding and how often the step was traced."""
    model = Net(sharded)
    optimizer = nnx.Optimizer(model, PRESETS[name][0](0.05), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss, grads = nnx.value_and_grad(_nnx_loss)(model)
        optimizer.update(model, grads)
        return loss

    losses = np.array([step(model, optimizer) for _ in range(STEPS)])
    return losses, nnx.as_pure(optimizer.opt_state)[0], model.b.kernel.get_value().sharding, len(traces)


@pytest.mark.parametrize("name", ["adamw", "ademamix"])
def test_nnx_optimizer(name):
    losses, state, _, traces = _train_nnx(name)
    _assert_falls(losses)
    assert traces == 1
    np.testing.assert_allclose(losses, _plain_net(name), rtol=1e-4)
    assert state.count == STEPS


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("adamw", AxisType.Auto),
        ("amsgrad", AxisType.Explicit),
        ("ademamix", AxisType.Auto),
    ],
)
def test_nnx_optimizer_with_sharded_parameters(name, axis):
    """The moments of a sharded parameter are sharded like it, and training is the same as on one device."""
    with jax.set_mesh(jax.make_mesh((4,), ("x",), axis_types=(axis,))):
        losses, state, kernel, traces = _train_nnx(name, sharded=True)
        assert kernel.spec == P(None, "x")
        moments = [x for x in jax.tree.leaves((state.mu, state.nu)) if x.shape == (16, 4)]
        assert len(moments) == (2 if name == "adamw" else 3)
        assert all(x.sharding.is_equivalent_to(kernel, 2) for x in moments)
    np.testing.assert_allclose(losses, _plain_net(name), rtol=1e-3)
    assert traces <= 2  # a replicated parameter may get its sharding in the first step


@pytest.mark.parametrize("name", ["amsgrad"])
def test_linen_train_state(name):
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.tanh(nn.Dense(16)(x)))

    model = Mlp()
    params = model.init(jax.random.key(0), X)["params"]
    tx = PRESETS[name][0](0.05)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, X) - Y) ** 2)

    @quick_jit
    def step(state):
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    state, losses = TrainState.create(apply_fn=model.apply, params=params, tx=tx), []
    for _ in range(STEPS):
        state, value = step(state)
        losses.append(value)
    _assert_falls(losses)
    np.testing.assert_allclose(losses, _plain(tx, params, loss), rtol=1e-4)


@pytest.mark.parametrize("name", ["ademamix"])
def test_equinox(name):
    """A model with leaves that are no parameters: a function, an integer array, None."""

    class Mlp(eqx.Module):
        layers: list
        steps: jax.Array
        nothing: None = None

        def __call__(self, x):
            return self.layers[1](jnp.tanh(self.layers[0](x)))

    keys = jax.random.split(jax.random.key(0))
    model = Mlp([eqx.nn.Linear(4, 16, key=keys[0]), eqx.nn.Linear(16, 4, key=keys[1])], jnp.arange(3))
    tx = PRESETS[name][0](0.05)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(STEPS):
        model, state, value = step(model, state)
        losses.append(value)
    _assert_falls(losses)
    np.testing.assert_array_equal(model.steps, np.arange(3))


@pytest.mark.parametrize("name", ["adamw"])
def test_haiku(name):
    """Parameters in a dict of dicts whose names hold slashes and tildes."""
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4], activation=jnp.tanh)(x)))
    params = net.init(jax.random.key(0), X)
    losses = _plain(PRESETS[name][0](0.05), params, lambda p: jnp.mean((net.apply(p, X) - Y) ** 2))
    _assert_falls(losses)


PARAMS = {"a": {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}, "b": jnp.float32(0.5)}


def _one_step(tx):
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def _after(tx, steps, params=PARAMS):
    state, step = tx.init(params), quick_jit(_one_step(tx))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def _through_orbax(path, saved, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", jax.tree.map(ocp.utils.to_shape_dtype_struct, target))


@pytest.mark.parametrize("name", SOME)
def test_orbax_restores_every_bit(name, tmp_path):
    """Four steps are two steps, a checkpoint, and two more."""
    tx = PRESETS[name][0](0.05)
    saved = _after(tx, 2)
    params, state = _through_orbax(tmp_path, saved, (PARAMS, tx.init(PARAMS)))
    _assert_equal((params, state), saved)
    step = quick_jit(_one_step(tx))
    for _ in range(2):
        params, state = step(params, state)
    _assert_equal((params, state), _after(tx, 4))


@pytest.mark.parametrize("name", ["adam", "adamw", "adabelief", "lamb"])
def test_a_checkpoint_of_optax_goes_on_here(name, tmp_path):
    """The states have the same shape and mean the same, so the next step is Optax's own."""
    ours, theirs = (make(0.05) for make in PRESETS[name])
    params, old = _after(theirs, 3)
    state = _through_orbax(tmp_path, old, ours.init(PARAMS))
    assert jax.tree.structure(state) == jax.tree.structure(ours.init(PARAMS))
    got, want = quick_jit(_one_step(ours))(params, state), quick_jit(_one_step(theirs))(params, old)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


with contextlib.suppress(ValueError):  # Optax leaves this to its users; raises if some day it does not
    jax.export.register_namedtuple_serialization(optax.EmptyState, serialized_name="optax.EmptyState")


@pytest.mark.parametrize("name", SOME)
def test_an_exported_step_gives_the_same_bits(name):
    """A step with its state as argument, written to bytes, read and called."""
    tx = PRESETS[name][0](0.05)
    params, state = _after(tx, 1)
    step = jax.jit(_one_step(tx))
    data = jax.export.export(step)(params, state).serialize()
    _assert_equal(jax.export.deserialize(data).call(params, state), step(params, state))
