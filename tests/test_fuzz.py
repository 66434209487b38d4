"""Random trees, dtypes and options against a plain recursion in 64 bits; random values against what holds for all.

`pytest tests/test_fuzz.py --fuzz 2000` draws 2,000 examples of each, other ones every time.
"""

import inspect

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import snr_adam

RATES = np.float32(2.0) ** -np.arange(3, 10, dtype="float32")  # a schedule without rounding
STEPS = 7  # RAdam with b2 = .9 rectifies from step 6 on
SHAPES = ((), (1,), (3,), (2, 3), (0, 2))
# dtype of parameters and gradients -> relative error of an update in it, and decades of gradients it can hold
DTYPES = {
    "float32": (2.0**-24, 3),
    "bfloat16": (2.0**-8, 3),
    "float16": (2.0**-11, 1),
    "complex64": (2.0**-23, 3),
    "float64": (2.0**-53, 3),
    "complex128": (2.0**-52, 3),
}
NOT_PACKED = ("amsgrad", "ademamix", "rmsprop", "lion")
# a sign or a difference of nearly equal numbers turns the error of a narrow moment into any error
NOT_NARROW = ("lion", "yogi", "adabelief", "centered_adam")
VALUES = {
    "b1": st.sampled_from([0.0, 0.5, 0.9, 0.95]),
    "b2": st.sampled_from([0.9, 0.99, 0.999, 0.9999]),
    "b3": st.sampled_from([0.99, 0.9999]),
    "b": st.sampled_from([0.5, 0.95]),
    "decay": st.sampled_from([0.9, 0.99]),
    "alpha": st.sampled_from([0.0, 5.0]),
    "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
    "eps_root": st.sampled_from([0.0, 1e-6, 1.0]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "nesterov": st.booleans(),
    "centered": st.booleans(),
    "eps_in_sqrt": st.booleans(),
    "use_clipping": st.booleans(),
}


@pytest.fixture
def examples(request):
    """The settings of a run: a few examples, always the same, or as many new ones as --fuzz asks for."""
    number = request.config.getoption("--fuzz")
    return settings(
        max_examples=number or 20,
        derandomize=not number,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def trees(dtypes):
    """Nested containers of (shape, dtype), with None among the leaves."""
    leaf = st.none() | st.tuples(st.sampled_from(SHAPES), st.sampled_from(dtypes)).map(lambda x: Leaf(*x))
    inside = st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        ),
        max_leaves=5,
    )
    return st.fixed_dictionaries({"root": inside})  # None alone would be no parameters at all


class Leaf:
    """A leaf to be: no tuple, which would be a tree of its own."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype

    def __repr__(self):
        return f"{self.dtype}{self.shape}"

    def draw(self, rng):
        """Normal numbers of one scale, as NumPy array."""
        scale = 10 ** rng.uniform(-1, 1, 1) ** DTYPES[self.dtype][1]
        x = rng.normal(size=self.shape) + (1j * rng.normal(size=self.shape) if "complex" in self.dtype else 0)
        return np.asarray(x * scale[0]).astype(self.dtype)


@st.composite
def problems(draw):
    """A preset with options, its storage, a learning rate, a tree of leaves and a seed."""
    name, wide = draw(st.sampled_from(list(oracle.FAMILY))), draw(st.booleans())
    known = inspect.signature(cases.PRESETS[name][0]).parameters
    options = {key: draw(values) for key, values in VALUES.items() if key in known}
    if name == "rmsprop":
        options["nesterov"] = False  # it needs a momentum
    shape = draw(trees([d for d in DTYPES if wide or d not in ("float64", "complex128")]))
    storages = ["float32"]
    if name not in NOT_NARROW and not options.get("centered"):
        storages.append("bfloat16")
        if name not in NOT_PACKED and not any("complex" in x.dtype for x in jax.tree.leaves(shape)):
            storages.append("packed")
    mask = draw(st.booleans()) if "mask" in known else None
    scheduled = draw(st.booleans())
    return name, options, draw(st.sampled_from(storages)), mask, scheduled, wide, shape, draw(st.integers(0, 2**31))


def _mask(params):
    return jax.tree.map(lambda p: np.ndim(p) == 0, params)


def _updates(tx, params, grads):
    """The update of every step, for constant parameters, and the states before and after."""
    update = jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})
    before = state = tx.init(params)
    found = []
    for g in grads:
        u, state = update(g, state, params)
        found.append(u)
    return found, before, state


def check_problem(problem):
    """The updates are those of the recursion, as near as dtype and storage allow; types are kept."""
    name, options, storage, mask, scheduled, wide, shape, seed = problem
    rng = np.random.default_rng(seed)
    with jax.enable_x64(wide):
        params = jax.tree.map(lambda leaf: leaf.draw(rng), shape)
        grads = [jax.tree.map(lambda leaf: leaf.draw(rng), shape) for _ in range(STEPS)]
        rate = (lambda t: jnp.asarray(RATES)[t]) if scheduled else 0.1
        extra = {} if mask is None else {"mask": _mask if mask else None}
        tx = cases.PRESETS[name][0](rate, **options, **extra, storage=storage)
        found, before, after = _updates(tx, jax.tree.map(jnp.asarray, params), grads)
        chex.assert_trees_all_equal_structs(before, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(found[0], params)
        alpha = (lambda t: float(RATES[t])) if scheduled else (lambda t: 0.1)
        known = {**oracle.COMMON, **_defaults(name), **options}
        for i, p in enumerate(jax.tree.leaves(params)):
            decay = known.get("weight_decay", 0.0) if not mask or p.ndim == 0 else 0.0
            want = oracle.updates(name, known, alpha, decay, p, [jax.tree.leaves(g)[i] for g in grads])
            for t, (u, v) in enumerate(zip([jax.tree.leaves(u)[i] for u in found], want, strict=True)):
                _compare(np.asarray(u), v, alpha(t), storage)


def _defaults(name):
    found = {k: p.default for k, p in inspect.signature(cases.PRESETS[name][0]).parameters.items()}
    return {k: x for k, x in found.items() if isinstance(x, (bool, float))}


def _compare(u, want, alpha, storage):
    own = DTYPES[u.dtype.name][0]
    size = max(abs(want).max(initial=0.0), alpha)
    computed = {"float32": 1e-9 if own < 2.0**-50 else 2e-5}.get(storage, 0.15)
    least = 1e-7 if u.dtype == np.float16 else 0.0
    if u.dtype == np.float16 and size > 6e4:
        return
    np.testing.assert_allclose(u.astype(want.dtype), want, rtol=2 * own, atol=computed * size + least)


def test_random_problems_are_solved_as_by_the_recursion(examples):
    examples(given(problems())(check_problem))()


WIDTH = 8
PROPERTIES = [(name, "float32") for name in cases.PRESETS] + [("adamw", "packed"), ("adamw", "bfloat16")]
NUMBER = (
    st.floats(-(2.0**60), 2.0**60, width=32)
    | st.floats(-(2.0**-60), 2.0**-60, width=32)
    | st.floats(-10.0, 10.0, width=32)
)


@pytest.mark.parametrize(("name", "storage"), PROPERTIES)
def test_whatever_is_finite_stays_finite(name, storage, examples):
    """Gradients from subnormal to 2^60, also next to one another: updates are finite, the count counts, and gradients
    of the other sign give the same update with the other sign."""
    tx = cases.PRESETS[name][0](0.1, storage=storage)
    params = jnp.zeros(WIDTH)

    @jax.jit
    def run(grads):
        def step(state, g):
            u, state = tx.update(g, state, params)
            return state, u

        return jax.lax.scan(step, tx.init(params), grads)

    @given(st.lists(NUMBER, min_size=3 * WIDTH, max_size=3 * WIDTH))
    def check(numbers):
        grads = jnp.asarray(numbers, jnp.float32).reshape(3, WIDTH)
        state, updates = run(grads)
        chex.assert_tree_all_finite((state[0].mu, state[0].nu, updates))
        assert state[0].count == 3
        if name != "yogi":  # starts at +1e-6
            chex.assert_trees_all_equal(run(-grads)[1], -updates)

    examples(check)()


def test_a_packed_word_holds_any_pair_of_moments(examples):
    """Decoded, both are within one step of their formats, of the right sign, and zero only below the normal numbers."""
    encode = jax.jit(lambda m, v, bits: snr_adam.parts.Packed().encode(m, v, lambda *_: bits)[0])
    decode = jax.jit(lambda w: snr_adam.parts.Packed().decode(w, (), jnp.float32))
    tiny = float(jnp.finfo("float32").tiny)

    @given(
        st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=WIDTH, max_size=WIDTH),
        st.lists(st.floats(0.0, 2.0**126, width=32), min_size=WIDTH, max_size=WIDTH),
        st.integers(0, 2**32 - 1),
    )
    def check(m, v, bits):
        m, v = np.float32(m), np.float32(v)
        got_m, got_v = map(np.asarray, decode(encode(m, v, np.full(WIDTH, bits, np.uint32))))
        np.testing.assert_allclose(got_m, m, rtol=2.0**-7, atol=tiny)
        np.testing.assert_allclose(got_v, v, rtol=2.0**-8, atol=tiny)
        assert np.all((np.sign(got_m) == np.sign(m)) | (abs(m) < tiny) | (got_m == 0))
        assert np.all((got_v > 0) | (v < tiny))

    examples(check)()
