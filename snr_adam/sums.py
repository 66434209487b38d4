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


def _sum(x, axis):
    """The sum over all axes but this one, as a float32 vector."""
    keep = () if axis is None else (axis,)
    total = jnp.sum(x, tuple(i for i in range(x.ndim) if i not in keep)).astype(jnp.float32)
    return _whole(total if keep else total[None])


def _whole(x):
    """The same on every device, where an explicit mesh shards it."""
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, jax.P()) if any(part is not None for part in spec) else x


def together(xs, axis, chains: int = 1):
    """`_sum` of several arrays of one shape, in one pass: what they share is computed once and stored nowhere.

    Each addition waits for the one before it. With `chains` = 4 a row makes four sums, of every fourth element, side by
    side: less waiting, and more code to compile.
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
    sums = [sum(sums[i + 1 : i + len(sums) // number], sums[i]) for i in range(0, len(sums), len(sums) // number)]
    return [_sum(x, axis if over == (last,) else 0) for x in sums]


def _is_long_and_whole(x) -> bool:
    """Whether the last axis can be cut in a fixed way, whatever mesh it is spread over: up to 128 devices."""
    return x.shape[-1] % 512 == 0 and x.size > 0 and jax.typeof(x).sharding.spec[-1] is None


def apart(xs, axis):
    """The same in one pass each."""
    return [_sum(x, axis) for x in xs]


def _add(xs, ys):
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


def join(parts, number: int):
    """One vector of the leaves' vectors."""
    return jnp.concatenate(parts) if parts else jnp.zeros(number, jnp.float32)
