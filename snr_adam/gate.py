"""What is decided before a step, from all gradients together, and how a step takes it in.

A step that must not happen, or whose gradients are too long, could be mended around the optimizer: keep the old state
beside the new one and choose. That costs a copy of the state. Carried into the step the choice is free: the moments are
chosen before they are stored, and the update is computed from what is stored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam._numerics import saturate, times


class Gate(NamedTuple):
    """What was decided, from all gradients together, before a step (`guard.py`).

    ok: bool scalar; where it is false the moments and the count stay what they are, and the updates mean nothing.
    scale: scalar that multiplies the gradients, or None.
    """

    ok: Any
    scale: Any = None

    def scaled(self, g):
        """The gradient cut off, then scaled; done the other way round, so that no sum gets a product."""
        if self.scale is None:
            return saturate(g)
        scale = self.scale.astype(g.real.dtype)
        return saturate(times(g, scale), scale)

    def held(self, new, old):
        """`new` where the step is taken, else `old`, for trees of one structure."""
        return jax.tree.map(lambda x, y: y if x is y else jnp.where(self.ok, x, y), new, old)


OPEN = Gate(True)


class Gated(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes `gate=` and then holds its own state: a step of this package and no more.

    The type is the proof. Whoever wraps or chains it makes another type, whose state `guard` has to hold from outside.
    """
