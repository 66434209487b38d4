"""16-bit parameters that train as float32 ones: bit for bit, to 24 bits, or in the mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FAST, run
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import snr_adam
from snr_adam import carry_remainder
from snr_adam.precision import round_stochastically, whole_weights

NARROW = ("bfloat16", "float16")
SHAPE = (16, 24)


def _same(got, want):
    for x, y in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(want)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def _params(dtype="bfloat16"):
    """Normal weights, some exact zeros and ones among them, that `dtype` holds."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=SHAPE)
    w[0], w[1] = 0.0, 1.0
    return {
        "w": jnp.asarray(w, dtype),
        "bias": jnp.asarray(0.1 * rng.normal(size=7), dtype),
        "one": jnp.ones((), dtype),
    }


def _gradients(steps, dtype="bfloat16"):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)) + 0.1, dtype), _params())


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _landed(tx, p, g, state=None):
    """Parameter, whole weight and state after one jitted step."""

    @jax.jit
    def step(p, state, g):
        u, state = tx.update(g, state, p)
        p = optax.apply_updates(p, u)
        return p, whole_weights(p, state), state

    return step(p, tx.init(p) if state is None else state, g)


# exact weights

# b m + (1-b) g, as Optax writes it, has other last bits in other programs: XLA may fuse either product with the sum. So
# Optax's own is compared as written; this package's leave nothing to fuse and are compared as they are compiled.
AS_WRITTEN = {"xla_disable_hlo_passes": "fusion"}
CHAINS = {
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "adamw": lambda: snr_adam.adamw(1e-3, weight_decay=0.1),
    "packed": lambda: snr_adam.adamw(1e-3, weight_decay=0.1, storage="packed"),
    "clip and schedule": lambda: optax.chain(
        optax.clip(0.5), snr_adam.adamw(optax.cosine_decay_schedule(1e-2, 1000), weight_decay=0.1)
    ),
    "multi-steps": lambda: optax.MultiSteps(snr_adam.adamw(1e-3, weight_decay=0.1), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_16_bits_are_float32(name):
    """Fed the same gradients for 1,000 steps: float32's weights bitwise, rounded and whole."""
    params, grads = _params(), _gradients(1000)
    options = AS_WRITTEN if name == "optax.adamw" else None
    _, want, _ = run(CHAINS[name](), _float32(params), _float32(grads), options)
    _, got, state = run(carry_remainder(CHAINS[name](), "16"), params, grads, options)
    _same(whole_weights(got, state), want)
    for p, w in zip(*map(jax.tree.leaves, jax.device_get((got, want))), strict=True):
        # a tie, half a bfloat16 spacing, goes away from zero, or 16 bits could not hold every remainder
        word = w.view("uint32")
        np.testing.assert_array_equal(p.astype("f4"), (word + 0x8000 & 0xFFFF0000).astype("u4").view("f4"))
        tie = word & 0xFFFF == 0x8000
        np.testing.assert_array_equal(p[~tie], w.astype("bfloat16")[~tie])
        assert np.mean(tie) < 0.01
    assert {x.dtype for x in jax.tree.leaves(state.remainder)} == {jnp.dtype("int16")}


def test_behind_a_clip_by_global_norm():
    """The norm is a sum, which a compiler orders as it likes: float32's weights to a few of its last bits."""
    params, grads = _params(), _gradients(200)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    _, want, _ = run(tx, _float32(params), _float32(grads), FAST)
    _, got, state = run(carry_remainder(tx), params, grads, FAST)
    for w, x in zip(*map(jax.tree.leaves, (whole_weights(got, state), want)), strict=True):
        np.testing.assert_allclose(w, x, rtol=1e-5, atol=1e-6)


def test_float16_is_float32_too():
    """Where float16 has its full precision of 11 bits: |w| above 2^-14."""
    params, grads = _params("float16"), _gradients(1000, "float16")
    params["w"] = jnp.where(params["w"] == 0, 1, params["w"])
    _, want, _ = run(snr_adam.adamw(1e-3), _float32(params), _float32(grads))
    _, got, state = run(carry_remainder(snr_adam.adamw(1e-3)), params, grads)
    whole = whole_weights(got, state)
    for p, w, x in zip(*map(jax.tree.leaves, (got, whole, want)), strict=True):
        np.testing.assert_array_equal(p, x.astype("float16"))
        normal = abs(x) > 2.0**-14
        assert np.mean(normal) > 0.99
        np.testing.assert_allclose(w, x, rtol=0, atol=2.0**-24)
        assert np.mean(np.where(normal, w == x, True)) > 0.99  # one passage below costs a few bits for good


@pytest.mark.parametrize("bits", ["16", "8"])
@pytest.mark.parametrize("dtype", NARROW)
def test_zero_and_its_neighbourhood_stay_finite(dtype, bits):
    """-0, and steps across zero or too small for the dtype, where the bits of the weight change their sign."""
    p = jnp.asarray([0.0, -0.0, 0.0, 0.0, -0.0, 1e-7, -1e-7, 1.0, -1.0], dtype)
    u = jnp.asarray([0.0, -0.0, -1e-9, 1e-9, -1e-9, -1e-7, 1e-7, -1.0, 1.0], "float32")
    got, whole, state = _landed(carry_remainder(optax.scale(1.0), bits), p, u)
    _, again, _ = _landed(carry_remainder(optax.scale(1.0), bits), got, jnp.zeros_like(u), state)
    for w in (whole, again):
        np.testing.assert_allclose(w, p.astype("float32") + u, rtol=0, atol=2e-9 if dtype == "bfloat16" else 3.1e-8)


def _cancellation():
    """Whole weights just under 1 and steps that take them just below 0; (remainder, update), 4,096 of them.

    The sum is an odd multiple of 2^-24, and the way there from p = 1, longer than 1, can only be an even one.
    """
    odd, more = np.meshgrid(np.arange(1, 129, 2), np.arange(64))
    return jnp.asarray(-odd.ravel(), "int16"), jnp.asarray(-(1.0 + more.ravel() * 2.0**-23), "float32")


def test_where_the_addition_misses():
    """p + (p' - p) is not p' if |p'| < 2^-16 |p|. The remainder counts from where the addition lands.

    So the whole weight is off by less than 2^-24 |p|, float32's own resolution before the step; and finite.
    """
    tx = carry_remainder(optax.scale(1.0))
    remainder, u = _cancellation()
    p = jnp.ones(u.shape, jnp.bfloat16)
    state = tx.init(p)._replace(remainder=remainder)
    exact = whole_weights(p, state) + u
    assert np.all((exact < 0) & (exact > -(2.0**-15)))
    nearest = exact.astype("bfloat16").astype("float32")
    misses = (1.0 + (nearest - 1.0)) != nearest
    assert np.sum(misses) > 1000
    got, whole, _ = _landed(tx, p, u, state)
    error = np.asarray(abs(whole - exact))
    print(f"{np.sum(misses)} additions miss; the whole weight by at most {error.max() * 2**24:.3f} 2^-24")
    assert np.all(error[~misses] == 0)
    # from +0 no remainder leads to a negative number; elsewhere part of the miss is carried
    assert np.all(error[got != 0] < 2.0**-24)
    assert np.all(error <= 2.0**-24)


# 24 bits


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 6e-6), ("float16", 8e-7)])
def test_8_bits_hold_the_weight(dtype, most):
    """One step to random normal weights: the whole weight's mean relative error, and no bias."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=200_000), "float32")
    p = jnp.zeros(w.shape, dtype)
    _, whole, state = _landed(carry_remainder(optax.scale(1.0), "8"), p, w)
    relative = np.asarray((whole - w) / w, float)
    print(f"8 bits beside {dtype}: mean relative error {np.mean(abs(relative)):.3g}")
    assert state.remainder.dtype == jnp.int8
    assert most / 20 < np.mean(abs(relative)) < most
    assert abs(np.mean(relative)) < 5 * np.std(relative) / np.sqrt(w.size)


@pytest.mark.parametrize("ulps", [1, 40, 500, 8000])
@pytest.mark.parametrize("dtype", NARROW)
def test_8_bits_lose_and_double_no_step(dtype, ulps):
    """Constant steps of 1 to 8,000 spacings of float32 from 1.25 on: their sum arrives, in the mean of 2,000 weights.

    Up to 16 units of the 24-bit weight (2^8 spacings beside bfloat16, 2^5 beside float16) within 5 standard errors of
    one stochastic rounding per step; longer steps are rounded to nearest and may err by half a unit each.
    """
    n, steps, unit = 2000, 100, 256 if dtype == "bfloat16" else 32
    u = jnp.full((steps, n), ulps * 2.0**-23)
    _, got, state = run(carry_remainder(optax.scale(1.0), "8"), jnp.full((n,), 1.25, dtype), u, FAST)
    moved = np.mean(np.asarray(whole_weights(got, state), float) - 1.25) * 2.0**23 / (steps * ulps)
    noise = np.sqrt(min(ulps, unit) * unit / (n * steps)) / ulps
    print(f"8 bits beside {dtype}, steps of {ulps / unit:.3g} units: {moved:.5f} of the way")
    assert abs(moved - 1.0) < (5 * noise if ulps < 16 * unit else 0.51 * unit / ulps)


# stochastic rounding


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_is_unbiased(dtype):
    """The mean of 2^18 landings within 5 standard errors of params + update, at 64 weights, on two neighbours only."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.uniform(0.1, 4.0, 64) * rng.choice([-1, 1], 64), dtype)
    u = jnp.asarray(rng.normal(size=64) * 1e-3, "float32")
    p = jnp.broadcast_to(w, (1 << 18, 64))
    tx = optax.chain(optax.scale(1.0), round_stochastically())
    got = np.asarray(_float32(run(tx, p, jnp.broadcast_to(u, (1, 1 << 18, 64)), FAST)[1]), float)
    want = np.asarray(w.astype("float32") + u, float)
    low, high = got.min(0), got.max(0)
    assert np.all((got == low) | (got == high))
    assert np.all((low <= want) & (want <= high))
    deviation = (got.mean(0) - want) / np.sqrt(np.maximum((high - want) * (want - low), 1e-30) / len(got))
    print(f"{dtype}: largest deviation {abs(deviation).max():.2f} standard errors")
    assert abs(deviation).max() < 5


def test_a_weight_of_one_reaches_zero():
    """lr 1e-3 under constant gradients, 1,000 steps: float32 goes from 1 to 0, plain bfloat16 stays at 1."""
    adam = snr_adam.adam(1e-3)
    one, g = jnp.ones(256), jnp.ones((1000, 256), "bfloat16")
    _, full, _ = run(adam, one, g.astype("float32"), FAST)
    assert abs(full).max() < 0.01
    narrow = one.astype("bfloat16")
    for plain in (adam, optax.adam(1e-3)):
        assert np.all(run(plain, narrow, g, FAST)[1] == 1)
    ends = {
        "round_stochastically": run(optax.chain(adam, round_stochastically()), narrow, g, FAST)[1],
        "carry 16": run(carry_remainder(adam), narrow, g, FAST)[1],
        "carry 8": run(carry_remainder(adam, "8"), narrow, g, FAST)[1],
    }
    print({name: float(jnp.mean(end.astype("float32"))) for name, end in ends.items()})
    for end in ends.values():
        assert abs(jnp.mean(end.astype("float32")) - jnp.mean(full)) < 0.05


@pytest.mark.parametrize("part", [0.1, 0.5, 1.0])
def test_the_way_to_zero_follows_float32(part):
    """All along the way, the mean weight under stochastic rounding is within 5 % of the float32 path's."""
    steps = int(1000 * part)
    one, g = jnp.ones(512), jnp.ones((steps, 512))
    _, full, _ = run(snr_adam.adam(1e-3), one, g, FAST)
    _, got, _ = run(optax.chain(snr_adam.adam(1e-3), round_stochastically()), one.astype("bfloat16"), g, FAST)
    assert abs(jnp.mean(got.astype("float32")) - jnp.mean(full)) < 0.05 * part


# in company


@pytest.mark.parametrize("make", [carry_remainder, lambda tx: optax.chain(tx, round_stochastically())])
def test_other_dtypes_pass_through(make):
    """In a mixed tree the float32 leaves, None and the update's structure are those of the optimizer alone."""
    params = {"narrow": jnp.ones(5, "bfloat16"), "wide": jnp.ones(3), "frozen": None}
    grads = {"narrow": jnp.ones((4, 5), "bfloat16"), "wide": jnp.ones((4, 3)), "frozen": None}
    tx, alone = make(optax.adamw(1e-3)), optax.adamw(1e-3)
    got, end, state = run(tx, params, grads)
    want, wide, _ = run(alone, params, grads)
    assert end["frozen"] is None
    assert (end["narrow"].dtype, end["wide"].dtype) == (jnp.bfloat16, jnp.float32)
    _same((got["wide"], end["wide"]), (want["wide"], wide["wide"]))
    start = tx.init(params)
    assert jax.tree.map(jax.typeof, start) == jax.tree.map(jax.typeof, state)
    if make is carry_remainder:
        np.testing.assert_array_equal(whole_weights(end, state)["wide"], end["wide"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [carry_remainder, functools.partial(carry_remainder, bits="8"), lambda tx: optax.chain(tx, round_stochastically())],
)
def test_inside_multi_steps(make):
    """Accumulated over two batches: nothing moves on the first, and the second steps with their mean."""
    params, grads = _params(), _gradients(4, "float32")
    updates, got, _ = run(optax.MultiSteps(make(snr_adam.adamw(0.01)), 2).gradient_transformation(), params, grads)
    means = jax.tree.map(lambda g: (g[0::2] + g[1::2]) / 2, grads)
    _, want, _ = run(make(snr_adam.adamw(0.01)), params, means)
    assert not any(np.any(u[0::2]) for u in jax.tree.leaves(updates))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x.astype("float32"), y.astype("float32"), rtol=2.0**-7, atol=1e-6)


MAKERS = {
    "16": carry_remainder,
    "8": lambda tx: carry_remainder(tx, "8"),
    "rounded": lambda tx: optax.chain(tx, round_stochastically()),
}


@pytest.mark.parametrize(("name", "devices"), [("16", 2), *((name, 8) for name in MAKERS)])
def test_sharded(name, devices):
    """The bits of a step do not depend on the number of devices, nor do those of the remainders."""
    tx = MAKERS[name](snr_adam.adamw(0.01, weight_decay=0.1))
    p, g = _params()["w"], _gradients(5)["w"]
    _, want, want_state = run(tx, p, g)
    mesh = jax.make_mesh((devices,), ("x",))
    split = NamedSharding(mesh, PartitionSpec("x"))
    _, got, state = run(tx, *jax.device_put((p, g), (split, NamedSharding(mesh, PartitionSpec(None, "x")))))
    assert len(got.sharding.device_set) == devices
    _same((got, state), (want, want_state))
    placed = tx.init(jax.device_put(p, split))
    assert all(x.sharding.is_equivalent_to(split, 2) for x in jax.tree.leaves(placed) if x.shape == p.shape)


@pytest.mark.parametrize("name", MAKERS)
def test_in_nnx(name):
    """A bfloat16 model under `nnx.Optimizer` learns a linear map that plain bfloat16 does not."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 4)), "float32")
    y = x @ jnp.asarray([[1.0], [-2.0], [0.5], [1.5]]) + 0.25

    def train(tx):
        model = nnx.Linear(4, 1, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        first = step(model, optimizer)
        for _ in range(150):
            last = step(model, optimizer)
        assert model.kernel[...].dtype == jnp.bfloat16
        return float(first), float(last)

    first, last = train(MAKERS[name](optax.sgd(optax.linear_schedule(0.02, 0.01, 150))))
    print(f"{name}: loss from {first:.3g} to {last:.3g}")
    assert last < 0.02 * first


# errors


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"bits=16: use '16' \(exact\) or '8'"):
        carry_remainder(optax.sgd(0.1), 16)
    p = jnp.ones(2, "bfloat16")
    for tx in (carry_remainder(optax.sgd(0.1)), round_stochastically()):
        with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
            tx.update(p, tx.init(p))
