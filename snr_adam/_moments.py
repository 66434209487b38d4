"""Where an optimizer's state keeps its moments, whichever optimizer it is.

Optax's states are nested NamedTuples, and those that hold a moving average of the gradients call it `mu`, `trace`,
`ema`, `m1` or `m`, those of their squares `nu`. The average is a tree like the parameters, in which `masked` and
`partition` leave a `MaskedNode` where another optimizer, or none, is in charge. So for each parameter the moment is in
the first such state that has an array of the parameter's shape at the parameter's place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._numerics import widen
from snr_adam.noise import AverageAndMaximum
from snr_adam.signal import FastAndSlow
from snr_adam.storage import Packed
from snr_adam.transform import ScaleBySnrState, SharedNoise

_FIRST = ("mu", "trace", "ema", "m1", "m")
_SUMS = ("trace",)  # not averages: m := b m + g


class Moments(NamedTuple):
    """One parameter's moments as they rest: both in words if packed; nu is None where there is none."""

    mu: Any
    nu: Any
    is_sum: bool

    def read(self) -> tuple[Any, Any]:
        """m and v, as numbers to compute with."""
        if self.mu.dtype == jnp.uint32:
            return Packed().decode(self.mu, (), jnp.float32)
        return widen(self.mu), None if self.nu is None else widen(self.nu)


def _field(node) -> str | None:
    """The name under which a state keeps a first moment."""
    fields = getattr(node, "_fields", ())
    return next((name for name in _FIRST if name in fields and hasattr(node, name)), None)


def _owners(state) -> list:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: _field(node) is not None)
    return [node for node in nodes if _field(node)]


def _first(owner):
    mu = getattr(owner, _field(owner) or "")
    return mu.m1 if isinstance(mu, FastAndSlow) else mu


def _second(owner, outer) -> list:
    """One second moment per leaf, or None for each."""
    nu = getattr(owner, "nu", ())
    nu = nu.v if isinstance(nu, AverageAndMaximum) else nu
    if isinstance(nu, SharedNoise):
        return list(nu.v) if len(nu.v) == outer.num_leaves else [None] * outer.num_leaves
    return _matching(nu, outer) or [None] * outer.num_leaves


def _matching(tree, outer) -> list | None:
    """The leaves of a tree of this structure, of any if it has another."""
    try:
        return outer.flatten_up_to(tree)
    except ValueError:
        return None


def _is_array(x) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def find(state, outer, leaves) -> list[Moments | None]:
    """The moments of each leaf of a tree of parameters or gradients; None where there are none."""
    found: list[Moments | None] = [None] * len(leaves)
    for owner in _owners(state):
        mus, nus = _matching(_first(owner), outer), _second(owner, outer)
        for i, (x, mu, nu) in enumerate(zip(leaves, mus or [], nus, strict=False)):
            if found[i] is None and x is not None and _is_array(mu) and mu.shape == jnp.shape(x):
                nu = nu if _is_array(nu) and nu.ndim == len(mu.shape) else None
                found[i] = Moments(mu, nu, _field(owner) in _SUMS)
    return found


def rounds_in_one_way(state) -> bool:
    """Whether each sum that makes a moment has one product, so that no compiler can choose which of two to fuse."""
    return all(isinstance(owner, (ScaleBySnrState, optax.TraceState)) for owner in _owners(state))


def kinds_in(state) -> str:
    """What a state consists of, for people."""
    kinds: list[str] = []

    def visit(node):
        if hasattr(node, "_fields"):
            kinds.append(type(node).__name__)
        return False

    jax.tree.leaves(state, is_leaf=visit)
    return ", ".join(dict.fromkeys(kinds)) or "its states"


def named_shapes(state) -> list[tuple[str, tuple[int, ...], bool]]:
    """Path and shape of every parameter with a first moment, and whether that is a sum, in the order of the leaves."""
    columns: list[list] = []
    for owner in _owners(state):
        leaves = jax.tree_util.tree_leaves_with_path(_first(owner), is_leaf=_is_place)
        places = [(_tree.name(path), x, _field(owner) in _SUMS) for path, x in leaves]
        if not columns or len(places) == len(columns):
            columns = [[*old, place] for old, place in zip(columns or [[] for _ in places], places, strict=True)]
    chosen = [next((place for place in column if _is_array(place[1])), None) for column in columns]
    return [(name, tuple(x.shape), is_sum) for name, x, is_sum in filter(None, chosen)]


def _is_place(x) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)
