"""What the observed steps have shown so far: vectors with an entry per layer, and how one more step changes them.

Three kinds of knowledge. *Averages* over steps, with the variances that their errors are made of. The *recursion* that
a moment follows, x_t = decay x_{t-1} + gain y_t: nobody is asked for decay and gain, they are the least squares of what
was seen. And from those, step by step, the *weights* that past gradients have in the moment: their sum, which corrects
its bias, and the sum of their squares, which is the share of noise that passes it. Formulas in `telemetry`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam import _tree

WINDOW = 80
"""Averages over observed steps forget at this rate: long enough for noise scales, short enough to follow a loss that
falls (`tests/test_examples.py` compares them with the exact value)."""
_LEVEL = 3.8415  # 95 % of the squares of normal numbers are below
_BEND = 2.42  # see level


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


def advance(w: Weights, first, second, start) -> Weights:
    """The weights after one more gradient. A moment that is there at the very start counts as having all of its."""
    (d, c), (d2, c2), (is_first, m, v) = first, second, start

    def begin(x, full, there):
        return jnp.where(is_first & (there > 0), full, x)

    one, sq, two = w
    one, sq = begin(one, c / (1 - d), m), begin(sq, c * c / (1 - d * d), m)
    two = begin(two, c2 / (1 - d2), v)
    return Weights(d * one + c, d * d * sq + c * c, d2 * two + c2)


def newest_weight(seen, largest=max):
    """The weight of the newest of so many observations in the averages: 2 / (n + 1), then that of a window.

    While the window fills, weights grow in proportion to n, so that the large gradients of the very first steps, a
    hundred times the power of later ones, are soon forgotten; a plain mean would keep them.
    """
    return largest(2 / (seen + 1), 1 / WINDOW)


def average(state, power, persistent):
    """Moving averages with one more step, unless it was not finite."""
    n = state.seen.astype(jnp.float32)
    gain = newest_weight(n + 1, jnp.maximum)
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


def examine(state, sums):
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


def level(first, second, weights: Weights):
    """The square of m^ / (rho v^)^(1/2) that noise exceeds in 5 % of cases: 3.84, less what v^ owes to m^ itself.

    Of v^, a share kappa moves with m^^2, which calls for 3.84 / (1 + 2.84 kappa). The rest of its variance, 2 rho_v -
    2 kappa^2, widens the tail: by half the curvature of the normal tail over its slope there, 1.21.
    """
    (d, _), (_, gain) = first, second
    newest = jnp.clip(gain / jnp.where(weights.second > 0, weights.second, 1.0), 0.0, 1.0)
    kappa = newest * (1 - d * d) / (1 - (1 - newest) * d * d)
    rest = newest / (2 - newest) - kappa * kappa
    return _LEVEL * (1 + _BEND * rest) / (1 + kappa * (_LEVEL - 1))
