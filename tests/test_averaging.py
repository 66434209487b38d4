"""The average is that of the weights as they landed, in any order of the wrappers, and takes nothing from them."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import snr_adam
from snr_adam import averaged, averaged_params

STEPS = 6
DECAYS = {"constant": 0.9, "array": jnp.float32(0.9), "schedule": lambda t: jnp.where(t < 3, 0.5, 0.9)}


def decay_of(t: int, kind="constant") -> float:
    """b of step t = 1, 2, ..."""
    return 0.5 if kind == "schedule" and t <= 3 else 0.9


def mean_of(weights, kind="constant"):
    """a_t by the equation, in float64."""
    mean = 0.0
    for t, w in enumerate(weights, 1):
        b = decay_of(t, kind)
        mean = mean + (1 - b) / (1 - b**t) * (np.asarray(w, np.complex128) - mean)
    return mean


def train(tx, params, gradients, values=None):
    """The parameters after each step, and the last state."""
    state, step, seen = tx.init(params), cases.quick_jit(tx.update), []
    for g in gradients:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def close(got, want, rtol=1e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.complex64), np.asarray(y, np.complex64), rtol=rtol, atol=1e-7)


def averages(seen, kind="constant"):
    return jax.tree.map(lambda *ws: mean_of(ws, kind), *seen)


@pytest.mark.parametrize("kind", DECAYS)
def test_it_is_the_debiased_average_of_the_weights(kind):
    """Of awkward leaves too; its weights sum to 1 under a schedule; before the first step it is the parameters."""
    params = {**cases.tree(), "z": jnp.asarray([1 + 1j, -2j]), "none": None}
    grads = [{**g, "z": jnp.asarray([0.1j, 1 - 1j]), "none": None} for g in cases.gradients(STEPS)]
    tx = averaged(snr_adam.adamw(0.1), DECAYS[kind])
    start = averaged_params(tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, start, params)
    seen, state = train(tx, params, grads)
    close(averaged_params(state, seen[-1]), averages(seen, kind))
    plain, inner = train(snr_adam.adamw(0.1), params, grads)
    jax.tree.map(np.testing.assert_array_equal, (seen[-1], state.inner), (plain[-1], inner))
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(tx.init(params)), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


def forwards(tx):
    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


# what is averaged are the weights after these of the six steps; the third gradient is not finite
ORDERS = {
    "guard of averaged": (lambda tx: snr_adam.guard(averaged(tx, 0.9), clip_norm=1.0), (0, 1, 3, 4, 5)),
    "guard of a user's of averaged": (lambda tx: snr_adam.guard(forwards(averaged(tx, 0.9))), (0, 1, 3, 4, 5)),
    "averaged of guard": (lambda tx: averaged(snr_adam.guard(tx), 0.9), range(6)),
    "chained before more": (
        lambda tx: optax.chain(averaged(snr_adam.guard(tx), 0.9), optax.add_decayed_weights(-0.1), optax.scale(0.5)),
        range(6),
    ),
    "accumulate of averaged": (lambda tx: snr_adam.accumulate(averaged(snr_adam.guard(tx), 0.9), 2), (1, 3, 5)),
    "observe of averaged": (lambda tx: snr_adam.observe(averaged(snr_adam.guard(tx), 0.9)), range(6)),
    "averaged of observe": (lambda tx: averaged(snr_adam.guard(snr_adam.observe(tx)), 0.9), range(6)),
    "apply_if_finite of averaged": (lambda tx: optax.apply_if_finite(averaged(tx, 0.9), 5), (0, 1, 3, 4, 5)),
    "injected": (
        lambda tx: optax.inject_hyperparams(lambda b: averaged(snr_adam.guard(tx), b))(optax.constant_schedule(0.9)),
        range(6),
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_in_any_order(name):
    wrap, taken = ORDERS[name]
    grads = list(cases.gradients(STEPS))
    grads[2]["one"] = grads[2]["one"] * jnp.nan
    seen, state = train(wrap(snr_adam.adamw(0.1, storage="packed")), cases.tree(), grads)
    close(averaged_params(state, seen[-1]), averages([seen[i] for i in taken]))


def test_of_some_parameters():
    """Masked ones stay what they are; with `partition` each is averaged by its own."""
    labels = {"scalar": "x", "one": "y", "block": "x", "empty": "y"}
    grads = list(cases.gradients(STEPS))
    masked = optax.masked(averaged(optax.sgd(0.1), 0.9), {k: v == "x" for k, v in labels.items()})
    seen, state = train(masked, cases.tree(), grads)
    got, want = averaged_params(state, seen[-1]), averages(seen)
    close([got["scalar"], got["block"]], [want["scalar"], want["block"]])
    np.testing.assert_array_equal(got["one"], seen[-1]["one"])
    parts = {"x": averaged(optax.sgd(0.1), 0.9), "y": averaged(snr_adam.adam(0.1), 0.9)}
    seen, state = train(optax.partition(parts, labels), cases.tree(), grads)
    close(averaged_params(state, seen[-1]), averages(seen))


@pytest.mark.parametrize("inside", [False, True])
def test_of_16_bit_parameters_it_is_float32(inside):
    """Inside of `carry_remainder` it is that of the whole weights."""
    params = jnp.asarray([1.0, -3.0, 0.1], jnp.bfloat16)
    grads = [jnp.asarray([1.0, -0.5, 0.25], jnp.bfloat16)] * STEPS
    inner = optax.sgd(1e-3)
    if inside:
        tx = snr_adam.carry_remainder(averaged(inner, 0.9))
        wide, _ = train(inner, params.astype("float32"), [g.astype("float32") for g in grads])
        seen, state = train(tx, params, grads)
        got = averaged_params(state, snr_adam.precision.whole_weights(seen[-1], state))
        assert state.inner.average.dtype == got.dtype == "float32"
        close(got, mean_of(wide))
    else:
        tx = averaged(snr_adam.carry_remainder(inner), 0.9)
        seen, state = train(tx, params, grads)
        assert state.average.dtype == "float32"
        np.testing.assert_array_equal(
            averaged_params(state, seen[-1]), jnp.asarray(mean_of(seen).real, "float32").astype("bfloat16")
        )


def test_no_buffer_is_shared_and_every_one_may_be_donated():
    tx, params = averaged(snr_adam.adamw(0.1)), cases.tree()
    state = tx.init(params)
    given = [x for x in jax.tree.leaves((params, state, averaged_params(state, params))) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in given}) == len(given)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for g in cases.gradients(2):
        params, state = step(params, state, g)
    assert averaged_params(state, params)["block"][0].shape == params["block"][0].shape


@pytest.mark.parametrize("guarded", [False, True])
def test_it_costs_few_bytes_and_no_array(guarded):
    """Also in a guard, whose verdict it takes in."""
    p = jax.ShapeDtypeStruct((2**18,), jnp.float32)

    def cost(tx):
        tx = snr_adam.guard(tx, clip_norm=1.0) if guarded else tx

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        made = jax.jit(step, donate_argnums=(0, 1)).lower(p, jax.eval_shape(tx.init, p), p).compile()
        return made.cost_analysis()["bytes accessed"] / p.size, made.memory_analysis().temp_size_in_bytes

    plain, kept = cost(snr_adam.adamw(1e-3)), cost(averaged(snr_adam.adamw(1e-3)))
    assert kept[0] - plain[0] <= 16.1  # on CPU parameter and average are read twice
    assert kept[1] - plain[1] <= 4096


def test_in_nnx():
    if not hasattr(nnx, "as_pure"):
        pytest.skip("flax before 0.12.7 has no nnx.as_pure")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, averaged(snr_adam.adam(0.1), 0.9), wrt=nnx.Param)
    seen = []
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(jnp.ones((4, 3))) ** 2))(model))
        seen.append(jax.device_get(nnx.as_pure(nnx.state(model, nnx.Param))))
    average = averaged_params(optimizer, nnx.state(model, nnx.Param))
    close(nnx.as_pure(average), averages(seen))
    nnx.update(model, average)
    close(nnx.as_pure(nnx.state(model, nnx.Param)), averages(seen))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: averaged(optax.sgd(0.1), 1.0), ValueError, "decay=1.0: must be in"),
        (lambda: averaged(0.1), TypeError, r"averaged: tx=0.1 .* write averaged\("),
        (lambda: averaged(optax.sgd(0.1)).init(jnp.ones(2, int)), TypeError, "averaged: parameter the tree itself has"),
        (
            lambda: averaged(optax.sgd(0.1)).update(jnp.ones(2), averaged(optax.sgd(0.1)).init(jnp.ones(2))),
            ValueError,
            "averaged averages the parameters: call update",
        ),
        (
            lambda: averaged_params(optax.sgd(0.1).init(jnp.ones(2)), jnp.ones(2)),
            ValueError,
            r"there is no AveragedState in this state: wrap the optimizer, averaged\(tx\)",
        ),
        (
            lambda: averaged_params(averaged(optax.sgd(0.1)).init({"w": jnp.ones(2)}), {"v": jnp.ones(2)}),
            ValueError,
            r"an average of w with shape \(2,\), the parameters have no such leaf",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
