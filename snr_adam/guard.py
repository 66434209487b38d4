"""Steps that must not be taken: gradients that are not finite, and gradients that are too long.

One NaN among the gradients makes the moments NaN and the run useless. `guard` looks at all gradients first, once, and
its verdict enters the step as two scalars: whether to take it, and what to multiply the gradients with.

    S = sum of |g|^2 over all leaves                   one read of the gradients
    taken = no g is NaN or infinite                    a bad step changes nothing but the guard's own counters
    g := g min(1, clip_norm / sqrt(S))                 clipping by the global norm (Pascanu et al. 2013)

S is the sum for gradients cut off at +-2^56 = 7.2e16 (`_numerics.saturate`), as the step will see them, and summed in
units of 2^8. So 2^31 of them cannot overflow and erase a step, and it is NaN only where a gradient is not finite: one
sum serves for both. Gradients under 2^-55 = 2.8e-17 have squares that are 0 and count for nothing in the norm, so a
`clip_norm` under 2.3e-13 is refused, and a norm of 0 is reported as under 2.8e-17.

The verdict reaches the step of an optimizer of this package as an extra argument, through whatever forwards it: chains,
`inject_hyperparams`, `observe`, wrappers of one's own. The step keeps its old moments, computes the update from what
it kept, reads nothing twice, and says that it did. For all other parts of the state the guard puts the old ones back.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snr_adam import _tree
from snr_adam._checks import check_hyperparams, check_optimizer, check_whole
from snr_adam._compiler import one_by_one
from snr_adam._derivatives import sqrt
from snr_adam._given import check_known, plain, readable
from snr_adam._moments import leaf_names
from snr_adam._numerics import Scalar, compute_dtype, largest, widen
from snr_adam._recipe import with_recipe
from snr_adam.step import OPEN, Gate


@_tree.exportable
class GuardState(NamedTuple):
    """inner: the state of the guarded optimizer, and scalars about the steps so far.

    skipped: int32, steps not taken; consecutive: int32, those since the last one that was; holding: bool, whether
    `max_consecutive` was reached; last_bad: int32, number of the first leaf that was not finite in the last bad step,
    -1 before; norm: global norm of the last finite gradients, before clipping.
    """

    inner: Any
    skipped: Any
    consecutive: Any
    holding: Any
    last_bad: Any
    norm: Any


class _Look(NamedTuple):
    """What one look at all gradients tells: the number of the first bad leaf, -1 if there is none, and their norm."""

    bad: Any
    norm: Any


def _is_place(x) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _look(leaves: list) -> _Look:
    """`leaves` has an entry for each that is None or masked too: they count."""
    gs = [_tree.jax_array(g) if not _is_place(g) and _is_real(g) else None for g in leaves]
    numbers = [i for i, g in enumerate(gs) if not _is_place(leaves[i])]
    gs = [gs[i] for i in numbers]
    dtype, one = compute_dtype(*(g for g in gs if g is not None)), jnp.float32(1.0)
    squares = [jnp.zeros((), dtype)]
    for g in gs:
        g, one = one_by_one(g, one)
        squares.append(jnp.zeros((), dtype) if g is None else _square(g, one, dtype))
    squares = jnp.stack(squares)
    bad = jnp.isnan(squares)
    first = jnp.where(jnp.any(bad), jnp.argmax(bad), 0).astype(jnp.int32) - 1
    if numbers != list(range(len(numbers))):
        first = jnp.asarray([-1, *numbers], jnp.int32)[first + 1]
    return _Look(first, sqrt(jnp.sum(squares)) * _unit(dtype))


def _is_real(g) -> bool:
    """Whether there is anything to look at: integers and the float0 beside them are finite."""
    return jnp.issubdtype(jnp.result_type(g), jnp.inexact)


def _unit(dtype) -> float:
    """What gradients are measured in before they are squared, so that 2^31 squares of the largest have a finite sum."""
    return 2.0 ** (jnp.finfo(dtype).maxexp // 16)


def _square(g, one, dtype):
    """|g|^2 of a whole leaf, cut off, in the units of `dtype`: finite if all of g is, else NaN.

    g - g is 0, or NaN where g is not finite. XLA's reductions on a CPU take in arithmetic and min, but no select and no
    clamp: those would first write an array as large as the leaf.
    """
    if jnp.iscomplexobj(g):
        return _square(g.real, one, dtype) + _square(g.imag, one, dtype)
    g = widen(g)
    one = one.astype(g.dtype)
    x = jnp.minimum(jnp.abs(g), largest(g.dtype) * one) + (g - g)
    x = x * (one / _unit(g.dtype))
    return jnp.sum(x * x).astype(dtype) * (_unit(g.dtype) / _unit(dtype)) ** 2


def _scale(norm, clip_norm: Scalar | None):
    """min(1, clip_norm / norm), exactly 1 for gradients that are short enough; None without clipping."""
    if clip_norm is None:
        return None
    clip = jnp.asarray(clip_norm, norm.dtype)
    long = norm > clip
    return jnp.where(long, clip / jnp.where(long, norm, 1.0), 1.0)


def _passed_on(updates, ok, scale, outer: Gate) -> tuple[Any, Gate]:
    """The gradients as they are passed on, scaled, and the gate with what they were."""
    gate = Gate(ok, scale)

    def scaled(g):
        if g is None or scale is None or not _is_real(g):
            return g
        x = _tree.jax_array(g)
        x = gate.scaled(widen(x)).astype(x.dtype)
        gate.raw[id(x)] = x, g
        return x

    if scale is None:  # nothing is scaled here, but maybe by a guard around this one
        gate.scale, gate.raw = outer.scale, outer.raw
        return updates, gate
    return jax.tree.map(scaled, updates, is_leaf=_tree.is_none), gate


@with_recipe
def guard(
    tx: optax.GradientTransformation, clip_norm: Scalar | None = None, max_consecutive: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradients are not finite, and clips the others by their global norm.

    At a step with a NaN or an infinity anywhere in the gradients, parameters and the optimizer's whole state, counts of
    schedules included, keep their bits: the update is -0, the one number that changes nothing when it is added.

    Args:
      tx: any optimizer. One of this package costs one more read of the gradients and no memory, in whatever it is
        wrapped; of what belongs to other optimizers, the old state is kept beside the new one for a moment.
      clip_norm: largest global norm of the gradients; longer ones are scaled to it. A float or a scalar array; None
        for no clipping.
      max_consecutive: after so many skipped steps in a row something is broken for good, and the guard holds: it skips
        every step, finite ones too, until its state's `holding` is set to False. None never gives up.

    Returns:
      A transformation with state `GuardState`. `health(state, params)` puts it into words. Inside of `jax.shard_map`
      norm and verdict are those of the device's shard: take the step outside of it.

    Raises:
      TypeError: if `tx` is no optimizer.
      ValueError: if `clip_norm` is not positive or `max_consecutive` is under 1.

    >>> tx = guard(optax.sgd(1.0), clip_norm=1.0)
    >>> w = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(w), w)
    >>> print(optax.apply_updates(w, updates))
    [1. 2.]
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), state, w)
    >>> print(updates, state.skipped, state.norm)
    [-0.6 -0.8] 1 5.0

    Reference: Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks, arXiv 1211.5063,
    Algorithm 1; Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2, for skipping.
    """
    inner = check_optimizer("guard", tx)
    if callable(clip_norm):
        raise TypeError(
            f"guard: clip_norm={clip_norm!r:.80} is a function: a guard counts no steps, so give a number, or inject a "
            "schedule with optax.inject_hyperparams(lambda clip: guard(tx, clip))(schedule)"
        )
    check_hyperparams(clip_norm=clip_norm)
    if max_consecutive is not None:
        max_consecutive = check_whole("guard: max_consecutive", max_consecutive, 1, ", or None to never give up")

    def init(params):
        leaves, _ = _tree.flatten(params)
        _tree.check_arrays("guard: parameter", params, leaves)
        numbers = [_tree.jax_array(p) for p in leaves if p is not None and _is_real(p)]
        new = functools.partial(_tree.new_scalar, leaves)
        return GuardState(
            inner=inner.init(params),
            skipped=new(jnp.int32(0)),
            consecutive=new(jnp.int32(0)),
            holding=new(jnp.zeros((), bool)),
            last_bad=new(jnp.int32(-1)),
            norm=new(jnp.zeros((), compute_dtype(*numbers))),
        )

    def update(updates, state, params=None, *, gate: Gate = OPEN, **extra_args):
        _tree.check_arrays("guard: gradient", updates, _tree.flatten(updates)[0])
        outer, look = gate, _look(jax.tree.leaves(updates, is_leaf=_is_place))
        ok = (look.bad < 0) & ~state.holding & outer.ok
        given, gate = _passed_on(updates, ok, _scale(look.norm, clip_norm), outer)
        us, new = inner.update(given, state.inner, params, gate=gate, **extra_args)
        new = gate.choose(new, state.inner)
        us = jax.tree.map(lambda u: jnp.where(ok, u, -jnp.zeros_like(u)) if _is_real(u) else u, us)
        after = _after(state, new, ok, look, max_consecutive)
        if outer is not OPEN:  # a guard around this one: its verdict was part of the gate, and has been seen to
            after = outer.choose(after._replace(inner=()), state._replace(inner=()))._replace(inner=new)
            outer.held.append(after)
        return us, after

    return optax.GradientTransformationExtraArgs(init, update)


def _after(state: GuardState, inner, ok, look: _Look, limit: int | None) -> GuardState:
    consecutive = jnp.where(ok, 0, optax.safe_increment(state.consecutive))
    return GuardState(
        inner=inner,
        skipped=jnp.where(ok, state.skipped, optax.safe_increment(state.skipped)),
        consecutive=consecutive,
        holding=state.holding if limit is None else state.holding | (consecutive >= limit),
        last_bad=jnp.where(look.bad < 0, state.last_bad, look.bad),
        norm=jnp.where(look.bad < 0, look.norm.astype(state.norm.dtype), state.norm),
    )


class Health(NamedTuple):
    """A `GuardState` as Python numbers, with the last bad leaf by name (None before any). `str()` is a sentence."""

    skipped: int
    consecutive: int
    holding: bool
    last_bad: str | None
    norm: float

    def __str__(self) -> str:
        if not self.skipped:
            norm = f"{self.norm:.3g}" if self.norm else "0 (no gradient so far, or all under 2.8e-17)"
            return f"no step skipped; gradient norm {norm}"
        steps = "1 step" if self.skipped == 1 else f"{self.skipped} steps"
        now = f" ({self.consecutive} in a row until now)" if self.consecutive else ""
        hold = "; HOLDING: no step is taken until the state's `holding` is set to False" if self.holding else ""
        return f"{steps} skipped{now}; last non-finite gradient: {self.last_bad}{hold}"


def health(state, params) -> Health:
    """What the guard in an optimizer's state has seen, in words.

    Args:
      state: an optimizer's state that holds one `GuardState`.
      params: the parameters, for the names of the leaves.

    Returns:
      A `Health`; reading it waits for the device, so ask for it as rarely as for a loss.

    Raises:
      ValueError: if the state holds no guard, or more than one, or if it is that of several runs at once.
      TypeError: inside of jit.
    """
    check_known("health", state)
    state = readable("health", state, GuardState)
    found = _tree.nodes(GuardState, state)
    if len(found) != 1:
        raise ValueError(
            f"expected an optimizer state with one GuardState, found {len(found)}: pass the guard's own state"
        )
    skipped, consecutive, holding, last_bad, norm = (np.asarray(x) for x in jax.device_get(found[0][1:]))
    name = _name_of(int(last_bad), found[0], state, plain(params)) if last_bad >= 0 else None
    return Health(int(skipped), int(consecutive), bool(holding), name, float(norm))


def _name_of(number: int, guarded: GuardState, state, params) -> str:
    """The name of that leaf among those that the guard was given, which need not be all of the parameters."""
    names, masks = [name for name, _ in _tree.named_leaves(params)], _tree.nodes(optax.MaskedState, state)
    below = _tree.nodes(optax.MaskedState, guarded.inner)
    given = None if below else leaf_names(guarded.inner)
    if given is not None and len(given) != len(names):
        names = given
    elif given is None and len(masks) > len(below):
        return f"leaf number {number} of those that optax.masked shows to the guard, itself counted"
    return names[number] if number < len(names) else f"leaf number {number}, which these parameters do not have"
