"""A digest sees every bit, on any number of devices, in one read; what comes back from a disk is what was saved, or an
error that says why not."""

import errno
import functools
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import gradients, quick_jit, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import snr_adam
from snr_adam._bits import mix
from snr_adam.state import digest
from snr_adam.state._savers import unfinished
from snr_adam.state.digest import manifest, verify
from snr_adam.state.files import restore_state, save_state

DTYPES = ["bool", "int4", "int8", "uint8", "int16", "int32", "uint32"]
DTYPES += ["float8_e4m3fn", "bfloat16", "float16", "float32", "complex64"]
WIDE = ["int64", "uint64", "float64", "complex128"]


def bits(x):
    """The two halves of a digest as one Python number."""
    a, b = np.asarray(x)
    return int(a) << 32 | int(b)


def numbers(dtype, shape=(3, 5), seed=0):
    """Random numbers of any dtype, as a NumPy array."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 3 + (1j * rng.normal(size=shape) if "complex" in dtype else 0)
    return (x > 0) if dtype == "bool" else abs(x).astype(dtype) if "int" in dtype else x.astype(dtype)


def state_tree():
    """A leaf of every dtype that needs no x64, and the awkward ones."""
    return {
        **{dtype: jnp.asarray(numbers(dtype)) for dtype in DTYPES},
        **{f"numpy {dtype}": numbers(dtype) for dtype in WIDE},
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7)),
        "scalar": jnp.float32(2.5),
        "python": 0.5,
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "state": snr_adam.adamw(1e-3, storage="packed").init({"w": jnp.ones((4, 4)), "frozen": None}),
    }


# the digest: every bit


def test_a_term_is_a_bijection():
    """`mix` has an inverse, so a changed word changes its term, and one changed term changes a sum."""

    def unshift(x, by):
        y = x
        for _ in range(32 // by):
            y = x ^ (y >> np.uint32(by))
        return y

    x = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32)
    with np.errstate(over="ignore"):
        y = unshift(np.asarray(mix(x)), 16) * np.uint32(pow(0x846CA68B, -1, 2**32))
        y = unshift(y, 15) * np.uint32(pow(0x7FEB352D, -1, 2**32))
    np.testing.assert_array_equal(unshift(y, 16), x)


@pytest.mark.slow
def test_ten_thousand_flips_of_one_bit():
    """Every one changes both halves, at any place of any leaf of a real state."""
    rng = np.random.default_rng(0)
    tx = snr_adam.carry_remainder(snr_adam.adamw(0.1, storage=snr_adam.parts.Cast(nu="bfloat16")))
    params, state = tree(dtype=jnp.bfloat16), None
    for g in gradients(2, dtype=jnp.bfloat16):
        _, state = tx.update(g, state or tx.init(params), params)
    leaves = [np.asarray(x) for x in jax.tree.leaves((params, state)) if x.size]
    compiled = jax.jit(digest)
    before, missed = np.asarray(compiled(leaves)), 0
    for _ in range(10_000):
        i = rng.integers(len(leaves))
        words = np.frombuffer(leaves[i].tobytes(), np.uint8).copy()
        at = rng.integers(8 * words.size)
        words[at // 8] ^= 1 << (at % 8)
        flipped = [*leaves[:i], words.view(leaves[i].dtype).reshape(leaves[i].shape), *leaves[i + 1 :]]
        missed += np.any(np.asarray(compiled(flipped)) == before)
    assert missed == 0


@pytest.mark.parametrize("dtype", DTYPES + WIDE)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(place=st.integers(0, 14), bit=st.integers(0, 127))
def test_every_bit_of_every_dtype(dtype, place, bit):
    """Also of NaN's payload, of subnormal numbers and of signed zeros."""
    x = numbers(dtype)
    size = {"bool": 1, "int4": 4}.get(dtype, 8 * x.dtype.itemsize)
    raw = np.frombuffer(x.tobytes(), np.uint8).copy()
    raw[place * x.dtype.itemsize + bit % size // 8] ^= 1 << (bit % size % 8)
    other = np.frombuffer(raw.tobytes(), x.dtype).reshape(x.shape)
    if dtype == "int4":
        other = other.astype(np.int8).astype(x.dtype)
    assert np.all(np.asarray(digest(x)) != np.asarray(digest(other)))


@pytest.mark.parametrize("dtype", WIDE)
def test_numpy_and_jax_agree_in_64_bits(dtype):
    x = numbers(dtype)
    with jax.enable_x64(True):
        inside = digest({"w": jnp.asarray(x)})
        on_device = jnp.asarray(x)
    assert bits(inside) == bits(digest({"w": x})) == bits(digest({"w": on_device}))


OTHERS = {
    "two elements exchanged": lambda t: {**t, "w": t["w"].at[0, 0].set(t["w"][0, 1]).at[0, 1].set(t["w"][0, 0])},
    "two leaves exchanged": lambda t: {**t, "w": t["v"], "v": t["w"]},
    "another name": lambda t: {"w": t["w"], "u": t["v"], "zero": t["zero"]},
    "another shape": lambda t: {**t, "w": t["w"].reshape(2, 6)},
    "another dtype, the same bits": lambda t: {**t, "w": jax.lax.bitcast_convert_type(t["w"], jnp.int32)},
    "another dtype, the same number": lambda t: {**t, "zero": jnp.int32(0)},
    "a leaf less": lambda t: {"w": t["w"], "v": t["v"]},
    "an empty leaf more": lambda t: {**t, "x": jnp.zeros(0)},
    "None for zero": lambda t: {**t, "zero": None},
    "minus zero": lambda t: {**t, "zero": -t["zero"]},
    "transposed": lambda t: {**t, "w": t["w"].T.reshape(3, 4)},
    "shifted by one": lambda t: {**t, "w": jnp.roll(t["w"], 1)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_is_another_tree(other):
    this = {"w": jnp.arange(12.0).reshape(3, 4), "v": jnp.ones((3, 4)), "zero": jnp.float32(0)}
    assert bits(digest(this)) == bits(digest(jax.tree.map(jnp.copy, this)))
    assert bits(digest(this)) != bits(digest(OTHERS[other](this)))


def test_no_two_of_many_small_states_collide():
    """Among 20,000 neighbours a 64-bit hash has none; a sum of raw words would have thousands, one of 32 bits a few."""
    one = jax.jit(jax.vmap(lambda w: digest({"w": w})))
    words = jnp.asarray(np.random.default_rng(0).integers(0, 3, (20_000, 24)), jnp.int32)
    seen = np.unique(np.asarray(words), axis=0)
    a, b = np.asarray(one(jnp.asarray(seen))).T.astype(np.uint64)
    assert len(np.unique(a << np.uint64(32) | b)) == len(seen) > 19_000
    ones = np.unpackbits(np.stack([a, b], 1).astype(np.uint32).view(np.uint8), axis=1).mean(0)
    assert np.all(abs(ones - 0.5) < 0.03)


@pytest.mark.parametrize(
    "leaf", ["a string", object(), jax.ShapeDtypeStruct((2,), jnp.float32)], ids=["str", "object", "abstract"]
)
def test_a_leaf_without_bits_is_named(leaf):
    with pytest.raises(TypeError, match=r"leaf layer/0 is a (str|object|ShapeDtypeStruct), which has no bits"):
        digest({"layer": [leaf]})


# the digest: everywhere the same, and cheap


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("y", "x"), P(("x", "y")), P()], ids=str)
def test_the_same_on_any_number_of_devices(spec, axis):
    """Nothing but a word or two per device and leaf is sent."""
    whole = {dtype: jnp.asarray(numbers(dtype, (16, 24))) for dtype in DTYPES}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis, axis))
    split = jax.device_put(whole, NamedSharding(mesh, spec))
    assert bits(jax.jit(digest)(split)) == bits(digest(whole))
    text = quick_jit(digest).lower(split).compile().as_text()
    gathered = [line.split("=")[1] for line in text.splitlines() if " all-gather(" in line]
    assert all(line.lstrip().startswith(("u32[4,", "u32[8", "u32[1,", "u32[2,")) for line in gathered)
    assert bool(gathered) == (spec != P())


def test_leaves_on_different_devices():
    """No one program could read them all."""
    whole = {"a": jnp.arange(5.0), "b": jnp.ones((2, 2)), "c": jnp.int32(3)}
    apart = {k: jax.device_put(x, d) for (k, x), d in zip(whole.items(), jax.devices(), strict=False)}
    assert bits(digest(apart)) == bits(digest(whole))


@functools.cache
def large():
    return {
        "params": jnp.ones((512, 1024), jnp.bfloat16),
        "mu": jnp.ones((512, 1024)),
        "nu": jnp.ones((512, 1024), jnp.complex64),
    }


def test_costs_one_read_and_no_memory():
    size = sum(x.nbytes for x in large().values())
    compiled = jax.jit(digest).lower(large()).compile()
    assert compiled.cost_analysis()["bytes accessed"] < 1.01 * size
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * size


def test_inside_and_outside_of_jit():
    this = state_tree()
    arrays = {k: x for k, x in this.items() if k != "python" and "numpy" not in k}
    assert bits(digest(arrays)) == bits(jax.jit(digest)(arrays)) == bits(digest(jax.device_get(arrays)))
    chex.assert_shape(digest({}), (2,))


def test_one_digest_does_not_compile_twice():
    counted = jax.jit(chex.assert_max_traces(digest, n=1))
    assert bits(counted({"w": jnp.ones(3)})) != bits(counted({"w": jnp.zeros(3)}))


# manifest and verify


def test_a_manifest_verifies_what_it_was_made_of():
    this = state_tree()
    lines = json.loads(json.dumps(manifest(this)))
    verify(this, lines)
    verify(pickle.loads(pickle.dumps(jax.device_get({**this, "key": None}))), manifest({**this, "key": None}))


SMALL = {"layer": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(3)}, "count": jnp.int32(3)}
WRONG = [
    (
        {"layer": {"w": SMALL["layer"]["w"], "b": jnp.zeros(3)}},
        "has leaf count that this one has not, and lacks no leaf",
    ),
    (
        {**SMALL, "layer": {"kernel": SMALL["layer"]["w"], "b": jnp.zeros(3)}},
        "has leaf layer/w .* lacks leaf layer/kernel",
    ),
    (
        {**SMALL, "layer": {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)}},
        r"layer/w was saved with shape \(2, 3\), .* \(3, 2\)",
    ),
    (
        {**SMALL, "layer": {"w": SMALL["layer"]["w"], "b": jnp.zeros(1)}},
        r"layer/b was saved with shape \(3,\), .* \(1,\)",
    ),
    ({**SMALL, "count": jnp.float32(3)}, "leaf count was saved as int32, here it is float32: restore it as it was"),
    ({**SMALL, "count": None}, "leaf count was saved as int32, here it is None"),
]


@pytest.mark.parametrize(("other", "match"), WRONG, ids=range(len(WRONG)))
def test_verify_says_what_is_another(other, match):
    with pytest.raises(ValueError, match=match):
        verify(other, manifest(SMALL))


NO_MANIFESTS = {"nothing": None, "a dict": {}, "words": ["w"], "short rows": [["w", "float32", []]]}


@pytest.mark.parametrize("kind", NO_MANIFESTS)
def test_what_is_no_manifest_is_refused(kind):
    with pytest.raises(ValueError, match=r"manifest is damaged or none: it has .* Give what `manifest` has returned"):
        verify(SMALL, NO_MANIFESTS[kind])


def test_verify_names_the_damaged_leaf():
    damaged = {**SMALL, "count": jnp.int32(2)}
    with pytest.raises(ValueError, match=r"leaf count of 3 is damaged: its digest is not the one .* older checkpoint"):
        verify(damaged, manifest(SMALL))


# on disk


def test_every_kind_of_leaf_comes_back(tmp_path):
    this = state_tree()
    save_state(tmp_path, 1, this)
    back = restore_state(tmp_path, this)
    assert manifest(back) == manifest(this)
    assert jax.tree.structure(back) == jax.tree.structure(this)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", jnp.float32)), this)
    assert bits(digest(restore_state(tmp_path, abstract))) == bits(digest(this))


ALONE = {
    "an array": jnp.arange(3.0),
    "a number": 0.5,
    "a key": jax.random.key(3),
    "a NumPy number": np.float64(1 / 3),
    "NumPy's kinds": {
        "bool": np.bool_(True),
        "int": np.int64(2**40),
        "half": np.float16(0.1),
        "complex": np.complex64(1j),
    },
    "a dict of nothing": {},
    "dicts of nothing": {"a": {}, "b": ()},
    "None": None,
    "only None": {"a": None},
    "only empty arrays": [jnp.zeros((0, 3))],
    "an empty array": jnp.zeros((2, 0)),
    "keys with separators": {"net/~/linear": {"w": jnp.ones(2)}, "net.b": jnp.zeros(2), "": jnp.ones(1)},
}


@pytest.mark.parametrize("kind", ALONE)
def test_whatever_is_a_tree_comes_back(kind, tmp_path):
    save_state(tmp_path, 1, ALONE[kind])
    back = restore_state(tmp_path, ALONE[kind])
    assert jax.tree.structure(back) == jax.tree.structure(ALONE[kind])
    assert manifest(back) == manifest(ALONE[kind])


STEPS = {
    "numpy": np.int64(4),
    "jax": jnp.int32(4),
    "0-d": np.array(4),
    "count": snr_adam.adam(0.1).init(SMALL["layer"])[0].count,
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_is_any_whole_number(kind, tmp_path):
    save_state(tmp_path, STEPS[kind], SMALL)
    verify(restore_state(tmp_path, SMALL, STEPS[kind]), manifest(SMALL))
    assert [f.name for f in tmp_path.iterdir()] == [str(int(STEPS[kind]))]


NO_STEPS = {
    "1e3": (1e3, "step=1000.0 is of type float: must be a whole number >= 0, such as 1000"),
    "-1": (-1, "step=-1: must be a whole number >= 0"),
    "True": (True, "step=True is of type bool: must be"),
    "a bool of NumPy": (np.bool_(True), "of type bool.*: must be"),
    "a bool of JAX": (jnp.bool_(True), "step=Array.True, dtype=bool.* must be"),
    "abc": ("abc", "step='abc' is of type str: must be"),
    "3": ("3", "step='3' is of type str: must be"),
    "a float of NumPy": (np.float32(3), "of type float32: must be"),
    "a vector": (jnp.arange(2), "must be a whole number"),
    "None": (None, "step=None is of type NoneType: must be"),
}


@pytest.mark.parametrize("kind", NO_STEPS)
def test_what_is_no_step_is_refused_before_anything_is_written(kind, tmp_path):
    step, match = NO_STEPS[kind]
    with pytest.raises(ValueError if type(step) is int else TypeError, match=match):
        save_state(tmp_path, step, SMALL)
    assert list(tmp_path.iterdir()) == []
    if step is not None:
        save_state(tmp_path, 3, SMALL)
        with pytest.raises((TypeError, ValueError), match=match):
            restore_state(tmp_path, SMALL, step)


NO_STATES = {
    "one name by a slash": (
        {"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(2)},
        ValueError,
        r"two leaves are called a/b, float32\[2\] and float32\[2\]: rename a key",
    ),
    "one name by a dot": (
        {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(2)},
        ValueError,
        "leaves a/b and a.b would both be called 'a.b' in the checkpoint.*: rename a key",
    ),
    "one name deeper": (
        {"a": [jnp.ones(2)], "a.0": jnp.zeros(3)},
        ValueError,
        "leaves a/0 and a.0 would both be called 'a.0'",
    ),
    "a string": ({"x": "text"}, TypeError, "leaf x is a str, which has no bits to read: keep it out of the state"),
    "an array of strings": ({"x": np.array(["a"])}, TypeError, "leaf x is a ndarray of <U1, which has no bits"),
    "an array of dates": (
        {"x": np.array(["2020-01-01"], "datetime64[D]")},
        TypeError,
        "ndarray of datetime64.D., which",
    ),
    "records": ({"x": np.zeros(2, [("a", "f4")])}, TypeError, "leaf x is a ndarray of .*, which has no bits"),
    "another order of bytes": ({"x": np.arange(4, dtype=">f4")}, TypeError, "leaf x is a ndarray of >f4, which"),
    "objects": ({"x": np.array([None])}, TypeError, "leaf x is a ndarray of object, which has no bits"),
}


@pytest.mark.parametrize("kind", NO_STATES)
def test_what_cannot_come_back_is_refused_before_anything_is_written(kind, tmp_path):
    state, error, match = NO_STATES[kind]
    with pytest.raises(error, match=match):
        save_state(tmp_path, 1, state)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_saved_inside_of_jit(tmp_path):
    with pytest.raises(TypeError, match="leaf w has no bits inside of jit: give what the compiled step has returned"):
        jax.jit(lambda x: save_state(tmp_path, 1, x))({"w": jnp.ones(2)})


def test_a_users_home_is_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_state("~/run", 1, SMALL)
    assert (tmp_path / "run" / "1").is_dir()
    verify(restore_state("~/run", SMALL), manifest(SMALL))


def test_the_newest_or_the_one_asked_for(tmp_path):
    for step in (3, 20, 100):
        save_state(tmp_path, step, {"step": jnp.int32(step)})
    like = {"step": jnp.int32(0)}
    assert [int(restore_state(tmp_path, like, step)["step"]) for step in (None, 3, 20)] == [100, 3, 20]


@pytest.mark.slow
def test_ten_thousand_leaves_take_no_longer_than_orbax_needs(tmp_path):
    """At most 1.5 times as long as Orbax's own save of the same arrays, without a manifest."""
    many = {f"layer {i}": {f"w{k}": jnp.full(8, 100.0 * i + k) for k in range(100)} for i in range(100)}

    def by_orbax(folder):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, many)

    def seconds(save, where):
        start = time.perf_counter()
        save(tmp_path / where)
        return time.perf_counter() - start

    manifest(many)  # compiles
    pairs = [
        (seconds(lambda path: save_state(path, 1, many), f"ours {k}"), seconds(by_orbax, f"orbax {k}"))
        for k in range(3)
    ]
    ours, orbax = map(min, zip(*pairs, strict=True))
    print(f"10,000 leaves: {ours:.1f} s, Orbax alone {orbax:.1f} s")
    assert ours < 1.5 * orbax
    verify(restore_state(tmp_path / "ours 0", many), manifest(many))


def test_a_run_on_eight_devices_goes_on_on_two(tmp_path):
    x = jnp.arange(64.0).reshape(8, 8)
    eight, two = (NamedSharding(jax.make_mesh((n,), ("x",), devices=jax.devices()[:n]), P("x")) for n in (8, 2))
    save_state(tmp_path, 1, {"w": jax.device_put(x, eight)})
    back = restore_state(tmp_path, {"w": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=two)})
    assert back["w"].sharding == two
    np.testing.assert_array_equal(back["w"], x)


def test_what_came_back_can_be_donated(tmp_path):
    save_state(tmp_path, 1, SMALL)
    back = restore_state(tmp_path, SMALL)
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(back)
    assert all(x.is_deleted() for x in jax.tree.leaves(back))


LARGE = {"layer": {"w": jnp.asarray(numbers("float32", (64, 64))), "b": jnp.zeros(3)}, "count": jnp.int32(3)}


def arrays_of(step_dir):
    """The largest file of a checkpoint: it holds the elements of `layer/w`."""
    return max((f for f in step_dir.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(step_dir):
    file = arrays_of(step_dir)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(step_dir):
    file = arrays_of(step_dir)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def half_written(step_dir):
    step_dir.rename(step_dir.with_name(f"{step_dir.name}.orbax-checkpoint-tmp"))


def edit_manifest(step_dir, old, new):
    file = step_dir / "manifest" / "metadata"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def write_manifest(step_dir, change):
    file = step_dir / "manifest" / "metadata"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def edit_leaf(step_dir, change):
    write_manifest(step_dir, lambda m: {**m, "leaves": [change(m["leaves"][0]), *m["leaves"][1:]]})


def without(of, key):
    return {name: x for name, x in of.items() if name != key}


def twice(of):
    return {**of, "leaves": [of["leaves"][0], *of["leaves"]]}


DAMAGE = {
    "half-written": (
        half_written,
        r"no complete checkpoint in .*: give the directory of a run that has finished a save",
    ),
    "truncated": (
        truncate,
        r"checkpoint .*/7: its arrays cannot be read.*, a file is damaged or missing: take an older",
    ),
    "without arrays": (lambda d: shutil.rmtree(d / "state"), "its arrays cannot be read"),
    "without an array file": (lambda d: arrays_of(d).unlink(), "its arrays cannot be read|layer/w .*is damaged"),
    "without metadata": (lambda d: (d / "state" / "manifest.ocdbt").unlink(), "its arrays cannot be read"),
    "without manifest": (lambda d: shutil.rmtree(d / "manifest"), "its manifest is missing or damaged"),
    "manifest cut": (lambda d: edit_manifest(d, '"leaves"', '"leav'), "its manifest is missing or damaged"),
    "manifest's digest": (
        lambda d: edit_manifest(d, manifest(LARGE)[0].digest, "0" * 16),
        "leaf count of 3 is damaged: its digest is not the one",
    ),
    "a list for a manifest": (lambda d: write_manifest(d, lambda m: [m]), "its manifest is missing or damaged"),
    "no step in the manifest": (
        lambda d: write_manifest(d, lambda m: without(m, "step")),
        "its manifest is missing or",
    ),
    "no number for a step": (
        lambda d: write_manifest(d, lambda m: {**m, "step": "7"}),
        "its manifest is missing or dam",
    ),
    "form 0": (lambda d: write_manifest(d, lambda m: {**m, "form": 0}), "its manifest is missing or damaged"),
    "no number for a form": (
        lambda d: write_manifest(d, lambda m: {**m, "form": True}),
        "its manifest is missing or dam",
    ),
    "leaves that are none": (
        lambda d: write_manifest(d, lambda m: {**m, "leaves": 3}),
        "its manifest is missing or dam",
    ),
    "a leaf cut short": (lambda d: edit_leaf(d, lambda row: row[:3]), "its manifest is missing or damaged"),
    "a leaf without a name": (
        lambda d: edit_leaf(d, lambda row: [None, *row[1:]]),
        "its manifest is missing or damaged",
    ),
    "a shape of words": (
        lambda d: edit_leaf(d, lambda row: [*row[:2], ["a"], row[3]]),
        "its manifest is missing or dam",
    ),
    "a leaf twice": (lambda d: write_manifest(d, twice), "two leaves are called count, int32.. and int32..: rename"),
    "a leaf less": (
        lambda d: write_manifest(d, lambda m: {**m, "leaves": m["leaves"][1:]}),
        "the saved state has no leaf that this one has not, and lacks leaf count",
    ),
    "flipped": (flip, "leaf layer/w .*is damaged|cannot be read .at leaf layer/w"),
    "renamed": (lambda d: d.rename(d.with_name("8")), "checkpoint .*/8: it was saved as step 7 and renamed since"),
    "deleted": (shutil.rmtree, "no complete checkpoint in"),
    "not a checkpoint": (
        lambda d: (shutil.rmtree(d), d.mkdir(), (d / "x").write_text("")),
        "its manifest is missing or damaged|no complete checkpoint",
    ),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_a_sentence(kind, tmp_path):
    damage, match = DAMAGE[kind]
    save_state(tmp_path, 7, LARGE)
    damage(tmp_path / "7")
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        restore_state(tmp_path, LARGE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_byte_of_the_array_file_is_refused(tmp_path):
    """At 60 places: Orbax cannot read it, or the digest is another, or it is a byte that nobody reads; never a wrong
    state without a word."""
    save_state(tmp_path, 7, LARGE)
    file = arrays_of(tmp_path / "7")
    data, found = file.read_bytes(), {"digest": 0, "unreadable": 0, "unread": 0}
    assert len(data) > 10_000
    for at in np.linspace(0, len(data) - 1, 60).astype(int):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            back = restore_state(tmp_path, LARGE)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(*map(jax.tree.leaves, (back, LARGE)), strict=True))
            found["unread"] += 1
        except ValueError as error:
            found["digest" if "leaf layer/w of 3 is damaged" in str(error) else "unreadable"] += 1
    print(f"60 flipped bytes: {found}")
    assert found["unread"] <= 6
    assert found["digest"] > 0


@pytest.mark.parametrize(("like", "match"), WRONG, ids=range(len(WRONG)))
def test_another_model_is_refused_before_anything_is_read(like, match, tmp_path):
    save_state(tmp_path, 1, SMALL)
    shutil.rmtree(tmp_path / "1" / "state")
    with pytest.raises(ValueError, match=f"checkpoint .*/1: .*{match}"):
        restore_state(tmp_path, like)


def test_an_older_checkpoint_is_there_when_the_newest_is_damaged(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, LARGE)
    truncate(tmp_path / "2")
    with pytest.raises(ValueError, match="take an older checkpoint"):
        restore_state(tmp_path, LARGE)
    verify(restore_state(tmp_path, LARGE, 1), manifest(LARGE))


def test_a_step_is_not_written_twice(tmp_path):
    save_state(tmp_path, 1, SMALL)
    with pytest.raises(ValueError, match="has a checkpoint 1 already: delete it, or save under a later step"):
        save_state(tmp_path, 1, SMALL)
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint 5 in .*: it has \[1\], ask for one of them"):
        restore_state(tmp_path, SMALL, 5)


def test_what_a_killed_save_left_is_in_nobodys_way(tmp_path):
    """Also what a version left that wrote as Orbax does, of the step that is saved."""
    save_state(tmp_path, 1, SMALL)
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / ".unfinished-dead" / "2").mkdir(parents=True)
    (tmp_path / ".unfinished-dead.lock").touch()
    (tmp_path / ".unfinished-not-begun.lock").touch()
    verify(restore_state(tmp_path, SMALL), manifest(SMALL))
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()  # a reader clears nothing away
    save_state(tmp_path, 2, SMALL)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    """The arrays of AdaMax's state lie as Adam's do; the manifest knows better, and says so before they are read."""
    w = {"w": jnp.ones(3)}
    state = {"opt": snr_adam.adamax(0.1).init(w)}
    save_state(tmp_path, 1, state)
    with pytest.raises(
        ValueError, match=r"moments of EMA/Infinity .* `like` is of EMA/RMS: restore it with the optimizer"
    ):
        restore_state(tmp_path, {"opt": snr_adam.adam(0.1).init(w)})
    assert restore_state(tmp_path, state)["opt"][0].made == "EMA/Infinity"


def test_a_manifest_that_does_not_say_what_made_the_state_is_taken(tmp_path, monkeypatch):
    """As those before it do not."""
    w = {"w": jnp.ones(3)}
    monkeypatch.setattr("snr_adam.state.files.marks", lambda state: [])
    save_state(tmp_path, 1, snr_adam.adam(0.1).init(w))
    monkeypatch.undo()
    assert restore_state(tmp_path, snr_adam.adam(0.1).init(w))[0].made == "EMA/RMS"


def test_who_saves_at_the_same_time_is_left_alone(tmp_path):
    """By this process, by another until it is killed, and where there are no locks."""
    other = "import sys; from snr_adam.state._savers import unfinished\nwith unfinished(sys.argv[1]): print(1); input()"
    (tmp_path / ".unfinished-without-lock").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", other, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "1\n"
        with unfinished(str(tmp_path)) as mine:
            before = {f.name for f in tmp_path.iterdir()}
            assert len(before) == 5
            assert pathlib.Path(mine).name in before
            save_state(tmp_path, 1, SMALL)
            assert {f.name for f in tmp_path.iterdir()} == {*before, "1"}
        process.kill()
    save_state(tmp_path, 2, SMALL)
    assert {f.name for f in tmp_path.iterdir()} == {"1", "2", ".unfinished-without-lock"}


def test_saves_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "lockf", refused)
    (tmp_path / ".unfinished-other").mkdir()
    save_state(tmp_path, 1, SMALL)
    verify(restore_state(tmp_path, SMALL), manifest(SMALL))
    assert {f.name for f in tmp_path.iterdir()} == {"1", ".unfinished-other"}


def test_of_two_that_save_one_step_one_wins(tmp_path):
    """And the loser is told, in words, after it has written all it had."""
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(save_state, tmp_path, 1, {"w": jnp.full(1000, k)}) for k in range(4)]
    told = [run.exception() for run in runs]
    won = [k for k, error in enumerate(told) if error is None]
    assert len(won) == 1
    assert all(re.search("has a checkpoint 1 already", str(error)) for error in told if error)
    verify(restore_state(tmp_path, {"w": jnp.zeros(1000, int)}), manifest({"w": jnp.full(1000, won[0])}))
    assert [f.name for f in tmp_path.iterdir()] == ["1"]


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
import snr_adam
try:
    __import__(sys.argv[2])
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [("orbax", "snr_adam.state.files", "files"), ("matplotlib", "snr_adam.telemetry.plots", "plots")],
)
def test_what_is_not_installed_is_named(package, module, extra):
    child = subprocess.run(
        [sys.executable, "-c", MISSING, package, module], capture_output=True, text=True, check=True, timeout=300
    )
    assert re.search(
        rf"{module} .* with {package}.*, which is not installed: pip install 'snr_adam\[{extra}\]'", child.stdout
    )


def test_a_reader_minds_nobody_who_deletes(tmp_path):
    """What is no checkpoint, or is being deleted, stands in the way of no other."""
    save_state(tmp_path, 3, SMALL)
    (tmp_path / "1" / "state").mkdir(parents=True)
    for name in ("-1", "03", "x", "4.orbax-checkpoint-tmp", "3 copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "5").write_text("a file")
    verify(restore_state(tmp_path, SMALL), manifest(SMALL))
    with pytest.raises(ValueError, match=r"checkpoint .*/1: its manifest is missing or damaged"):
        restore_state(tmp_path, SMALL, 1)
