"""Sums over the elements of an array, or of each of its slices along one axis, in as few passes as there can be.

What is summed together is read once. XLA for CPU takes rows of an array side by side but not a flat one in parts, so
long arrays are summed in rows. On a mesh the sums come back whole on every device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def inner(x, y):
    """Re(conj(x) y), element by element."""
    return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y


@functools.partial(jax.jit, static_argnums=1)  # traced once for all leaves of one shape
def together(xs, axis):
    """The sums of n arrays of one shape in one pass: what they share is computed once and stored nowhere.

    Args:
      xs: n real arrays; those of fewer dimensions are broadcast to the first.
      axis: the axis along which each slice has a sum of its own, None for one sum of all.

    Returns:
      float32 of shape (n, slices), or (n, 1).
    """
    number, xs = len(xs), _alike(xs)
    xs = [x[None] if x.ndim == 0 else x for x in xs]
    if axis is None:
        xs = _in_rows(xs, np.gcd(xs[0].shape[0], 4096))
    last = xs[0].ndim - 1
    over = (last,) if axis != last else tuple(range(last))
    sums = _reduce(xs, over) if over else xs
    kept = None if axis is None else 1 + (axis if over == (last,) else 0)
    sums = _sum(jnp.stack(sums), kept, first=1)
    return sums.reshape(number, -1, sums.shape[-1]).sum(1)


def in_one_reduction(xs, axis):
    """Sums inside of the kernel that an update makes on a GPU, as one reduction with several results.

    XLA lets one reduction per kernel read an array that the kernel overwrites: of several it copies the array first.
    """
    xs = _alike(xs)
    return _reduce(xs, _all_but(axis, xs[0]))


def one_each(xs, axis):
    """Sums inside of the kernel that an update makes on a TPU, as one reduction for each result.

    There a reduction with several results does not become a part of the kernel.
    """
    xs = _alike(xs)
    return [jnp.sum(x, _all_but(axis, x)) for x in xs]


def _alike(xs) -> list:
    """Every array as float32, in the shape of the first; what is looked at has no derivative."""
    xs = jax.lax.stop_gradient(list(xs))
    return [jnp.broadcast_to(x, xs[0].shape).astype(jnp.float32) for x in xs]


def _all_but(axis, x) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis)


def columns(found: list):
    """What the two above have found, leaf after leaf, as rows (k, L); in few operations, each of which is a kernel."""
    return jnp.stack([jnp.concatenate([jnp.atleast_1d(_whole(x)) for x in row]) for row in zip(*found, strict=True)])


def is_small(x) -> bool:
    """Whether a kernel of its own takes longer to launch and to compile than to run."""
    return x.size <= 2**14 and all(part is None for part in _spec(x))


def _in_rows(xs, rows: int):
    """Flat arrays as so many rows, which can be summed side by side."""
    flat = xs[0].ndim == 1 and rows > 1 and _spec(xs[0])[0] is None
    return [x.reshape(rows, -1) for x in xs] if flat else xs


def _reduce(xs, over):
    return jax.lax.reduce(tuple(xs), (np.float32(0),) * len(xs), _add, over)


def _sum(x, axis, first: int = 0):
    """The sum over all axes but `axis` and the `first` ones, float32, with 1 for an axis of None."""
    kept = (*range(first), *(() if axis is None else (axis,)))
    total = jnp.sum(x, tuple(i for i in range(x.ndim) if i not in kept)).astype(jnp.float32)
    return _whole(total[..., None] if axis is None else total)


def _spec(x):
    """How an explicit mesh spreads each axis of x, None where it does not."""
    return jax.typeof(x).sharding.spec


def _whole(x):
    """The same on every device, where an explicit mesh shards it."""
    return jax.sharding.reshard(x, jax.P()) if any(part is not None for part in _spec(x)) else x


def joined(xs: list, axes: list):
    """`together` of what is to be summed of each leaf, as rows (k, L)."""
    return jnp.concatenate([together(row, axis) for row, axis in zip(xs, axes, strict=True)], axis=1)


def _add(xs, ys):
    return tuple(x + y for x, y in zip(xs, ys, strict=True))
