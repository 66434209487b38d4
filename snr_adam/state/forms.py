"""Older forms of states, and how they become today's.

A checkpoint's manifest says of which form it is: 1, which names no form, 2 or 3. What may change from form to form is
where numbers lie in a state, never what the next step of the optimizer does. Changed so far:

    1 -> 2      `observe` keeps few arrays instead of many; the moments and counts it wraps are where they were
    2 -> 3      `observe` keeps sketches of gradients and the means of their products as well; they begin anew

`earlier(like, form)` is the tree to read a checkpoint of an older form into, `renewed(old, like)` makes today's of it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam._moments import find
from snr_adam._numerics import abs_sq
from snr_adam._tree import flatten
from snr_adam.telemetry._averages import Last, Means, Memory
from snr_adam.telemetry._state import ObserveState, blank_of

FORM = 3
"""The form in which states are saved now."""


class _Moving(NamedTuple):
    gradient_sq: Any
    persistent: Any
    aa: Any
    ax: Any
    xx: Any


class _Recursion(NamedTuple):
    old_old: Any
    old_in: Any
    in_in: Any
    new_old: Any
    new_in: Any
    new_new: Any


class _Weights(NamedTuple):
    first: Any
    square: Any
    second: Any


class _Detail(NamedTuple):
    first: Any
    second: Any
    update: Any
    param: Any
    significant: Any
    counted: Any


class _Second(NamedTuple):
    """The state of `observe` in form 2."""

    inner: Any
    count: Any
    seen: Any
    looked: Any
    detailed: Any
    square: Any
    axis: Any
    means: Any
    memory: Any
    last: Any


class _First(NamedTuple):
    """The state of `observe` in form 1."""

    inner: Any
    count: Any
    seen: Any
    examined: Any
    square: Any
    axis: Any
    moving: Any
    first: Any
    second: Any
    weights: Any
    detail: Any


def _is_observed(node) -> bool:
    return isinstance(node, (ObserveState, _First, _Second))


def earlier(like, form: int):
    """`like` as it was in an older form; ShapeDtypeStructs for what is no longer there."""
    if form == FORM:
        return like

    def old(node):
        if not isinstance(node, ObserveState):
            return node
        inner = earlier(node.inner, form)
        if form == 2:
            return _Second(inner, *(getattr(node, name) for name in _Second._fields[1:]))
        size = node.axis.shape[0]
        n, total = (jax.ShapeDtypeStruct((k,), jnp.float32) for k in (size, size + 1))
        kinds = ((_Moving, total), (_Recursion, n), (_Recursion, n), (_Weights, n), (_Detail, n))
        vectors = [kind(*(x for _ in kind._fields)) for kind, x in kinds]
        return _First(inner, node.count, node.seen, node.seen, node.square, node.axis, *vectors)

    return jax.tree.map(old, like, is_leaf=_is_observed)


def renewed(state, like):
    """A state that was read in an older form, in the form of `like`."""

    def new(node, here):
        if not isinstance(node, (_First, _Second)):
            return node
        inner = renewed(node.inner, here.inner)
        size = node.axis.shape[0]
        fresh = blank_of(here)
        if isinstance(node, _Second):
            own = {name: getattr(node, name) for name in _Second._fields[1:]}
            return placed(fresh._replace(inner=inner, **own), here)
        nan = jnp.full(size, math.nan, jnp.float32)
        memory = Memory(node.weights.first, node.weights.square, *_sums(inner, size))
        means, memory, last = (
            jnp.stack(rows) for rows in (Means(*node.moving), memory, Last(*[nan] * len(Last._fields)))
        )
        own = {"count": node.count, "seen": node.seen, "square": node.square, "axis": node.axis}
        return placed(fresh._replace(inner=inner, means=means, memory=memory, last=last, **own), here)

    def placed(state: ObserveState, like: ObserveState) -> ObserveState:
        """On the devices where `like` is."""
        own = zip(state[1:], like[1:], strict=True)
        return ObserveState(state.inner, *(jax.device_put(x, to.sharding) for x, to in own))

    return jax.tree.map(new, state, like, is_leaf=_is_observed)


def _sums(inner, size: int):
    """|m|^2 and the sum of v of each leaf, and nothing lost to rounding; unknown where leaves were sliced."""
    leaves, outer = flatten(next((x.mu for x in jax.tree.leaves(inner, is_leaf=_has_mu) if _has_mu(x)), ()))
    found = [x.read() for x in find(inner, outer, leaves) if x is not None and x.form != "own"]
    zero, nan = jnp.zeros(size, jnp.float32), jnp.full(size, math.nan, jnp.float32)
    if len(found) != size:
        return nan, zero, nan, zero
    first = jnp.stack([jnp.sum(abs_sq(m)).astype(jnp.float32) for m, _ in found])
    second = jnp.stack([jnp.float32(math.nan) if v is None else jnp.sum(v).astype(jnp.float32) for _, v in found])
    return first, zero, second, zero


def _has_mu(node) -> bool:
    return hasattr(node, "mu")
