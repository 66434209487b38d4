"""How much of a gradient is signal, at any learning rate: products of successive gradients, extrapolated to lag 0.

Two gradients of the same parameters have independent noise, so <g_i, g_j> estimates |G|^2. Successive steps have nearly
the same parameters, and what is left of the difference is taken to grow with the lag. In a *burst* of six looks at
successive steps, C_k = <g_i, g_j> with k = j - i is fitted by S - k slope over all 15 pairs; S, at lag 0, is

    S = 6 / ((n-1)(n-2)) sum_{i<j} (1 - 2 (j-i) / n) <g_i, g_j>         n = 6: weights .2, .1, 0, -.1, -.2 by lag

Where gradients turn round within a burst no line fits, and `estimate` says what is known then.

The products are those of *sketches*: 128 sums of the elements of a leaf with random signs, which keep inner products on
average; kilobytes instead of five copies of the gradients. Signs are hashes of the element's place, the leaf and the
burst: the same within a burst, and new ones for the next, so that their error averages out over bursts.

The spread of S is measured in each burst. Q_ij = <g_i, g_j> less the fit is split into what belongs to one gradient,
u_i, and to a pair, r_ij: with a = mean of Q_ii and l = S / a,

    Var S = .3 Var r + 1.04 Var u - (2/3) l Cov(u, Q_ii) + (l^2/6) Var Q_ii + (2/K) (1-l)^2 S^2

The last term is the sketch's own error, which leaves of at most 128 elements do not have: they are kept whole.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._bits import Seed, float_of, sign_bits, word_of
from snr_adam.telemetry._sums import WIDTH, is_few

BURST = 6
"""Looks at successive steps that belong together."""
WINDOW = 80
"""Looks that the means over bursts reach back."""

_LAG = np.abs(np.subtract.outer(np.arange(BURST), np.arange(BURST)))
_PAIR = _LAG > 0
_WEIGHT = np.where(_PAIR, 6 / ((BURST - 1) * (BURST - 2)) * (1 - 2 * _LAG / BURST), 0) / 2
_CENTERED = np.where(_PAIR, _LAG - (BURST + 1) / 3, 0)
_NUMBER = BURST - np.arange(1, BURST)  # of pairs at each lag
_LINE = np.array([_WEIGHT[k == _LAG].sum() for k in range(1, BURST)])  # weights of C_1 to C_5 in S
_MEAN = _NUMBER / _NUMBER.sum()
_TWO, _THREE = np.array([2.0, -1, 0, 0, 0]), np.array([3.0, -3, 1, 0, 0])
_OF_PAIRS = (_WEIGHT**2).sum() * 2  # Var S in units of Var r: .3
_OF_ONES = ((2 * _WEIGHT.sum(1)) ** 2).sum()  # in units of Var u: 1.04


class Lags(NamedTuple):
    """Means over bursts, (L + 1,) each: one entry per leaf or slice, the last for all together.

    power: a. lag_1 to lag_5: C_k. pairs, ones, both, squares, sketch: Var r, Var u, Cov(u, Q_ii), Var Q_ii and S^2
    (0 of leaves that are kept whole) with the squared weights of the means, in units of the square of the mean a.
    """

    power: Any
    lag_1: Any
    lag_2: Any
    lag_3: Any
    lag_4: Any
    lag_5: Any
    pairs: Any
    ones: Any
    both: Any
    squares: Any
    sketch: Any


def weight_of_newest(bursts, largest=max):
    """The weight of the newest of so many bursts: 2 / (n + 1), then that of a window."""
    return largest(2 / (bursts + 1), BURST / WINDOW)


def is_whole(x, axis) -> bool:
    """Whether the slices of an array are kept as they are: they are no longer than a sketch."""
    return is_few(x.size // (1 if axis is None else x.shape[axis])) and not jnp.iscomplexobj(x)


def signed(x, seeds: Seed, axis):
    """What to sum into a sketch: the elements of x with the signs of a burst, float32, or as they are.

    Seeds of several arrays: x has them along its first axis.

    Of complex numbers, real and imaginary parts get signs of their own and are added."""
    if is_whole(x, axis):
        return x
    shape = x.shape[seeds.before.ndim :]
    bits = sign_bits(shape, seeds)

    def turn(x, bits):
        return float_of(word_of(x) ^ (bits & np.uint32(0x80000000)))

    return turn(x.real, bits) + turn(x.imag, bits << 1) if jnp.iscomplexobj(x) else turn(x, bits)


def put(sketches, new, place, ok):
    """The sketches of a burst after the look at `place`, 0 to 5. The first makes the others unknown, as does a step
    that was not finite: a burst is whole or does not count."""
    row = jnp.arange(BURST)[:, None, None]
    kept = jnp.where(place == 0, jnp.nan, sketches)
    return jnp.where(row == place, jnp.where(ok, new, jnp.nan), kept)


@jax.jit  # traced once for all platforms
def after_a_burst(old: jax.Array, bursts, sketches, whole: np.ndarray):
    """The means and the number of bursts after a whole burst; the same if some sketch is not known.

    old: (11, L + 1) rows named by `Lags`. whole: bool (L,), the leaves that are kept as they are.
    """
    products = jnp.sum(sketches[:, None] * sketches[None], -1)  # no dot: a GPU's would round to 10 bits
    q = jnp.concatenate([products, jnp.sum(products, -1, keepdims=True)], -1)
    before = Lags(*old)
    n = bursts.astype(jnp.float32) + 1
    gain = weight_of_newest(n, jnp.maximum)

    def over(weights, x):
        return jnp.sum(jnp.asarray(weights, jnp.float32)[..., None] * x, (0, 1))

    signal = over(_WEIGHT, q)
    own = jnp.stack([q[i, i] for i in range(BURST)])
    power = jnp.mean(own, 0)
    products = [over(np.equal(_LAG, k) / np.equal(_LAG, k).sum(), q) for k in range(1, BURST)]
    slope = over(_CENTERED / (_CENTERED**2).sum(), q)

    def toward(old, new):
        return old + gain * (new - old)

    mean = toward(before.power, power)
    unit = jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1), 0.0)
    lag, pair = (jnp.asarray(x, jnp.float32)[..., None] for x in (_LAG, _PAIR))
    rest = pair * (q - signal - slope * lag) * unit
    one = jnp.sum(rest, 1) / (BURST - 2)
    pairs = jnp.sum((pair * (rest - one[:, None] - one[None])) ** 2, (0, 1)) / 2 / (BURST * (BURST - 3) / 2 - 1)
    ones = jnp.sum(one**2, 0) / (BURST - 1) - pairs / (BURST - 2)
    own = (own - power) * unit
    sketch = jnp.where(jnp.asarray(whole), 0.0, (signal[:-1] * unit[:-1]) ** 2)
    sketch = jnp.append(sketch, jnp.sum(sketch * (mean[:-1] * unit[-1]) ** 2))
    spreads = (pairs, ones, jnp.sum(one * own, 0) / (BURST - 1), jnp.sum(own**2, 0) / (BURST - 1), sketch)
    fade = ((1 - gain) * before.power * unit) ** 2
    rows = zip(before[BURST:], spreads, strict=True)
    means = map(toward, before[1:BURST], products)
    new = jnp.stack([mean, *means, *(fade * x + gain**2 * y for x, y in rows)])
    ok = jnp.all(jnp.isfinite(q[..., -1]))
    return jnp.where(ok, new, old), bursts + ok


class Estimate(NamedTuple):
    """What the lags say of each row, nan before the first burst.

    signal, power: S and a. half: half the width of the 95 % interval of S, as far as it is chance. slack, above: what
    the interval is wider to both sides, and above, where gradients turn round within a burst. least: what S exceeds.
    """

    signal: np.ndarray
    power: np.ndarray
    half: np.ndarray
    slack: np.ndarray
    above: np.ndarray
    least: np.ndarray


def squared_weights(bursts: int) -> float:
    """The sum of the squared weights of so many bursts in their mean."""
    total = 0.0
    for n in range(1, min(bursts, 1000) + 1):
        gain = weight_of_newest(n)
        total = (1 - gain) ** 2 * total + gain**2
    return total


def estimate(lags: Lags, bursts: int) -> Estimate:
    """The estimate of every row, on the host, from the means over so many bursts.

    The interval has Student's t for the few bursts there are, and room for the curvature of C_k: half of what the line
    adds to the mean product. Where gradients turn round within a burst, a line over all lags misses lag 0. The line
    through the first two lags, 2 C_1 - C_2, and the parabola through the first three, 3 C_1 - 3 C_2 + C_3, miss it by
    less and have a larger error. So S moves toward the former by what chance does not explain of their distance, and
    the interval reaches as far beyond as the latter does. And as no product of gradients is larger than their power,
    S is at least |C_k|, of every lag.
    """
    if not bursts:
        return Estimate(*[np.full(np.shape(lags.power), np.nan)] * 6)
    power, products = lags.power, np.array(lags[1:BURST])
    line, two, three = (_LINE @ products, _TWO @ products, _THREE @ products)
    share = np.minimum(line / np.where(power > 0, power, 1), 1.0)
    ones = np.maximum(lags.ones, 0)
    var = _OF_PAIRS * lags.pairs + _OF_ONES * ones - 4 / BURST * share * lags.both
    var = var + share**2 / BURST * lags.squares + 2 / WIDTH * (1 - share) ** 2 * lags.sketch
    error = np.sqrt(np.maximum(var, _OF_PAIRS / 2 * lags.pairs)) * power
    bend = line - _MEAN @ products
    t = student(bursts)

    def spread(weights):
        of_pairs, of_ones = _variance(weights)
        return np.sqrt(of_pairs * lags.pairs + of_ones * ones) * power

    def unexplained(difference, weights):
        return np.sign(difference) * np.maximum(np.abs(difference) - t / 2 * spread(weights), 0)

    shift = unexplained(two - line, _TWO - _LINE)
    above = np.maximum(unexplained(three - two, _THREE - _TWO), 0)
    chance = student(bursts, 0.9995) * np.array([spread(lag) for lag in np.eye(BURST - 1)])
    least = np.max(np.abs(products) - chance, 0)
    return Estimate(line + shift, power, np.hypot(t * error, bend / 2), np.abs(shift) / 2, above, least)


def _variance(weights) -> tuple[float, float]:
    """The variance of a sum of C_1 to C_5 with these weights, in units of Var r and of Var u."""
    of_pair = np.array([0, *(weights / _NUMBER)])[_LAG]
    return float((weights**2 / _NUMBER).sum()), float((of_pair.sum(1) ** 2).sum())


def student(bursts: int, level: float = 0.975) -> float:
    """How many standard errors hold 95 %, with the few bursts there are; or so many on one side."""
    from scipy.special import stdtrit  # comes with jax; not loaded before it is needed

    return float(stdtrit(max((BURST - 2) / squared_weights(bursts) - 1, 2.0), level))
