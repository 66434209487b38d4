"""Which noise may be shared: measured on a running optimizer, then done to it.

v differs little along some axes of some parameters; there one number can stand for many and most of v's memory is
saved. Along others (the tokens of an embedding) it differs by orders of magnitude. Sharing over axes K replaces v by
its mean over K; the update, m / sqrt(v), then errs by about half the relative deviation of v along K,

    SNR_K = 1 / E[Var_K v / (E_K v)^2]          error of the update ~ 0.5 / sqrt(SNR_K)

with E over the axes that are kept. SNR_K = 1 means 50 %, 10 means 16 %, 25 means 10 %. SlimAdam (Kalra et al. 2025,
arXiv 2503.01843) averages (E_K v)^2 / Var_K v instead; there one even row hides many uneven ones, and the prediction
of the error fails exactly where it matters.

    suggestion = suggest_sharing(opt_state, params, cutoff=10)      # print it: a table
    opt_state = share(opt_state, params, suggestion)                # the same optimizer goes on with it
    tx = ...Shared(RMS(0.999), suggestion.axes)                     # a new run that starts with it
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._checks import check_layer_axis
from snr_adam._given import box_of, check_known, held_by, plain, readable
from snr_adam.shared import Shared, SharedNoise
from snr_adam.storage import InOwnForm
from snr_adam.transform import ScaleBySnrState

_NOT_SHARED = ("Infinity", "Spread", "Adapted")  # of those that keep one array; others are told from its form


class Candidate(NamedTuple):
    """One parameter and the axes over which its noise is best shared; `axes` is () where nothing passes the cutoff.

    snr: SNR_K of the axes (of the best single candidate if none passes); error: the expected relative RMS error of the
    update; saved: bytes of v that sharing saves.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    snr: float
    error: float
    saved: int


class Suggestion(NamedTuple):
    """What may be shared, one row per parameter with two or more axes. `str()` is a table."""

    rows: tuple[Candidate, ...]
    cutoff: float
    total: int

    @property
    def axes(self):
        """A rule for `Shared`: the axes by the parameter's exact path."""
        found = {row.path: row.axes for row in self.rows}
        return lambda path, shape: found.get(path, ())

    def __str__(self) -> str:
        width = max([len(row.path) for row in self.rows], default=9)
        heads = f"{'shape':>16}  {'share axes':>10}  {'SNR_K':>9}  {'update error':>12}  {'saved':>12}"
        lines = [f"{'parameter':{width}}  {heads}"]
        for row in self.rows:
            done = f"{row.error:12.1%}" if row.axes else f"{'-':>12}"
            axes = str(row.axes).replace(",)", ")") if row.axes else "none"
            lines.append(f"{row.path:{width}}  {row.shape!s:>16}  {axes:>10}  {row.snr:9.3g}  {done}  {row.saved:12,}")
        saved = sum(row.saved for row in self.rows)
        lines.append(f"v shrinks from {self.total:,} to {self.total - saved:,} bytes (cutoff SNR_K >= {self.cutoff:g})")
        return "\n".join(lines)


@functools.partial(jax.jit, static_argnums=1)
def snr_over(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """SNR_K of a second moment over `axes`: 1 / E[Var_K v / (E_K v)^2], ignoring slices that are all zero."""
    v = v.astype(jnp.float32)
    v = v / jnp.maximum(jnp.max(v), jnp.finfo(jnp.float32).tiny)  # squares of tiny second moments underflow
    mean, variance = jnp.mean(v, axes), jnp.var(v, axes)
    seen = mean > 1e-18
    spread = jnp.where(seen, variance / jnp.where(seen, mean, 1.0) ** 2, 0.0)
    return jnp.sum(seen) / jnp.sum(spread)


def suggest_sharing(state, params, *, cutoff: float = 10.0, layer_axis: Any = None) -> Suggestion:
    """Measures, for each parameter and each subset of its axes, how well one noise would serve all elements along them.

    Args:
      state: an optimizer's state, or an `nnx.Optimizer`, that holds one `ScaleBySnrState`, after some hundreds of
        steps. SNR_K falls as the learning rate grows, so measure in the middle of a run rather than at its start.
      params: the parameters, for paths and shapes.
      cutoff: the least SNR_K to accept. The update's expected error is 0.5 / sqrt(cutoff): 16 % for 10.
      layer_axis: the axis that stacks layers, never shared: an int, a dict from patterns to ints, or None.

    Returns:
      A `Suggestion`: of the axes whose SNR_K reaches the cutoff, those that save most; never for vectors and scalars.

    Raises:
      ValueError: if the state holds no noise that can be shared, or more than one `ScaleBySnrState`.
    """
    check_layer_axis("suggest_sharing", layer_axis)
    check_known("suggest_sharing", state)
    params = plain(params)
    vs = _per_parameter(_second_moments(_only("suggest_sharing", state)), params)
    rows = []
    for (path, p), v in zip(_tree.named_leaves(params), vs, strict=True):
        if _is_kept(v) and jnp.ndim(p) >= 2:
            rows.append(_best(path, v, cutoff, _layer_axis(layer_axis, path, jnp.ndim(p))))
    total = sum(v.size * v.dtype.itemsize for v in vs if _is_kept(v))
    return Suggestion(tuple(rows), cutoff, total)


def _best(path: str, v, cutoff: float, layer_axis: int | None) -> Candidate:
    free = [axis for axis in range(v.ndim) if axis != layer_axis and v.shape[axis] > 1]
    subsets = [axes for size in range(1, len(free) + 1) for axes in itertools.combinations(free, size)]
    measured = {axes: float(snr_over(v, axes)) for axes in subsets}

    def saved(axes):
        kept = v.size
        for axis in axes:
            kept //= v.shape[axis]
        return (v.size - kept) * v.dtype.itemsize

    passing = [axes for axes, snr in measured.items() if snr >= cutoff]
    best = max(passing, key=lambda axes: (saved(axes), measured[axes]), default=())
    snr = measured[best] if best else max(measured.values(), default=0.0)
    return Candidate(path, v.shape, best, snr, 0.5 / snr**0.5 if best else 0.0, saved(best))


def _layer_axis(layer_axis, path: str, ndim: int) -> int | None:
    if layer_axis is None:
        return None
    axes = layer_axis if isinstance(layer_axis, Mapping) else {"": layer_axis}
    return next(iter(Shared(None, axes).axes_of(path, (0,) * ndim)), None)


def share(state, params, axes):
    """Compresses the noise of a running optimizer in place of its full one; the same optimizer goes on with the result.

    Args:
      state: an optimizer's state, or an `nnx.Optimizer`, that holds one `ScaleBySnrState` whose `nu` is a tree like
        the parameters.
      params: the parameters, for paths and structure.
      axes: a `Suggestion`, or anything that `Shared` takes as its axes.

    Returns:
      The state with v averaged over the axes, as `Shared` would have kept it from now on.
    """
    rule = Shared(None, axes.axes if isinstance(axes, Suggestion) else axes)
    state, params = held_by(state), plain(params)
    vs = _per_parameter(_second_moments(_only("share", state)), params)
    shared = SharedNoise(
        tuple(
            None
            if v is None
            else jnp.mean(v.astype(jnp.float32), rule.axes_of(path, v.shape), keepdims=True).astype(v.dtype)
            for (path, _), v in zip(_tree.named_leaves(params), vs, strict=True)
            if not isinstance(v, optax.MaskedNode)
        )
    )

    def replaced(node):
        return node._replace(nu=jax.tree.map(box_of(node.count), shared)) if _is_state(node) else node

    return jax.tree.map(replaced, state, is_leaf=_is_state)


def _per_parameter(nu, params) -> list:
    return _tree.flatten(params)[1].flatten_up_to(nu)


def _is_kept(v) -> bool:
    return v is not None and not isinstance(v, optax.MaskedNode)


def _is_state(node) -> bool:
    return isinstance(node, ScaleBySnrState)


def _only(owner: str, state) -> ScaleBySnrState:
    found = _tree.nodes(ScaleBySnrState, readable(owner, state, ScaleBySnrState))
    if len(found) != 1:
        raise ValueError(
            f"expected an optimizer state with one ScaleBySnrState, found {len(found)}: pass the part to share"
        )
    return found[0]


def _second_moments(state: ScaleBySnrState):
    if isinstance(state.nu, SharedNoise):
        raise ValueError("the noise of this state is shared already")
    if isinstance(state.nu, InOwnForm):
        raise ValueError(
            "the moments of this state rest in the form of a storage that this package does not know (its nu is "
            "InOwnForm), so that no noise can be found in it: use storage 'float32' or 'bfloat16'"
        )
    if isinstance(state.nu, tuple) and (state.nu == () or hasattr(state.nu, "_fields")):
        raise ValueError(
            "sharing needs a noise that keeps one array per parameter, apart from the signal: this state's nu is "
            f"{type(state.nu).__name__}. Storage 'packed' and optimizers such as amsgrad cannot share"
        )
    if state.made and state.made.rpartition("/")[2] in _NOT_SHARED:
        raise ValueError(
            f"sharing needs a noise that is a mean of squares: this state is one of {state.made} (signal/noise), which "
            "`Shared` refuses too"
        )
    return state.nu
