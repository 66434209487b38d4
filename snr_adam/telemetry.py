"""Signal and noise of a running optimizer, per layer: what is measured on the device, while it trains.

A gradient is g_t = G + x_t: the true gradient and noise of covariance Sigma, independent from step to step. The
optimizer's first moment is a weighted sum of past gradients, m_{t-1} = sum_s a_s g_s, so m^ = m / sum a_s is an average
of them. Two numbers per leaf and observed step tell the signal from the noise:

    A_t = |g_t|^2              E A = |G|^2 + tr(Sigma)       the power of one gradient
    L_t = <m^_{t-1}, g_t>      E L = |G|^2                   its persistent part: the noises of m and g are independent
    SNR = L / (A - L)          averages over steps first, then the ratio; it may come out negative where there is none

No second moment enters, so it holds for any optimizer with momentum and does not lag behind by 1 / (1 - b2) steps.

*Floor.* Noise passes m^ too: E |m^|^2 = |G|^2 + rho tr(Sigma) with rho = sum a_s^2 / (sum a_s)^2, for an EMA
(1-b)(1+b^t) / ((1+b)(1-b^t)). Pure noise shows a pseudo-SNR |m^| / |v^|^(1/2) of sqrt(rho): 0.23 for b1 = .9.

*Standard error.* With l = L / A the error of the SNR is that of z_t = (L_t - l A_t) / A, by the delta
method:

    Var SNR = sum w^2 (Var z + 2 q / (1-q) (rho + (1 - 2l) a_1 / b) V) / (1-l)^4,   V = Var(L/A) l / (l + rho)

w are the weights of the steps, Var z is measured. The second term is the autocorrelation of L_t. Where all is noise it
is 0: L_t is a martingale difference. Where there is signal, x_s enters L_s through <G, x_s> and again, through m, all
later ones: V = G' Sigma G / A^2 is that part of Var L, taking it that the signal lies in the directions where the noise
lies; a_1 is the weight of the newest gradient in m^ (1-b for an EMA), q = a b^k with a the decay of the average and k
the steps between two observations. Left out, the error of L would be half of what it is. Where the SNR is above 1 the
second term is negative and the difference of the two uncertain; it is kept above its value for Gaussian noise,

    ((1 - 2l)^2 + rho) V + (rho + 2 l^2) V (1-l) / l       in place of Var z where that is less.

The error of L itself is the same with l = 0 in the brackets and Var(L/A) for Var z. Less signal than about 2 errors
cannot be told from none: the limit of detection, which `noise_scale` turns into ">= limit".

*Decays* are not asked for but measured: least squares of m_t on m_{t-1} and g_t gives decay and gain of every leaf,
whatever comes before the moment (a clipped gradient has a smaller gain) and however it is stored. The sums of the
weights a_s and of their squares follow by recursion.

*Cost* (memory traffic). All is read from the state before the step, under a `lax.cond`. The gradient given to the
optimizer waits for it, through a zero that no compiler can know: without that XLA copies the moments and the parameters
before it overwrites them. A and L read 12 bytes per float32 parameter; the rest is one more pass, which asks the
optimizer for the step it is about to take, made at the first 16 observations and then ever more rarely, down to one
in 64. Optax's own averages, b m + (1-b) g, have two products, and which of them XLA fuses with the addition changes
with the program around them: such an optimizer does not wait. Its bits stay the same and the copies are made.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snr_adam import _tree
from snr_adam._numerics import abs_sq, compute_dtype
from snr_adam.moments import find, kinds_in, rounds_in_one_way

WINDOW = 80
"""Averages over observed steps are plain means of the first 80 and forget at that rate from then on: long enough for
noise scales, short enough to follow a loss that falls (`tests/test_examples.py` compares both with the exact value)."""
_RAREST = 64
_EARLY = 4  # steps that are observed whatever `every` says: they show the decays before averages need them
_LEVEL = 3.8415  # 95 % of the squares of normal numbers are below
_BEND = 2.42  # see _level


@_tree.exportable
class Moving(NamedTuple):
    """Averages over observed steps, each float32 of shape (L + 1,): one per leaf or slice, the last for all together.

    gradient_sq, persistent: A and L. aa, ax, xx: the variances and the covariance of A_t and L_t in units of the A of
    their time, which the standard error is made of (after West 1979, so that nothing cancels).
    """

    gradient_sq: Any
    persistent: Any
    aa: Any
    ax: Any
    xx: Any


@_tree.exportable
class Recursion(NamedTuple):
    """Averages that give the decay and gain of x_t = decay x_{t-1} + gain y_t by least squares, float32 (L,) each."""

    old_old: Any
    old_in: Any
    in_in: Any
    new_old: Any
    new_in: Any
    new_new: Any


@_tree.exportable
class Weights(NamedTuple):
    """The sum of the weights of past gradients in the first moment, of their squares, and of those in the second."""

    first: Any
    square: Any
    second: Any


@_tree.exportable
class Detail(NamedTuple):
    """Sums over the elements of each leaf or slice when it was last examined, float32 (L,) each.

    first, second: |m|^2 and the sum of v. update, param: of the squares of the update and of the parameter.
    significant: how many of the `counted` elements, those with a gradient and a v, have an |m| that noise alone would
    exceed in 5 % of cases.
    """

    first: Any
    second: Any
    update: Any
    param: Any
    significant: Any
    counted: Any


@_tree.exportable
class ObserveState(NamedTuple):
    """The state of `observe`: the wrapped optimizer's, unchanged, and float32 vectors with an entry per leaf.

    inner: the wrapped state. count, seen, examined: int32 numbers of steps, of steps averaged, of examinations.
    square: the sum of the squared weights of the averages. axis: int32 (L,), the axis a leaf was sliced along, or -1.
    """

    inner: Any
    count: Any
    seen: Any
    examined: Any
    square: Any
    axis: Any
    moving: Moving
    first: Recursion
    second: Recursion
    weights: Weights
    detail: Detail


class _Leaf(NamedTuple):
    """Where an observed leaf is in the tree, the axis it is sliced along (None: not), and its part of the vectors."""

    number: int
    axis: int | None
    part: slice


def _layer_axis(rule, path: str, shape) -> int | None:
    """The axis of this leaf that stacks layers."""
    if isinstance(rule, Mapping):
        rule = next((axis for pattern, axis in rule.items() if re.search(pattern, path)), None)
    if rule is None or not -len(shape) <= rule < len(shape) or not shape[rule]:
        return None
    return rule % len(shape)


def _observed(tree, found, rule) -> list[_Leaf]:
    """The leaves that have a first moment."""
    leaves, start = [], 0
    for i, ((path, x), moments) in enumerate(zip(_tree.named_leaves(tree), found, strict=True)):
        if moments is not None:
            axis = _layer_axis(rule, path, jnp.shape(x))
            stop = start + (1 if axis is None else jnp.shape(x)[axis])
            leaves.append(_Leaf(i, axis, slice(start, stop)))
            start = stop
    return leaves


def _wide(x):
    """A leaf as numbers to compute with."""
    x = _tree.as_array(x)
    return x if jnp.iscomplexobj(x) else x.astype(compute_dtype(x))


def _inner(x, y):
    """Re(conj(x) y), element by element."""
    return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y


def _sum(x, axis):
    """The sum over all axes but this one, as a float32 vector."""
    keep = () if axis is None else (axis,)
    total = jnp.sum(x, tuple(i for i in range(x.ndim) if i not in keep)).astype(jnp.float32)
    return _whole(total if keep else total[None])


def _whole(x):
    """The same on every device, where an explicit mesh shards it."""
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, jax.P()) if any(part is not None for part in spec) else x


def _sums(xs, axis):
    """`_sum` of several arrays of one shape, in one pass: what they share is computed once and stored nowhere."""
    xs = [jnp.broadcast_to(x, xs[0].shape).astype(jnp.float32) for x in xs]
    xs = [x[None] if x.ndim == 0 else x for x in xs]
    last = xs[0].ndim - 1
    rows = np.gcd(xs[0].shape[0], 4096) if last == 0 and axis is None else 1
    if rows > 1 and jax.typeof(xs[0]).sharding.spec[0] is None:  # in rows, to sum them side by side
        xs, last = [x.reshape(rows, -1) for x in xs], 1
    over = (last,) if axis != last else tuple(range(last))
    sums = jax.lax.reduce(tuple(xs), (np.float32(0),) * len(xs), _add, over) if over else tuple(xs)
    return [_sum(x, axis if over == (last,) else 0) for x in sums]


def _sums_apart(xs, axis):
    """The same in one pass each."""
    return [_sum(x, axis) for x in xs]


def _add(xs, ys):
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


def _join(parts, number: int):
    """One vector of the leaves' vectors."""
    return jnp.concatenate(parts) if parts else jnp.zeros(number, jnp.float32)


def _with_total(x):
    return jnp.concatenate([x, jnp.sum(x, keepdims=True)])


def solve(r: Recursion, one):
    """Decay and gain of a recursion: least squares, drawn weakly to gain + one decay = 1 and to decay = .9.

    One element has one equation per step, and a constant gradient the same one again and again: hence the priors. An
    average has `one` = 1, a sum 0.
    """
    prior = jnp.minimum(1e-4, 1e-3 * r.old_old + 1e-9)  # weak also where a clip leaves little of the gradients
    guess = 1e-4 * prior
    a, b, n = r.old_old + (prior * one + guess), r.old_in + prior * one, r.in_in + prior
    e, f = r.new_old + (prior * one + 0.9 * guess), r.new_in + prior
    scale = 1 / (a * n - b * b)
    return jnp.clip((e * n - f * b) * scale, 0.0, 1 - 1e-7), jnp.maximum((f * a - e * b) * scale, 0.0)


def _learn(r: Recursion, new: Recursion, power, gain) -> Recursion:
    """The averages with one more step, in units of the gradient's power; a leaf without gradient learns nothing."""
    seen = power > 0
    scale = jnp.where(seen, 1 / jnp.where(seen, power, 1.0), 0.0)
    return jax.tree.map(lambda old, x: jnp.where(seen, old + gain * (x * scale - old), old), r, new)


def _advance(w: Weights, first, second, start) -> Weights:
    """The weights after one more gradient. A moment that is there at the very start counts as having all of its."""
    (d, c), (d2, c2), (is_first, m, v) = first, second, start

    def begin(x, full, there):
        return jnp.where(is_first & (there > 0), full, x)

    one, sq, two = w
    one, sq = begin(one, c / (1 - d), m), begin(sq, c * c / (1 - d * d), m)
    two = begin(two, c2 / (1 - d2), v)
    return Weights(d * one + c, d * d * sq + c * c, d2 * two + c2)


def _average(state: ObserveState, power, persistent):
    """Moving averages with one more step, unless it was not finite."""
    n = state.seen.astype(jnp.float32)
    gain = jnp.maximum(1 / (n + 1), 1 / WINDOW)
    a, x = _with_total(power), _with_total(persistent)
    old = state.moving
    da, dx = a - old.gradient_sq, x - old.persistent
    mean = old.gradient_sq + gain * da
    scale = jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1.0), 0.0)
    ra, rx = da * scale, dx * scale
    spreads = zip(old[2:], (ra * ra, ra * rx, rx * rx), strict=True)
    new = Moving(mean, old.persistent + gain * dx, *((1 - gain) * (c + gain * y) for c, y in spreads))
    usable = (state.count > 0) & jnp.isfinite(a[-1]) & jnp.isfinite(x[-1])
    square = (1 - gain) ** 2 * state.square + gain**2
    new = (new, square, state.seen + 1)
    return jax.tree.map(lambda x, y: jnp.where(usable, x, y), new, (old, state.square, state.seen))


def _examine(state: ObserveState, sums):
    """Details and recursions from the sums over one step's elements."""
    gg, mm, mg, m1m, m1g, m1m1, v, v1, p, u, significant, counted = sums
    usable = jnp.isfinite(jnp.sum(gg) + jnp.sum(m1m1) + jnp.sum(v1))
    n = state.examined.astype(jnp.float32)
    fast, slow = jnp.maximum(1 / (n + 1), 0.5), jnp.maximum(1 / (n + 1), 0.1)
    seen = jnp.where(gg > 0, 1 / jnp.where(gg > 0, gg, 1.0), 0.0)
    w, w1 = v * seen, v1 * seen
    new = (
        _learn(state.first, Recursion(mm, mg, gg, m1m, m1g, m1m1), gg, fast),
        _learn(state.second, Recursion(w * w, w, gg * seen, w1 * w, w1, w1 * w1), (gg > 0).astype(gg.dtype), slow),
        Detail(mm, v, u, p, significant, counted),
        state.examined + 1,
    )
    old = (state.first, state.second, state.detail, state.examined)
    return jax.tree.map(lambda x, y: jnp.where(usable, x, y), new, old)


def _level(first, second, weights: Weights):
    """The square of m^ / (rho v^)^(1/2) that noise exceeds in 5 % of cases: 3.84, less what v^ owes to m^ itself.

    Of v^, a share kappa moves with m^^2, which calls for 3.84 / (1 + 2.84 kappa). The rest of its variance, 2 rho_v -
    2 kappa^2, widens the tail: by half the curvature of the normal tail over its slope there, 1.21.
    """
    (d, _), (_, gain) = first, second
    newest = jnp.clip(gain / jnp.where(weights.second > 0, weights.second, 1.0), 0.0, 1.0)
    kappa = newest * (1 - d * d) / (1 - (1 - newest) * d * d)
    rest = newest / (2 - newest) - kappa * kappa
    return _LEVEL * (1 + _BEND * rest) / (1 + kappa * (_LEVEL - 1))


def _elements(g, old, new, p, u, least, leaf: _Leaf):
    """The sums over the elements of one leaf that `_examine` takes."""

    def along(x):
        shape = [1] * g.ndim
        if leaf.axis is not None:
            shape[leaf.axis] = -1
        return x[leaf.part].reshape(shape)

    (m, v), (m1, v1) = old, new
    hits = counted = jnp.zeros((), jnp.float32)
    if v is not None:
        counted = (abs_sq(g) > 0) & (v > 0)
        hits = counted & (abs_sq(m) > along(least) * v)
    v, v1 = (jnp.zeros((), jnp.float32) if x is None else x for x in (v, v1))
    p = jnp.nan if p is None else abs_sq(_wide(p))
    u = abs_sq(_wide(u))
    each = [abs_sq(g), abs_sq(m), _inner(m, g), _inner(m1, m), _inner(m1, g), abs_sq(m1), v, v1, p, u, hits, counted]
    return _sums([jnp.asarray(x) for x in each], leaf.axis)


def _ones(observed, found):
    """Whether decay and gain of each entry's first moment add up to 1: 1 for averages, 0 for sums."""
    sizes = [leaf.part.stop - leaf.part.start for leaf in observed]
    kinds = [0.0 if found[leaf.number].is_sum else 1.0 for leaf in observed]
    return np.repeat(np.asarray(kinds, np.float32), sizes)


def _blank(inner, observed, leaves) -> ObserveState:
    """The state before the first step."""
    abstract = any(map(_tree.is_abstract, leaves))
    axes = [-1 if leaf.axis is None else leaf.axis for leaf in observed for _ in range(leaf.part.start, leaf.part.stop)]

    def zeros(kind, size):
        return kind(*(jnp.zeros(size, jnp.float32) for _ in kind._fields))

    n, counts = len(axes), [jnp.zeros((), jnp.int32) for _ in range(3)]
    vectors = Moving, Recursion, Recursion, Weights, Detail
    sizes = n + 1, n, n, n, n
    axis = jnp.asarray(axes, jnp.int32)
    own: Any = (*counts, jnp.zeros((), jnp.float32), axis, *map(zeros, vectors, sizes))
    if abstract:
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
    return ObserveState(inner, *own)


def _before_the_step(due, measure, old, t):
    """measure() if it is due, else old; and a zero that depends on it, for `_wait`."""
    return jax.lax.cond(
        due,
        lambda: (measure(), jnp.where(t > 0, 0, 1).astype(jnp.uint32)),
        lambda: (old, jnp.uint32(0)),
    )


def _wait(g, zero):
    """g, once `zero` is known: no bit of it changes. An integer operation, because a floating-point one would let the
    compiler fuse what comes after it in another way."""
    g = _tree.as_array(g)
    if jnp.iscomplexobj(g):
        return jax.lax.complex(_wait(g.real, zero), _wait(g.imag, zero))
    if not jnp.issubdtype(g.dtype, jnp.floating):
        return g
    word = jnp.dtype(f"uint{8 * g.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(g, word) | zero.astype(word), g.dtype)


def observe(
    tx: optax.GradientTransformation, every: int = 1, layer_axis: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Watches an optimizer: its updates and its state are the same bits with and without.

    SNR = L / (A - L),   A = average of |g_t|^2,   L = average of <m^_{t-1}, g_t>, per leaf. Read it with
    `report(opt_state)` or `metrics(opt_state)`, at any time.

    Args:
      tx: any optimizer with a first moment: one of this package, `optax.adamw`, `optax.lion`, `optax.sgd` with
        momentum, a chain, ... It may also be a part of a larger one: inside `optax.MultiSteps` it sees the mean
        gradients, which is right; behind a clip the clipped ones, before it the raw ones.
      every: observe one step in so many. 10 makes it almost free; the averages then reach ten times as far back.
      layer_axis: the axis along which leaves stack layers (as scanned layers do), to report each layer by itself: an
        int for all leaves, a dict from patterns (regular expressions, searched in "layers/kernel") to ints, or None.

    Returns:
      A transformation whose state is an `ObserveState`; arguments pass through.

    Raises:
      ValueError: if `every` is less than 1, or if `tx` keeps no first moment or is `optax.MultiSteps`.

    >>> tx = observe(optax.adamw(1e-3))
    >>> w = jnp.ones(4)
    >>> state = tx.init(w)
    >>> for step in range(4):
    ...     updates, state = jax.jit(tx.update)(jnp.ones(4), state, w)  # one gradient for ever: no noise at all
    >>> print(state.moving.gradient_sq, state.moving.persistent.round(4))
    [4. 4.] [4. 4.]

    Reference: Balles & Hennig 2018 (arXiv 1705.07774) for rho; McCandlish et al. 2018 (arXiv 1812.06162) for A.
    """
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"observe: every={every!r} must be a whole number of steps, 1 or more")
    tx = optax.with_extra_args_support(tx)

    def init(params):
        inner = tx.init(params)
        if "MultiStepsState" in kinds_in(inner):
            raise ValueError(
                "observe: most gradients that MultiSteps is given do not reach the moment; observe what is inside of "
                "MultiSteps instead: optax.MultiSteps(snr_adam.observe(tx), k)"
            )
        leaves, outer = _tree.flatten(params)
        observed = _observed(params, find(inner, outer, leaves), layer_axis)
        if not observed and any(x is not None for x in leaves):
            raise ValueError(
                f"observe: {kinds_in(inner)} keep no first moment of the gradients, so nothing tells signal from "
                "noise: wrap an optimizer with momentum, such as snr_adam.adamw or optax.sgd(0.1, momentum=0.9)"
            )
        return _blank(inner, observed, leaves)

    def update(updates, state, params=None, **extra_args):
        leaves, outer = _tree.flatten(updates)
        places = find(state.inner, outer, leaves)
        observed = _observed(updates, places, layer_axis)
        ones = _ones(observed, places)
        ps = [None] * len(leaves) if params is None else outer.flatten_up_to(params)

        def look():
            before: list[Any] = find(state.inner, outer, leaves)
            power, product = [], []
            for leaf in observed:
                g, (m, _) = _wide(leaves[leaf.number]), before[leaf.number].read()
                # two vectorised passes are faster, but would store what a word decodes to
                sums = _sums if before[leaf.number].is_packed else _sums_apart
                a, x = sums([abs_sq(g), _inner(m, g)], leaf.axis)
                power.append(a)
                product.append(x)
            total = state.weights.first
            product = _join(product, 0) / jnp.where(total > 0, total, 1.0)
            return _average(state, _join(power, 0), product)

        def examine():
            us, inner = tx.update(updates, state.inner, params, **extra_args)
            us = outer.flatten_up_to(us)
            before: list[Any] = find(state.inner, outer, leaves)
            after: list[Any] = find(inner, outer, leaves)
            learnt = solve(state.first, ones), solve(state.second, 1.0)
            least = _level(*learnt, state.weights) * state.weights.square / state.weights.second
            rows = []
            for leaf in observed:
                i = leaf.number
                moments = before[i].read(), after[i].read()
                rows.append(_elements(_wide(leaves[i]), *moments, ps[i], us[i], least, leaf))
            columns = zip(*rows, strict=True) if rows else [[]] * 12
            return _examine(state, [_join(list(column), 0) for column in columns])

        t = optax.safe_increment(state.count)
        due = (state.count % every == 0) | (state.count < _EARLY)
        stride = jnp.clip(2 ** (28 - jax.lax.clz(jnp.maximum(state.seen, 8))), 1, _RAREST)
        rare = state.seen & (stride - 1) == 0
        old = (state.moving, state.square, state.seen), (state.first, state.second, state.detail, state.examined)
        # one `cond` in the other: where arrays are small, their number is what an unobserved step pays for
        new, zero = _before_the_step(due, lambda: (look(), jax.lax.cond(rare, examine, lambda: old[1])), old, t)
        (moving, square, seen), (first, second, detail, examined) = new
        start = state.count == 0, detail.first, detail.second
        weights = _advance(state.weights, solve(first, ones), solve(second, 1.0), start)
        new = ObserveState(None, t, seen, examined, square, state.axis, moving, first, second, weights, detail)

        gs = leaves
        if rounds_in_one_way(state.inner):
            gs = [g if g is None else _wait(g, zero) for g in leaves]
        out, inner = tx.update(outer.unflatten(gs), state.inner, params, **extra_args)
        return out, new._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)
