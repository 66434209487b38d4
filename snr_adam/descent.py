"""What is done with the ratio of signal and noise: how it becomes the update of a parameter.

    Decoupled     u = -alpha signal / noise - (alpha lambda) p          Adam; Loshchilov & Hutter 2019, Algorithm 2
    TrustRatio    u = -alpha |p| / |r| r,  r = signal / noise + lambda p   LAMB; You et al. 2020, Algorithm 2

alpha, the learning rate, is in units of the parameters per step; lambda is the weight decay, decoupled from signal and
noise; norms are those of one array. A descent is a frozen dataclass that knows one array, never a tree:

    update(ratio, p, alpha, decay) -> u       the update, from `step.Ratio`, the parameter (or None), alpha and lambda
    needs_params                              whether it reads p even where nothing decays

`alpha` and `decay` are numbers of this step: floats, or scalar arrays. A `decay` of the float 0.0 is known to be none,
and without decay p may be None. `ratio.value` is signal / noise; `ratio.times(k)` is k times that in one division, and
the way to end an update so that its bits do not depend on the program around it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp

from snr_adam._derivatives import sqrt
from snr_adam._numerics import abs_sq, times


@runtime_checkable
class Descent(Protocol):
    """What a descent has; see the module.

    `needs_params` may be a field, a property, or belong to the class. No type says that: it is looked for at run time.
    """

    if not TYPE_CHECKING:

        @property
        def needs_params(self) -> bool: ...

    def update(self, ratio, p, alpha, decay, /) -> Any: ...


def decays(decay) -> bool:
    """Whether there is weight decay, as far as one knows before the step."""
    return not (isinstance(decay, (int, float)) and decay == 0)


@dataclass(frozen=True)
class Decoupled:
    """-alpha signal / noise - (alpha lambda) p."""

    needs_params: ClassVar[bool] = False

    def update(self, ratio, p, alpha, decay):
        u = ratio.times(-alpha)
        return u - times(p, alpha * decay) if decays(decay) else u


@dataclass(frozen=True)
class TrustRatio:
    """The same, each array's step scaled to the norm of its parameter; inside of `jax.shard_map`, of its shard."""

    needs_params: ClassVar[bool] = True

    def update(self, ratio, p, alpha, decay):
        u = ratio.value
        u = u + times(p, decay) if decays(decay) else u
        return times(u, -alpha * _trust_ratio(p, u)) + ratio.zero


def _trust_ratio(p, u):
    """|p| / |u|, and 1 where either is 0 (LAMB, with phi the identity)."""
    p_norm, u_norm = sqrt(jnp.sum(abs_sq(p))), sqrt(jnp.sum(abs_sq(u)))
    return jnp.where((p_norm > 0) & (u_norm > 0), p_norm / jnp.where(u_norm > 0, u_norm, 1.0), 1.0)
