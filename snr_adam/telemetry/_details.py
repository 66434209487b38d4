"""What is no linear sum of a step and takes a pass of its own over all arrays: made on CPU, at few looks.

On accelerators sums like these do not become a part of the update's kernel, or not of every optimizer's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snr_adam import _tree
from snr_adam._numerics import abs_sq, widen
from snr_adam.telemetry import _averages as averages
from snr_adam.telemetry import _sums as sums
from snr_adam.telemetry._averages import Last, Memory
from snr_adam.telemetry._seen import Shown

_DENSE = 0.8
"""Of pure noise with fewer gradients that are not 0, more than 6 % of the m with a new one would pass for significant:
7 % of half, 39 % of one in twenty."""
_LARGEST = 3
"""The first so many of the arrays are not summed: the largest element of each is taken."""


def details(step: Shown, last: Last, memory: Memory) -> Last:
    """The row of a look with its details."""
    factor = step.row(step.factors())
    gain = step.field(step.firsts, "gain")
    newest = step.field(step.seconds, "gain") * factor
    # |m^|^2 > level rho v^ without the corrections that both sides have
    least = averages.level(last.leak, newest) * step.weights(memory)[1] * factor
    each = zip(step.seen, step.observed, step.params, step.updates, strict=True)
    found = [_of(seen, leaf, p, u, least[leaf.part]) for seen, leaf, p, u in each]
    rows, _ = sums.joined([(*xs[_LARGEST:], xs[-1]) for xs in found])
    significant, moving, update, param, relative, lost, moved = rows
    largest = [_largest([xs[k] for xs in found]) for k in range(_LARGEST)]
    is_known = step.row([float(bool(seen.first and seen.second and not seen.repeats)) for seen in step.seen])
    counted = (step.sizes - last.zeros) * is_known
    # an m whose newest gradient is not 0 is no fair sample where gradients mostly are
    known = jnp.where((counted > 0) & (counted > _DENSE * moving), 1.0, jnp.nan)
    return last._replace(
        significant=significant * known,
        counted=counted * known,
        update_sq=update,
        param_sq=param,
        relative_sq=relative / factor,
        lost=lost,
        moved=moved,
        largest_gradient=largest[0],
        largest_signal=largest[1] * (last.newest / gain),
        largest_update=largest[2],
    )


def _of(seen, leaf, p, u, least) -> list:
    """The rows of one leaf: the largest elements, and sums."""
    (m, v), p = seen.after(), None if p is None else _tree.jax_array(p)
    is_tested = bool(v is not None and seen.first and seen.second and not seen.repeats)
    v = None if seen.noise == "unknown" else v
    update = seen.update(None if p is None else widen(p))
    to = None if seen.rate is None else str(jnp.result_type(u))
    return _rows(seen.gradient(), m, v, update, p, least, axis=leaf.axis, is_tested=is_tested, to=to)


@functools.partial(jax.jit, static_argnames=("axis", "is_tested", "to"))  # traced once for all leaves of one shape
def _rows(g, m, v, update, p, least, *, axis, is_tested, to):
    """is_tested: whether `hits` have a meaning; to: the dtype of the update, None if `update` is not all of it."""
    hits = moving = jnp.zeros((), jnp.float32)
    relative = lost = moved = jnp.full((), jnp.nan)
    if v is not None:
        v = jnp.broadcast_to(v, g.shape)
        relative = jnp.where(v > 0, abs_sq(g) / jnp.where(v > 0, v, 1.0), 0.0)
    if v is not None and is_tested:
        shape = [1] * g.ndim
        if axis is not None:
            shape[axis] = -1
        moving = v > 0
        hits = (g != 0) & moving & (abs_sq(m) > least.reshape(shape) * v)
    if p is not None and to is not None:
        moved = update != 0
        lost = moved & (jnp.asarray(optax.apply_updates(p, update.astype(to))) == p)
    param = jnp.nan if p is None else abs_sq(widen(p))
    xs = [*map(jnp.abs, (g, m, update)), hits, moving, abs_sq(update), param, relative, lost, moved]
    return sums.rows([jnp.asarray(x) for x in xs], axis, _with_largest)


def _with_largest(xs):
    """The largest elements along the last axis, and of the other arrays sums, as one reduction."""

    def both(xs, ys):
        pairs = list(zip(xs, ys, strict=True))
        return (*(jnp.maximum(x, y) for x, y in pairs[:_LARGEST]), *(x + y for x, y in pairs[_LARGEST:]))

    return jax.lax.reduce(tuple(xs), (np.float32(0),) * len(xs), both, (xs[0].ndim - 1,))


def _largest(rows: list):
    """The largest of the rows of each leaf, (L,); of leaves with equally many rows together."""
    alike: dict = {}
    for i, x in enumerate(rows):
        alike.setdefault(x.shape[1], []).append(i)
    made = [jnp.max(jnp.concatenate([rows[i] for i in some]), 1, initial=0.0) for some in alike.values()]
    order = sums.in_order([i for some in alike.values() for i in some], [x.shape[0] for x in rows])
    return jnp.concatenate(made)[order]
