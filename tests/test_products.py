"""Random products: two or three wrappers around any preset in any storage, on any leaves, against 64-bit recursions.

Each wrapper has a twin of a few lines in NumPy, the innermost is the family of `oracle.py`; a product of wrappers is
the same product of their twins. Every update of a run is compared, jitted step by step, in a scan, or mapped over two.

    pytest tests/test_products.py --fuzz-seconds 3600         an hour of new products; --fuzz-from N begins at the Nth
"""

import inspect
import time
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from test_fuzz import NOT_NARROW, NOT_PACKED

import snr_adam
from snr_adam._tree import nodes
from snr_adam.precision import CarryRemainderState, whole_weights

DEFAULT = 16  # products of the default run
STEPS = 7
RATE = 0.0625
SHAPES = ((), (1,), (3,), (2, 3), (0, 2))
# relative rounding error of a number
DTYPES = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11, "complex64": 2.0**-23, "float64": 2.0**-53}
SKIPS, WINDOWS = ("guard", "clip", "apply_if_finite"), ("accumulate", "MultiSteps")
LABELS = ("on", "off")


VALUES: dict[str, list] = {
    "b1": [0.0, 0.5, 0.9, 0.95],
    "b2": [0.9, 0.99, 0.999, 0.9999],
    "b3": [0.99, 0.9999],
    "b": [0.5, 0.95],
    "decay": [0.9, 0.99],
    "alpha": [0.0, 5.0],
    "eps": [1e-8, 1e-3, 1.0],
    "eps_root": [0.0, 1e-6, 1.0],
    "weight_decay": [0.0, 0.1],
    "nesterov": [False, True],
    "centered": [False, True],
    "eps_in_sqrt": [False, True],
    "use_clipping": [False, True],
}


class Product(NamedTuple):
    """What is drawn: wrappers, the outermost first; dtypes of the leaves, None for a frozen one."""

    wrappers: tuple
    preset: str
    options: dict
    storage: str
    shapes: tuple
    dtypes: tuple
    on: tuple  # which leaves `masked` and `partition` let through
    without_gradient: tuple
    bad: int  # the step with a NaN, -1 for none
    loop: str
    wide: bool


def choice(rng, items):
    return items[rng.integers(len(items))]


def draw(seed: int) -> Product:
    """A product that is allowed: those that are refused are rows of `test_never_silent.py`."""
    rng = np.random.default_rng(seed)
    wrappers = tuple(rng.permutation(list(WRAPPERS))[: rng.integers(2, 4)].tolist())
    if "observe" in wrappers:  # whole batches reach it
        wrappers = tuple(sorted(wrappers, key=lambda name: name not in WINDOWS))
    if "carry_remainder" in wrappers:  # nothing changes its updates, nor wants them in 16 bits
        wrappers = ("carry_remainder", *(x for x in wrappers if x != "carry_remainder"))
        if "observe" in wrappers:
            wrappers = tuple(x for x in wrappers if x not in WINDOWS)
    wide, name = bool(rng.integers(4) == 0), choice(rng, list(oracle.FAMILY))
    known = inspect.signature(cases.PRESETS[name][0]).parameters
    options = {key: choice(rng, items) for key, items in VALUES.items() if key in known}
    if name == "rmsprop":
        options.pop("nesterov", None)  # it needs a momentum
    if name == "adabelief" and options["b1"] == 0:
        options["b1"] = 0.5  # with 0 it divides by what rounding leaves of g - g
    dtypes = [d for d in DTYPES if wide or d != "float64"]
    if "MultiSteps" in wrappers:  # Optax's forgets the imaginary part of all gradients of a window but the last
        dtypes.remove("complex64")
    leaves = [choice(rng, dtypes) for _ in range(rng.integers(1, 5))]
    storages = ["float32"]
    if name not in (*NOT_NARROW, "lamb") and not options.get("centered"):  # LAMB makes a sign of a scalar's step
        storages.append("bfloat16")
        if name not in NOT_PACKED and "complex64" not in leaves:
            storages.append("packed")
    on = (True, *(bool(rng.integers(2)) for _ in leaves))
    # Optax's windows and `observe` want the gradients that there were parameters for
    every = "MultiSteps" in wrappers or "observe" in wrappers
    without = tuple(bool(i and not every and rng.integers(5) == 0) for i in range(len(leaves)))
    skips = any(x in SKIPS for x in wrappers) and "MultiSteps" not in wrappers
    bad = int(rng.integers(STEPS)) if skips and rng.integers(2) else -1
    shapes = tuple(choice(rng, SHAPES) for _ in leaves)
    if name == "rmsprop":  # keeps no first moment to observe
        wrappers = tuple(x for x in wrappers if x != "observe")
    return Product(
        wrappers,
        name,
        options,
        choice(rng, storages),
        shapes,
        tuple(leaves),
        on[: len(leaves)],
        without,
        bad,
        choice(rng, ("jit", "scan", "vmap")),
        wide,
    )


# --- the twins: step(gradients, parameters) -> updates, lists with None for a leaf that has none --------------------


class Core:
    """The family, each array by itself."""

    def __init__(self, product: Product):
        self.name = product.preset
        self.options = {**oracle.COMMON, **defaults(self.name), **product.options}
        self.memory: list[dict] = [{} for _ in product.dtypes]
        self.t = 0

    def step(self, grads, params):
        self.t += 1
        return [self.update(*each) for each in zip(grads, params, self.memory, strict=True)]

    def update(self, g, p, memory):
        if g is None:
            return None
        with np.errstate(all="ignore"):
            signal, noise = oracle.FAMILY[self.name](self.options, memory, g, self.t)
            u = signal / noise + self.options.get("weight_decay", 0.0) * p
            if self.name == "lamb":
                sizes = np.linalg.norm(np.ravel(p)), np.linalg.norm(np.ravel(u))
                u = u * (sizes[0] / sizes[1] if min(sizes) > 0 else 1.0)
            return -RATE * u


def defaults(name):
    found = {k: p.default for k, p in inspect.signature(cases.PRESETS[name][0]).parameters.items()}
    return {k: x for k, x in found.items() if isinstance(x, (bool, float))}


def zeros(grads):
    return [None if g is None else 0 * np.nan_to_num(g) for g in grads]


class Same:
    def __init__(self, inner):
        self.inner = inner

    def step(self, grads, params):
        return self.inner.step(grads, params)


class Skip(Same):
    """No step where a gradient is not finite."""

    clip = np.inf

    def step(self, grads, params):
        there = [g for g in grads if g is not None]
        if not all(np.all(np.isfinite(g)) for g in there):
            return zeros(grads)
        norm = np.sqrt(sum(np.sum(np.abs(g) ** 2) for g in there))
        scale = min(1.0, self.clip / norm) if norm else 1.0
        return self.inner.step([None if g is None else g * scale for g in grads], params)


class Clip(Skip):
    clip = 1.5


class Window(Same):
    """One step for two gradients, of their mean."""

    def __init__(self, inner):
        self.inner, self.sum = inner, None

    def step(self, grads, params):
        if self.sum is None:
            self.sum = grads
            return zeros(grads)
        mean = [None if g is None else (s + g) / 2 for s, g in zip(self.sum, grads, strict=True)]
        self.sum = None
        return self.inner.step(mean, params)


class Masked(Same):
    """Leaves that are masked pass through; under partition they stand still."""

    still = False

    def __init__(self, inner, on):
        self.inner, self.on = inner, on

    def step(self, grads, params):
        inside = self.inner.step([g if on else None for g, on in zip(grads, self.on, strict=True)], params)
        outside = zeros(grads) if self.still else grads
        return [u if on else g for u, g, on in zip(inside, outside, self.on, strict=True)]


class Parted(Masked):
    still = True


def tree(leaves):
    """A list of leaves as the tree that the optimizer sees."""
    return {f"leaf {i}": x for i, x in enumerate(leaves)}


def user(tx):
    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


# name -> the wrapper, given a product, and its twin
WRAPPERS: dict[str, Any] = {
    "guard": (lambda tx, _: snr_adam.guard(tx), lambda inner, _: Skip(inner)),
    "clip": (lambda tx, _: snr_adam.guard(tx, clip_norm=1.5), lambda inner, _: Clip(inner)),
    "observe": (lambda tx, _: snr_adam.observe(tx), lambda inner, _: Same(inner)),
    "carry_remainder": (lambda tx, _: snr_adam.carry_remainder(tx), lambda inner, _: Same(inner)),
    "accumulate": (lambda tx, _: snr_adam.accumulate(tx, 2), lambda inner, _: Window(inner)),
    "MultiSteps": (
        lambda tx, _: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda inner, _: Window(inner),
    ),
    "apply_if_finite": (lambda tx, _: optax.apply_if_finite(tx, 5), lambda inner, _: Skip(inner)),
    "chain": (lambda tx, _: optax.chain(optax.identity(), tx), lambda inner, _: Same(inner)),
    "masked": (lambda tx, p: optax.masked(tx, tree(p.on)), lambda inner, p: Masked(inner, p.on)),
    "partition": (
        lambda tx, p: optax.partition(
            {"on": tx, "off": optax.set_to_zero()}, tree("on" if on else "off" for on in p.on)
        ),
        lambda inner, p: Parted(inner, p.on),
    ),
    "user's": (lambda tx, _: user(tx), lambda inner, _: Same(inner)),
}


def built(product: Product):
    """The optimizer and its twin."""
    tx = cases.PRESETS[product.preset][0](RATE, **product.options, storage=product.storage)
    twin: Any = Core(product)
    for name in reversed(product.wrappers):
        wrap, pair = WRAPPERS[name]
        tx, twin = wrap(tx, product), pair(twin, product)
    return tx, twin


def values(product: Product, seed: int):
    """Parameters and one list of gradients per step, in NumPy; None where there are none."""
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype):
        x = rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0)
        return np.asarray(x, dtype)

    params = [leaf(*each) for each in zip(product.shapes, product.dtypes, strict=True)]
    grads = []
    for t in range(STEPS):
        size = np.exp(0.5 * rng.normal())
        row = [
            np.asarray(size * leaf(*each)).astype(each[1]) for each in zip(product.shapes, product.dtypes, strict=True)
        ]
        if t == product.bad and row[0].size:
            row[0] = np.full_like(row[0], np.nan)
        grads.append([None if none else g for g, none in zip(row, product.without_gradient, strict=True)])
    return params, grads


def run(tx, params, grads, loop: str):
    """For every step the updates, and the parameters before and after it (whole ones where there are remainders)."""

    def step(carry, g):
        params, state = carry
        before = wholes(params, state)
        u, state = tx.update(g, state, params)
        params = jax.tree.map(
            lambda p, u: p if u is None else optax.apply_updates(p, u), params, u, is_leaf=lambda x: x is None
        )
        return (params, state), (u, before, wholes(params, state))

    params, rows = tree(map(jnp.asarray, params)), [tree(g) for g in grads]
    options = {"xla_backend_optimization_level": 0}
    if loop == "jit":
        once, carry, found = jax.jit(step, compiler_options=options), (params, tx.init(params)), []
        for g in rows:
            carry, out = once(carry, g)
            found.append(out)
        return jax.device_get(found)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

    def scan(grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    if loop == "vmap":  # beside a run of other gradients, which is not looked at
        both = jax.tree.map(lambda g: jnp.stack([g, -2 * g]), stacked)
        out = jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(scan), compiler_options=options)(both))
    else:
        out = jax.jit(scan, compiler_options=options)(stacked)
    return [jax.tree.map(lambda x, t=t: np.asarray(x[t]), out) for t in range(STEPS)]


def wholes(params, state):
    found = nodes(CarryRemainderState, state)
    return whole_weights(params, found[0]) if found else params


def listed(made, number: int) -> list:
    return [made[f"leaf {i}"] for i in range(number)]


def tolerance(product: Product, dtype: str) -> tuple[float, float]:
    """Relative to the numbers themselves, and to the largest or a learning rate."""
    own = DTYPES[dtype]
    if "carry_remainder" in product.wrappers and dtype in ("bfloat16", "float16"):
        own = 2.0**-13  # differences of float32 weights, and of float16 ones under its normal numbers
    exact = dtype == "float64" and not {"clip", "MultiSteps"} & set(product.wrappers)  # which sum in float32
    near = 2e-4 if product.options.get("centered") else 2e-5  # a variance that is small beside the square
    inside = {"float32": 1e-9 if exact else near}.get(product.storage, 0.15)
    # gradients that are scaled or averaged outside of the step come to it in their own dtype
    outside = bool(set(product.wrappers) & set(WINDOWS)) or len(set(product.wrappers) & set(IN_BETWEEN)) > 1
    narrow = dtype in ("bfloat16", "float16") and "carry_remainder" not in product.wrappers
    passed = 16 * DTYPES[dtype] if narrow and outside else 0
    if outside and "clip" in product.wrappers:  # and through the norm to all leaves
        passed = 16 * max(map(DTYPES.__getitem__, product.dtypes))
    return 4 * own, inside + passed + (4e-4 if own == 2.0**-13 else 0)


IN_BETWEEN = ("guard", "clip", "accumulate", "MultiSteps", "apply_if_finite", "masked", "partition")


def check(seed: int) -> None:
    product = draw(seed)
    with jax.enable_x64(product.wide):
        tx, twin = built(product)
        params, grads = values(product, seed)
        found = run(tx, params, grads, product.loop)
        number, wide = len(params), {"c": np.complex128}
        for t, (row, (u, before, after)) in enumerate(zip(grads, found, strict=True)):
            ps = [p.astype(wide.get(p.dtype.kind, np.float64)) for p in listed(before, number)]
            gs = [None if g is None else g.astype(wide.get(g.dtype.kind, np.float64)) for g in row]
            want = twin.step(gs, ps)
            got, ends = listed(u, number), listed(after, number)
            for i, dtype in enumerate(product.dtypes):
                where = f"seed {seed}, step {t}, leaf {i}: {product}"
                if want[i] is None:
                    assert got[i] is None, where
                    continue
                moved = np.asarray(got[i])
                if "carry_remainder" in product.wrappers and dtype in ("bfloat16", "float16"):
                    moved = np.asarray(ends[i], np.float64) - ps[i]
                if dtype == "float16" and np.abs(want[i]).max(initial=0.0) > 6e4:
                    return  # infinite from here on
                rtol, atol = tolerance(product, dtype)
                size = max(np.abs(want[i]).max(initial=0.0), RATE)
                size = (
                    max(size, np.abs(ps[i]).max(initial=0.0))
                    if moved.dtype == np.float64 and dtype != "float64"
                    else size
                )
                np.testing.assert_allclose(
                    moved.astype(want[i].dtype), want[i], rtol=rtol, atol=atol * size, err_msg=where
                )


def test_products(request):
    """A few, always the same; or as many new ones as the time allows."""
    seconds, first = (request.config.getoption(name) for name in ("--fuzz-seconds", "--fuzz-from"))
    if not seconds:
        for seed in range(first, first + DEFAULT):
            check(seed)
        return
    end, seed = time.monotonic() + seconds, first or time.time_ns() % 10**9
    while time.monotonic() < end:
        check(seed)
        seed += 1
        if seed % 50 == 0:
            jax.clear_caches()


@pytest.mark.slow
def test_every_wrapper_preset_and_storage_is_drawn():
    drawn = [draw(seed) for seed in range(300)]
    assert {x for p in drawn for x in p.wrappers} == set(WRAPPERS)
    assert {p.preset for p in drawn} == set(oracle.FAMILY)
    assert {p.storage for p in drawn} == {"float32", "bfloat16", "packed"}
    assert {d for p in drawn for d in p.dtypes} == set(DTYPES)
    assert {p.loop for p in drawn} == {"jit", "scan", "vmap"}
    assert any(p.bad >= 0 for p in drawn)
