"""Where the state lies: by its parameter, split over the data axis, in bytes per device; and what that communicates.

The communication is read off the compiled program. The meshes are of eight CPU devices.
"""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PRESETS, SUMS, quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import snr_adam
from snr_adam.state.footprint import Footprint, footprint
from snr_adam.state.sharding import LikeParameters, Zero1, state_sharding
from snr_adam.telemetry._lags import Lags
from snr_adam.telemetry._state import means_in

STORAGES = ("float32", "bfloat16", "packed")
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def _mesh(axis=AxisType.Auto, **sizes):
    count = math.prod(sizes.values())
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(axis,) * len(sizes), devices=jax.devices()[:count]
    )


def _shapes(mesh, spec=P(), shapes=None):
    shapes = shapes or {"a": {"w": (128, 256), "b": (256,)}}
    full = {k: P(*spec) if len(v) > 1 else P() for k, v in _flat(shapes).items()}
    made = {
        k: jax.ShapeDtypeStruct(v, jnp.float32, sharding=NamedSharding(mesh, full[k])) for k, v in _flat(shapes).items()
    }
    return jax.tree.map(lambda k: made[k], _names(shapes))


def _is_shape(x):
    return isinstance(x, tuple)


def _names(shapes):
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), shapes, is_leaf=_is_shape)


def _flat(shapes):
    return {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(shapes, is_leaf=_is_shape)}


def _every_optimizer():
    """Each preset with each storage that it can have, variants with one, without what sums over all devices."""
    made = {}
    for name, (preset, _) in PRESETS.items():
        for storage in STORAGES[: 1 if preset.__module__ == "snr_adam.variants" else None]:
            with contextlib.suppress(ValueError):
                made[f"{name} {storage}"] = preset(1e-3, storage=storage)
    made = {name: tx for name, tx in made.items() if name.split()[0] not in SUMS}
    assert len(made) == 47
    made["carry_remainder"] = snr_adam.carry_remainder(snr_adam.adamw(1e-3, storage="packed"), "8")
    return made


def _every_storage():
    """One preset or more for each storage, those among them with two signals, two noises, none."""
    every, names = _every_optimizer(), ("adamw float32", "adamw bfloat16", "adamw packed", "carry_remainder")
    return {name: every[name] for name in (*names, "ademamix bfloat16", "amsgrad float32", "lion bfloat16")}


# --- which sharding each array gets ---

SHARED = snr_adam.scale_by_snr(noise=snr_adam.parts.Shared(snr_adam.parts.RMS(0.999), {"w": 0}))
MASK = {"a": {"w": True, "b": False}}
HOLDERS = {
    "optax.adamw": optax.adamw(1e-3),
    "packed": snr_adam.adamw(1e-3, storage="packed"),
    "two signals": snr_adam.ademamix(1e-3),
    "remainder": snr_adam.carry_remainder(optax.adam(1e-3), "8"),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.trace(0.9)),
    "MultiSteps": optax.MultiSteps(snr_adam.adam(1e-3), 4),
    "accumulate": snr_adam.accumulate(snr_adam.adam(1e-3), 4),
    "inject_hyperparams": optax.inject_hyperparams(snr_adam.adamw)(1e-3),
    "masked": optax.masked(optax.adam(1e-3), MASK),
    "partition": optax.partition({True: optax.adam(1e-3), False: optax.sgd(0.1, 0.9)}, MASK),
    "shared": SHARED,
    "shared, masked": optax.masked(SHARED, MASK),
    "factored": optax.adafactor(1e-3),
}


@pytest.mark.parametrize("policy", ["like parameters", "zero1"])
@pytest.mark.parametrize("name", HOLDERS)
def test_every_array_of_a_parameters_shape_follows_the_policy(name, policy):
    """A state made by jit lies there, has the structure of the state, and its whole arrays are the small ones."""
    mesh, tx = _mesh(data=4, model=2), HOLDERS[name]
    params = _shapes(mesh, P(None, "model"))
    shardings = state_sharding(tx, params, mesh, policy)
    plain = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    state = quick_jit(tx.init, out_shardings=shardings)(plain)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(plain)) == jax.tree.structure(shardings)
    want = P(None, "model") if policy == "like parameters" else P("data", "model")
    found = [x for x in jax.tree.leaves(state) if x.shape == (128, 256)]
    assert len(found) >= (0 if name == "factored" else 1)
    assert all(x.sharding.is_equivalent_to(NamedSharding(mesh, want), 2) for x in found)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state) if x.ndim < 2)


def test_shared_noise_lies_like_its_parameter_where_it_has_its_size():
    mesh = _mesh(data=4, model=2)
    shardings = state_sharding(SHARED, _shapes(mesh, P("data", "model")), mesh)
    assert shardings.nu.v[1].spec == P(None, "model")  # shared over axis 0
    assert shardings.nu.v[0].spec == P(None)
    unshared = snr_adam.scale_by_snr(noise=snr_adam.parts.Shared(snr_adam.parts.RMS(0.999), {"b": 0}))
    assert state_sharding(unshared, _shapes(mesh, P("data", "model")), mesh).nu.v[1].spec == P("data", "model")


def test_a_tree_that_only_looks_like_the_parameters_is_replicated():
    """A single array as parameters: the count and the array are told apart by shape; a pair of numbers is no pair."""
    mesh = _mesh(data=8)
    one = state_sharding(optax.adam(1e-3), _shapes(mesh, P("data"), {"w": (64, 512)})["w"], mesh)
    assert (one[0].count.spec, one[0].mu.spec) == (P(), P("data", None))
    pair = tuple(_shapes(mesh, P("data"), {"a": (64, 512), "b": (64, 512)}).values())
    tx = optax.GradientTransformation(lambda p: (jnp.zeros(2), jnp.zeros(3)), lambda u, s, p=None: (u, s))
    assert [s.spec for s in state_sharding(tx, pair, mesh)] == [P(), P()]


@pytest.mark.parametrize(
    ("shape", "spec", "want"),
    [
        ((128, 256), P(), P(None, "data")),  # the longest
        ((256, 256), P(), P("data", None)),  # the first of equals
        ((50257, 768), P(), P(None, "data")),  # only this one divides
        ((50257, 769), P(), P(None, None)),  # none does: no padding
        ((64, 64), P(), P(None, None)),  # small
        ((128, 512), P(None, "model"), P(None, ("model", "data"))),  # 256 of 512 are left per device, more than 128
        ((512, 256), P(None, "model"), P("data", "model")),
        ((512, 256), P("data"), P("data", None)),  # split already
        ((512, 256), P(("model", "data")), P(("model", "data"), None)),
        ((3, 4, 9, 256), P(), P(None, None, None, "data")),
    ],
)
def test_zero1_splits_the_longest_axis_that_divides(shape, spec, want):
    mesh = _mesh(data=4, model=2)
    p = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    assert state_sharding(optax.trace(0.9), p, mesh, "zero1").trace.spec == want


@pytest.mark.parametrize("smallest", [None, 8 * 2**10, 8])
def test_zero1_splits_an_array_of_exactly_the_smallest_size(smallest):
    """`smallest` is the size from which an array is split: one with an element less per device lies whole."""
    mesh, policy = _mesh(data=8), Zero1() if smallest is None else Zero1(smallest=smallest)
    assert policy.smallest == (smallest or 2**14)
    for size, want in ((policy.smallest, "data"), (policy.smallest - 8, None)):
        p = jax.ShapeDtypeStruct((size, 1), jnp.float32)
        assert state_sharding(optax.trace(0.9), p, mesh, policy).trace.spec == P(want, None)


def test_zero1_over_axes_by_name():
    mesh = _mesh(replica=2, shard=4)
    p = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    assert state_sharding(optax.trace(0.9), p, mesh, Zero1("shard", 1)).trace.spec == P("shard", None)
    both = state_sharding(optax.trace(0.9), p, mesh, Zero1(("replica", "shard"), 1))
    assert both.trace.spec == P(("replica", "shard"), None)


def test_what_cannot_be_is_refused():
    mesh, tx, p = _mesh(a=2, b=4), optax.adam(1e-3), {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    with pytest.raises(ValueError, match="none named 'data'"):
        state_sharding(tx, p, mesh, "zero1")
    with pytest.raises(ValueError, match=r"axis='x'.*\('a', 'b'\)"):
        state_sharding(tx, p, mesh, Zero1("x"))
    with pytest.raises(ValueError, match="'like parameters', 'zero1'"):
        state_sharding(tx, p, mesh, "zero3")
    with pytest.raises(ValueError, match=r"parameter w .* not on the mesh"):
        state_sharding(tx, _shapes(_mesh(data=8), P("data"), {"w": (8, 8)}), mesh)
    with pytest.raises(ValueError, match=r"memory_kind='hbm2'.*cpu devices have .*'pinned_host'"):
        state_sharding(tx, p, mesh, memory_kind="hbm2")


# --- bytes ---


def _gpt2():
    """The shapes of GPT-2 124M."""
    d = 768
    block = {
        "ln1": (2, d), "qkv": (d, 3 * d), "qkv_b": (3 * d,), "out": (d, d), "out_b": (d,),
        "ln2": (2, d), "up": (d, 4 * d), "up_b": (4 * d,), "down": (4 * d, d), "down_b": (d,),
    }  # fmt: skip
    return {"wte": (50257, d), "wpe": (1024, d), "blocks": [block] * 12, "ln": (2, d)}


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_zero1_of_gpt2_holds_an_eighth_on_each_device(storage):
    """Measured from the live buffers of a state that jit made."""
    mesh, tx = _mesh(data=8), snr_adam.adamw(1e-3, storage=storage)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), _gpt2(), is_leaf=_is_shape)
    shardings = state_sharding(tx, params, mesh, "zero1")
    state = jax.jit(lambda: tx.init(jax.tree.map(jnp.zeros_like, params)), out_shardings=shardings)()
    held = dict.fromkeys(jax.devices(), 0)
    for x in jax.tree.leaves(state):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    assert count == 124_439_808
    assert total == count * (8 if storage == "float32" else 4) + 4
    assert all(total / 8 <= size <= 1.05 * total / 8 for size in held.values())
    report = footprint(state)
    assert (report.total, report.per_device, report.devices) == (total, held[jax.devices()[0]], 8)
    assert report == footprint(jax.eval_shape(tx.init, params), shardings)  # known before anything is made


def test_the_report_says_what_is_whole():
    mesh = _mesh(data=8)
    params = _shapes(mesh, P(), {"w": (128, 256), "odd": (101, 303), "b": (256,)})
    tx = optax.trace(0.9)
    said = str(footprint(jax.eval_shape(tx.init, params), state_sharding(tx, params, mesh, "zero1")))
    assert said.splitlines() == [
        "255 kB in all, 140 kB on each of 8 devices: 54.94%, where an even split is 12.50%",
        "whole on every device: 2 arrays, 123 kB: trace/odd (122 kB), trace/b (1.02 kB)",
    ]


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ((0, 0, 1, ()), ["0 bytes in all, 0 bytes on each of 1 devices: 100.00%, where an even split is 100.00%"]),
        (
            (999, 999, 1, (("w", 999),)),
            ["999 bytes in all, 999 bytes on each of 1 devices: 100.00%, where an even split is 100.00%"],
        ),
        (
            (1_000, 250, 4, ()),
            ["1.00 kB in all, 250 bytes on each of 4 devices: 25.00%, where an even split is 25.00%"],
        ),
        (
            (123_456_789, 23_456_000, 8, (("a", 12_300_000), ("b", 999_999), ("c", 12_345))),
            [
                "123 MB in all, 23.46 MB on each of 8 devices: 19.00%, where an even split is 12.50%",
                "whole on every device: 3 arrays, 13.31 MB: a (12.30 MB), b (1000 kB), c (12.35 kB)",
            ],
        ),
        (
            (2 * 10**12, 10**9, 8, (("a", 4), ("b", 3), ("c", 2), ("d", 1))),
            [
                "2.00 TB in all, 1.00 GB on each of 8 devices: 0.05%, where an even split is 12.50%",
                "whole on every device: 4 arrays, 10 bytes: a (4 bytes), b (3 bytes), c (2 bytes), ...",
            ],
        ),
    ],
)
def test_a_footprint_in_words(seen, said):
    """Three digits or more of each size, the three largest of the arrays that are whole, and whether there are more."""
    assert str(Footprint(*seen)).splitlines() == said


def test_a_state_in_the_hosts_memory_trains_the_same():
    """Pinned memory for the moments, fetched and put back by every step."""
    mesh, tx = _mesh(data=8), snr_adam.adamw(1e-2)
    params = jax.device_put({"w": jnp.ones((128, 256)), "b": jnp.ones(256)}, NamedSharding(mesh, P()))
    near = state_sharding(tx, params, mesh, "zero1")
    far = state_sharding(tx, params, mesh, "zero1", memory_kind="pinned_host")

    def step(params, state):
        updates, state = tx.update(params, jax.device_put(state, jax.memory.Space.Device), params)
        return optax.apply_updates(params, updates), state

    results = []
    for shardings in (near, far):
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        run = jax.jit(step, out_shardings=(NamedSharding(mesh, P()), shardings))
        carry = (params, state)
        for _ in range(3):
            carry = run(*carry)
        results.append(carry)
    assert results[1][1][0].mu["w"].sharding.memory_kind == "pinned_host"
    assert results[1][1][0].count.sharding.memory_kind != "pinned_host"
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(results))


# --- communication ---

OPERATION = re.compile(
    r" = (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)


def _collectives(compiled):
    """(operation, [each array's dtype and shape]) for every collective of a compiled program."""
    return [(match[2], re.findall(r"(\w+\[[\d,]*\])", match[1])) for match in OPERATION.finditer(compiled.as_text())]


# how parameters lie, how gradients do, and the policy of the state
LAYOUTS = {
    "FSDP": (P("data"), P("data"), "like parameters"),
    "tensor parallel": (P(None, "model"), P(None, "model"), "like parameters"),
    "ZeRO-1": (P(), P(None, "data"), "zero1"),
    "ZeRO-1, replicated gradients": (P(), P(), "zero1"),
}


def _compiled_updates(layout, axis, optimizers):
    """One program with the update of every optimizer, so that it is compiled once."""
    spec, grad_spec, policy = LAYOUTS[layout]
    mesh = _mesh(axis, data=4, model=2)
    params, grads = (_shapes(mesh, each, {"w": (128, 256)}) for each in (spec, grad_spec))
    states, shardings, out = {}, {}, {}
    for name, tx in optimizers.items():
        shardings[name] = state_sharding(tx, params, mesh, policy)
        states[name] = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, _bare(params)),
            shardings[name],
        )
        out[name] = (jax.tree.map(lambda g: g.sharding, grads), shardings[name])

    def update(states, grads, params):
        return {name: tx.update(grads, states[name], params) for name, tx in optimizers.items()}

    with jax.set_mesh(mesh):
        return quick_jit(update, out_shardings=out).lower(states, grads, params).compile()


def _bare(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def brief(layout, axis):
    """A pair for the default run; the others are slow to compile."""
    return pytest.param(layout, axis, marks=() if axis == "auto" and layout in BRIEFLY else pytest.mark.slow)


BRIEFLY = (next(iter(LAYOUTS)), "ZeRO-1")


@pytest.mark.parametrize(("layout", "axis"), [brief(layout, axis) for layout in LAYOUTS for axis in AXES])
def test_an_update_communicates_nothing_but_zero1s_new_updates(layout, axis):
    """All presets with all storages. With replicated gradients ZeRO-1 gathers one update per split parameter."""
    optimizers = _every_optimizer()
    found = _collectives(_compiled_updates(layout, AXES[axis], optimizers))
    if layout != "ZeRO-1, replicated gradients":
        assert found == []
        return
    assert {operation for operation, _ in found} == {"all-gather"}
    gathered = [shape for _, shapes in found for shape in shapes]
    assert gathered == ["f32[128,256]"] * len(optimizers)


def test_a_collective_would_be_seen():
    """LAMB's norm is one; so the reading of the text can fail."""
    found = _collectives(_compiled_updates("FSDP", AxisType.Auto, {"lamb": snr_adam.lamb(1e-3)}))
    assert {operation for operation, _ in found} == {"all-reduce"}


# --- bits ---

MESHES = {
    "1": {"data": 1}, "2": {"data": 2}, "4": {"data": 4}, "8": {"data": 8},
    "1 x 8": {"data": 1, "model": 8}, "2 x 4": {"data": 2, "model": 4},
}  # fmt: skip
SIZES = {"w": (16, 48), "v": (128, 256), "b": (256,), "odd": (5, 7), "s": ()}


@functools.cache
def _trained(mesh_name, policy, axis="auto", optimizers=_every_storage):
    """Parameters and states of some optimizers after five steps on a mesh."""
    jit = quick_jit if optimizers is _observed else jax.jit  # whose sums are compared to a tolerance
    mesh, optimizers = _mesh(AXES[axis], **MESHES[mesh_name]), optimizers()
    like = P() if policy == "zero1" else P(*("data", "model")[: len(MESHES[mesh_name])])
    rng = np.random.default_rng(0)

    def draw():
        size = {k: np.float32(10 ** rng.uniform(-3, 1)) for k in SIZES}
        return {k: size[k] * rng.normal(size=shape).astype("float32") for k, shape in SIZES.items()}

    shardings = {k: NamedSharding(mesh, like if len(s) > 1 and k != "odd" else P()) for k, s in SIZES.items()}
    params, grads = jax.device_put(draw(), shardings), [jax.device_put(draw(), shardings) for _ in range(5)]
    places = {
        name: state_sharding(tx, params, mesh, Zero1(smallest=1) if policy == "zero1" else policy)
        for name, tx in optimizers.items()
    }

    def step(all_params, states, g):
        new = {}
        for name, tx in optimizers.items():
            updates, state = tx.update(g, states[name], all_params[name])
            new[name] = (optax.apply_updates(all_params[name], updates), state)
        return {k: v[0] for k, v in new.items()}, {k: v[1] for k, v in new.items()}

    with jax.set_mesh(mesh):
        carry = (
            dict.fromkeys(optimizers, params),
            jax.jit(lambda p: {k: tx.init(p) for k, tx in optimizers.items()}, out_shardings=places)(params),
        )
        run = jit(step, out_shardings=(dict.fromkeys(optimizers, shardings), places))
        for g in grads:
            carry = run(*carry, g)
    return jax.device_get(carry)


BRIEF = [("8", "like parameters"), ("2 x 4", "zero1")]
EVERY = [(m, "like parameters") for m in MESHES if m != "1"] + [("8", "zero1"), ("2 x 4", "zero1")]


@pytest.mark.parametrize(
    ("mesh", "policy"), [each if each in BRIEF else pytest.param(*each, marks=pytest.mark.slow) for each in EVERY]
)
def test_the_same_bits_on_every_mesh(mesh, policy):
    """Every storage, packed and carried included, sharded like the parameters and by ZeRO-1."""
    want, got = _trained("1", "like parameters"), _trained(mesh, policy)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.tobytes() == y.tobytes(), f"{jax.tree_util.keystr(path)}: {np.sum(x != y)} of {x.size} differ"


def test_the_same_bits_with_explicit_axes():
    jax.tree.map(
        np.testing.assert_array_equal,
        _trained("2 x 4", "like parameters", "explicit"),
        _trained("1", "like parameters"),
    )


def _observed():
    return {"observed": snr_adam.observe(snr_adam.adamw(1e-3, storage="packed"))}


@pytest.mark.parametrize(
    ("mesh", "policy"), [("8", "zero1"), pytest.param("2 x 4", "like parameters", marks=pytest.mark.slow)]
)
def test_the_same_telemetry_on_every_mesh(mesh, policy):
    """Within 1e-6, for these are sums; those of both signs relative to the sum of their absolute values."""
    (_, want), (_, got) = (_trained(*each, optimizers=_observed) for each in (("1", "like parameters"), (mesh, policy)))
    want, got = want["observed"], got["observed"]
    jax.tree.map(np.testing.assert_array_equal, got.inner, want.inner)
    got_means, means = means_in(got.means), means_in(want.means)
    assert np.all(means.gradient_sq > 0)
    np.testing.assert_allclose(got_means.gradient_sq, means.gradient_sq, rtol=1e-6)
    assert np.all(np.abs(got_means.persistent - means.persistent) <= 1e-6 * means.gradient_sq)
    reports = [snr_adam.report(state) for state in (got, want)]
    for key in ("update_rms", "param_rms", "gradient_norm", "significant"):
        np.testing.assert_allclose(*(each.columns[key] for each in reports), rtol=1e-6)
    np.testing.assert_allclose(got.sketches, want.sketches, rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(want.sketches)))
    assert got.bursts == want.bursts
    np.testing.assert_allclose(Lags(*got.lags).power, Lags(*want.lags).power, rtol=1e-6)


def test_policies_are_values():
    assert Zero1("data") == Zero1("data") != LikeParameters()
