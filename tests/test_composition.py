"""Inside Optax's combinators every preset stays what it is, and what is passed as an array never recompiles."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from cases import PRESETS, quick_jit

import snr_adam

STEPS = 4
# between them: one tree in mu and nu, two in either, none, a division before the signal, weights in the update
SOME = ("adamw", "amsgrad", "ademamix", "rmsprop", "lion", "adopt", "lamb")


def _make(name, **options):
    return PRESETS[name][0](0.01, **options)


def _draw(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=3), dtype),
        "b": [jnp.asarray(rng.normal(), dtype), jnp.zeros((0,), dtype)],
    }


def _gradients(steps=STEPS, dtype="float32"):
    return [_draw(100 + t, dtype) for t in range(steps)]


def _run(tx, grads, dtype="float32"):
    """The update of every step and the last state; not compiled as a whole, which would take longer than it runs."""
    params = _draw(0, dtype)
    state, all_updates = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return all_updates, state


def _compiled(tx):
    """`tx` with its update compiled as one program: quicker where it holds a `lax.cond`."""
    return optax.GradientTransformationExtraArgs(tx.init, quick_jit(tx.update))


def _assert_close(got, want, rtol=1e-5, atol=1e-9):
    def check(x, y):
        x, y = (np.asarray(v, "float32") for v in (x, y))
        assert np.all(np.isfinite(x))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)

    jax.tree.map(check, got, want)


def _scaled(by, tree):
    return jax.tree.map(lambda x: by * x, tree)


@pytest.mark.parametrize("chain", [optax.chain, lambda *parts: optax.named_chain(*zip("ab", parts, strict=True))])
def test_the_parts_in_a_chain_make_the_preset(chain):
    parts = chain(snr_adam.scale_by_snr(), optax.scale_by_learning_rate(0.01))
    _assert_close(_run(parts, _gradients())[0], _run(snr_adam.adam(0.01), _gradients())[0])


@pytest.mark.parametrize("name", SOME)
def test_behind_a_transformation_of_the_gradients(name):
    chained = optax.chain(optax.scale(-2.0), _make(name))
    want, _ = _run(_make(name), _scaled(-2.0, _gradients()))
    _assert_close(_run(chained, _gradients())[0], want)


@pytest.mark.parametrize("name", SOME)
def test_masked_leaves_are_passed_through(name):
    on = {"a": False, "b": [True, False]}
    got, _ = _run(optax.masked(_make(name), on), _gradients())
    whole, _ = _run(_make(name), _gradients())
    for u, v, g in zip(got, whole, _gradients(), strict=True):
        _assert_close(u, {"a": g["a"], "b": v["b"]})


@pytest.mark.parametrize("name", SOME)
def test_partition_gives_every_group_its_own_optimizer(name):
    got, _ = _run(
        optax.partition({"x": _make(name), "y": snr_adam.adam(0.5)}, {"a": "x", "b": ["y", "x"]}), _gradients()
    )
    x, y = _run(_make(name), _gradients())[0], _run(snr_adam.adam(0.5), _gradients())[0]
    for u, v, w in zip(got, x, y, strict=True):
        _assert_close(u, {"a": v["a"], "b": [w["b"][0], v["b"][1]]})


@pytest.mark.parametrize("name", ["adamw", "ademamix", "lion"])
def test_multi_steps_steps_with_the_mean(name):
    grads = _gradients(4)
    got, _ = _run(_compiled(optax.MultiSteps(_make(name), 2).gradient_transformation()), grads)
    means = [_scaled(0.5, optax.tree.add(grads[t], grads[t + 1])) for t in (0, 2)]
    _assert_close(got[1::2], _run(_make(name), means)[0])
    assert not any(np.any(u) for u in jax.tree.leaves(got[0::2]))


@pytest.mark.parametrize("name", SOME)
def test_apply_if_finite_skips_a_step_and_its_memory(name):
    first, last = _gradients(2)
    got, state = _run(_compiled(optax.apply_if_finite(_make(name), 3)), [first, _scaled(jnp.nan, first), last])
    want, inner = _run(_make(name), [first, last])
    _assert_close(got[0::2], want)
    _assert_close(state.inner_state, inner)
    assert not any(np.any(u) for u in jax.tree.leaves(got[1]))


def _descend(name, wrap, pack, fast, unpack):
    """How far from its bottom a bowl of radius 1 is left after 40 steps of 0.05."""
    tx = wrap(PRESETS[name][0](0.05))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(fast(params) - 2.0, state, params)
        return (optax.apply_updates(params, updates), state), None

    def descend(params):
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=40)
        return unpack(state, params)

    return float(abs(quick_jit(descend)(pack(jnp.float32(1.0))) - 2.0))


@pytest.mark.parametrize("name", ["adamw", "ademamix", "rmsprop", "lion"])
def test_schedule_free_descends(name):
    assert (
        _descend(
            name,
            lambda tx: optax.contrib.schedule_free(tx, 0.05),
            lambda params: params,
            lambda params: params,
            optax.contrib.schedule_free_eval_params,
        )
        < 0.7
    )


@pytest.mark.parametrize("name", ["adamw", "ademamix", "rmsprop", "lion"])
def test_lookahead_descends(name):
    assert (
        _descend(
            name,
            lambda tx: optax.lookahead(tx, sync_period=5, slow_step_size=0.8),
            optax.LookaheadParams.init_synced,
            lambda params: params.fast,
            lambda state, params: params.slow,
        )
        < 0.7
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_injected_hyperparams_change_nothing(name, dtype):
    make = PRESETS[name][0]
    tx = optax.inject_hyperparams(make)(0.01)
    got, state = _run(tx, _gradients(dtype=dtype), dtype)
    want, _ = _run(make(0.01), _gradients(dtype=dtype), dtype)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, got, want))
    rtol, atol = (1e-4, 1e-8) if dtype == "float32" else (1e-2, 1e-4)  # 1e-4 is a hundredth of a step
    _assert_close(got, want, rtol, atol)
    numbers = {k: p.default for k, p in inspect.signature(make).parameters.items() if isinstance(p.default, float)}
    numbers["learning_rate"] = 0.01
    for key, value in numbers.items():
        held = state.hyperparams[key]
        assert held.dtype == jnp.float32, key
        assert held == jnp.float32(value), key


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "adamc"])  # a schedule needs its peak
def test_changing_an_injected_number_takes_effect_without_compiling(name):
    make = PRESETS[name][0]
    decay = next(b for b in ("b2", "b", "decay") if b in inspect.signature(make).parameters)
    tx = optax.inject_hyperparams(make)(0.01)
    params, (g1, g2, g3) = jnp.ones(3), jnp.array([[1.0, -2.0, 0.5], [3.0, 1.0, -0.5], [-1.0, 1.0, 2.0]])
    update = quick_jit(tx.update)
    _, state = update(g1, tx.init(params), params)
    state.hyperparams["learning_rate"] = jnp.float32(0.02)
    state.hyperparams[decay] = jnp.float32(0.5)
    _, state = update(g2, state, params)
    got, _ = update(g3, state, params)
    assert update._cache_size() == 1

    def after_one(then, now):
        return lambda count: jnp.where(count < 1, now, then)

    before = inspect.signature(make).parameters[decay].default
    scheduled = make(after_one(0.02, 0.01), **{decay: after_one(0.5, before)})
    state = scheduled.init(params)
    for g in (g1, g2, g3):
        want, state = scheduled.update(g, state, params)
    _assert_close(got, want, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["adam", "adamw", "ademamix", "rmsprop", "lamb"])
def test_schedules_are_the_same_injected(name):
    make = PRESETS[name][0]
    schedules = {
        "learning_rate": optax.linear_schedule(0.1, 0.01, STEPS),
        "decay" if name == "rmsprop" else "b2": optax.linear_schedule(0.9, 0.99, STEPS),
    }
    got, state = _run(optax.inject_hyperparams(make)(**schedules), _gradients())
    _assert_close(got, _run(make(**schedules), _gradients())[0], rtol=1e-4, atol=1e-8)
    for key, schedule in schedules.items():
        np.testing.assert_allclose(state.hyperparams[key], schedule(STEPS - 1), rtol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_traced_learning_rate_does_not_compile_again(name):
    params, grads = jnp.ones(3), jnp.array([1.0, -2.0, 0.5])

    @quick_jit
    def step(learning_rate, state):
        return PRESETS[name][0](learning_rate).update(grads, state, params)

    _, state = _make(name).update(grads, _make(name).init(params), params)
    for learning_rate in (0.01, 0.1):
        want, _ = PRESETS[name][0](learning_rate).update(grads, state, params)
        _assert_close(step(jnp.float32(learning_rate), state)[0], want, rtol=1e-4)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {"nesterov": True, "mu_dtype": jnp.bfloat16}),
        ("adam", {"storage": snr_adam.parts.Cast(mu="bfloat16")}),
        ("adamw", {"mask": {"a": False, "b": True}, "weight_decay": 0.1}),
        ("adamw", {"mask": lambda params: jax.tree.map(lambda p: p.ndim > 0, params), "weight_decay": 0.1}),
        ("amsgrad", {"bias_correction_mu": False, "bias_correction_nu": False}),
        ("rmsprop", {"centered": True, "eps_in_sqrt": False}),
        ("rmsprop", {"momentum": 0.9, "nesterov": True}),
        ("adopt", {"use_clipping": False}),
        ("adopt", {"clip_value_fn": lambda count: 0.1 + 0.0 * count}),
    ],
)
def test_options_stay_what_they_are_when_injected(name, options):
    make = PRESETS[name][0]
    got, state = _run(optax.inject_hyperparams(make)(0.01, **options), _gradients())
    narrow = "mu_dtype" in options or "storage" in options  # a corrected average rounds in other places
    rtol, atol = (2.0**-6, 1e-4) if narrow else (1e-4, 1e-8)
    _assert_close(got, _run(make(0.01, **options), _gradients())[0], rtol, atol)
    static = {key for key, value in options.items() if isinstance(value, (bool, str, type))}
    assert not static & set(state.hyperparams)


@pytest.mark.parametrize("name", PRESETS)
def test_tree_map_params_finds_every_moment(name):
    """Sharding specifications of a state: each parameter's own for its moments, one for all that is not a moment."""
    params = _draw(0)
    specs = jax.tree.map(lambda p: f"spec of shape {p.shape}", params)
    tx = _make(name)
    state = tx.init(params)
    got = optax.tree_map_params(
        tx, lambda x, spec: spec, state, specs, transform_non_params=lambda x: f"replicated {x.shape}"
    )
    assert jax.tree.structure(got) == jax.tree.structure(state)
    snr, want = got[0], state[0]
    assert snr.count == "replicated ()"
    assert jax.tree.leaves((snr.mu, snr.nu)) == [
        f"spec of shape {x.shape}" for x in jax.tree.leaves((want.mu, want.nu))
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_the_moments_are_found_by_name(name):
    tx = optax.chain(optax.clip_by_global_norm(1.0), _make(name))
    params = _draw(0)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert optax.tree.get(state, "mu") is state[1][0].mu
    assert optax.tree.get(state, "nu") is state[1][0].nu
    assert optax.tree.get(state, "count") == 1
    _, found = optax.tree.get_all_with_path(state, "ScaleBySnrState")[0]
    assert found is state[1][0]
