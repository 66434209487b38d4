"""Gradients that are far larger than a moment ago: of each layer and of all, when it began and how large it was.

With x_t = log |g_t| of the steps looked at, and its mean and variance over the looks before,

    z_t = (x_t - mean_{t-1}) / sd_{t-1}

A spike is a z above 6; it lasts until 20 steps have passed without another. What enters the mean is cut off at 6
standard deviations, so that a few spikes do not hide the next, and a level that has changed is learned in some ten
looks. Logarithms, because a gradient is rather so many times as large than so much larger. |g| is what it was before
a guard clipped it; of what `optax.clip_by_global_norm` has clipped, nothing is known.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam.telemetry._averages import newest_weight, stack, with_total

LEAST = 6.0
"""A z above this is a spike."""
CALM = 20
"""Steps without a spike after which the next one is another."""
FEW = 20
"""Looks before there is a z."""
_SAME = 1e-3  # standard deviations are at least that: gradients that are all alike have none


class Spikes(NamedTuple):
    """Rows of one array, (L + 1,) each: one entry per leaf or slice, the last for all together.

    level, spread: mean and variance of log |g|. looks: how many gradients they are of; those of 0 do not count.
    z: of the last look. began, latest: the first and the last step of the newest spike, peak: its largest z; nan before
    the first.
    """

    level: Any
    spread: Any
    looks: Any
    z: Any
    began: Any
    latest: Any
    peak: Any


def none(size: int) -> Spikes:
    """Before the first look."""
    zero, nan = jnp.zeros(size, jnp.float32), jnp.full(size, jnp.nan, jnp.float32)
    return Spikes(zero, zero, zero, nan, nan, nan, nan)


def after(old: Spikes, power, scale, t) -> jax.Array:
    """The rows after a look at step t; power: |g|^2 of each leaf, scale: what a guard has multiplied g with, or nan."""
    scale, t = jnp.where(jnp.isnan(scale), 1.0, scale), t.astype(jnp.float32)
    power = with_total(power / scale / scale)
    there, known = power > 0, old.looks >= FEW
    change = jnp.where(there, jnp.log(jnp.where(there, power, 1.0)) / 2 - old.level, 0.0)
    deviation = jnp.sqrt(old.spread + _SAME**2)
    z = jnp.where(there & known, change / deviation, jnp.nan)
    change = jnp.where(known, jnp.clip(change, -LEAST * deviation, LEAST * deviation), change)
    looks = old.looks + there
    gain = jnp.where(there, newest_weight(looks, jnp.maximum), 0.0)
    spread = (1 - gain) * (old.spread + gain * change * change)
    is_one = z > LEAST
    is_new = is_one & ~(t - old.latest <= CALM)
    began, latest = jnp.where(is_new, t, old.began), jnp.where(is_one, t, old.latest)
    peak = jnp.where(is_new, z, jnp.where(is_one, jnp.maximum(old.peak, z), old.peak))
    return stack(Spikes(old.level + gain * change, spread, looks, z, began, latest, peak))
