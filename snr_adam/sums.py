"""Sums over the elements of an array, or of each of its slices along one axis, in as few passes as there can be.

What is summed together is read once. XLA for CPU vectorises a sum over the last axis of several arrays side by side but
not one over all axes, so long arrays are summed in rows. On a mesh the sums come back whole on every device.
"""

import jax
import jax.numpy as jnp
import numpy as np


def inner(x, y):
    """Re(conj(x) y), element by element."""
    return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y


def together(xs, axis, chains: int = 1):
    """The sums of n arrays of one shape in one pass: what they share is computed once and stored nowhere.

    Each addition waits for the one before it. With `chains` = 4 a row makes four sums, of every fourth element, side by
    side: less waiting, and more code to compile.

    Args:
      xs: n real arrays; those of fewer dimensions are broadcast to the first.
      axis: the axis along which each slice has a sum of its own, None for one sum of all.

    Returns:
      float32 of shape (n, slices), or (n, 1).
    """
    number, xs = len(xs), [jnp.broadcast_to(x, xs[0].shape).astype(jnp.float32) for x in xs]
    xs = [x[None] if x.ndim == 0 else x for x in xs]
    last = xs[0].ndim - 1
    rows = np.gcd(xs[0].shape[0], 4096) if last == 0 and axis is None else 1
    if rows > 1 and jax.typeof(xs[0]).sharding.spec[0] is None:  # in rows, to sum them side by side
        xs, last = [x.reshape(rows, -1) for x in xs], 1
    over = (last,) if axis != last else tuple(range(last))
    if chains > 1 and over == (last,) and _is_long_and_whole(xs[0]):
        xs = [x.reshape(*x.shape[:-1], -1, chains)[..., i] for x in xs for i in range(chains)]
    sums = jax.lax.reduce(tuple(xs), (np.float32(0),) * len(xs), _add, over) if over else tuple(xs)
    kept = None if axis is None else 1 + (axis if over == (last,) else 0)
    sums = _sum(jnp.stack(sums), kept, first=1)
    return sums.reshape(number, -1, sums.shape[-1]).sum(1)


def apart(xs, axis):
    """The same in one pass each."""
    return jnp.stack([_sum(x, axis) for x in xs])


def _sum(x, axis, first: int = 0):
    """The sum over all axes but `axis` and the `first` ones, float32, with 1 for an axis of None."""
    kept = (*range(first), *(() if axis is None else (axis,)))
    total = jnp.sum(x, tuple(i for i in range(x.ndim) if i not in kept)).astype(jnp.float32)
    return _whole(total[..., None] if axis is None else total)


def _is_long_and_whole(x) -> bool:
    """Whether the last axis can be cut in a fixed way, whatever mesh it is spread over: up to 16 devices."""
    return x.shape[-1] % 64 == 0 and x.size > 0 and jax.typeof(x).sharding.spec[-1] is None


def _whole(x):
    """The same on every device, where an explicit mesh shards it."""
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, jax.P()) if any(part is not None for part in spec) else x


def _add(xs, ys):
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


def join(parts, number: int):
    """The leaves' sums side by side: `number` rows."""
    return jnp.concatenate(parts, axis=1) if parts else jnp.zeros((number, 0), jnp.float32)
