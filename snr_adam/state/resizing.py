"""A run that goes on with more layers, or fewer, or with an embedding of another size.

A state's arrays are found by their paths. What was there before keeps its bits, in whatever form it rests; what is new
starts as in a fresh state. Along an axis that has another size, entries keep their places from the start of the axis.
"""

from typing import Any

import jax
import jax.numpy as jnp

from snr_adam import _tree
from snr_adam._checks import check_optimizer
from snr_adam._given import check_known, plain
from snr_adam._moments import leaf_names
from snr_adam._numerics import widen
from snr_adam._state import fits, marks
from snr_adam.guard import GuardState
from snr_adam.shared import SharedNoise
from snr_adam.state.forms import joined
from snr_adam.telemetry._state import ObserveState
from snr_adam.transform import ScaleBySnrState


def resize(state: Any, tx, params) -> Any:
    """The state with which `tx` goes on where the parameters have become `params`.

    Moments of new parameters, and of new rows or columns, are those of a fresh state; the rest keeps its bits. The
    count goes on, and serves for all: new entries step as after gradients of zeros, at first up to 3.2 learning rates
    long for Adam's defaults (docs/how_to/order_of_wrappers.md, "Frozen parameters"). Averages of weights begin there
    with the new weights, and `observe` begins to look anew.

    Args:
      state: the optimizer's state, of this package or of Optax, after any number of steps.
      tx: the optimizer that goes on, the one that made `state`.
      params: the parameters as they are now; those that `state` knows have the same paths and numbers of axes.

    Returns:
      A state of the form of `tx.init(params)`.

    Raises:
      ValueError: naming the place, if the state is of another optimizer or storage, or if a parameter has another
        number of axes.

    >>> import optax
    >>> tx, old = optax.adam(1e-3), {"embedding": jnp.ones((2, 3))}
    >>> _, state = tx.update(old, tx.init(old), old)
    >>> new = {"embedding": jnp.ones((4, 3)), "head": jnp.ones(3)}
    >>> print(resize(state, tx, new)[0].mu["embedding"][:, 0])
    [0.1 0.1 0.  0. ]
    """
    check_known("resize", state)
    tx, state, params = check_optimizer("resize", tx), plain(state), plain(params)
    fresh = tx.init(params)
    pairs = zip(marks(state), marks(fresh), strict=False)
    if len(marks(state)) != len(marks(fresh)) or not all(fits(old, new) for old, new in pairs):
        raise ValueError(
            f"resize: the state was made by {marks(state)} (signal/noise), tx makes one by {marks(fresh)}: give the "
            "optimizer that made the state; another's is taken over by `from_optax`"
        )
    old = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(_by_name(state))}
    old |= _last_bad(state, fresh)
    whole = dict(zip(_tree.keys(params), _tree.flatten(params)[0], strict=True))
    suffixes = sorted(whole, key=len, reverse=True)

    def begun(key: str, new):
        """What a new entry starts with."""
        suffix = next((x for x in suffixes if key.endswith(x)), None)
        prefix = key.removesuffix(suffix or "")
        if suffix is None or not any(other.startswith(prefix) for other in old):
            raise ValueError(
                f"resize: tx keeps {key}, of which there is nothing in the state: give the optimizer that made it"
            )
        return widen(_tree.jax_array(whole[suffix])) if prefix.endswith(".average") else new

    def keep(path, new):
        key = jax.tree_util.keystr(path)
        if key not in old:
            return begun(key, new)
        x = old[key]
        if jnp.shape(x) == jnp.shape(new) and x.dtype == new.dtype:
            return x
        if jnp.ndim(x) != jnp.ndim(new) or x.dtype != new.dtype:
            raise ValueError(
                f"resize: {key} is {x.dtype}{list(jnp.shape(x))} in the state and {new.dtype}{list(jnp.shape(new))} "
                "for these parameters: the optimizer, its storage and the number of axes must be the same"
            )
        both = tuple(slice(min(sizes)) for sizes in zip(x.shape, new.shape, strict=True))
        return begun(key, new).at[both].set(x[both])

    return _by_place(jax.tree_util.tree_map_with_path(keep, _by_name(fresh)), fresh)


def _is_special(node) -> bool:
    """Whether a state keeps arrays in the order of the parameters, and not in a tree like them."""
    return isinstance(node, ObserveState) or (isinstance(node, ScaleBySnrState) and isinstance(node.nu, SharedNoise))


def _by_name(state):
    """The state with all arrays that belong to a parameter at its path; without what `observe` has seen."""

    def named(node):
        if isinstance(node, ObserveState):
            return ObserveState(_by_name(node.inner), *[None] * (len(node) - 1))
        if _is_special(node):
            return node._replace(nu=_tree.flatten(node.mu)[1].unflatten(node.nu.v))
        return node

    return jax.tree.map(named, state, is_leaf=_is_special)


def _by_place(new, fresh):
    """The inverse of `_by_name`; what `observe` shows begins anew."""

    def placed(like, node):
        if isinstance(like, ObserveState):
            return joined(like._replace(inner=_by_place(node.inner, like.inner)))
        if _is_special(like):
            return node._replace(nu=SharedNoise(tuple(_tree.flatten(like.mu)[1].flatten_up_to(node.nu))))
        return node

    return jax.tree.map(placed, fresh, new, is_leaf=_is_special)


def _guards(state, at: str = ""):
    """Every guard in a state by its path."""

    def is_guard(node) -> bool:
        return isinstance(node, GuardState)

    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_guard):
        if is_guard(node):
            key = at + jax.tree_util.keystr(path)
            yield key, node
            yield from _guards(node.inner, f"{key}.inner")


def _last_bad(state, fresh) -> dict[str, jax.Array]:
    """The number of the last bad leaf among the leaves as they are now, -1 if it is no longer there."""
    found, now = {}, dict(_guards(fresh))
    for key, node in _guards(state):
        if key in now:
            before, after = (leaf_names(x.inner) or [] for x in (node, now[key]))
            name = dict(enumerate(before)).get(int(node.last_bad))
            found[f"{key}.last_bad"] = jnp.int32(after.index(name) if name in after else -1)
    return found
