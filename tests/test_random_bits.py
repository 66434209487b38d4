"""The random bits of stochastic rounding: uniform, independent, and a function of (step, leaf, index) alone."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from cases import fast_jit, quick_jit
from jax.sharding import NamedSharding, PartitionSpec
from scipy.stats import chi2

import snr_adam
from snr_adam._bits import random_bits, round_to, seeds_at, word_of

DRAWS = 1 << 22
LEAST = 1e-5  # p-values; some 300 are looked at
STORAGES = ("packed", "bfloat16")


def _drawn(count, shape, leaf=0, stream=0):
    return random_bits(shape, stream, seeds_at(count, leaf + 1)[leaf])


_draw = fast_jit(_drawn, static_argnames=("shape", "leaf", "stream"))


def _bits(count=1, leaf=0, stream=0):
    return _draw(jnp.int32(count), (DRAWS // 2048, 2048), leaf, stream).ravel()


def _p(observed, expected):
    """p-value of counts against expected counts, all cells free but for their sum; over the last axis."""
    observed = np.asarray(observed, float)
    return chi2.sf(np.sum((observed - expected) ** 2 / expected, -1), observed.shape[-1] - 1)


@fast_jit
def _tables(x, y):
    """For each of the 32 bits the 2 x 2 counts of that bit in x and in y: (32, 4)."""

    def one(k):
        a, b = (x >> k) & 1, (y >> k) & 1
        both, left, right = (jnp.sum(c.astype(jnp.int32)) for c in (a & b, a & ~b, b & ~a))
        return jnp.stack([x.size - both - left - right, left, right, both])

    return jax.lax.map(one, jnp.arange(32, dtype=jnp.uint32))


@fast_jit
def _joint(x, y):
    """How often each of the 256 pairs of the leading 4 bits of x and y occurs."""
    return jnp.bincount(((x >> 28) << 4 | (y >> 28)).astype(jnp.int32), length=256)


@pytest.mark.parametrize(("count", "leaf", "stream"), [(1, 0, 0), (2, 7, 1), (1_000_000, 299, 3), (2**31 - 1, 0, 0)])
def test_every_bit_is_fair(count, leaf, stream):
    x = _bits(count, leaf, stream)
    ones = _tables(x, x)[:, 3]
    p = _p(np.stack([ones, DRAWS - ones], -1), DRAWS / 2)
    print(f"bits fair, step {count}, leaf {leaf}: least p = {p.min():.2g}")
    assert p.shape == (32,)
    assert p.min() > LEAST
    bytes_ = _p(np.stack([np.bincount((x >> k) & 255, minlength=256) for k in (0, 8, 16, 24)]), DRAWS / 256)
    assert bytes_.min() > LEAST


def _neighbours(distance):
    x = _bits()
    return x[:-distance], x[distance:]


PAIRS = {
    "neighbours": lambda: _neighbours(1),
    "rows": lambda: _neighbours(2048),
    "half an array apart": lambda: _neighbours(DRAWS // 2),
    "consecutive steps": lambda: (_bits(1), _bits(2)),
    "neighbours of consecutive steps": lambda: (_bits(1)[1:], _bits(2)[:-1]),
    "leaves": lambda: (_bits(leaf=0), _bits(leaf=1)),
    "leaves at consecutive steps": lambda: (_bits(1, leaf=1), _bits(2, leaf=0)),
    "streams": lambda: (_bits(stream=0), _bits(stream=1)),
    "the halves of a word": lambda: (_bits() << 16, _bits() & jnp.uint32(0xFFFF0000)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_are_independent(pair):
    """Bit by bit, all 32, and the leading four bits jointly."""
    x, y = PAIRS[pair]()
    each = _tables(x, y)
    p = _p(each[16:] if pair == "the halves of a word" else each, x.size / 4)
    joint = _p(_joint(x, y), x.size / 256)
    print(f"{pair}: least p of the bits {p.min():.2g}, p of the leading four {joint:.2g}")
    assert min(p.min(), joint) > LEAST


def test_bits_differ_between_steps_and_leaves():
    """No (step, leaf, stream) of a small run repeats another's sequence, shifted or not."""
    streams = [(stream, leaf) for stream in range(4) for leaf in range(20)]
    one = jax.vmap(
        lambda t: jnp.stack([random_bits((), stream, seeds_at(t, leaf + 1)[leaf]) for stream, leaf in streams])
    )
    seen = quick_jit(one)(jnp.arange(100))
    assert len(np.unique(seen)) > seen.size - 5  # 8,000 words of 2^32: 0.007 collisions expected
    steps = np.stack([_draw(jnp.int32(t), (4096,)) for t in range(1, 9)])
    assert len(np.unique(steps)) > steps.size - 5
    np.testing.assert_array_equal(steps[0].reshape(64, 64), _draw(jnp.int32(1), (64, 64)))


# rounding: the mean of 1e5 draws, for every exponent


def _up(words, rounded, dropped):
    """How often words were rounded up, in standard errors from what makes the mean exact; (cases, draws) -> (cases,)"""
    low = words & ((1 << dropped) - 1)
    up = np.asarray(rounded != (words - low)[:, None]).sum(1)
    assert np.all((rounded == (words - low)[:, None]) | (rounded == (words - low + (1 << dropped))[:, None]))
    n, p = rounded.shape[1], low / 2.0**dropped
    return (up - n * p) / np.sqrt(n * p * (1 - p))


def _words(first, last, dropped):
    """One number of every exponent of float32 in [first, last], with a third to two thirds of a unit to round off."""
    rng = np.random.default_rng(0)
    mantissa = rng.integers(0, 2 ** (23 - dropped), last - first + 1) << dropped
    low = rng.integers(2**dropped // 3, 2 * 2**dropped // 3, last - first + 1)
    return (np.arange(first, last + 1) << 23 | mantissa | low).astype("uint32")


def _cast(dtype):
    def rounded(x, bits):
        return word_of(round_to(dtype, x, bits).astype(jnp.float32))

    return rounded


def _packed(half):
    def rounded(x, bits):
        stored = snr_adam.parts.Packed().encode(x, x, lambda *_: bits)
        return word_of(snr_adam.parts.Packed().decode(*stored, jnp.float32)[half])

    return rounded


@pytest.mark.parametrize(
    ("rounded", "dropped", "first", "last"),
    [
        pytest.param(_cast("bfloat16"), 16, 1, 254, id="bfloat16"),
        pytest.param(_cast("float16"), 13, 127 - 14, 127 + 15, id="float16"),
        pytest.param(_packed(0), 16, 1, 254, id="packed signal"),
        pytest.param(_packed(1), 15, 1, 254, id="packed noise"),
    ],
)
def test_the_mean_of_rounding_is_exact(rounded, dropped, first, last):
    """Within 5 standard errors at every exponent, both neighbours occur, and nothing else does."""
    words, draws = _words(first, last, dropped), 100_000

    @jax.jit
    def round_all(words):
        shape = (len(words), draws)
        bits = _drawn(jnp.int32(1), shape)
        return rounded(jax.lax.bitcast_convert_type(jnp.broadcast_to(words[:, None], shape), jnp.float32), bits)

    z = np.concatenate([_up(part, np.asarray(round_all(part)), dropped) for part in np.array_split(words, 2)])
    print(f"{len(z)} exponents: largest deviation {abs(z).max():.2f}, their RMS {np.sqrt(np.mean(z**2)):.2f} s.e.")
    assert abs(z).max() < 5.0
    assert 0.5 < np.sqrt(np.mean(z**2)) < 1.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_keeps_what_the_dtype_holds(dtype):
    """All 2^16 numbers of the dtype, whatever the random bits; NaN stays NaN."""
    codes = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    x = jnp.asarray(codes).astype(jnp.float32)
    for bits in (0, 0xFFFFFFFF, 0xFFFF, 0x8000):
        got = np.asarray(round_to(dtype, x, jnp.full(x.shape, bits, jnp.uint32)))
        np.testing.assert_array_equal(got.astype("f4"), codes.astype("f4"))


CODES = np.arange(2**16, dtype=np.uint32)


@pytest.mark.parametrize(
    "bits",
    [0, 0xFFFFFFFF, 0xFFFF, 0xFFFE0000, 0x8000, 0x80000000, "random"],
    ids=lambda b: b if b == "random" else hex(b),
)
@pytest.mark.parametrize("half", ["signal", "noise"])
def test_every_code_encodes_to_itself(half, bits):
    """decode, then encode: the same word, for all 2^16 codes of each half beside any code of the other."""
    other = np.random.default_rng(0).permutation(CODES)
    words = jnp.asarray(CODES << 16 | other if half == "signal" else other << 16 | CODES)

    def dither(shape, stream):
        return _drawn(jnp.int32(1), shape) if bits == "random" else jnp.full(shape, bits, jnp.uint32)

    packed = snr_adam.parts.Packed()
    decode = jax.jit(lambda words: packed.decode(words, (), jnp.float32))
    encode = jax.jit(lambda m, v: packed.encode(m, v, dither)[0])
    m, v = decode(words)
    assert not np.any(np.signbit(v))
    np.testing.assert_array_equal(encode(m, v), words)
    values = np.asarray(m if half == "signal" else v)
    assert len(np.unique(values.view("uint32"))) == 2**16  # no two codes mean the same number


# the same bits wherever and however the step runs

# Eight columns to a shard at least: with six, jax 0.12 compiles two of 6,144 words with another contraction.
SHAPE, STEPS = (64, 64), 12


def _tx(storage):
    return snr_adam.adamw(0.1, weight_decay=0.1, storage=storage)


@functools.cache
def _problem():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=SHAPE).astype("f4") for name in "ab"}
    return params, [{name: rng.normal(size=SHAPE).astype("f4") for name in "ab"} for _ in range(STEPS)]


@functools.cache
def _step(storage):
    @jax.jit
    def step(params, state, grads):
        updates, state = _tx(storage).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _loop(storage, params, state, gradients):
    for grads in gradients:
        params, state = _step(storage)(params, state, grads)
    return params, state


@functools.cache
def _reference(storage):
    params, gradients = _problem()
    return jax.device_get(_loop(storage, params, _tx(storage).init(params), gradients))


def _assert_same(got, want):
    got = jax.device_get(got)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes())


@pytest.mark.parametrize(("devices", "spec"), [(1, ("x",)), (2, (None, "x")), (8, ("x",)), (8, (None, "x"))])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_on_any_number_of_devices(storage, devices, spec):
    split = NamedSharding(jax.make_mesh((devices,), ("x",)), PartitionSpec(*spec))
    params, gradients = jax.device_put(_problem(), split)
    params, state = _loop(storage, params, _tx(storage).init(params), gradients)
    assert len(params["a"].sharding.device_set) == devices
    _assert_same((params, state), _reference(storage))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_in_a_scan(storage):
    params, gradients = _problem()
    stacked = jax.tree.map(lambda *each: np.stack(each), *gradients)
    scan = jax.jit(lambda *carry: jax.lax.scan(lambda c, g: (_step(storage)(*c, g), None), carry, stacked)[0])
    _assert_same(scan(params, _tx(storage).init(params)), _reference(storage))


def _pickled(tree, path):
    return pickle.loads(pickle.dumps(jax.device_get(tree)))


def _through_orbax(tree, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", tree)


@pytest.mark.parametrize("saved", [_pickled, _through_orbax])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_after_a_checkpoint(storage, saved, tmp_path):
    params, gradients = _problem()
    half = _loop(storage, params, _tx(storage).init(params), gradients[: STEPS // 2])
    restored = saved(half, tmp_path)
    assert restored[1][0].mu["a"] is not half[1][0].mu["a"]
    _assert_same(_loop(storage, *restored, gradients[STEPS // 2 :]), _reference(storage))


@pytest.mark.parametrize("storage", STORAGES)
def test_equal_leaves_are_rounded_by_different_bits(storage):
    """Two leaves with the same gradients part: bits that only saw the index would round both alike."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=4096), "float32")
    tx = snr_adam.adam(0.1, storage=storage)
    _, state = tx.update({"a": g, "b": g}, tx.init({"a": g, "b": g}))
    differ = np.mean(state[0].mu["a"] != state[0].mu["b"])
    # |frac_a - frac_b| of a unit: two uniform thresholds fall on different sides with probability 1/3
    assert differ > 0.3 - 5 * math.sqrt(0.25 / g.size)
