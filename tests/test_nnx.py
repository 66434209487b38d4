"""What reads and converts states takes an `nnx.Optimizer` and its `opt_state`, boxes and all, and training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import snr_adam
from snr_adam.parts import RMS, Shared
from snr_adam.state import share, suggest_sharing

X = jnp.arange(8.0).reshape(4, 2) / 8


def made(tx):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def trained(model, optimizer, steps=3):
    """The kernel after some steps."""
    for k in range(steps):
        optimizer.update(model, nnx.grad(lambda model, k=k: jnp.mean((model(X) - k) ** 2))(model))
    return np.asarray(model.kernel.get_value())


@pytest.mark.parametrize("whole", [True, False], ids=["the optimizer", "its state"])
@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_a_run_moves_between_optax_and_here(whole, storage):
    theirs, other = made(optax.adam(0.1)), made(snr_adam.adam(0.1, storage=storage))
    trained(*theirs)
    nnx.update(other[0], nnx.state(theirs[0]))
    given = theirs[1] if whole else theirs[1].opt_state
    new = snr_adam.from_optax(given, like=other[1] if whole else other[1].opt_state)
    assert jax.tree.structure(new) == jax.tree.structure(other[1].opt_state)  # boxes too
    other[1].opt_state = nnx.data(new)
    close = {"float32": 1e-5, "packed": 0.05}[storage]
    np.testing.assert_allclose(trained(*other), trained(*theirs), rtol=close, atol=close)
    back = snr_adam.to_optax(other[1] if whole else other[1].opt_state, like=theirs[1])
    assert isinstance(back[0], optax.ScaleByAdamState)
    np.testing.assert_array_equal(back[0].count.get_value(), 6)


def test_without_a_form_to_take_boxes_from_it_is_plain():
    model, optimizer = made(optax.adam(0.1))
    trained(model, optimizer)
    state = snr_adam.from_optax(optimizer)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "get_value")))
    nnx.update(optimizer.opt_state, nnx.state(snr_adam.to_optax(state)))


def test_noise_is_shared_in_the_middle_of_a_run():
    if not hasattr(nnx, "as_pure"):
        pytest.skip("flax before 0.12.7 has no nnx.as_pure")
    model, optimizer = made(snr_adam.descend(0.1))
    trained(model, optimizer)
    params = nnx.state(model, nnx.Param)
    suggestion = suggest_sharing(optimizer, params, cutoff=1e-9)
    assert [row.path for row in suggestion.rows] == ["kernel"]
    assert suggestion == suggest_sharing(nnx.as_pure(optimizer.opt_state), nnx.as_pure(params), cutoff=1e-9)
    optimizer.opt_state = nnx.data(share(optimizer, params, {"kernel": 0}))
    pure = share(nnx.as_pure(optimizer.opt_state)._replace(nu=nnx.state(model, nnx.Param)), params, {"kernel": 0})
    assert pure.nu.v[1].shape == (1, 3)
    before = trained(model, optimizer, 0)
    assert np.all(np.abs(trained(model, optimizer, 2) - before) > 1e-3)
    assert optimizer.opt_state.nu.v[1].get_value().shape == (1, 3)
    other = made(snr_adam.descend(0.1, noise=Shared(RMS(), {"kernel": 0})))[1]
    assert jax.tree.structure(nnx.as_pure(other.opt_state)) == jax.tree.structure(nnx.as_pure(optimizer.opt_state))


@pytest.mark.parametrize("whole", [True, False], ids=["the optimizer", "its state"])
def test_what_is_read(whole):
    model, optimizer = made(snr_adam.guard(snr_adam.observe(snr_adam.adamw(0.1))))
    trained(model, optimizer)
    state = optimizer if whole else optimizer.opt_state
    assert snr_adam.report(state).names == ("bias", "kernel")
    assert snr_adam.report(state).step == 3
    assert snr_adam.metrics(state)["snr/signal"] > 0
    assert snr_adam.health(state, nnx.state(model, nnx.Param)).skipped == 0


def test_the_state_in_a_train_state():
    tx = snr_adam.observe(snr_adam.adamw(0.1))
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=tx)
    state = state.apply_gradients(grads={"w": jnp.ones(3)})
    assert snr_adam.report(state).names == ("w",)
    assert isinstance(snr_adam.to_optax(state).inner[0], optax.ScaleByAdamState)
