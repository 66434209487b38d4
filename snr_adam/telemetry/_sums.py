"""Sums over the elements of an array, or of each of its slices along one axis, in as few passes as possible.

What is summed together is read once. Of the arrays given, the last is summed in another way: into a *sketch* of 128
numbers, by the place of an element modulo 128, which keeps inner products (`_lags`). So everything is summed over the
last axis first, and these rows are summed whole or folded. XLA for CPU takes rows side by side but not a flat array in
parts, so flat arrays are cut into rows. On a mesh the sums are whole on every device.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 128
"""Sums in a sketch."""
_PIECE = 32


def inner(x, y):
    """Re(conj(x) y), element by element."""
    return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y


def at_once(xs):
    """Sums over the last axis as one reduction with several results.

    XLA for GPU lets one reduction per kernel read an array that the kernel overwrites: of several it copies the array
    first.
    """
    return jax.lax.reduce(tuple(xs), (np.float32(0),) * len(xs), _add, (xs[0].ndim - 1,))


def one_each(xs):
    """Sums over the last axis as one reduction for each result.

    On TPU a reduction with several results does not become a part of the kernel that makes an update.
    """
    return [jnp.sum(x, -1) for x in xs]


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for all leaves of one shape
def rows(xs, axis, take=at_once):
    """The sums over rows of arrays of one shape, in one pass: what they share is computed once and stored nowhere.

    Args:
      xs: real arrays; those of fewer dimensions are broadcast to the first.
      axis: the axis along which each slice has sums of its own, None for one of all.
      take: how rows are summed over their last axis.

    Returns:
      For each array float32 (slices, rows) or (1, rows); of no more elements than a sketch has, the elements.
    """
    xs = [_rows(x, axis) for x in _alike(xs)]
    found = xs if is_few(math.prod(xs[0].shape[1:])) else take(xs)
    return [whole(x).reshape(x.shape[0], math.prod(x.shape[1:])) for x in found]


def joined(found: list) -> tuple:
    """What `rows` has found of each leaf, summed: all but the last, float32 (k, L), and sketches of the last (L, 128).

    Leaves with equally many rows are summed together: after the kernels of the leaves there are only few more.
    """
    alike: dict = {}
    for i, xs in enumerate(found):
        alike.setdefault(xs[0].shape[1], []).append(i)
    sums, sketches = [], []
    for some in alike.values():
        *those, last = (jnp.concatenate(column) for column in zip(*(found[i] for i in some), strict=True))
        sums.append(jnp.stack([jnp.sum(x, 1) for x in those]))
        sketches.append(_fold(last))
    order = in_order([i for some in alike.values() for i in some], [xs[0].shape[0] for xs in found])
    return jnp.concatenate(sums, axis=1)[:, order], jnp.concatenate(sketches)[order]


def together(xs, axis, take=at_once) -> tuple:
    """The same of one leaf alone."""
    return joined([rows(xs, axis, take)])


def in_order(made: list[int], sizes: list[int]):
    """What brings columns into the order of the leaves, from that in which they were made; sizes: columns of each."""
    ends = np.cumsum([sizes[i] for i in made])
    place = {i: np.arange(end - sizes[i], end) for i, end in zip(made, ends, strict=True)}
    index = np.concatenate([place[i] for i in range(len(made))])
    return slice(None) if np.all(np.diff(index) == 1) else index


def _alike(xs) -> list:
    """Every array as float32, in the shape of the first; what is looked at has no derivative."""
    xs = jax.lax.stop_gradient(list(xs))
    return [jnp.broadcast_to(x, xs[0].shape).astype(jnp.float32) for x in xs]


def is_few(size: int) -> bool:
    """Whether so many elements are no more than a sketch has."""
    return size <= WIDTH


def _rows(x, axis):
    """An array as (slices, ..., rows, elements of a row), with rows enough for a sketch where there are so many."""
    x = x[None] if axis is None else jnp.moveaxis(x, axis, 0)
    size = math.prod(x.shape[1:])
    if is_few(size) or (x.ndim > 2 and math.prod(x.shape[1:-1]) >= WIDTH):
        return x
    x = whole(x)
    cut = np.gcd(size, 4096)
    if cut >= WIDTH:
        return x.reshape(x.shape[0], cut, -1)
    flat = jnp.pad(x.reshape(x.shape[0], -1), ((0, 0), (0, -size % WIDTH)))
    return jnp.swapaxes(flat.reshape(x.shape[0], -1, WIDTH), 1, 2)


def _fold(x):
    """Rows (slices, rows) as sketches (slices, 128).

    Rows are cut into pieces of 32, of which every fourth goes to the same places. To cut them into pieces of 128 would
    move them between devices, where an axis is spread over so many that none holds whole pieces.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _PIECE if x.shape[1] else _PIECE)))
    pieces = x.reshape(x.shape[0], -1, 1, _PIECE)
    shape = (1, pieces.shape[1], WIDTH // _PIECE, 1)
    piece, place = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (1, 2))
    here = (piece ^ place) & (WIDTH // _PIECE - 1) == 0
    return jnp.sum(jnp.where(here, pieces, 0.0), 1).reshape(x.shape[0], WIDTH)


def is_small(x) -> bool:
    """Whether a kernel of its own takes longer to launch and to compile than to run."""
    return x.size <= 2**14 and all(part is None for part in _spec(x))


def _spec(x):
    """How an explicit mesh spreads each axis of x, None where it does not."""
    return jax.typeof(x).sharding.spec


def whole(x):
    """The same on every device, where an explicit mesh shards it."""
    return jax.sharding.reshard(x, jax.P()) if any(part is not None for part in _spec(x)) else x


def _add(xs, ys):
    return tuple(x + y for x, y in zip(xs, ys, strict=True))
