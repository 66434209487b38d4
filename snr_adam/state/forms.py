"""Older forms of states, and how they become today's.

A checkpoint's manifest says of which form it is: 1, which names no form, or 2 to 4. What may change from form to form
is where numbers lie in a state, never what the next step of the optimizer does. Changed so far:

    1 -> 2      `observe` keeps few arrays instead of many; the moments and counts it wraps are where they were
    2 -> 3      `observe` keeps sketches of gradients and the means of their products as well; they begin anew
    3 -> 4      more rows in its means, for spikes and what is clipped, and in its last look; they begin anew

`earlier(like, form)` is the tree to read a checkpoint of an older form into, `renewed(old, like)` makes today's of it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam._moments import find
from snr_adam._numerics import abs_sq
from snr_adam._tree import flatten
from snr_adam.telemetry._averages import Last, Memory
from snr_adam.telemetry._state import ObserveState, blank_of

FORM = 4
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


class _Third(NamedTuple):
    """The state of `observe` in form 3."""

    inner: Any
    count: Any
    seen: Any
    looked: Any
    detailed: Any
    bursts: Any
    square: Any
    axis: Any
    means: Any
    lags: Any
    memory: Any
    last: Any
    sketches: Any


_MEANS = 5
_LAST = (
    "signal_sq",
    "noise_sq",
    "rho",
    "floor_sq",
    "leak",
    "newest",
    "significant",
    "counted",
    "update_sq",
    "param_sq",
)
"""The rows of `means` and of `last` before form 4."""


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
    return isinstance(node, (ObserveState, _First, _Second, _Third))


def earlier(like, form: int):
    """`like` as it was in an older form; ShapeDtypeStructs for what is no longer there."""
    if form == FORM:
        return like

    def old(node):
        if not isinstance(node, ObserveState):
            return node
        inner = earlier(node.inner, form)
        size = node.axis.shape[0]
        if form in (2, 3):
            kind = {2: _Second, 3: _Third}[form]
            rows = {"means": (_MEANS, size + 1), "last": (len(_LAST), size)}
            own = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in rows.items()}
            return kind(inner, *(own.get(name, getattr(node, name)) for name in kind._fields[1:]))
        n, total = (jax.ShapeDtypeStruct((k,), jnp.float32) for k in (size, size + 1))
        kinds = ((_Moving, total), (_Recursion, n), (_Recursion, n), (_Weights, n), (_Detail, n))
        vectors = [kind(*(x for _ in kind._fields)) for kind, x in kinds]
        return _First(inner, node.count, node.seen, node.seen, node.square, node.axis, *vectors)

    return jax.tree.map(old, like, is_leaf=_is_observed)


def renewed(state, like):
    """A state that was read in an older form, in the form of `like`."""

    def new(node, here):
        if not isinstance(node, (_First, _Second, _Third)):
            return node
        inner = renewed(node.inner, here.inner)
        size = node.axis.shape[0]
        fresh = blank_of(here)
        if isinstance(node, (_Second, _Third)):
            own = {name: getattr(node, name) for name in node._fields[1:]}
            own |= {
                "means": with_rows(fresh.means, node.means),
                "last": last_of(dict(zip(_LAST, node.last, strict=True))),
            }
            return placed(fresh._replace(inner=inner, **own), here)
        memory = jnp.stack(Memory(node.weights.first, node.weights.square, *_sums(inner, size)))
        means = with_rows(fresh.means, jnp.stack(node.moving))
        own = {"count": node.count, "seen": node.seen, "square": node.square, "axis": node.axis}
        return placed(fresh._replace(inner=inner, means=means, memory=memory, **own), here)

    def with_rows(means, old):
        """The means with rows of an older form, which were its first."""
        return jnp.concatenate([old, means[_MEANS:]])

    def last_of(rows: dict):
        """The last look with what is known of it."""
        nan = jnp.full_like(rows["rho"], math.nan)
        return jnp.stack([rows.get(name, nan) for name in Last._fields])

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
