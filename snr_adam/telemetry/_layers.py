"""The layers of a report as a person reads them: in the order of the network, and which of them hold only rounding.

    network_order(names)       positions of names such that layers_2 comes before layers_10
    first_spike(began, ...)    the layer in which a spike began
    is_rounding(columns)       layers whose gradient is what float32's rounding leaves
    mostly_rounding(history)   those of which this holds most of the time

Apart from the rest because tables, plots, the page and alarms all ask the same questions.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from snr_adam.telemetry._spikes import CALM

ROUNDING = 2.0**-20
"""A gradient up to this share of the largest layer's, per element, may be rounding: 8 units in the last place."""


def network_order(names: Sequence[str]) -> list[int]:
    """The positions of the names in the order of the network, as far as the names tell.

    Trees with named branches are flattened in alphabetical order, which puts layers_10 before layers_2. So branches of
    one parent that differ only in their numbers are sorted by these, among the places that they have; the rest stays
    where it is, because lists and classes keep the order of the network themselves.

    Args:
      names: L paths, parts separated by "/".

    Returns:
      L positions in `names`, each once.

    >>> names = ["embed", "layers_0/w", "layers_10/w", "layers_2/w", "bias"]
    >>> [names[i] for i in network_order(names)]
    ['embed', 'layers_0/w', 'layers_2/w', 'layers_10/w', 'bias']
    """
    paths = [name.split("/") for name in names]
    branches: dict[tuple[str, ...], dict[str, None]] = {}
    for path in paths:
        for i, part in enumerate(path):
            branches.setdefault(tuple(path[:i]), {})[part] = None
    ranks = {parent: _ranks(list(parts)) for parent, parts in branches.items()}
    keys = [[ranks[tuple(path[:i])][part] for i, part in enumerate(path)] for path in paths]
    return sorted(range(len(names)), key=keys.__getitem__)


def _ranks(parts: list[str]) -> dict[str, int]:
    """The place of each branch among those of its parent."""
    place = {part: i for i, part in enumerate(parts)}
    split = {part: re.split(r"(\d+)", part) for part in parts}
    alike: dict[tuple[str, ...], list[str]] = {}
    for part in parts:
        alike.setdefault(tuple(split[part][::2]), []).append(part)
    ranks = {}
    for same in alike.values():
        by_number = sorted(same, key=lambda part: [int(x) for x in split[part][1::2]])
        ranks.update(zip(by_number, [place[part] for part in same], strict=True))
    return ranks


def first_spike(began: np.ndarray, peak: np.ndarray, step: float) -> int | None:
    """Which layer spiked first of those whose newest spike began within 20 steps of this one; None if there is none.

    began, peak: `spike_step` and `spike_peak` of a report, (L,). Of several at one step, that with the largest peak.
    """
    near = [i for i in range(len(began)) if abs(began[i] - step) <= CALM]
    return min(near, key=lambda i: (began[i], -peak[i]), default=None)


def is_rounding(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which layers' gradients are at the level of float32's rounding of the largest layer's.

    RMS(g) <= 2^-23 max RMS(g) over all layers, one unit in the last place; up to 2^-20 max RMS(g) if no signal is found

    The bias of attention's keys is one: its true gradient is 0, since softmax does not change when a number is added to
    all scores. Adam scales such a gradient up to steps of full size.

    Args:
      columns: the `columns` of a report or of a history, (..., L) each.

    Returns:
      A boolean array (..., L); False where nothing is known.
    """
    if not {"gradient_norm", "size"} <= {*columns}:
        return np.zeros(np.shape(next(iter(columns.values()), ())), bool)
    norm, size = np.asarray(columns["gradient_norm"]), np.asarray(columns["size"])
    rms = np.divide(norm, np.sqrt(size), out=np.zeros(norm.shape), where=np.isfinite(norm) & (size > 0))
    limit = ROUNDING * rms.max(-1, keepdims=True, initial=0)
    found = np.asarray(columns["snr_low"]) > 0 if "snr_low" in columns else False
    return (rms > 0) & (rms <= np.where(found, limit / 8, limit))


def mostly_rounding(history) -> np.ndarray:
    """Which layers of a history are rounding in more than half of its reports, a boolean array (L,)."""
    found = is_rounding(history.columns)
    return found.mean(0) > 0.5 if found.size else np.zeros(len(history.names), bool)
