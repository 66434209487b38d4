"""What a step shows to whoever watches it: `observe` passes a `Look` as an extra argument, and finds it filled.

A `Look` holds no arrays of its own. Each leaf of a step that got it is noted under its path, as the few arrays that the
step began and ended with, and ways to make the rest again: inside the step's own kernels or, on CPU, afterwards.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam._numerics import Average
from snr_adam.noise import center
from snr_adam.step import Numbers, Stored


class Seen(NamedTuple):
    """One step of one array, for whoever passed a `look`: arrays are made when they are asked for.

    rule: what the step was; source, is_raw, gate: what makes the gradient; old, new: the moments at rest before and
    after; numbers: of this step; dtype, wide: the real dtype of the arithmetic, and that of the gradient; t: the step's
    number; alpha, decay, descent: learning rate, weight decay and what is done with them; alpha is None of a step that
    only divides.
    """

    rule: Any
    source: Any
    is_raw: bool
    gate: Any
    old: Stored
    new: Stored
    numbers: Numbers
    dtype: Any
    wide: Any
    t: Any
    alpha: Any
    decay: Any
    descent: Any

    @property
    def ok(self):
        """Whether the step was taken."""
        return self.gate.ok

    @property
    def rate(self):
        """The learning rate, None of a step that only divides."""
        return self.alpha

    @property
    def scale(self):
        """What a guard multiplied the gradient with, None if none clips."""
        return self.gate.scale

    def given(self):
        """The gradient that the step was made of."""
        return self.gate.gradient(self.source.astype(self.wide), self.is_raw)

    def gradient(self):
        """The gradient as the moments saw it."""
        return self.rule.seen(self.given(), self.old, self.numbers, self.dtype)

    @property
    def repeats(self) -> bool:
        """Whether that holds some of the gradient of the step before."""
        return self.rule.corrects

    def kind(self) -> tuple:
        """What two arrays of one step have in common if their sums may be taken together."""
        shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves((self.source, self.old, self.new))]
        alone = id(self.source) if self.rule.corrects else None  # a norm of one array is not that of several
        return id(self.rule), alone, self.is_raw, id(self.gate), str(self.dtype), *shapes

    def stacked(self, others: "list[Seen]") -> "Seen":
        """Several arrays of one kind as one, along a new first axis."""
        those = [(each.source, each.old, each.new) for each in (self, *others)]
        source, old, new = jax.tree.map(lambda *xs: jnp.stack(xs), *those)
        return self._replace(source=source, old=old, new=new)

    @property
    def first(self):
        """The `Average` that the signal's first moment is of the gradients; None if it is none, or is not known."""
        known = None if self.rule.divides_first else getattr(self.rule.signal, "average", None)
        return known and known(self.numbers.signal)

    @property
    def second(self):
        """The `Average` that the square of the noise is of |g|^2, likewise."""
        known = getattr(self.rule.noise, "average", None) if hasattr(self.rule.noise, "second") else None
        return known and known(self.numbers.noise)

    @property
    def constants(self) -> tuple[Average | None, Average | None]:
        """Both averages without what belongs to one step, None where their decays change in time."""

        def constant(x: Average | None) -> Average | None:
            return x._replace(debias=0.0) if x and isinstance(x.gain, float) else None

        return constant(self.first), constant(self.second)

    @property
    def noise(self) -> str:
        """ "average" if the noise is the root of an average of |g|^2, else "direct" if it divides, or "none"."""
        if self.second:
            return "average"
        keeps = jax.tree.leaves(jax.eval_shape(self.rule.noise.init, self.gradient()))
        return "direct" if keeps and not self.rule.divides_first else "none"

    def before(self):
        """The signal's first moment before the step."""
        return center(self.rule.storage.decode(*self.old, self.dtype)[0])

    def after(self):
        """The signal's first moment after the step, and the square of the noise (up to its `Average`'s correction)."""
        mu, nu = self.rule.storage.decode(*self.new, self.dtype)
        if self.second:
            return center(mu), self.rule.noise.second(nu, self.rule.center(mu, self.numbers))
        noise = self.rule.noise.estimate(nu, self.gradient(), self.numbers.noise, self.rule.center(mu, self.numbers))
        return center(mu), None if self.noise == "none" else noise * noise

    def update(self, p):
        """The update, made again from the moments after the step; of a step that only divides, the ratio."""
        ratio = self.rule.ratio(self.given(), self.old, self.new, self.numbers, self.dtype)
        return ratio.value if self.alpha is None else self.descent.update(ratio, p, self.alpha, self.decay)


@jax.tree_util.register_pytree_node_class
@dataclass(eq=False)
class Look:
    """What the steps inside have noted, by the key of the leaf's path; empty if it was copied, as by `jit`."""

    seen: dict[str, Seen] = field(default_factory=dict)

    def note(self, path: str, seen: Seen) -> None:
        self.seen[path] = seen

    def tree_flatten(self):
        return (), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls()
