"""Steps that must not be taken: gradients that are not finite, gradients that are too long, and sudden spikes.

One NaN among the gradients makes the moments NaN and the run useless. `guard` looks at all gradients first, once, and
its verdict enters the step as two scalars: whether to take it, and what to multiply the gradients with.

    S = sum of |g|^2 over all leaves                   one read of the gradients
    taken = no g is NaN or infinite                    a bad step changes nothing but the guard's own counters
    g := g min(1, clip_norm / sqrt(S))                 clipping by the global norm (Pascanu et al. 2013)
    spike = log sqrt(S) is far above its usual value   skipped or clipped where asked for, see `spikes.py`

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
import optax

from snr_adam import _tree
from snr_adam._checks import check_hyperparams, check_optimizer, check_whole, in_range
from snr_adam._given import check_known, plain, readable
from snr_adam._moments import leaf_names
from snr_adam._norm import Norm, is_place, is_real, norm_of
from snr_adam._numerics import Hyper, compute_dtype, widen
from snr_adam._recipe import with_recipe
from snr_adam.spikes import Spikes, Usual, nothing_yet
from snr_adam.step import OPEN, Gate


@_tree.exportable
class GuardState(NamedTuple):
    """inner: the state of the guarded optimizer, and scalars about the steps so far.

    skipped: int32, steps not taken; consecutive: int32, those since the last one that was; holding: bool, whether
    `max_consecutive` was reached; last_bad: int32, number of the first leaf that was not finite in the last bad step,
    -1 before; norm: global norm of the last finite gradients, before clipping; count: int32, steps taken; spikes:
    int32, steps that were finite and skipped or clipped as spikes; usual: what a spike is measured against.
    """

    inner: Any
    skipped: Any
    consecutive: Any
    holding: Any
    last_bad: Any
    norm: Any
    count: Any
    spikes: Any
    usual: Any


def unused_guard(state: GuardState) -> GuardState:
    """A guard around the same inner state that has seen nothing yet."""
    zeros = jax.tree.map(jnp.zeros_like, state._replace(inner=()))
    return zeros._replace(inner=state.inner, last_bad=zeros.last_bad - 1)


def _scale(norm, *limits):
    """min(1, limit / norm), exactly 1 for gradients that are short enough; None without a limit."""
    known = [jnp.asarray(limit, norm.dtype) for limit in limits if limit is not None]
    if not known:
        return None
    clip = functools.reduce(jnp.minimum, known)
    long = norm > clip
    return jnp.where(long, clip / jnp.where(long, norm, 1.0), 1.0)


def _passed_on(updates, ok, scale, outer: Gate) -> tuple[Any, Gate]:
    """The gradients as they are passed on, scaled, and the gate with what they were."""
    gate = Gate(ok, scale)

    def scaled(g):
        if g is None or scale is None or not is_real(g):
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
    tx: optax.GradientTransformation,
    clip_norm: Hyper | None = None,
    max_consecutive: int | None = None,
    spikes: Spikes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradients are not finite, and clips the others by their global norm.

    At a step with a NaN or an infinity anywhere in the gradients, parameters and the optimizer's whole state, counts of
    schedules included, keep their bits: the update is -0, the one number that changes nothing when it is added.

    Args:
      tx: any optimizer. One of this package costs one more read of the gradients and no memory, in whatever it is
        wrapped; of what belongs to other optimizers, the old state is kept beside the new one for a moment.
      clip_norm: largest global norm of the gradients; longer ones are scaled to it. A float, a scalar array, or a
        schedule of the number of steps taken; None for no clipping.
      max_consecutive: after so many skipped steps in a row something is broken for good, and the guard holds: it skips
        every step, finite ones too, until its state's `holding` is set to False. None never gives up.
      spikes: what is to be taken for a spike, and whether to skip or to clip it, for example `Spikes(z=4.0)`. Its
        norm is the one that clipping takes: no further read of the gradients. None for no such look.

    Returns:
      A transformation with state `GuardState`. `health(state, params)` puts it into words. Inside of `jax.shard_map`
      norm and verdict are those of the device's shard: take the step outside of it.

    Raises:
      TypeError: if `tx` is no optimizer, or `spikes` no `Spikes`.
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
    check_hyperparams(clip_norm=clip_norm)
    if spikes is not None and not isinstance(spikes, Spikes):
        raise TypeError(f"guard: spikes={spikes!r:.80}: give snr_adam.Spikes(), or None not to look for any")
    if max_consecutive is not None:
        max_consecutive = check_whole("guard: max_consecutive", max_consecutive, 1, ", or None to never give up")

    def init(params):
        leaves, _ = _tree.flatten(params)
        _tree.check_arrays("guard: parameter", params, leaves)
        numbers = [_tree.jax_array(p) for p in leaves if p is not None and is_real(p)]
        new = functools.partial(_tree.new_scalar, leaves)
        return GuardState(
            inner=inner.init(params),
            skipped=new(jnp.int32(0)),
            consecutive=new(jnp.int32(0)),
            holding=new(jnp.zeros((), bool)),
            last_bad=new(jnp.int32(-1)),
            norm=new(jnp.zeros((), compute_dtype(*numbers))),
            count=new(jnp.int32(0)),
            spikes=new(jnp.int32(0)),
            usual=Usual(*map(new, nothing_yet())),
        )

    def update(updates, state, params=None, *, gate: Gate = OPEN, **extra_args):
        _tree.check_arrays("guard: gradient", updates, _tree.flatten(updates)[0])
        outer, look = gate, norm_of(jax.tree.leaves(updates, is_leaf=is_place))
        fit = (look.bad < 0) & ~state.holding & outer.ok
        ok, seen, longest = fit, None, None
        if spikes is not None:
            seen = spikes.judge(state.usual, look.norm, extra_args.get("value", extra_args.get("loss")), fit)
            ok, longest = (fit & ~seen.spike, None) if spikes.then == "skip" else (fit, seen.limit)
        clip = in_range("clip_norm", clip_norm)(state.count) if callable(clip_norm) else clip_norm
        given, gate = _passed_on(updates, ok, _scale(look.norm, clip, longest), outer)
        us, new = inner.update(given, state.inner, params, gate=gate, **extra_args)
        new = gate.choose(new, state.inner)
        us = jax.tree.map(lambda u: jnp.where(ok, u, -jnp.zeros_like(u)) if is_real(u) else u, us)
        after = _after(state, new, fit, ok, look, seen, max_consecutive)
        if outer is not OPEN:  # a guard around this one: its verdict was part of the gate, and has been seen to
            after = outer.choose(after._replace(inner=()), state._replace(inner=()))._replace(inner=new)
            outer.held.append(after)
        return us, after

    return optax.GradientTransformationExtraArgs(init, update)


def _after(state: GuardState, inner, fit, ok, look: Norm, seen, limit: int | None) -> GuardState:
    """fit: finite and not held; ok: taken. A spike that is skipped does not count in a row of bad steps, nor end it."""
    again: Any = optax.safe_increment(state.consecutive)
    return GuardState(
        inner=inner,
        skipped=jnp.where(fit, state.skipped, optax.safe_increment(state.skipped)),
        consecutive=jnp.where(ok, 0, jnp.where(fit, state.consecutive, again)),
        holding=state.holding if limit is None else state.holding | (~fit & (again >= limit)),
        last_bad=jnp.where(look.bad < 0, state.last_bad, look.bad),
        norm=jnp.where(look.bad < 0, look.norm.astype(state.norm.dtype), state.norm),
        count=jnp.where(ok, optax.safe_increment(state.count), state.count),
        spikes=state.spikes if seen is None else state.spikes + (fit & seen.spike),
        usual=state.usual if seen is None else seen.usual,
    )


class Health(NamedTuple):
    """A `GuardState` as Python numbers, with the last bad leaf by name (None before any). `str()` is a sentence."""

    skipped: int
    consecutive: int
    holding: bool
    last_bad: str | None
    norm: float
    spikes: int = 0

    def __str__(self) -> str:
        kinds = "1 spike" if self.spikes == 1 else f"{self.spikes} spikes"
        spikes = f"; {kinds} in norm or loss, skipped or clipped" if self.spikes else ""
        if not self.skipped:
            norm = f"{self.norm:.3g}" if self.norm else "0 (no gradient so far, or all under 2.8e-17)"
            return f"no {'non-finite ' if spikes else ''}step skipped{spikes}; gradient norm {norm}"
        steps = "1 step" if self.skipped == 1 else f"{self.skipped} steps"
        now = f" ({self.consecutive} in a row until now)" if self.consecutive else ""
        hold = "; HOLDING: no step is taken until the state's `holding` is set to False" if self.holding else ""
        return f"{steps} skipped{now}; last non-finite gradient: {self.last_bad}{spikes}{hold}"


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
    seen = jax.device_get(found[0]._replace(inner=()))
    name = _name_of(int(seen.last_bad), found[0], state, plain(params)) if seen.last_bad >= 0 else None
    counts = int(seen.skipped), int(seen.consecutive)
    return Health(*counts, bool(seen.holding), name, float(seen.norm), int(seen.spikes))


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
