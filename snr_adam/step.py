"""The heart: one step of one array, w := w - alpha signal / noise.

    x       the gradient, cut off where its square would overflow, and scaled by the gate       Gate.scaled
    m, v    decoded from the form they rest in, updated with x, encoded again                   Rule.step
    ratio   signal / noise, from the moments as they will rest: the division                    Ratio
    u       the update that the descent makes of the ratio                                      descent.py

A step reads nothing twice: signal and noise are estimated from what has just been stored. Arithmetic is float32
(float64 for 64-bit gradients or moments) whatever the parameters' dtype and the storage.

What a wrapper decides before a step reaches it as an extra argument, which Optax's wrappers and combinators forward:
`gate=` (whether to take the step, and what to multiply the gradients with) and `look=` (who wants to see the arrays of
this step). A step notes in them what it has done, and whoever passed them asks afterwards. Where they did not arrive,
because a wrapper does not forward them, or were copied on the way, by `jit`, a branch or a loop, nothing is noted, and
the work is done from outside.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam import storage as storages
from snr_adam._numerics import Scalar, divide, saturate, scaled_ratio, times
from snr_adam.noise import center, squared


class Stored(NamedTuple):
    """The moments of one array, as they rest."""

    mu: Any
    nu: Any


class Numbers(NamedTuple):
    """The numbers of one step in one dtype, shared by all arrays: of signal and noise, and `_compiler.unseen_zero`."""

    signal: Any
    noise: Any
    zero: Any


class Ratio(NamedTuple):
    """scale * signal / noise, before it is divided. A noise of 1.0 is no noise.

    Scalars join the noise before the division, so that an element costs one product, and the update ends in a division
    or an addition: its bits are then the same whether or not the compiler fuses it with `params + update`. Where it
    would end in a product, `zero` is added.

    gradient: what signal and noise were estimated from. second(): the second moment that the noise is the root of,
    corrected, without eps; of other noises their square.
    """

    signal: Any
    scale: Scalar
    noise: Any
    zero: Any
    gradient: Any = None
    second: Any = None

    @property
    def value(self):
        """scale * signal / noise, as `scale_by_snr` returns it."""
        return divide(times(self.signal, self.scale), self.noise)

    def times(self, by: Scalar):
        """`by` times the ratio; of 0 a zero, with the derivative of the product."""
        if isinstance(self.noise, float):
            return times(self.signal, by * self.scale) + self.zero
        k = by * self.scale
        if isinstance(k, jax.Array):
            return scaled_ratio(self.signal, k, self.noise)
        return divide(self.signal, (1.0 / k) * self.noise) if k else divide(times(self.signal, k), self.noise)


@jax.tree_util.register_pytree_node_class
@dataclass(eq=False)
class Gate:
    """What was decided, from all gradients together, before a step (`guard.py`).

    ok: bool scalar; where it is false the moments and the count stay what they are, and the updates mean nothing.
    scale: scalar that multiplies the gradients, or None.

    As a pytree it is these two. The rest is known in one trace only:

    raw: pairs of a scaled gradient that was passed on and the raw one, by the id of the former. A step that is given
      the former takes the latter and scales it in its own precision; what lies between may change the scaled one.
    held: the states whose step has taken the gate in; all others are held from outside.
    """

    ok: Any
    scale: Any = None
    raw: dict = field(default_factory=dict)
    held: list = field(default_factory=list)

    def tree_flatten(self):
        return (self.ok, self.scale), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def scaled(self, g):
        """The gradient cut off, then scaled; done the other way round, so that no sum gets a product."""
        if self.scale is None:
            return saturate(g)
        scale = self.scale.astype(g.real.dtype)
        return saturate(times(g, scale), scale)

    def source(self, g) -> tuple[Any, bool]:
        """What a step makes its gradient of, given g: the raw gradient that this gate scaled, or g as it is."""
        scaled, raw = self.raw.get(id(g), (None, None))
        return (raw, True) if scaled is g and g is not None else (g, False)

    def gradient(self, g, is_raw: bool):
        """The gradient that a step works with, from what `source` gives, in the dtype it is computed in."""
        return self.scaled(g) if is_raw else saturate(g)

    def choose(self, new, old):
        """`new` where the step is taken, else `old`, for trees of one structure; what holds itself as it is."""

        def is_held(node) -> bool:
            return any(node is state for state in self.held)

        def choice(x, y):
            return x if is_held(x) or x is y else jnp.where(self.ok, x, y)

        return jax.tree.map(choice, new, old, is_leaf=is_held)


OPEN = Gate(True)
"""The gate of a step that nobody guards: every step is taken as it is."""


class Rule:
    """The step of one array up to the ratio, for a fixed choice of signal, noise and storage."""

    def __init__(self, signal, noise, storage):
        self.signal, self.noise = signal, noise
        self.storage = storages.resolve(storage)
        self.divides_first = getattr(noise, "divides_first", False)
        self.divides_by_new = getattr(noise, "divides_by_new", False)
        self.corrects = hasattr(signal, "sees")

    def init(self, p, shared: tuple[int, ...] = ()) -> Stored:
        """The moments before the first step; `shared` are the axes along which the noise has one entry for all."""

        def dither(shape, stream):
            return jnp.zeros(shape, jnp.uint32)

        nu = self.noise.init(p)
        if shared:
            nu = jnp.mean(nu, shared, keepdims=True)
        return Stored(*self.storage.encode(self.signal.init(p), nu, dither))

    def seen(self, x, stored: Stored, k: Numbers, dtype):
        """What signal and noise are estimated from: the gradient, or what the signal makes of it and its memory."""
        return self.signal.sees(self.storage.decode(*stored, dtype)[0], x, k.signal) if self.corrects else x

    def averaged(self, x, nu, k: Numbers):
        """What the signal averages: the gradient, or its quotient by a noise."""
        return divide(x, self.noise.estimate(nu, x, k.noise, None)) if self.divides_first else x

    def center(self, mu, k: Numbers):
        """The average that a spread is measured around."""
        own = getattr(self.signal, "center", None)
        return own(mu, k.signal) if own else center(mu)

    def moments(self, x, stored: Stored, k: Numbers, dtype, dither, gate: Gate) -> Stored:
        """The moments after gradient x, for their rest."""
        old = Stored(*self.storage.decode(*stored, dtype))
        if self.divides_by_new:
            nu = self.noise.update(old.nu, x, k.noise, None)
            mu = self.signal.update(old.mu, self.averaged(x, nu, k), k.signal)
        else:
            mu = self.signal.update(old.mu, self.averaged(x, old.nu, k), k.signal)
            seen = self.signal.sees(old.mu, x, k.signal) if self.corrects else x
            nu = self.noise.update(old.nu, seen, k.noise, self.center(mu, k))
        if gate is not OPEN:  # encoding what was decoded gives the bits that were there, see storage.py
            mu, nu = gate.choose((mu, nu), tuple(old))
        return Stored(*self.storage.encode(mu, nu, dither))

    def ratio(self, x, old: Stored, new: Stored, k: Numbers, dtype) -> Ratio:
        """Signal over noise of a step to the moments `new`, from what is stored: the step reads nothing twice."""
        (mu, nu), x = self.storage.decode(*new, dtype), self.seen(x, old, k, dtype)
        if self.divides_first:
            by = nu if self.divides_by_new else self.storage.decode(*old, dtype)[1]
            g, noise = self.averaged(x, by, k), 1.0
        else:
            g, noise = x, self.noise.estimate(nu, x, k.noise, self.center(mu, k))
        signal, scale = self.signal.estimate(mu, g, k.signal)
        second = functools.partial(squared, self.noise, nu, k.noise, self.center(mu, k), noise)
        return Ratio(signal, scale, noise, k.zero, x, second)

    def at(self, t, dtype, zero) -> Numbers:
        return Numbers(self.signal.at(t, dtype), self.noise.at(t, dtype), zero)
