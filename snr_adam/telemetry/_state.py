"""What `observe` keeps: the wrapped optimizer's state, and few arrays with a column per layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snr_adam import _tree
from snr_adam.telemetry import _averages as averages
from snr_adam.telemetry import _lags as lags
from snr_adam.telemetry import _spikes as spikes
from snr_adam.telemetry._averages import Last, Means, Memory
from snr_adam.telemetry._lags import Lags
from snr_adam.telemetry._spikes import Spikes


@_tree.exportable
class ObserveState(NamedTuple):
    """The state of `observe`: the wrapped optimizer's, unchanged, and float32 arrays with a column per leaf.

    inner: the wrapped state. count: int32, steps taken. seen: int32, looks in the means. looked, detailed: int32, the
    steps of the last look and of the last details. bursts: int32, bursts of looks in `lags`. square: the sum of the
    squared weights of the means. axis: int32 (L,), the axis a leaf was sliced along, or -1.
    means: rows named by `Means`, then by `Spikes` (L + 1); `means_in` and `spikes_in` take them apart. lags, memory,
    last: rows named by `Lags` (L + 1), `Memory` and `Last` (L).
    sketches: (6, L, 128), of the gradients of the burst that has begun.
    """

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


class Watched(NamedTuple):
    """What a step adds to an `ObserveState`, beside the count."""

    seen: Any
    looked: Any
    detailed: Any
    bursts: Any
    square: Any
    means: Any
    lags: Any
    memory: Any
    last: Any
    sketches: Any


def means_in(array) -> Means:
    """The means among the rows of `ObserveState.means`."""
    return Means(*array[: len(Means._fields)])


def spikes_in(array) -> Spikes:
    """What is known of spikes, likewise."""
    return Spikes(*array[len(Means._fields) :])


def blank(inner, observed, leaves) -> ObserveState:
    """The state before the first step."""
    axes = [-1 if leaf.axis is None else leaf.axis for leaf in observed for _ in range(leaf.size)]
    state = ObserveState(inner, *_blank(jnp.asarray(axes, jnp.int32)))
    if any(map(_tree.is_abstract, leaves)):
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state[1:])
        return ObserveState(inner, *own)
    return state


def blank_of(state: ObserveState) -> ObserveState:
    """The same as if it had seen nothing yet."""
    return ObserveState(state.inner, *_blank(state.axis))


def _blank(axis) -> tuple:
    """All fields but the first, before the first step."""
    n = axis.shape[0]
    return (
        *(jnp.zeros((), jnp.int32) for _ in range(5)),
        jnp.zeros((), jnp.float32),
        axis,
        jnp.concatenate([averages.zeros(Means, n + 1), averages.stack(spikes.none(n + 1))]),
        averages.zeros(Lags, n + 1),
        averages.zeros(Memory, n),
        averages.zeros(Last, n),
        jnp.full((lags.BURST, n, lags.WIDTH), jnp.nan, jnp.float32),
    )
