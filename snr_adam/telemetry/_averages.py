"""What looks have shown so far: vectors with an entry per layer, and how one more look changes them.

Three kinds of numbers. *Means* over looks, with the variances that their errors are made of. What a moment *remembers*:
the sum of the weights of past gradients in it, the sum of their squares, and on accelerators its own square, all by
exact recursion from step to step. And the *last* look: numbers of one step, with that step's own weights.

Each kind is one array with a row per name, because a state of few arrays is what a small network's step can afford.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._numerics import Average

WINDOW = 80
"""Means over looks forget at this rate: long enough for noise scales, short enough to follow a loss that falls
(`tests/test_examples.py` compares them with the exact value)."""
_LEVEL = 3.8415  # 95 % of the squares of normal numbers are below
_BEND = 2.42  # see level


class Means(NamedTuple):
    """Means over looks, (L + 1,) each: one entry per leaf or slice, the last for all together.

    gradient_sq, persistent: A and L. aa, ax, xx: the variances and the covariance of A_t and L_t in units of the A of
    their time, which the standard error is made of (after West 1979, so that nothing cancels). clipped: the share of
    looks whose gradients were clipped, nan where nothing clips.
    """

    gradient_sq: Any
    persistent: Any
    aa: Any
    ax: Any
    xx: Any
    clipped: Any


class Memory(NamedTuple):
    """What the moments remember after the last step, (L,) each.

    weight, square: the sum of the weights of past gradients in the first moment, and of their squares. Kept where
      decays change in time; constant ones have a closed form.
    first, second: |m|^2 and the sum of v, each as a number and what that number has lost to rounding.
    """

    weight: Any
    square: Any
    first: Any
    first_rest: Any
    second: Any
    second_rest: Any

    def begun(self, late) -> "Memory":
        """The same, not known where the moments were there before anybody looked."""
        return Memory(self.weight, self.square, *(jnp.where(late, jnp.nan, x) for x in self[2:]))


class Last(NamedTuple):
    """The last look, (L,) each, nan where there is no number.

    signal_sq, noise_sq: |m^|^2 and the sum of v^. rho: the share of noise that passes m^; floor_sq: the same, where
    the noise is an average of squares. leak, newest: what m forgets in a step, and the newest gradient's weight in m^.
    power, product, before_sq: |g|^2, <m, g> and |m|^2 with the m before the step. zeros: how many elements of g are 0.
    rate: the learning rate. scale: what a guard multiplied the gradients with.

    The others are details. significant: how many of the `counted` elements, those with a gradient and a v, have an |m|
    that noise alone would exceed in 5 % of cases; nan where many gradients are 0. update_sq, param_sq: of the squares
    of the update and of the parameter. relative_sq: of |g|^2 / v^. lost: how many of the `moved` elements, those with
    an update that is not 0, are the same after it. largest_gradient, largest_signal, largest_update: of |g|, |m^|, |u|.
    """

    signal_sq: Any
    noise_sq: Any
    rho: Any
    floor_sq: Any
    leak: Any
    newest: Any
    power: Any
    product: Any
    before_sq: Any
    zeros: Any
    rate: Any
    scale: Any
    significant: Any
    counted: Any
    update_sq: Any
    param_sq: Any
    relative_sq: Any
    lost: Any
    moved: Any
    largest_gradient: Any
    largest_signal: Any
    largest_update: Any

    def with_details(self, old: "Last") -> "Last":
        """The same with the details of another, which take a pass of their own and are made at fewer looks."""
        return Last(*self[:-DETAILS], *old[-DETAILS:])


DETAILS = len(Last._fields) - Last._fields.index("significant")
"""How many of the rows of `Last` are details."""


def zeros(kind, size: int):
    """The array of this kind before the first look."""
    return jnp.full((len(kind._fields), size), math.nan if kind is Last else 0.0, jnp.float32)


def stack(rows) -> jax.Array:
    """Rows by name as one array."""
    return jnp.stack([jnp.asarray(row, jnp.float32) for row in rows])


def newest_weight(seen, largest=max):
    """The weight of the newest of so many looks in the means: 2 / (n + 1), then that of a window.

    While the window fills, weights grow in proportion to n, so that the large gradients of the very first steps, a
    hundred times the power of later ones, are soon forgotten; a plain mean would keep them.
    """
    return largest(2 / (seen + 1), 1 / WINDOW)


def with_total(x):
    return jnp.concatenate([x, jnp.sum(x, keepdims=True)])


def mean_of(old: jax.Array, square, seen, power, persistent, scale):
    """The means, the sum of their squared weights and the number of looks after one more look.

    Where nothing persistent is known yet, or ever, A alone is averaged, and L is nan."""
    gain = newest_weight(seen.astype(jnp.float32) + 1, jnp.maximum)
    a, x = with_total(power), with_total(persistent)
    rows = Means(*old)
    da, dx = a - rows.gradient_sq, x - rows.persistent
    mean = rows.gradient_sq + gain * da
    unit = jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1.0), 0.0)
    ra, rx = da * unit, dx * unit
    spreads = zip((rows.aa, rows.ax, rows.xx), (ra * ra, ra * rx, rx * rx), strict=True)
    spreads = ((1 - gain) * (c + gain * y) for c, y in spreads)
    clipped = jnp.where(jnp.isnan(scale), jnp.nan, scale < 1)
    clipped = jnp.append(clipped, jnp.max(clipped, initial=0.0))  # one for all leaves, if there is one guard
    clipped = rows.clipped + gain * (clipped - rows.clipped)
    new = stack((mean, rows.persistent + gain * dx, *spreads, clipped))
    return new, (1 - gain) ** 2 * square + gain**2, seen + 1


def advance(sum_and_rest, change):
    """A running sum after a change, and what rounding took from it, so that errors do not add up over the steps."""
    total, rest = sum_and_rest
    change = change + rest
    new = total + change
    return new, change - (new - total)


def is_constant(average: Average) -> bool:
    """Whether this moment's decay is a number that is known before the run."""
    return isinstance(average.gain, float) and isinstance(average.leak, float)


def weights_after(average: Average, t):
    """The sum of the weights of t gradients in a moment of constant decay, and the sum of their squares.

    gain (1 - d^t) / (1 - d), gain^2 (1 - d^2t) / (1 - d^2) with d = 1 - leak.
    """
    gain, leak, t = average.gain, average.leak, t.astype(jnp.float32)
    log = math.log1p(-leak) if leak < 1 else -math.inf
    both = leak * (2 - leak)
    return (
        gain / leak * -jnp.expm1(_product(t, log)),
        gain * gain / both * -jnp.expm1(_product(t, 2 * log)),
    )


def _product(t, log: float):
    """t log d, and 0 for t = 0 also where nothing is kept."""
    return t * log if math.isfinite(log) else jnp.where(t > 0, -jnp.inf, 0.0)


def level(leak, newest):
    """The square of m^ / (rho v^)^(1/2) that noise exceeds in 5 % of cases: 3.84, less what v^ owes to m^ itself.

    leak: of the first moment. newest: the weight of the newest gradient in v^. Of v^, a share kappa moves with m^^2,
    which calls for 3.84 / (1 + 2.84 kappa). The rest of its variance, 2 rho_v - 2 kappa^2, widens the tail: by half the
    curvature of the normal tail over its slope there, 1.21.
    """
    d = 1.0 - leak
    newest = jnp.clip(newest, 0.0, 1.0)
    kappa = newest * (1 - d * d) / (1 - (1 - newest) * d * d)
    rest = newest / (2 - newest) - kappa * kappa
    return _LEVEL * (1 + _BEND * rest) / (1 + kappa * (_LEVEL - 1))


def errors(means: Means, square, rho, decay, newest, seen: int, steps: int):
    """The standard error of L as a share of A, times A, on the host.

    With l = L / A it is that of z_t = (L_t - l A_t) / A, by the delta method:

        Var l = sum w^2 (Var z + pull (rho + (1 - 2l) a_1 / b) V),   V = Var(L/A) l / (l + rho),   pull = 2 q / (1-q)

    w are the weights of the looks, Var z is measured. The second term is the autocorrelation of L_t. Where all is noise
    it is 0: L_t is a martingale difference. Where there is signal, x_s enters L_s through <G, x_s> and again, through
    m, all later ones: V = G' Sigma G / A^2 is that part of Var L, taking it that the signal lies in the directions
    where the noise lies; a_1 is the weight of the newest gradient in m^ (1-b for an EMA), q = a b with a the decay of
    the average; of looks in bursts the sum over lags ends with the burst. Left out, the error of L would be half of
    what it is. Where L is most of A the second term is negative and the difference of the two uncertain; it is kept
    above its value for Gaussian noise, ((1 - 2l)^2 + rho) V + (rho + 2 l^2) V (1-l) / l in place of Var z if that is
    less.

    rho, decay, newest: of m^, as in `Last`. seen, steps: how many looks there were in how many steps.
    """
    a, x, aa, ax, xx, _ = means
    share = x / a
    both = np.clip(share, 0, 1)
    per_share = xx / (both + rho)
    v = per_share * both
    q = (1 - newest_weight(max(seen, 1))) * decay
    has_pauses = steps >= 1.5 * max(seen, 1)
    pull = 2 * sum((1 - k / 6) * q**k for k in range(1, 6)) if has_pauses else 2 * q / (1 - q)
    ahead = newest / np.maximum(decay, np.finfo(float).tiny)
    model = ((1 - 2 * share) ** 2 + rho) * v + (rho + 2 * both**2) * per_share * (1 - both)
    z = np.maximum(xx - 2 * share * ax + share**2 * aa, model)
    return np.sqrt(np.maximum(square * (z + pull * (rho + (1 - 2 * share) * ahead) * v), 0)) * a
