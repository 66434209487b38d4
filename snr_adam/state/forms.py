"""Older forms of states, and how they become today's.

A checkpoint's manifest says of which form it is: 1, which names no form, or 2 to 5. What may change from form to form
is where numbers lie in a state, never what the next step of the optimizer does. Changed so far:

    1 -> 2      `observe` keeps few arrays instead of many; the moments and counts it wraps are where they were
    2 -> 3      `observe` keeps sketches of gradients and the means of their products as well; they begin anew
    3 -> 4      `guard` counts steps and spikes, and keeps what is usual for both; they begin anew
    4 -> 5      `observe` keeps more rows in its means, of spikes and clips, and in its last look; they begin anew

`earlier(like, form)` is the tree to read a checkpoint of an older form into, `renewed(old, like)` makes today's of it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._moments import find
from snr_adam._numerics import abs_sq
from snr_adam._tree import flatten, is_abstract
from snr_adam.guard import GuardState, unused_guard
from snr_adam.telemetry._averages import Last, Memory
from snr_adam.telemetry._state import ObserveState, blank_of

FORM = 5
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
    """The state of `observe` in forms 3 and 4."""

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
"""The rows of `means` and of `last` before form 5."""
_LAST_NOW = [Last._fields.index(name) for name in _LAST]


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


class _Guarded(NamedTuple):
    """The state of `guard` in forms 1 to 3."""

    inner: Any
    skipped: Any
    consecutive: Any
    holding: Any
    last_bad: Any
    norm: Any


def _is_wrapper(node) -> bool:
    return isinstance(node, (ObserveState, GuardState, _First, _Second, _Third, _Guarded))


def earlier(like, form: int):
    """`like` as it was in an older form; ShapeDtypeStructs for what is no longer there."""
    if form == FORM:
        return like

    def old(node):
        if not isinstance(node, (ObserveState, GuardState)):
            return node
        inner = earlier(node.inner, form)
        if isinstance(node, GuardState):
            own = _Guarded(inner, *node[1 : len(_Guarded._fields)])
            return own if form < 4 else node._replace(inner=inner)
        size = node.axis.shape[0]
        if form > 1:
            kind = _Second if form == 2 else _Third
            kept = node._replace(inner=inner, means=_rows(node.means, range(_MEANS)), last=_rows(node.last, _LAST_NOW))
            return kind(*(getattr(kept, name) for name in kind._fields))
        n, total = (jax.ShapeDtypeStruct((k,), jnp.float32) for k in (size, size + 1))
        kinds = ((_Moving, total), (_Recursion, n), (_Recursion, n), (_Weights, n), (_Detail, n))
        vectors = [kind(*(x for _ in kind._fields)) for kind, x in kinds]
        return _First(inner, node.count, node.seen, node.seen, node.square, node.axis, *vectors)

    return jax.tree.map(old, like, is_leaf=_is_wrapper)


def _rows(x, those):
    """Some rows of an array, which may be known by its shape alone."""
    those = np.array(those)
    return jax.ShapeDtypeStruct((len(those), *x.shape[1:]), x.dtype) if is_abstract(x) else x[those]


def renewed(state, like):
    """A state that was read in an older form, in the form of `like`."""

    def new(node, here):
        if not _is_wrapper(node):
            return node
        inner = renewed(node.inner, here.inner)
        if isinstance(node, _Guarded):
            return placed(unused_guard(here)._replace(**node._replace(inner=inner)._asdict()), here)
        if isinstance(node, GuardState):
            return node._replace(inner=inner)
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

    def placed(state, like):
        """On the devices where `like` is."""
        own, to = (x._replace(inner=()) for x in (state, like))
        return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), own, to)._replace(inner=state.inner)

    return jax.tree.map(new, state, like, is_leaf=_is_wrapper)


def joined(state: ObserveState) -> ObserveState:
    """The state of an `observe` that begins in the middle of its optimizer's run, and knows only the moments."""
    if any(map(is_abstract, jax.tree.leaves(state.axis))):
        raise ValueError(
            "what an `observe` shows by layer is not known from shapes alone: give as `like` what its `init` returns"
        )
    size = state.axis.shape[0]
    zero = jnp.zeros(size, jnp.float32)
    counts = [node.count for node in jax.tree.leaves(state.inner, is_leaf=_has_mu) if _has_mu(node)]
    fresh = blank_of(state)
    count = jnp.array(counts[0], copy=True) if counts else fresh.count
    return fresh._replace(count=count, memory=jnp.stack(Memory(zero, zero, *_sums(state.inner, size))))


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
