"""The state of a step, and the mark in it of what made it.

A state of Adam, of AdaMax and of Yogi are three arrays per parameter alike, and mean different things. So a state knows
the parts that made it, beside its arrays: in the structure of the tree, where no array, no path and no checkpoint has
it. `optax` keeps nothing of the kind, so its checkpoints and this package's stay the same files.

    made                                 "EMA/RMS", the names of signal and noise; "Adam" from a state of Optax; None
                                         where it is not known: what a user or Flax's msgpack has put together
    fits(made, wanted)                   whether a state made so may be used so
"""

from typing import Any, NamedTuple

import jax
import jax.export

ADAM = "Adam"
OF_ADAM = frozenset({ADAM, "EMA/RMS", "Nesterov/RMS", "EMA/Rectified", "Nesterov/Rectified"})
"""Who keeps a plain average of gradients and one of their squares: what one made of the same gradients is the other's,
to whoever asks for it (`from_optax`)."""


class _Made:
    """The mark as the tree's structure holds it. Marks that fit are equal: a tree that is made by hand matches any."""

    __slots__ = ("by",)

    def __init__(self, by: str | None):
        self.by = by

    def __eq__(self, other):
        return isinstance(other, _Made) and fits(self.by, other.by)

    def __hash__(self):
        return 0

    def __repr__(self):
        return f"made by {self.by or 'an unknown optimizer'}"


class _Fields(NamedTuple):
    count: Any
    mu: Any
    nu: Any


class ScaleBySnrState(_Fields):
    """What a step needs of the past. With float32 storage these are the fields of `optax.ScaleByAdamState`,
    whose instance it is not.

    count: int32 scalar, the number of steps taken; stays at 2^31 - 1 once there.
    mu: the signal's memory, a tree like the parameters (or a NamedTuple of such trees, or ()).
    nu: the noise's memory, likewise; or a mark of the form in which both rest: `SharedNoise`, `storage.InWords`,
      `storage.InOwnForm`.
    made: no field: the names of the parts that made it, see the module.
    """

    made: str | None = None

    def _replace(self, **fields):
        return marked(super()._replace(**fields), self.made)


def marked(state: ScaleBySnrState, made: str | None) -> ScaleBySnrState:
    """The state, with the mark of the parts that made it."""
    state.made = made
    return state


def made_by(signal, noise) -> str:
    """The mark of a state that these parts make."""
    return f"{type(signal).__name__}/{type(noise).__name__}"


def fits(made: str | None, wanted: str | None) -> bool:
    """Whether a state that was made so may be used by, or have come from, parts that are marked so."""
    either = made is None or wanted is None or made == wanted
    return either or (ADAM in (made, wanted) and {made, wanted} <= OF_ADAM)


def marks(state) -> list[str | None]:
    """The marks of all states of steps in a tree, in its order."""

    def is_state(node) -> bool:
        return isinstance(node, ScaleBySnrState)

    return [node.made for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]


_NAMES = tuple(map(jax.tree_util.GetAttrKey, ScaleBySnrState._fields))
jax.tree_util.register_pytree_with_keys(
    ScaleBySnrState,
    lambda state: (tuple(zip(_NAMES, state, strict=True)), _Made(state.made)),
    lambda made, fields: marked(ScaleBySnrState(*fields), made.by),
    lambda state: (tuple(state), _Made(state.made)),
)
jax.export.register_pytree_node_serialization(
    ScaleBySnrState,
    serialized_name="snr_adam.ScaleBySnrState",
    serialize_auxdata=lambda made: (made.by or "").encode(),
    deserialize_auxdata=lambda name: _Made(name.decode() or None),
)
