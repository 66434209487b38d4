"""Steps that are finite and yet far from what the run has shown so far: gradients, or a loss, that are much too large.

What is usual is learnt from the run itself, by moving averages of x = log |g|, the log of the global norm, and of the
loss where it is given. With w = max(sqrt(variance), .02) of the log, max(sqrt(variance), .02 |mean|) of the loss:

    d = x - mean                                a spike: d > z w, once n >= warmup
    d := clip(d, -z w, z w)                     c_n = (1 - b) / (1 - b^n), so that weights sum to 1
    mean := mean + c_n d                        variance := (1 - c_n) (variance + c_n d^2)

A spike enters its own history, but only as far as z w: one of them moves the mean by c z w and widens w by the factor
f = sqrt((1 - c) (1 + c z^2)) at most, 1.14 at the defaults. So a few spikes hide no further ones, and a lasting change
of level is taken: a norm that rises by the factor r for good is let through after about log(log r / (z w)) / log f
steps, 18 for r = 50 and w = .1. A threshold that learnt nothing from spikes would wait for ever.

A threshold on the z-score of the norm is that of ZClip (Kumar et al. 2025, arXiv 2504.02507), which takes the norm in
place of its log and always clips. The variance is that of West (CACM 22(9), 1979), with weights that forget.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from snr_adam import _tree
from snr_adam._checks import check_fields, check_scalar, check_whole
from snr_adam._derivatives import sqrt
from snr_adam._numerics import corrected_gain, decay_at

_LEAST = 0.02  # a spread under 2 % counts as 2 %: of gradients that are all alike every change would be a spike


@_tree.exportable
class Usual(NamedTuple):
    """What is usual, two entries each: of the log of the gradients' norm, and of the loss.

    seen: int32, steps in the averages; mean, variance: float32, averages whose weights sum to 1.
    """

    seen: Any
    mean: Any
    variance: Any


def nothing_yet() -> Usual:
    """Before the first step."""
    return Usual(jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.float32), jnp.zeros(2, jnp.float32))


class Verdict(NamedTuple):
    """spike: bool. limit: the norm to clip to, infinite where there is nothing to clip. usual: after the step."""

    spike: Any
    limit: Any
    usual: Usual


@dataclass(frozen=True)
class Spikes:
    """Which steps are spikes, and what `guard` does with them.

    A step is a spike if the log of the gradients' global norm, or the loss, is more than z spreads above its mean. Both
    are moving averages over the run so far. The loss is looked at where it is passed on as Optax's wrappers do:
    `tx.update(grads, state, params, value=loss)`, or as `loss=`; one that is not finite is always a spike.

    Args:
      z: how many spreads, at least 2. The log of a norm is close to a normal number, of which one in 30,000 is so high.
      warmup: so many steps are watched before the first can be a spike.
      decay: b of the averages, the memory of 1 / (1 - b) steps.
      then: "skip" leaves the step out, as if its batch had not been there. "clip" scales the gradients down to the
        longest that would be no spike, exp(mean + z w), or, if it is the loss that spikes, to exp(mean).

    Raises:
      ValueError, TypeError: for numbers out of range, or another `then`.
    """

    z: float = 4.0
    warmup: int = 100
    decay: float = 0.98
    then: Literal["skip", "clip"] = "skip"

    def __post_init__(self):
        check_fields(self)
        check_whole("Spikes: warmup", self.warmup, 1)
        if self.then not in ("skip", "clip"):
            raise ValueError(f"Spikes: then={self.then!r}: must be 'skip' or 'clip'")

    def judge(self, usual: Usual, norm, value, ok) -> Verdict:
        """The verdict on a step with gradients of this norm and this loss; nothing is learnt unless `ok`.

        Gradients of zeros, and losses that are not finite, say nothing of what is usual.
        """
        norm, loss = norm.astype(jnp.float32), jnp.float32(jnp.nan)
        if value is not None:
            check_scalar("guard: value", value, "the loss, one real number")
            loss = jnp.asarray(value).astype(jnp.float32)
        there = jnp.stack([norm > 0, jnp.isfinite(loss)]) & ok
        x = jnp.where(there, jnp.stack([jnp.log(jnp.where(norm > 0, norm, 1.0)), loss]), usual.mean)
        least = _LEAST * jnp.stack([jnp.float32(1.0), jnp.abs(usual.mean[1])])
        reach = self.z * jnp.maximum(sqrt(usual.variance), least)
        away = x - usual.mean
        high = there & (away > reach) & (usual.seen >= self.warmup)
        wrong = ok & ~jnp.isfinite(loss) & (value is not None)
        first = usual.seen == 0
        away = jnp.where(first, away, jnp.clip(away, -reach, reach))
        seen = usual.seen + there
        n = jnp.maximum(seen, 1)
        gain = corrected_gain(decay_at(self.decay, n, jnp.float32), n, jnp.float32)
        mean = usual.mean + gain * away
        variance = (1.0 - gain) * (usual.variance + gain * away * away)
        after = Usual(seen, *(jnp.where(there, x, y) for x, y in ((mean, usual.mean), (variance, usual.variance))))
        longest = jnp.where(high[1] | wrong, usual.mean[0], usual.mean[0] + reach[0])
        spike = high[0] | high[1] | wrong
        return Verdict(spike, jnp.where(spike & (usual.seen[0] > 0), jnp.exp(longest), jnp.inf), after)
