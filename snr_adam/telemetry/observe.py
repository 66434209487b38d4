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
before it overwrites them. A and L are one pass over g and m, leaf by leaf, of which a sixteenth is kept until it is
summed. The rest is one more pass, which asks the optimizer for the step it is about to take, made at the first 16
observations and then ever more rarely, down to one in 64. Optax's own averages, b m + (1-b) g, have two products, and
which of them XLA fuses with the addition changes with the program around them: such an optimizer does not wait. Its
bits stay the same and the copies are made.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snr_adam import _tree
from snr_adam._moments import find, kinds_in, rounds_in_one_way
from snr_adam._numerics import abs_sq, hidden, widen
from snr_adam.telemetry import _averages as averages
from snr_adam.telemetry import _sums as sums
from snr_adam.telemetry._averages import Detail, Moving, Recursion, Weights

_RAREST = 64
_EARLY = 4  # steps that are observed whatever `every` says: they show the decays before averages need them


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


def _elements(g, old, new, p, u, least, leaf: _Leaf):
    """The sums over the elements of one leaf that `examine` takes."""

    def along(x):
        shape = [1] * g.ndim
        if leaf.axis is not None:
            shape[leaf.axis] = -1
        return x.reshape(shape)

    (m, v), (m1, v1) = old, new
    hits = counted = jnp.zeros((), jnp.float32)
    if v is not None:
        counted = (abs_sq(g) > 0) & (v > 0)
        hits = counted & (abs_sq(m) > along(least) * v)
    v, v1 = (jnp.zeros((), jnp.float32) if x is None else x for x in (v, v1))
    p = jnp.nan if p is None else abs_sq(widen(_tree.as_array(p)))
    u = abs_sq(widen(_tree.as_array(u)))
    each = [
        abs_sq(g),
        abs_sq(m),
        sums.inner(m, g),
        sums.inner(m1, m),
        sums.inner(m1, g),
        abs_sq(m1),
        v,
        v1,
        p,
        u,
        hits,
        counted,
    ]
    return sums.together([jnp.asarray(x) for x in each], leaf.axis)


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
      every: observe one step in so many. 10 looks a tenth as often; the averages then reach ten times as far back.
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
            parts = []
            for leaf in observed:
                g, (m, _) = widen(_tree.as_array(leaves[leaf.number])), before[leaf.number].read()
                parts.append(sums.in_vectors([abs_sq(g), sums.inner(m, g)], leaf.axis, parts[-1] if parts else None))
            power, product = sums.join(parts, 2)
            total = state.weights.first
            return averages.average(state, power, product / jnp.where(total > 0, total, 1.0))

        def examine():
            us, inner = tx.update(updates, state.inner, params, **extra_args)
            us = outer.flatten_up_to(us)
            before: list[Any] = find(state.inner, outer, leaves)
            after: list[Any] = find(inner, outer, leaves)
            learnt = averages.solve(state.first, ones), averages.solve(state.second, 1.0)
            least = averages.level(*learnt, state.weights) * state.weights.square / state.weights.second
            leasts = hidden(state.count, lambda: [least[leaf.part] for leaf in observed])
            rows = []
            for leaf, each in zip(observed, leasts, strict=True):
                i = leaf.number
                moments = before[i].read(), after[i].read()
                rows.append(_elements(widen(_tree.as_array(leaves[i])), *moments, ps[i], us[i], each, leaf))
            return averages.examine(state, sums.join(rows, 12))

        t = optax.safe_increment(state.count)
        due = (state.count % every == 0) | (state.count < _EARLY)
        stride = jnp.clip(2 ** (28 - jax.lax.clz(jnp.maximum(state.seen, 8))), 1, _RAREST)
        rare = state.seen & (stride - 1) == 0
        old = (state.moving, state.square, state.seen), (state.first, state.second, state.detail, state.examined)
        # one `cond` in the other: where arrays are small, their number is what an unobserved step pays for
        new, zero = _before_the_step(due, lambda: (look(), jax.lax.cond(rare, examine, lambda: old[1])), old, t)
        (moving, square, seen), (first, second, detail, examined) = new
        start = state.count == 0, detail.first, detail.second
        weights = averages.advance(state.weights, averages.solve(first, ones), averages.solve(second, 1.0), start)
        new = ObserveState(None, t, seen, examined, square, state.axis, moving, first, second, weights, detail)

        gs = leaves
        if rounds_in_one_way(state.inner):
            gs = [g if g is None else _wait(g, zero) for g in leaves]
        out, inner = tx.update(outer.unflatten(gs), state.inner, params, **extra_args)
        return out, new._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)
