"""The signal from lags of successive gradients: the formulas, written anew, and what they promise.

Where a leaf has at most 128 elements its sketches are the gradients themselves, and the Gram matrices exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import weights_of_looks
from cases import fast_jit, quick_jit
from scipy import stats

import snr_adam
from snr_adam._bits import seeds_at
from snr_adam.telemetry import _lags as lags
from snr_adam.telemetry import _sums as sums
from snr_adam.telemetry._averages import zeros

LAG = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
PAIRS = [(i, j) for i in range(6) for j in range(i + 1, 6)]


def line_through(q):
    """Height at lag 0 and slope of the least-squares line through all 15 products."""
    slope, height = np.polyfit([j - i for i, j in PAIRS], [q[i, j] for i, j in PAIRS], 1)
    return height, slope


def spreads_of(q):
    """Var r, Var u, Cov(u, Q_ii) and Var Q_ii of one burst: the products less the line, split into ones and pairs."""
    height, slope = line_through(q)
    own = np.diag(q) - np.mean(np.diag(q))
    rest = np.where(LAG > 0, q - height - slope * LAG, 0)
    one = rest.sum(1) / 4
    pair = sum((rest[i, j] - one[i] - one[j]) ** 2 for i, j in PAIRS) / 8
    return np.array([pair, one @ one / 5 - pair / 4, one @ own / 5, own @ own / 5])


def combined(*weights):
    """What a sum of C_1 to C_5 with these weights has of Var r and of Var u."""
    pairs, ones = 0.0, np.zeros(6)
    for i, j in PAIRS:
        k = j - i
        w = weights[k - 1] / (6 - k)
        pairs += w * w
        ones[[i, j]] += w
    return np.array([pairs, ones @ ones])


LINE = [0.2 * 5, 0.1 * 4, 0.0, -0.1 * 2, -0.2 * 1]


def by_hand(bursts):
    """The estimate from Gram matrices of whole leaves, one per burst."""
    mean, spread, squared = np.zeros(6), np.zeros(4), 0.0
    for n, q in enumerate(bursts, 1):
        gain = max(2 / (n + 1), 6 / 80)
        products = [np.mean(q[k == LAG]) for k in range(6)]
        mean = (1 - gain) * mean + gain * np.array(products)
        spread = (1 - gain) ** 2 * spread + gain**2 * spreads_of(q)
        squared = (1 - gain) ** 2 * squared + gain**2
    power, c = mean[0], mean[1:]
    pairs, ones, both, squares = spread
    ones, freedom = max(ones, 0), max(4 / squared - 1, 2)
    t = stats.t.ppf(0.975, freedom)

    def error(*weights):
        return np.sqrt(combined(*weights) @ [pairs, ones])

    def beyond_chance(x, *weights):
        return np.sign(x) * max(abs(x) - t / 2 * error(*weights), 0)

    line, two, three = LINE @ c, 2 * c[0] - c[1], 3 * c[0] - 3 * c[1] + c[2]
    share = min(line / power, 1)
    var = 0.3 * pairs + 1.04 * ones - 2 / 3 * share * both + share**2 / 6 * squares
    bend = line - np.mean([bursts_mean for k in range(1, 6) for bursts_mean in [c[k - 1]] * (6 - k)])
    shift = beyond_chance(two - line, *np.subtract([2, -1, 0, 0, 0], LINE))
    certain = stats.t.ppf(0.9995, freedom)
    return lags.Estimate(
        signal=line + shift,
        power=power,
        half=np.hypot(t * np.sqrt(max(var, 0.15 * pairs)), bend / 2),
        slack=abs(shift) / 2,
        above=max(beyond_chance(three - two, 1, -2, 1, 0, 0), 0),
        least=max(abs(c[k]) - certain * error(*np.eye(5)[k]) for k in range(5)),
    )


@functools.partial(quick_jit, static_argnums=1)
def _after(bursts, whole):
    """The rows and the number of bursts after so many: (T, 6, L, 128)."""

    def step(carry, sketches):
        return lags.after_a_burst(*carry, sketches, np.array(whole)), None

    begin = zeros(lags.Lags, bursts.shape[2] + 1), jnp.int32(0)
    return jax.lax.scan(step, begin, bursts)[0]


def estimated(bursts, whole=None):
    """The estimate of every row, from sketches (T, 6, L, up to 128)."""
    bursts = np.pad(np.asarray(bursts, "float32"), ((0, 0),) * 3 + ((0, 128 - np.shape(bursts)[-1]),))
    rows, n = _after(bursts, whole or (True,) * bursts.shape[2])
    assert n == len(bursts)
    return lags.estimate(lags.Lags(*np.asarray(rows, float)), int(n))


def turning(rng, times, size, decay, signal):
    """Gradients whose true part is multiplied by `decay` at each step, and noise."""
    g = signal * rng.normal(size=size) * decay ** np.arange(6 * times)[:, None]
    return (g + rng.normal(size=(6 * times, size))).reshape(times, 6, size)


@pytest.mark.parametrize("decay", [1.0, 0.97, -0.8], ids=["steady", "falling", "turning round"])
@pytest.mark.parametrize("times", [1, 2, 30])
def test_the_estimate_is_its_formula(times, decay):
    """For each leaf, and for all together from the sum of their Gram matrices."""
    rng = np.random.default_rng(times)
    sizes, signals = (128, 50, 7), (0.5, 2.0, 0.0)
    leaves = [turning(rng, times, size, decay, signal) for size, signal in zip(sizes, signals, strict=True)]
    bursts = np.stack([np.pad(g, ((0, 0), (0, 0), (0, 128 - g.shape[-1]))) for g in leaves], 2)
    grams = [np.einsum("tik,tjk->tij", g, g) for g in leaves]
    expected = [by_hand(q) for q in (*grams, sum(grams))]
    found = estimated(bursts)
    for name, got, want in zip(found._fields, found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4 * np.max(found.power), err_msg=name)
    if decay < 0 and times > 1:
        assert np.max(found.slack) > 0  # else the corrections were not tested


def test_its_constants_are_those_of_the_docstring():
    np.testing.assert_allclose(combined(*LINE), [0.3, 1.04], rtol=1e-12)
    basis = np.eye(15)
    for (i, j), one in zip(PAIRS, basis, strict=True):
        q = np.zeros((6, 6))
        q[[x for x, _ in PAIRS], [y for _, y in PAIRS]] = one
        assert line_through(q)[0] == pytest.approx([0.2, 0.1, 0, -0.1, -0.2][j - i - 1], abs=1e-12)


def test_the_weights_of_bursts_are_those_of_a_window():
    """2 / (n + 1), then 6 looks in 80; the sum of their squares is that of the mean's weights."""
    for bursts in (1, 2, 5, 26, 27, 200):
        weights = weights_of_looks(6 * bursts).reshape(bursts, 6)
        assert weights.sum() == pytest.approx(1)
        assert (weights[:, 0] * 6) @ (weights[:, 0] * 6) == pytest.approx(lags.squared_weights(bursts))
        if bursts > 30:
            assert weights[-1, 0] / weights[-2, 0] == pytest.approx(1 / (1 - 6 / 80))
    assert lags.student(1) == pytest.approx(3.182, abs=1e-3)  # three degrees of freedom
    assert lags.student(1000) == pytest.approx(1.983, abs=1e-3)  # 102


def test_without_noise_all_is_signal_and_without_a_burst_nothing_is_known():
    g = np.random.default_rng(0).normal(size=100)
    found = estimated(np.broadcast_to(g, (3, 6, 1, 100)))
    np.testing.assert_allclose(found.signal, g @ g, rtol=1e-6)
    np.testing.assert_allclose(found.power, g @ g, rtol=1e-6)
    for wide in (found.half, found.slack, found.above):
        np.testing.assert_allclose(wide, 0, atol=1e-4 * (g @ g))
    np.testing.assert_allclose(found.least, g @ g, rtol=1e-4)
    for nothing in lags.estimate(lags.Lags(*np.zeros((len(lags.Lags._fields), 3))), 0):
        assert np.all(np.isnan(nothing))


def test_products_that_fall_in_a_line_are_continued_to_lag_0():
    """Gram matrices are what counts: here those of vectors with <g_i, g_j> = 10 - |i - j|, and 14 with themselves."""
    q = np.where(LAG > 0, 10.0 - LAG, 14.0)
    g = np.linalg.cholesky(q)
    found = estimated(np.stack([g] * 20)[:, :, None])
    np.testing.assert_allclose(found.signal, 10, rtol=1e-5)
    np.testing.assert_allclose(found.power, 14, rtol=1e-5)
    np.testing.assert_allclose(found.least, 9, rtol=1e-3)
    assert np.all(found.half < 1.5)


@pytest.mark.parametrize("turn", [-1.0, -0.9, -0.6, 0.6])
def test_gradients_that_turn_round_within_a_burst_are_in_the_interval(turn):
    """<g_i, g_j> = 10 turn^|i - j|, of which a line over all lags knows little; the truth is 10 of 12."""
    q = 10 * turn ** LAG.astype(float) + 2 * np.eye(6)
    found = estimated(np.stack([np.linalg.cholesky(q)] * 20)[:, :, None])
    low = np.maximum(found.signal - found.half - found.slack, found.least)
    high = np.maximum(found.signal, found.least) + found.half + found.slack + found.above
    assert np.all(low <= 10 * (1 + 1e-4))
    assert np.all(high >= 10 * (1 - 1e-4))
    assert np.all(4 * abs(turn) < found.least)  # no product is larger than the power; less what is chance
    assert np.all(found.least < 10 * abs(turn))


DIM, RUNS = 100, 400


@functools.partial(fast_jit, static_argnums=1)
def _known(snr, bursts):
    """Rows of runs with gradients of this SNR, with noise of unequal size."""
    spread = jnp.linspace(0.5, 1.5, DIM)
    mean = jnp.sqrt(snr) * jnp.roll(spread, DIM // 2)

    def one(key):
        def step(carry, key):
            g = mean + spread * jax.random.normal(key, (6, 1, DIM))
            g = jnp.pad(g, ((0, 0), (0, 0), (0, 128 - DIM)))
            return lags.after_a_burst(*carry, g, np.array([True])), None

        begin = zeros(lags.Lags, 2), jnp.int32(0)
        return jax.lax.scan(step, begin, jax.random.split(key, bursts))[0][0]

    return jax.vmap(one)(jax.random.split(jax.random.key(0), RUNS))


@pytest.mark.parametrize("bursts", [1, 2, 16])
def test_a_known_signal_is_in_the_interval(bursts):
    """In 90 to 99.9 % of runs, from the first burst on; without bias; pure noise is found out in 97 %."""
    for snr in (0.0, 0.3, 1.0, 3.0):
        rows = np.moveaxis(np.asarray(_known(snr, bursts), float), 1, 0)[..., 0]
        found = lags.estimate(lags.Lags(*rows), bursts)
        share, half = found.signal / found.power, (found.half + found.slack) / found.power
        true = snr / (1 + snr)
        assert 0.9 < np.mean((share - half <= true) & (true <= share + half + found.above / found.power)) < 1
        assert abs(np.mean(share) - true) < 4 * np.std(share) / RUNS**0.5 + 0.01
        if snr == 0:
            assert np.mean(share - half > 0) < 0.03
            assert np.mean(found.least > 0) < 0.01
        if bursts == 16:
            assert np.mean(half) < 4 * np.std(share)


# sketches


@functools.partial(quick_jit, static_argnums=2)
def _sketches(x, counts, leaves=1):
    """Sketches of one array under the signs of so many bursts, those of the last leaf of several."""

    def one(count):
        signed = lags.signed(x, seeds_at(count, leaves)[-1], None)
        return sums.together([signed.real, signed], None)[1][0]

    return jax.vmap(one)(counts)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("shape", [(2000,), (40, 50), (300, 3, 2)], ids=str)
def test_a_sketch_keeps_inner_products_on_average(shape, dtype):
    """Over bursts, whose signs are independent: the mean is <x, y>, the variance at most that of 128 random sums."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape) + 1j * rng.normal(size=shape) for _ in range(2))
    y = y + x / 2
    x, y = (jnp.asarray(z if dtype == "complex64" else z.real, dtype) for z in (x, y))
    counts = jnp.arange(2000)
    a, b = (np.asarray(_sketches(z, counts), float) for z in (x, y))
    for one, other, true in ((a, b, np.vdot(x, y).real), (a, a, np.vdot(x, x).real)):
        products = np.sum(one * other, 1)
        assert abs(np.mean(products) - true) < 4 * np.std(products) / len(counts) ** 0.5
        most = np.vdot(x, x).real * np.vdot(y, y).real if one is not other else 2 * true**2
        assert 0 < np.var(products) < 2.2 * most / 128
        assert abs(np.corrcoef(products[1:], products[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["constant", "stripes", "ramp"])
def test_signs_are_as_good_as_independent_where_elements_are_alike(kind):
    """A hash that is too short gives a constant gradient two to seven times the variance."""
    row, column = np.mgrid[:256, :128]
    x = jnp.asarray(
        {"constant": 1 + 0 * row, "stripes": 1 - 2 * (column % 2), "ramp": column - 64.0}[kind], jnp.float32
    )
    products = np.sum(np.asarray(_sketches(x, jnp.arange(1000)), float) ** 2, 1) / float(jnp.sum(x**2))
    assert abs(np.mean(products) - 1) < 4 * np.std(products) / 1000**0.5
    assert 0.8 < np.var(products) / (2 / 128) < 1.25


def test_signs_are_of_the_burst_and_the_leaf():
    x = jnp.ones(500)
    first, again = (_sketches(x, jnp.arange(2)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first[0] != first[1])
    assert np.any(first[0] != _sketches(x, jnp.arange(2), 2)[0])


@pytest.mark.parametrize(("shape", "axis"), [((128,), None), ((9, 128), 0), ((5, 20, 6), 0), ((64, 2), None)])
def test_small_leaves_and_slices_are_kept_whole(shape, axis):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) + 1
    seed = seeds_at(jnp.int32(3), 1)[0]
    assert lags.is_whole(x, axis)
    np.testing.assert_array_equal(lags.signed(x, seed, axis), x)
    assert not lags.is_whole(jnp.ones((129,)), None)
    assert not lags.is_whole(jnp.ones((9, 129)), 0)
    assert not lags.is_whole(jnp.ones((9, 128)), None)
    assert not lags.is_whole(jnp.ones((3,), complex), None)  # real and imaginary parts share a sum


def test_what_a_sketch_adds_to_the_error_is_known():
    """Its own error of (2/128) (1-l)^2 S^2 in the variance; none of a leaf that is kept whole; of all, that of each."""
    rng = np.random.default_rng(0)
    g = 3 * rng.normal(size=(1, 1, 2, 128)) + rng.normal(size=(10, 6, 2, 128))
    whole, sketched, one = (estimated(g, which) for which in ((True, True), (False, False), (False, True)))
    np.testing.assert_array_equal(whole.signal, sketched.signal)
    t, share = lags.student(10), sketched.signal / sketched.power
    assert np.all(sketched.slack == 0)
    added = (sketched.half**2 - whole.half**2) / t**2
    mean_of_squares = lags.squared_weights(10) * sketched.signal**2
    np.testing.assert_allclose(added[:2], 2 / 128 * ((1 - share) ** 2 * mean_of_squares)[:2], rtol=0.05)
    np.testing.assert_allclose(added[2], 2 / 128 * (1 - share[2]) ** 2 * np.sum(mean_of_squares[:2]), rtol=0.05)
    np.testing.assert_allclose(one.half[:2], [sketched.half[0], whole.half[1]], rtol=1e-6)
    assert whole.half[2] < one.half[2] < sketched.half[2]


# bursts


def test_a_burst_with_a_step_that_was_not_finite_does_not_count():
    good = jnp.asarray(np.random.default_rng(0).normal(size=(6, 1, 128)), jnp.float32)
    begin = zeros(lags.Lags, 2), jnp.int32(0)
    before = lags.after_a_burst(*begin, good, np.array([True]))
    sketches = jnp.zeros((6, 1, 128))
    for bad in range(6):
        for place in range(6):
            sketches = lags.put(sketches, good[place], jnp.int32(place), jnp.bool_(place != bad))
            np.testing.assert_array_equal(np.isnan(sketches[place]), place == bad)
        after = lags.after_a_burst(*before, sketches, np.array([True]))
        jax.tree.map(np.testing.assert_array_equal, after, before)
    for place in range(6):
        sketches = lags.put(sketches, good[place], jnp.int32(place), jnp.bool_(True))
    np.testing.assert_array_equal(sketches, good)
    assert lags.after_a_burst(*before, sketches, np.array([True]))[1] == 2


def test_a_new_burst_knows_nothing_of_the_last():
    """A burst that begins late, after a resumed or a skipped step, is not filled with sketches of other signs."""
    sketches = lags.put(jnp.ones((6, 1, 128)), jnp.zeros((1, 128)), jnp.int32(0), jnp.bool_(True))
    assert np.all(sketches[0] == 0)
    assert np.all(np.isnan(sketches[1:]))


@functools.partial(quick_jit, static_argnums=(0, 1))
def _watched(every, steps, spoiled):
    """The state after every step; the gradient of one step is not finite."""
    tx = snr_adam.observe(snr_adam.adam(1e-3), every=every)
    w = jnp.ones(30)

    def step(state, t):
        g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (30,))
        g = g.at[0].set(jnp.where(t == spoiled, jnp.nan, g[0]))
        _, state = tx.update(g, state, w)
        return state, (state.bursts, state.looked, state.seen)

    return jax.lax.scan(step, tx.init(w), jnp.arange(steps))[1]


def test_looks_come_in_bursts_of_six():
    """At every step, or at six steps of 6 N; the very first look has no m before it and is in no mean of L."""
    bursts, looked, seen = _watched(1, 30, -1)
    np.testing.assert_array_equal(bursts, np.arange(1, 31) // 6)
    np.testing.assert_array_equal(looked, np.arange(1, 31))
    np.testing.assert_array_equal(seen, np.arange(30))
    bursts, looked, seen = _watched(3, 45, -1)
    steps = np.arange(1, 46)
    expected = [np.sum([6 + 18 * k <= t for k in range(3)]) for t in steps]
    np.testing.assert_array_equal(bursts, expected)
    np.testing.assert_array_equal(looked, [(t - 1) // 18 * 18 + min((t - 1) % 18 + 1, 6) for t in steps])
    np.testing.assert_array_equal(seen, [(t - 1) // 18 * 6 + min((t - 1) % 18 + 1, 6) - 1 for t in steps])


def test_a_gradient_that_is_not_finite_costs_its_burst_and_no_other():
    bursts, *_ = _watched(1, 30, 8)
    np.testing.assert_array_equal(bursts[5::6], [1, 1, 2, 3, 4])
