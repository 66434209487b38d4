"""States as users have them: in boxes of a library, of several runs, in a trace, or back from a disk without types.

What reads a state on the host (`report`, `health`, `suggest_sharing`, `from_optax`, ...) asks here first, so that all
of them take the same things and say the same of the others.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from snr_adam import _tree


def _is_box(x) -> bool:
    """Whether x is a Variable of Flax NNX, or an array with the names of its axes of Flax Linen."""
    return hasattr(x, "get_value") or (hasattr(x, "unbox") and not hasattr(x, "dtype"))


def held_by(owner) -> Any:
    """The state in an `nnx.Optimizer`, a `TrainState` or the like; a state itself is one."""
    return owner if isinstance(owner, tuple) else getattr(owner, "opt_state", owner)


def plain(tree) -> Any:
    """A tree without the boxes of a library; of an `nnx.Optimizer` or a `TrainState` the state that it holds."""
    tree = held_by(tree)
    return jax.tree.map(lambda x: _content(x) if _is_box(x) else x, tree, is_leaf=_is_box)


def _content(box):
    return box.get_value() if hasattr(box, "get_value") else box.unbox()


def boxed_like(tree, like) -> Any:
    """`tree`, an unboxed tree of the form of `like`, in the boxes of `like`."""
    boxes, structure = jax.tree.flatten(held_by(like))
    return structure.unflatten(jax.tree.leaves(tree)) if len(boxes) == len(jax.tree.leaves(tree)) else tree


def box_of(x):
    """A function that puts an array into a box like this one; what is no box makes none."""
    return type(x) if _is_box(x) else lambda array: array


def check_known(owner: str, state) -> None:
    """Raises TypeError for a state inside of jit."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
        raise TypeError(
            f"{owner}: inside of jit a state has no numbers to read: call {owner} on the state that the compiled step "
            "has returned"
        )


def readable(owner: str, state, *kinds) -> Any:
    """The state, unboxed, if there is one of these kinds in it and of one run.

    Raises ValueError for several runs in one state, and for a state that has lost its types.
    """
    state = plain(state)
    found = _tree.nodes(kinds, state)
    for node in found:
        name = next(name for name in ("count", "skipped") if name in node._fields)
        if shape := np.shape(getattr(node, name)):
            at = ", ".join("0" * len(shape))
            raise ValueError(
                f"{owner}: this state is that of several runs at once, as vmap and replicas make them (its {name} has "
                f"the shape {shape}): take one of them, {owner}(jax.tree.map(lambda x: x[{at}], state))"
            )
    if not found and (isinstance(state, (dict, list)) or _lost(kinds, state)):
        raise ValueError(
            f"{owner}: there is no {' or '.join(kind.__name__ for kind in kinds)} in this {type(state).__name__}: a "
            "state that came back as dicts or lists is restored again with init(params) as its target"
        )
    return state


def _lost(kinds, state) -> bool:
    """Whether somewhere in a state there is a dict with the fields of one of these kinds."""

    def is_one(node) -> bool:
        return isinstance(node, Mapping) and any(set(kind._fields) <= set(node) for kind in kinds)

    return any(map(is_one, jax.tree.leaves(state, is_leaf=is_one)))
