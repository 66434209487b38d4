"""How many bytes of a tree of arrays each device holds.

    per device = sum over arrays of the bytes of one shard

Known before anything is made, from shapes and shardings, and the same for arrays that exist. What an array costs is a
matter of its shape, dtype and sharding alone; whose state it is does not enter.
"""

import math
from typing import NamedTuple

import jax

from snr_adam import _tree


class Footprint(NamedTuple):
    """What a tree of arrays costs in memory; all sizes in bytes. `str()` is a few lines.

    total: of all arrays, each counted once; per_device: what one device holds; devices: how many there are; whole: path
    and size of the arrays that every device holds whole, the largest first.
    """

    total: int
    per_device: int
    devices: int
    whole: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        share = self.per_device / self.total if self.total else 1.0
        lines = [
            f"{_size(self.total)} in all, {_size(self.per_device)} on each of {self.devices} devices: {share:.2%}, "
            f"where an even split is {1 / self.devices:.2%}"
        ]
        if self.devices > 1 and self.whole:
            kept = sum(size for _, size in self.whole)
            names = ", ".join(f"{path} ({_size(size)})" for path, size in self.whole[:3])
            more = ", ..." if len(self.whole) > 3 else ""
            lines.append(f"whole on every device: {len(self.whole)} arrays, {_size(kept)}: {names}{more}")
        return "\n".join(lines)


def footprint(tree, shardings=None) -> Footprint:
    """How many bytes each device holds of a state, a tree of parameters, or any other tree of arrays.

    Args:
      tree: arrays; or anything with shapes and dtypes, such as `jax.eval_shape(tx.init, params)`, with `shardings`.
      shardings: a tree of shardings like `tree`, such as `state_sharding` gives; None for the arrays' own.

    Returns:
      A `Footprint`.

    >>> print(footprint(jax.numpy.zeros((1000, 1000))))
    4.00 MB in all, 4.00 MB on each of 1 devices: 100.00%, where an even split is 100.00%
    """
    arrays = jax.tree_util.tree_leaves_with_path(tree)
    where = [x.sharding for _, x in arrays] if shardings is None else jax.tree.leaves(shardings)
    total, per_device, whole = 0, 0, []
    for (path, x), sharding in zip(arrays, where, strict=True):
        size = x.size * x.dtype.itemsize
        here = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        total, per_device = total + size, per_device + here
        if here == size:
            whole.append((_tree.name(path), size))
    devices = max((sharding.num_devices for sharding in where), default=1)
    return Footprint(total, per_device, devices, tuple(sorted(whole, key=lambda each: -each[1])))


def _size(count: int) -> str:
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.0f} {unit}" if count / power >= 100 else f"{count / power:.2f} {unit}"
    return f"{count} bytes"
