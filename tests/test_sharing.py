"""Shared noise: what is measured, what it costs, what is never shared, and that training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FAST, fast_jit, run
from flax import nnx
from flax.nnx.training.optimizer import to_opt_state
from jax.sharding import NamedSharding, PartitionSpec

import snr_adam
from snr_adam import scale_by_snr
from snr_adam.parts import EMA, RMS, Belief, Infinity, Maximum, Mean, Previous, Rectified, Shared, Spread, Unit, Yogi
from snr_adam.state import share, suggest_sharing
from snr_adam.state.shared_noise import snr_over


def _uneven(snr, size, axis=0):
    """Positive numbers of mean 1 and variance 1/snr, both exact, along one of two axes."""
    x = 1.0 + (-1.0) ** np.arange(size) / np.sqrt(snr)
    return np.expand_dims(x, 1 - axis)


def _avals(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def _train(tx, params, scales, steps, state=None, seed=0):
    """State after `steps` of normal gradients whose standard deviations are `scales`, and every update."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda s: np.asarray(s) * rng.standard_normal((steps, *s.shape), "float32"), scales)

    def step(state, g):
        u, state = tx.update(g, state, params)
        return state, u

    return fast_jit(lambda *start: jax.lax.scan(step, *start))(tx.init(params) if state is None else state, grads)


def _suggest(vs, **options):
    """Suggestion for a state whose second moments are `vs`."""
    vs = jax.tree.map(lambda v: jnp.asarray(v, "float32"), vs)
    state = scale_by_snr().init(vs)._replace(nu=vs)
    return suggest_sharing(state, vs, **options)


def _axes(suggestion):
    return {row.path: row.axes for row in suggestion.rows}


# the measure


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e30])
@pytest.mark.parametrize("snr", [3.0, 10.0, 1000.0])
def test_snr_of_known_variation(snr, scale):
    """v = c_j x_i, x of mean 1 and variance 1/SNR, c of any size: SNR_K over i, whatever c and the scale of v."""
    x, c = _uneven(snr, 200), 10.0 ** np.linspace(-3, 3, 50)[None]
    v = jnp.asarray(scale * 1e-3 * x * c, "float32")
    np.testing.assert_allclose(snr_over(v, (0,)), snr, rtol=1e-3)
    np.testing.assert_allclose(snr_over(v.T, (1,)), snr, rtol=1e-3)
    assert snr_over(v, (1,)) < 1


def test_snr_over_several_axes():
    """Independent relative variances a and b along two axes give (1 + a)(1 + b) - 1 over both."""
    v = jnp.asarray(_uneven(20.0, 64, 0) * _uneven(50.0, 128, 1), "float32")
    np.testing.assert_allclose(snr_over(v, (0,)), 20.0, rtol=1e-3)
    np.testing.assert_allclose(snr_over(v, (1,)), 50.0, rtol=1e-3)
    np.testing.assert_allclose(snr_over(v, (0, 1)), 1 / (1.05 * 1.02 - 1), rtol=1e-3)


def test_one_even_row_does_not_hide_uneven_ones():
    """The mean is of 1/SNR: half of the columns even and half of SNR 4 make 8, not half of infinity."""
    even = np.ones((16, 100))
    v = np.concatenate([even, np.broadcast_to(_uneven(4.0, 16), (16, 100))], 1)
    np.testing.assert_allclose(snr_over(jnp.asarray(v, "float32"), (0,)), 8.0, rtol=1e-3)


def test_columns_that_have_seen_nothing_do_not_count():
    x = jnp.asarray(np.broadcast_to(_uneven(10.0, 30), (30, 40)), "float32")
    np.testing.assert_allclose(snr_over(x.at[:, 20:].set(0.0), (0,)), 10.0, rtol=1e-3)


# the prediction

SPREADS = {"half a decade": (0.25, (0,)), "a third": (0.33, (0,)), "a tenth": (0.1, (1,)), "both axes": (0.3, (0, 1))}


@pytest.mark.parametrize("name", SPREADS)
def test_the_predicted_error_is_the_measured_one(name):
    """Update with v shared against v whole, on the same gradients: within a factor 1.5 of 0.5 / sqrt(SNR_K).

    v's deviation along the axes is that of the gradients' scales (lognormal) plus the average's own, 1/sqrt(1000).
    """
    sigma, axes = SPREADS[name]
    rng = np.random.default_rng(0)
    along = [64 if axis in axes else 1 for axis in range(2)]
    across = [1 if axis in axes else 48 for axis in range(2)]
    scale = np.exp(rng.normal(0, sigma, along)) * 10.0 ** rng.uniform(-3, 3, across)
    scales = jnp.asarray(np.broadcast_to(scale, np.broadcast_shapes(along, across)), "float32")
    tx, params = scale_by_snr(noise=RMS(0.999, eps=0.0)), jnp.zeros(scales.shape)
    state, _ = _train(tx, params, scales, 3000)
    [row] = suggest_sharing(state, params, cutoff=1.0).rows
    predicted = 0.5 / float(snr_over(state.nu, axes)) ** 0.5
    if row.axes == axes:
        assert row.error == pytest.approx(predicted, rel=1e-6)
    _, whole = _train(tx, params, scales, 200, state, seed=1)
    _, shared = _train(tx, params, scales, 200, share(state, params, axes), seed=1)
    measured = float(jnp.sqrt(jnp.mean((shared - whole) ** 2) / jnp.mean(whole**2)))
    print(f"{name}: predicted {predicted:.3f}, measured {measured:.3f}, ratio {measured / predicted:.2f}")
    assert 1 / 1.5 < measured / predicted < 1.5


# what is suggested


@pytest.mark.parametrize("cutoff", [1.0, 10.0, 25.0])
def test_nothing_under_the_cutoff_is_shared(cutoff):
    """Tensors of SNR 2 to 100 over their first axis, and uneven over the second: shared where SNR_K >= cutoff."""
    snrs = (2.0, 5.0, 9.0, 11.0, 24.0, 26.0, 100.0)
    columns = 10.0 ** np.linspace(-2, 2, 40)[None]
    vs = {f"of {snr:g}": _uneven(snr, 60) * columns for snr in snrs}
    suggestion = _suggest(vs, cutoff=cutoff)
    assert _axes(suggestion) == {f"of {snr:g}": (0,) if snr >= cutoff else () for snr in snrs}
    for row, snr in zip(sorted(suggestion.rows, key=lambda row: float(row.path[3:])), snrs, strict=True):
        assert row.snr == pytest.approx(snr, rel=1e-3)
        assert row.error == (pytest.approx(0.5 / np.sqrt(snr), rel=1e-3) if snr >= cutoff else 0.0)
        assert row.saved == ((row.shape[0] - 1) * 40 * 4 if snr >= cutoff else 0)


def test_an_snr_of_exactly_the_cutoff_passes():
    """The cutoff is the least that is accepted; the next number above it is not reached."""
    v = {"w": _uneven(11.0, 60) * 10.0 ** np.linspace(-2, 2, 40)[None]}
    least = _suggest(v).rows[0].snr
    assert _axes(_suggest(v, cutoff=least)) == {"w": (0,)}
    assert _axes(_suggest(v, cutoff=np.nextafter(least, np.inf))) == {"w": ()}


def test_the_most_is_saved_that_passes():
    """Both axes where both together pass, else the longer one."""
    even = _uneven(100.0, 60, 0) * _uneven(100.0, 90, 1)
    together = _uneven(12.0, 60, 0) * _uneven(12.0, 90, 1)
    assert _axes(_suggest({"even": even, "less": together})) == {"even": (0, 1), "less": (1,)}


def test_vectors_and_scalars_are_left_alone():
    suggestion = _suggest({"bias": np.ones(9), "scale": np.ones(()), "w": np.ones((4, 5))})
    assert _axes(suggestion) == {"w": (0, 1)}
    assert suggestion.total == 4 * (9 + 1 + 20)
    assert _suggest({"bias": np.ones(9)}).rows == ()


def test_an_embedding_is_never_shared_over_its_tokens():
    """Tokens with Zipf's frequencies, trained with Adam: shared over the features if at all, at any cutoff in use."""
    tokens, features, batch = 200, 16, 64
    log_p = -jnp.log(jnp.arange(1.0, tokens + 1.0))
    tx, table = snr_adam.adam(1e-3, b2=0.99), jnp.zeros((tokens, features))
    scales = jnp.asarray(np.exp(np.random.default_rng(0).normal(0, 0.1, features)), "float32")

    def step(state, key):
        seen, noise = jax.random.split(key)
        batch_of = jax.random.categorical(seen, log_p, shape=(batch,))
        g = jnp.zeros_like(table).at[batch_of].add(scales * jax.random.normal(noise, (batch, features)) / batch)
        return tx.update(g, state)[1], None

    state, _ = fast_jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 600)))(tx.init(table))
    assert snr_over(state[0].nu, (0,)) < 1.0
    for cutoff in (1.0, 10.0, 25.0):
        [row] = suggest_sharing(state, table, cutoff=cutoff).rows
        assert 0 not in row.axes
    [row] = suggest_sharing(state, table, cutoff=1.0).rows
    print(f"embedding: SNR over tokens {snr_over(state[0].nu, (0,)):.3g}, over features {row.snr:.3g}")
    assert row.axes == (1,)


@pytest.mark.parametrize("layer_axis", [0, -3, {"layers": 0}])
def test_the_layer_axis_is_never_shared(layer_axis):
    """Perfectly even v, stacked by layers on axis 0: all axes but that one."""
    vs = {"layers/w": np.ones((6, 20, 30))}
    assert _axes(_suggest(vs)) == {"layers/w": (0, 1, 2)}
    assert _axes(_suggest(vs, layer_axis=layer_axis)) == {"layers/w": (1, 2)}
    assert _axes(_suggest({"other": np.ones((6, 20))}, layer_axis={"layers": 0})) == {"other": (0, 1)}


def test_the_table():
    text = str(_suggest({"w": np.ones((10, 20)) * 2.0 ** np.arange(20), "e": 10.0 ** np.eye(9)}))
    print(text)
    head, e, w, total = text.splitlines()
    assert head.split()[:2] == ["parameter", "shape"]
    assert e.split()[0] == "e"
    assert "none" in e
    assert w.split() == ["w", "(10,", "20)", "(0)", "inf", "0.0%", "720"]
    assert total == "v shrinks from 1,124 to 404 bytes (cutoff SNR_K >= 10)"
    row = str(_suggest({"w": _uneven(16.34, 60) * 10.0 ** np.linspace(-2, 2, 40)[None]})).splitlines()[1]
    assert row.split() == ["w", "(60,", "40)", "(0)", "16.3", "12.4%", "9,440"]


# going on with it

PARAMS = {"block": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}, "table": jnp.ones((5, 4))}
SCALES = jax.tree.map(lambda p: jnp.linspace(1.0, 2.0, p.size).reshape(p.shape), PARAMS)


def _vs(state):
    """v by the parameter's path."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(PARAMS)]
    return dict(zip(paths, optax.tree.get(state, "nu").v, strict=True))


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda storage: snr_adam.adamw(1e-3, storage=storage),
        lambda storage: optax.chain(
            optax.clip_by_global_norm(1.0), scale_by_snr(storage=storage), optax.scale_by_learning_rate(1e-3)
        ),
    ],
    ids=["preset", "chain"],
)
def test_the_same_optimizer_goes_on(make, storage):
    """`share` on a running state: v is the mean of what it was, m stays, and the state is a fixed point from there."""
    tx = make(storage)
    state, _ = _train(tx, PARAMS, SCALES, 50)
    shared = share(state, PARAMS, {"kernel": 0, "table": (0, 1)})
    before, after = optax.tree.get(state, "nu"), _vs(shared)
    rtol = 1e-6 if storage == "float32" else 2.0**-8
    np.testing.assert_allclose(
        after["block/kernel"].astype("f4"), before["block"]["kernel"].astype("f4").mean(0, keepdims=True), rtol=rtol
    )
    np.testing.assert_allclose(after["table"].astype("f4"), before["table"].astype("f4").mean(keepdims=True), rtol=rtol)
    np.testing.assert_array_equal(after["block/bias"], before["block"]["bias"])
    for what in ("mu", "count"):
        jax.tree.map(np.testing.assert_array_equal, optax.tree.get(shared, what), optax.tree.get(state, what))
    on, _ = _train(tx, PARAMS, SCALES, 3, shared)
    assert _avals(on) == _avals(shared)
    assert not np.array_equal(_vs(on)["table"], after["table"])
    assert optax.tree.get(on, "count") == 53


def test_shared_from_the_start_is_the_same_as_shared_on_the_way():
    """Squares and means over axes commute: from v = 0 on, and from a shared running state on, `Shared` is the mean of
    g^2.
    """
    axes = {"kernel": 0, "table": (0, 1)}
    tx = scale_by_snr(noise=Shared(RMS(0.9), axes))
    state, _ = _train(tx, PARAMS, SCALES, 20)
    plain, _ = _train(scale_by_snr(noise=RMS(0.9)), PARAMS, SCALES, 20)
    late = share(plain, PARAMS, axes)
    assert _avals(late) == _avals(state)
    for path, v in _vs(state).items():
        np.testing.assert_allclose(v, _vs(late)[path], rtol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        {"kernel": (1,), "table": 1},
        {"kernel": -1, "table$": -1, ".*": ()},
        lambda path, shape: 1 if len(shape) == 2 else (),
        lambda path, shape: {"block/kernel": (1,), "table": (-1,)}.get(path, ()),
    ],
)
def test_axes_by_pattern_and_rule(axes):
    state = scale_by_snr(noise=Shared(RMS(), axes)).init(PARAMS)
    assert {path: v.shape for path, v in _vs(state).items()} == {
        "block/bias": (6,),
        "block/kernel": (8, 1),
        "table": (5, 1),
    }


@pytest.mark.parametrize(
    ("axes", "shape"), [(0, (1, 6)), (-1, (8, 1)), ((0, 1), (1, 1)), ((-1, 1), (8, 1)), ((), (8, 6))]
)
def test_axes_for_all(axes, shape):
    params = {"a": jnp.ones((8, 6)), "b": jnp.ones((8, 6))}
    state = scale_by_snr(noise=Shared(RMS(), axes)).init(params)
    assert [v.shape for v in state.nu.v] == [shape, shape]


def test_a_suggestion_is_a_rule():
    """`suggestion.axes` starts a new run with what `share` does to a running one; by exact path, not by pattern."""
    even, uneven = np.ones((8, 6)), 10.0 ** np.arange(-24.0, 24.0).reshape(8, 6)
    suggestion = _suggest({"w": even, "xw": uneven})
    params = {"w": jnp.ones((8, 6)), "xw": jnp.ones((8, 6))}
    state = scale_by_snr(noise=Shared(RMS(), suggestion.axes)).init(params)
    assert [v.shape for v in state.nu.v] == [(1, 1), (8, 6)]
    assert _avals(share(scale_by_snr().init(params), params, suggestion)) == _avals(state)


AXES = {"kernel": 0, "table": (0, 1)}
NOISES = {
    "rms": (EMA(), Shared(RMS(), AXES)),
    "belief": (EMA(), Shared(Belief(), AXES)),
    "yogi": (EMA(), Shared(Yogi(), AXES)),
    "rectified": (EMA(), Shared(Rectified(), AXES)),
    "previous": (EMA(debias=False), Shared(Previous(clip=2.0), AXES)),
}


@pytest.mark.parametrize("name", NOISES)
def test_every_noise_keeps_the_shape_it_shares(name):
    """Whatever `Shared` accepts keeps its shape at a step."""
    tx = scale_by_snr(*NOISES[name])
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, after = tx.update(SCALES, state, PARAMS)
        assert _avals(after) == _avals(state)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
        state = after


# in company


def test_sharded():
    """Sharded over an axis that shares and over one that is kept: the numbers of one device, and v where it fits."""
    p, g = jnp.ones((16, 8)), jnp.asarray(np.random.default_rng(0).normal(size=(5, 16, 8)), "float32")
    tx = snr_adam.scale_by_snr(noise=Shared(RMS(), 0))
    want, _, _ = run(tx, p, g, FAST)
    mesh = jax.make_mesh((8,), ("x",))
    for spec in (("x", None), (None, "x")):
        params = jax.device_put(p, NamedSharding(mesh, PartitionSpec(*spec)))
        grads = jax.device_put(g, NamedSharding(mesh, PartitionSpec(None, *spec)))
        got, _, state = run(tx, params, grads, FAST)
        assert len(got.sharding.device_set) == 8
        assert state.nu.v[0].shape == (1, 8)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_masked_and_frozen_parameters():
    """Leaves without a moment are skipped, None and masked ones alike."""
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5)), "none": None}
    tx = optax.masked(snr_adam.adam(1e-3), {"a": True, "b": False, "none": None})
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    suggestion = suggest_sharing(state, params)
    assert _axes(suggestion) == {"a": (0, 1)}
    _, after = tx.update(params, share(state, params, suggestion), params)
    assert [v.shape for v in jax.tree.leaves(optax.tree.get(after, "nu"))] == [(1, 1)]


def test_in_nnx():
    """Measured and shared on the state of an `nnx.Optimizer`, which then goes on."""
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, snr_adam.adam(0.02), wrt=nnx.Param)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(128, 6)), "float32")
    y = x @ jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), "float32")

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(30):
        first = step(model, optimizer)
    # the bare arrays, without the Variables that NNX keeps them in, and back
    params, state = nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)
    suggestion = suggest_sharing(state, params, cutoff=0.01)
    assert _axes(suggestion) == {"kernel": (0, 1)}
    optimizer.opt_state = nnx.data(to_opt_state(share(state, params, suggestion)))
    for _ in range(30):
        last = step(model, optimizer)
    assert last < first
    assert [v.shape for v in nnx.as_pure(optimizer.opt_state)[0].nu.v] == [(5,), (1, 1)]


# errors


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: scale_by_snr(noise=Shared(Maximum(), 0)),
            "needs a noise that keeps one array per parameter",
        ),
        (lambda: scale_by_snr(noise=Shared(Infinity(), 0)), "needs a noise"),
        (lambda: scale_by_snr(Mean(), Shared(Spread(), 0)), "needs a noise"),
        (
            lambda: scale_by_snr(noise=Shared(Unit(), 0)),
            "needs a noise that keeps one array per parameter",
        ),
        (lambda: scale_by_snr(noise=Shared(RMS(), 0), storage="packed"), "storage that keeps it apart"),
        (
            lambda: scale_by_snr(noise=Shared(RMS(), {"kernel": 2})).init(PARAMS),
            r"axes \(2,\) for parameter 'block/ker",
        ),
        (lambda: share(scale_by_snr().init(PARAMS), PARAMS, {"bias": 1}), "axes .* 'block/bias' .* out of range"),
        (lambda: share(snr_adam.amsgrad(0.1).init(PARAMS), PARAMS, 0), "nu is AverageAndMaximum"),
        (lambda: share(snr_adam.adam(0.1, storage="packed").init(PARAMS), PARAMS, 0), "'packed' .* cannot share"),
        (lambda: share(snr_adam.lion(0.1).init(PARAMS), PARAMS, 0), "nu is tuple"),
        (lambda: suggest_sharing(optax.adam(0.1).init(PARAMS), PARAMS), "one ScaleBySnrState, found 0"),
        (lambda: suggest_sharing([scale_by_snr().init(PARAMS)] * 2, PARAMS), "one ScaleBySnrState, found 2"),
        (lambda: suggest_sharing(share(scale_by_snr().init(PARAMS), PARAMS, ()), PARAMS), "shared already"),
    ],
)
def test_errors_say_what_to_do(make, match):
    with pytest.raises(ValueError, match=match):
        make()
