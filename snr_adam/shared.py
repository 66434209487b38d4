"""One noise for many elements: a denominator whose v is averaged over axes, and how a state keeps it.

Where that costs little is measured on a running state by `state.suggest_sharing`; `state.share` does it.
"""

import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from snr_adam._checks import check_pattern
from snr_adam._tree import exportable


@exportable
class SharedNoise(NamedTuple):
    """The `nu` of a state whose noise is shared over axes (`noise.Shared`, `state.share`).

    v: one array per parameter, in the order of the tree's leaves, with size 1 along the axes that share. Not a tree
      like the parameters, because Flax and others give every array in such a tree the sharding of its parameter.
    """

    v: tuple


@dataclass(frozen=True)
class Shared:
    """Another denominator whose v is the mean of g^2 over some axes of each parameter: one noise for many elements.

    Where v varies little along an axis its elements can share one number, which saves nearly all of v's memory
    (SlimAdam, Kalra et al. 2025; Adam-mini, Zhang et al. 2024). What may be shared is measured, not guessed:
    `sharing.suggest_sharing` on a running state.

    Args:
      noise: a denominator that keeps one array per parameter, such as `RMS`.
      axes: which axes of a parameter share. An int or a tuple of ints for all parameters; or a dict from patterns
        (regular expressions, searched in the path "layer/kernel", first match wins) to such axes; or a function of
        (path, shape) to such axes. Parameters without a match share nothing. Leave out an axis that stacks layers.
    """

    noise: Any
    axes: Any

    def __post_init__(self):
        if callable(self.axes):
            return
        by_pattern = isinstance(self.axes, Mapping)
        for pattern, axes in self.axes.items() if by_pattern else ((None, self.axes),):
            if by_pattern:
                check_pattern("Shared: axes", pattern)
            _tuple_of(axes, "" if pattern is None else f" for {pattern!r}")

    def axes_of(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of the parameter at `path` that share."""
        axes = self.axes
        if callable(axes):
            axes = axes(path, shape)
        elif isinstance(axes, Mapping):
            axes = next((found for pattern, found in axes.items() if re.search(pattern, path)), ())
        axes = _tuple_of(axes, f" for parameter {path!r}")
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(f"Shared: axes {axes} for parameter {path!r} of shape {shape}: an axis is out of range")
        return tuple(sorted({axis % len(shape) for axis in axes}))


def _tuple_of(axes, where: str) -> tuple[int, ...]:
    """Axes as a tuple of ints."""
    found = (axes,) if isinstance(axes, numbers.Integral) else axes
    if not isinstance(found, (tuple, list)) or not all(
        isinstance(axis, numbers.Integral) and not isinstance(axis, bool) for axis in found
    ):
        raise TypeError(
            f"Shared: axes={axes!r}{where}: must be an int or a tuple of ints, a dict from patterns to these, or a "
            "function of (path, shape) to these"
        )
    return tuple(map(int, found))
