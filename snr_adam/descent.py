"""How signal and noise make a step: -alpha signal / noise - (alpha lambda) p.

alpha, the learning rate, is in units of the parameters per step; lambda is the decoupled weight decay (Loshchilov &
Hutter 2019); a trust ratio scales a parameter's whole step to its norm (LAMB, You et al. 2020). Without alpha the step
is the ratio itself. Knows one array at a time, and which number holds for which parameter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam import _tree
from snr_adam._numerics import abs_sq, divide, times, value_at


def _trust_ratio(p, u):
    """|p| / |u|, and 1 where either is 0 (LAMB, You et al. 2020, with phi the identity)."""
    p_norm, u_norm = jnp.sqrt(jnp.sum(abs_sq(p))), jnp.sqrt(jnp.sum(abs_sq(u)))
    return jnp.where((p_norm > 0) & (u_norm > 0), p_norm / jnp.where(u_norm > 0, u_norm, 1.0), 1.0)


def _minus_inverse(x):
    """-1 / x, and -inf for a learning rate of 0: nothing moves."""
    return -1.0 / x if isinstance(x, jax.Array) or x else -jnp.inf


def _resolve(hyper, t):
    """A hyper-parameter, or a tree of them, with every schedule replaced by its value at step t."""
    return jax.tree.map(lambda h: value_at(h, t), hyper, is_leaf=_tree.is_none)


class Descent(NamedTuple):
    """How signal and noise make an update: -alpha signal / noise - (alpha lambda) p; without alpha, their ratio."""

    alpha: Any = None
    weight_decay: Any = 0.0
    mask: Any = None
    trust_ratio: bool = False

    @property
    def needs_params(self) -> bool:
        return self.trust_ratio or not (isinstance(self.weight_decay, (int, float)) and self.weight_decay == 0)

    def per_leaf(self, t, outer, updates, params) -> tuple[list, list]:
        """alpha and lambda of every leaf."""
        if self.alpha is None:
            return [None] * outer.num_leaves, [0.0] * outer.num_leaves
        alphas = _tree.spread(_resolve(self.alpha, t), outer, updates, "learning_rate")
        decay = _resolve(self.weight_decay, t)
        if self.mask is None:
            return alphas, [decay] * outer.num_leaves
        mask = self.mask(updates if params is None else params) if callable(self.mask) else self.mask
        masks = _tree.spread(mask, outer, updates, "mask")
        return alphas, [_select(on, decay) for on in masks]

    def step(self, signal, noise, p, alpha, decay, zero):
        x, k = signal
        if alpha is None:
            return divide(times(x, k), noise)
        decays = not (isinstance(decay, float) and decay == 0)
        if self.trust_ratio:
            u = divide(times(x, k), noise)
            u = u + times(p, decay) if decays else u
            return times(u, -alpha * _trust_ratio(p, u)) + zero
        # the scalars come first and on the noise's side, so that equal loops are equal to the compiler as well
        divides = not isinstance(noise, float)  # by 1
        u = divide(x, _minus_inverse(alpha * k) * noise) if divides else times(x, -alpha * k) + zero
        return u - times(p, alpha * decay) if decays else u


def _select(on, decay):
    """decay where the mask is on, else 0; decided now if the mask is known now. A frozen parameter's mask is None."""
    return (decay if on else 0.0) if on is None or isinstance(on, (bool, np.bool_)) else jnp.where(on, decay, 0.0)
