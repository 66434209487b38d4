"""What a step does with the ratio of each leaf: learning rate, weight decay and descent, one for all or for each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam import _tree
from snr_adam._checks import in_range, is_mask
from snr_adam._contracts import check_part
from snr_adam._numerics import Hyper, value_at
from snr_adam.descent import Decoupled, Descent, decays

Rate: TypeAlias = Hyper | Mapping[Any, "Rate"] | list[Any] | tuple["Rate", ...]
"""A learning rate or a weight decay: a number, a scalar array, a schedule, or a tree of these that is a prefix of the
parameters."""

Descents: TypeAlias = Descent | Mapping[Any, "Descents"] | list[Any] | tuple["Descents", ...] | Callable[[Any], Any]
"""A descent, a tree of descents that is a prefix of the parameters, or a function from them to either."""


class PerLeaf(NamedTuple):
    """Learning rate, weight decay, the mask of the latter and the descent, as they were given. alpha: None for none."""

    alpha: Any = None
    weight_decay: Any = 0.0
    mask: Any = None
    descent: Any = Decoupled()

    def check(self, owner: str) -> None:
        """Raises TypeError for what is no descent; a function of the parameters is asked later."""
        if not _is_function(self.descent):
            for path, each in _tree.named_leaves(self.descent):
                where = "descent" if each is self.descent else f"descent at {path}"
                check_part(owner, where, each, Descent, "Decoupled()")

    def at(self, t, outer, updates, params) -> tuple[list, list, list]:
        """alpha, lambda and the descent of every leaf."""
        if self.alpha is None:
            return [None] * outer.num_leaves, [0.0] * outer.num_leaves, [Decoupled()] * outer.num_leaves

        def resolve(hyper, name: str):
            values = jax.tree.map(lambda h: value_at(in_range(name, h), t), hyper, is_leaf=_tree.is_none)
            return _tree.spread(values, outer, updates, name)

        def chosen(given, what: str):
            given = given(updates if params is None else params) if _is_function(given) else given
            return _tree.spread(given, outer, updates, what)

        alphas, lambdas = resolve(self.alpha, "learning_rate"), resolve(self.weight_decay, "weight_decay")
        if self.mask is not None:
            masks = chosen(self.mask, "mask")
            for (path, _), on in zip(_tree.named_leaves(updates), masks, strict=True):
                if not is_mask(on):
                    raise TypeError(f"mask at {path} is {on!r}: must be True or False, whether this parameter decays")
            lambdas = [_select(on, decay) for on, decay in zip(masks, lambdas, strict=True)]
        descents = chosen(self.descent, "descent")
        if params is None and any(_reads(*row) for row in zip(descents, self._known(outer, updates), strict=True)):
            raise ValueError(
                "weight decay and trust ratios need the parameters: call update(grads, state, params), got params=None"
            )
        return alphas, lambdas, descents

    def _known(self, outer, updates) -> list:
        """The weight decay of each leaf as it was given, whatever the mask."""
        return _tree.spread(self.weight_decay, outer, updates, "weight_decay")


def _reads(descent, decay) -> bool:
    """Whether a leaf's update needs the parameter."""
    return descent is not None and (descent.needs_params or (decay is not None and decays(decay)))


def _is_function(x) -> bool:
    return callable(x) and not isinstance(x, type) and not hasattr(x, "needs_params")


def _select(on, decay):
    """decay where the mask is on, else 0; decided now if the mask is known now. A frozen parameter's mask is None."""
    return (decay if on else 0.0) if on is None or isinstance(on, (bool, np.bool_)) else jnp.where(on, decay, 0.0)
