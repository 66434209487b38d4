"""What a report tells an experiment tracker: numbers and histograms by names that it takes.

    metrics(opt_state)              {name: float}, which `wandb.log`, `mlflow.log_metrics`, ... take as it is
    histograms(opt_state)           {name: (counts, edges)}, how a quantity is spread over layers

Two functions because trackers agree on floats and on nothing else: W&B takes a histogram as counts and edges,
TensorBoard as these or as raw values, and MLflow takes none. So `metrics` is floats whatever is asked of it, and a user
turns (counts, edges) into what the tracker calls a histogram.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from snr_adam.telemetry.report import report

_NOT_GLOBAL = ("size", "param_rms")  # of the whole model they say nothing
_SPREAD = ("snr", "pseudo_snr", "significant")

BINS: Mapping[str, np.ndarray] = MappingProxyType(
    {
        "signal": np.logspace(-8, 4, 49),
        "noise": np.logspace(-8, 4, 49),
        "pseudo_snr": np.logspace(-2, 1, 31),
        "snr": np.logspace(-4, 4, 41),
        "significant": np.linspace(0, 1, 21),
        "effective_step": np.logspace(-9, 0, 37),
    }
)
"""The quantities of `histograms` and the edges of their bins: ratios logarithmic, shares linear, and the same at every
step, so that the histograms of a run stack up to a picture over time."""


def metric_name(name: str) -> str:
    """A name that W&B, MLflow and TensorBoard take: letters, digits, `_`, `-`, `.` and single slashes."""
    name = re.sub(r"\[(\w+)\]", r".\1", name)
    name = re.sub(r"[^\w\-./ ]", "", name).replace(" ", "_")
    return re.sub(r"/+", "/", name).strip("/")


def metric_names(names: list[str]) -> list[str]:
    """`metric_name` of each, no two alike: where two names differ only by what is left out, the later gets a number.

    >>> metric_names(["net/~/linear", "net/linear"])
    ['net/linear', 'net/linear_2']
    """
    found: list[str] = []
    for name in map(metric_name, names):
        same = (f"{name}_{i}" for i in range(2, len(names) + 2))
        found.append(name if name not in found else next(x for x in same if x not in found))
    return found


def metrics(
    opt_state,
    prefix: str = "snr/",
    *,
    layers: bool = False,
    batch_size: float | None = None,
    examples: int | None = None,
) -> dict[str, float]:
    """A flat dict of Python floats for any logger: some forty numbers for the whole model, whatever its size.

    The totals under their names (`snr/signal`, `snr/snr`, ...), and for the corrected SNR, the pseudo-SNR and the share
    of significant elements the 10th, 50th and 90th percentile over layers (`snr/snr_p50`). Where no signal was found
    there is `snr/noise_scale_low` and no `snr/noise_scale`; numbers that do not exist are left out. What each number
    says is in `snr_adam.telemetry.columns.COLUMNS`, or `print(report(opt_state).explain())`.

    Args:
      opt_state: as in `report`.
      prefix: put before every key.
      layers: also every number of every layer, in a folder of their own: `snr/layer/snr/encoder/kernel`. No key is a
        folder of another, which MLflow would refuse.
      batch_size, examples: as in `report`.

    Returns:
      Finite floats by names that W&B, MLflow and TensorBoard take.
    """
    seen = report(opt_state, batch_size, examples)
    found = {key: x for key, x in seen.total.items() if key not in _NOT_GLOBAL}
    for key in _SPREAD:
        known = seen.columns[key][np.isfinite(seen.columns[key])]
        if known.size:
            found |= {f"{key}_p{p}": x for p, x in zip((10, 50, 90), np.percentile(known, (10, 50, 90)), strict=True)}
    if layers:
        names = metric_names([row["name"] for row in seen.rows])
        for name, row in zip(names, seen.rows, strict=True):
            found |= {f"layer/{key}/{name}": x for key, x in row.items() if key != "name"}
    return {prefix + key: float(x) for key, x in found.items() if np.isfinite(x)}


def histograms(
    opt_state,
    prefix: str = "snr/",
    *,
    bins: Mapping[str, np.ndarray] = BINS,
    batch_size: float | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """How many layers have which SNR, signal, noise, ...: one histogram per quantity.

    The first and the last bin also take what lies outside of them: a negative SNR is in the first, an infinite one in
    the last. A layer is left out only where it has no number (nan), as a first moment's SNR has after one step.

    Args:
      opt_state: as in `report`.
      prefix: put before every key.
      bins: quantity -> edges of its bins, (N + 1,) numbers that grow; `BINS | {"floor": edges}` adds one.
      batch_size: as in `report`, for noise scales.

    Returns:
      {"snr/layers/snr": (counts, edges), ...}: int64 (N,) and float64 (N + 1,), as `np.histogram` gives them. No key is
      one of `metrics`, so one call may log both.

    Raises:
      ValueError: if there is no such quantity, or if its edges are no numbers that grow.

    >>> import jax, jax.numpy as jnp, optax
    >>> from snr_adam.telemetry.observe import observe
    >>> tx, w = observe(optax.adam(0.1)), {"a": jnp.ones(4), "b": jnp.ones(4)}
    >>> state = tx.init(w)
    >>> for step in range(6):
    ...     _, state = jax.jit(tx.update)({"a": jnp.ones(4), "b": jnp.ones(4) * (-1) ** step}, state, w)
    >>> counts, edges = histograms(state, bins={"snr": np.array([0.0, 1.0, 10.0, 100.0])})["snr/layers/snr"]
    >>> counts  # one layer has nothing but signal, the other none
    array([1, 0, 1])

    With W&B: `wandb.log({key: wandb.Histogram(np_histogram=x) for key, x in histograms(opt_state).items()})`.
    """
    seen, found = report(opt_state, batch_size), {}
    for key, values in bins.items():
        if key not in seen.columns:
            raise ValueError(f"bins: no quantity {key!r}; there are {', '.join(seen.columns)}")
        edges = np.asarray(values, float)
        if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
            raise ValueError(
                f"bins: {key!r} has the edges {values}; give two or more numbers, each above the one before"
            )
        known = seen.columns[key][~np.isnan(seen.columns[key])]
        found[f"{prefix}layers/{key}"] = np.histogram(np.clip(known, edges[0], edges[-1]), edges)
    return found
