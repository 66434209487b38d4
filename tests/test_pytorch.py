"""PyTorch's Adam goes on here, and a run from here in PyTorch: the state bit for bit, the steps to rounding.

The tests that train with PyTorch need it and are skipped without it: `uv run --group torch pytest -m slow
tests/test_pytorch.py`. The others have its state as plain arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam.state import from_torch, to_torch

SHAPES = ((3, 5), (3,), (4, 3), (4,))  # of two torch.nn.Linear in a row: out, in


def convert(arrays):
    """PyTorch's list as a tree of parameters of another order, with kernels the other way round."""
    a, b, c, d = arrays
    return {"out": {"bias": d, "kernel": c.T}, "in": {"bias": b, "kernel": a.T}}


def back(tree):
    return [tree["in"]["kernel"].T, tree["in"]["bias"], tree["out"]["kernel"].T, tree["out"]["bias"]]


def kept(step=7.0, seed=0):
    rng = np.random.default_rng(seed)
    draws = [(rng.normal(size=s).astype("f4"), rng.normal(size=s).astype("f4") ** 2) for s in SHAPES]
    return {i: {"step": np.float32(step), "exp_avg": m, "exp_avg_sq": v} for i, (m, v) in enumerate(draws)}


PARAMS = convert([jnp.ones(s) for s in SHAPES])
GOES_ON = {
    "adam": snr_adam.adam(0.1),
    "scheduled": snr_adam.adamw(optax.linear_schedule(0.1, 0.0, 100)),
    "of Optax": optax.adam(optax.linear_schedule(0.1, 0.0, 100)),
    "injected": optax.inject_hyperparams(snr_adam.adam)(optax.linear_schedule(0.1, 0.0, 100)),
    "wrapped": snr_adam.guard(snr_adam.accumulate(snr_adam.averaged(snr_adam.adam(0.1)), 2)),
}


@pytest.mark.parametrize("name", GOES_ON)
def test_there_and_back_bit_for_bit(name):
    """Every count of steps is PyTorch's, and no buffer serves twice; where decays are injected to rounding."""
    like = GOES_ON[name].init(PARAMS)
    state = from_torch({"state": kept(), "param_groups": [{"params": [0, 1]}, {"params": [2, 3]}]}, like, convert)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    wrapped = name == "wrapped"
    assert {int(x) for _, x in optax.tree.get_all_with_path(state, "count")} == ({0, 7} if wrapped else {7})
    assert {int(x) for _, x in optax.tree.get_all_with_path(state, "steps")} == ({7} if wrapped else set())
    given = [x for x in jax.tree.leaves(state) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in given}) == len(given)
    again = to_torch(state, back)
    assert list(again) == [0, 1, 2, 3]
    for i, entry in kept().items():
        for key, x in entry.items():
            assert again[i][key].dtype == "float32"
            np.testing.assert_allclose(again[i][key], x, rtol=1e-6 if name == "injected" else 0)


def test_packed_moments_are_read_and_written():
    tx = snr_adam.adam(0.1, storage="packed")
    again = to_torch(from_torch(kept(), tx.init(PARAMS), convert), back)
    np.testing.assert_allclose(again[0]["exp_avg"], kept()[0]["exp_avg"], rtol=2.0**-7)
    assert again[2]["exp_avg_sq"].shape == (4, 3)


def test_without_a_function_the_order_is_that_of_the_leaves():
    """A parameter without a state is None on both sides."""
    three = {0: kept()[0], 2: kept()[3]}
    params = {"a": jnp.ones((3, 5)), "b": None, "c": jnp.ones(4)}
    groups = [{"params": [0, 1, 2]}]
    state = from_torch({"state": three, "param_groups": groups}, snr_adam.adam(0.1).init(params))
    again = to_torch(state)
    assert list(again) == [0, 2]
    np.testing.assert_array_equal(again[2]["exp_avg_sq"], three[2]["exp_avg_sq"])


LIKE = snr_adam.adam(0.1).init(PARAMS)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: from_torch({}, LIKE, convert), "have taken no steps"),
        (lambda: from_torch({**kept(), 1: kept(8.0)[1]}, LIKE, convert), r"have taken \[7, 8\] steps: here one count"),
        (lambda: from_torch({0: {**kept()[0], "max_exp_avg_sq": 0}}, LIKE), "parameter 0 has .*'max_exp_avg_sq'"),
        (lambda: from_torch({0: {"momentum_buffer": 0}}, LIKE), r"parameter 0 has \['momentum_buffer'\]: only step"),
        (lambda: from_torch({0: kept()[0]}, LIKE), "has 1 parameters, the tree 4 leaves: give a function `convert`"),
        (lambda: from_torch(kept(), LIKE, lambda arrays: arrays), "`convert` makes PyTreeDef.* the parameters are"),
        (lambda: from_torch(kept(), LIKE), r"moments of in/bias have shape \(3, 5\), those of `like` \(3,\)"),
        (lambda: from_torch(kept(), optax.sgd(0.1).init(PARAMS)), "holds 0 states of an Adam"),
        (lambda: to_torch(snr_adam.lion(0.1).init(PARAMS)), "does not keep one m and one v"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_next_ten_steps_are_those_of_pytorch(name):
    """From PyTorch after seven steps, and back to it after ten more: 1e-6 in units of the step, and every bit moves."""
    torch = pytest.importorskip("torch")
    options = {"lr": 0.1, **({"weight_decay": 0.1} if name == "AdamW" else {})}
    rng = np.random.default_rng(1)
    grads = [[rng.normal(size=s).astype("f4") for s in SHAPES] for _ in range(27)]
    weights = [torch.nn.Parameter(torch.tensor(rng.normal(size=s).astype("f4"))) for s in SHAPES]
    theirs = getattr(torch.optim, name)(weights, **options)
    tx = snr_adam.adam(0.1) if name == "Adam" else snr_adam.adamw(0.1, weight_decay=0.1)

    def step_there(optimizer, weights, gs):
        for w, g in zip(weights, gs, strict=True):
            w.grad = torch.tensor(g)
        optimizer.step()

    def now(weights):
        return convert([w.detach().numpy().copy() for w in weights])

    for gs in grads[:7]:
        step_there(theirs, weights, gs)
    params = jax.tree.map(jnp.asarray, now(weights))
    state = from_torch(theirs.state_dict(), tx.init(params), convert)
    for i, entry in to_torch(state, back).items():
        for key, x in theirs.state_dict()["state"][i].items():
            assert entry[key].tobytes() == x.numpy().tobytes()

    update = jax.jit(tx.update)
    for gs in grads[7:17]:
        step_there(theirs, weights, gs)
        updates, state = update(jax.tree.map(jnp.asarray, convert(gs)), state, params)
        params = optax.apply_updates(params, updates)
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(now(weights)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)

    again = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in back(params)]
    other = getattr(torch.optim, name)(again, **options)
    entries = {i: {k: torch.tensor(x) for k, x in entry.items()} for i, entry in to_torch(state, back).items()}
    other.load_state_dict({**other.state_dict(), "state": entries})
    for gs in grads[17:]:
        step_there(other, again, gs)
        step_there(theirs, weights, gs)
    for x, y in zip(again, weights, strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y.detach().numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.slow
def test_tensors_in_bfloat16_are_taken():
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    w.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([w])
    optimizer.step()
    state = from_torch(optimizer.state_dict(), snr_adam.adamw(1e-3).init(jnp.ones(3)))
    np.testing.assert_array_equal(state[0].mu, optimizer.state_dict()["state"][0]["exp_avg"].float().numpy())
