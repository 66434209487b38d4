"""A run that goes on under another optimizer: the same moments in another state.

Adam's memory is a count, m and v per parameter, here and in Optax. What differs is how they lie:

    from_optax(state, like)     a run of `optax.adam` or `optax.adamw` goes on in this package
    to_optax(state, like)       and back

`like` is what the optimizer that goes on returns from `init`; its form is what the result has. So the same two words
change the storage (float32, bfloat16, packed, shared noise) and the learning rate from constant to scheduled: with a
schedule Optax keeps a second counter behind its Adam, this package one for both. What is beside an Adam (a mean of
gradients, injected numbers) comes along as it is, and whatever would not fit is an error by name. A wrapper of this
package that only one of the two has is put around, and begins with nothing seen, or taken off: `guard`, `observe`,
`averaged`, `accumulate`, `carry_remainder`.

Where decays may change, here moments are kept corrected and Optax's are not. `inject_hyperparams` keeps its decays in
the state, so its moments are corrected on the way. Of a decay that is a schedule a state does not know: there the two
agree once 1 - b^t is 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._bits import random_bits, seeds_at
from snr_adam._given import boxed_like, plain, readable
from snr_adam._moments import Moments, is_adam, of_adam
from snr_adam._numerics import decay_at, mean_onto, times
from snr_adam._state import ADAM, OF_ADAM, marked
from snr_adam.accumulation import AccumulateState
from snr_adam.averaging import AveragedState, unused_average
from snr_adam.guard import GuardState, unused_guard
from snr_adam.precision import CarryRemainderState
from snr_adam.shared import SharedNoise
from snr_adam.state.forms import joined
from snr_adam.storage import Cast, InWords, Packed
from snr_adam.telemetry._state import ObserveState
from snr_adam.transform import ScaleBySnrState


def _encode_leaf(m, v, like: Moments, dither):
    """m and v of one leaf in the form of another's."""
    if like.form == "words":
        return Packed().encode(m, jnp.broadcast_to(v, m.shape), dither)
    to = Cast(_real_dtype(like.mu), _real_dtype(like.nu))
    m, v = to.encode(m, mean_onto(like.nu, jnp.broadcast_to(v, m.shape)), dither)
    return m.astype(like.mu.dtype), v.astype(like.nu.dtype)


def _real_dtype(x):
    return None if jnp.issubdtype(x.dtype, jnp.complexfloating) else x.dtype


def _correction(b, state, like, dtype):
    """What a moment of decay b is multiplied with on its way: where b is injected, this package keeps it corrected."""
    own = isinstance(like, ScaleBySnrState)
    if b is None or isinstance(state, ScaleBySnrState) == own:
        return 1.0
    debias = decay_at(jnp.asarray(b, dtype), jnp.maximum(state.count, 1), dtype).debias
    return jnp.where(state.count > 0, debias if own else 1.0 / debias, 1.0)


def move_moments(state, like, where: str, injected: dict):
    """The state of an Adam in the form of another, rounded stochastically where that is narrower."""
    (outer, kept), (other, to) = of_adam(state, where), of_adam(like, where)
    here, there = mark_of(state), mark_of(like)
    if here is not None and there is not None and here != there and not {here, there} <= OF_ADAM:
        raise ValueError(
            f"the moments at {where} are those of {here} (signal/noise), `like` has those of {there}: they are other "
            "averages, and only Adam's move. Between an optimizer of Optax's and its namesake here, such as adamax, "
            "the arrays are the same: put count, mu and nu into the state that `init` returns, with `_replace`"
        )
    if outer != other:
        raise ValueError(
            f"the moments at {where} belong to parameters of structure {outer}, those of `like` to {other}: "
            "give two states of one model"
        )
    seeds, names = seeds_at(state.count, len(kept)), [name for name, _ in _tree.named_leaves(state.mu)]
    new: list[Any] = [(None, None)] * len(kept)
    for i, (one, goal) in enumerate(zip(kept, to, strict=True)):
        if one is None or goal is None:
            continue
        if one.mu.shape != goal.mu.shape:
            raise ValueError(
                f"the moments of {names[i]} have shape {one.mu.shape}, those of `like` {goal.mu.shape}: give two "
                "states of one model"
            )
        m, v = one.read()
        by = [_correction(injected.get(b), state, like, v.dtype) for b in ("b1", "b2")]
        m, v = times(m, by[0]), times(v, by[1])
        new[i] = _encode_leaf(m, v, goal, functools.partial(random_bits, seed=seeds[i]))
    ms, vs = ([pair[k] for pair in new] for k in (0, 1))
    nu: Any = SharedNoise(tuple(vs)) if isinstance(like.nu, SharedNoise) else like.nu
    nu = nu if isinstance(nu, (InWords, SharedNoise)) else outer.unflatten(vs)
    return like._replace(count=state.count, mu=outer.unflatten(ms), nu=nu)


def _accumulating(like: AccumulateState) -> AccumulateState:
    """Between two steps; the schedule of microbatches goes on from the steps that the optimizer has taken."""
    fresh = jax.tree.map(jnp.zeros_like, like._replace(inner=()))
    counts = [node.count for node in jax.tree.leaves(like.inner, is_leaf=is_adam) if is_adam(node)]
    return fresh._replace(inner=like.inner, steps=jnp.array(counts[0], copy=True) if counts else fresh.steps)


def _carrying(like: CarryRemainderState) -> CarryRemainderState:
    return jax.tree.map(jnp.zeros_like, like._replace(inner=()))._replace(inner=like.inner)


_BEGUN = {
    GuardState: unused_guard,
    ObserveState: joined,
    AveragedState: unused_average,
    AccumulateState: _accumulating,
    CarryRemainderState: _carrying,
}
"""A wrapper's state around an inner state that has moved, as if it had seen nothing yet."""


def _take_off(state, where: str):
    """What is inside of a wrapper, if nothing is lost with it."""
    if isinstance(state, CarryRemainderState):
        raise ValueError(
            f"the CarryRemainderState at {where} holds what the parameters have lost to rounding: train the whole "
            "weights, precision.whole_weights(params, state), with state.inner"
        )
    known = isinstance(state, AccumulateState) and not isinstance(state.count, jax.core.Tracer)
    if known and int(state.count):
        raise ValueError(
            f"the AccumulateState at {where} is in the middle of a step, with {int(state.count)} microbatches in its "
            "sum: move right after a step, when its count is 0"
        )
    return state.inner


def mark_of(state) -> str | None:
    """What made the state; Optax's states do not say, and are taken for those of its Adam."""
    return ADAM if isinstance(state, optax.ScaleByAdamState) else state.made


def _children(node):
    """The children of one node with their paths, and the node without them; a leaf is its own child."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _move(path, state, like, count, injected):
    """`state` in the form of `like`; `count` is that of the Adam beside it, if there is one, `injected` are the numbers
    of the `inject_hyperparams` around it."""
    where = _tree.name(path)
    if is_adam(state) and is_adam(like):
        return move_moments(state, like, where, injected)
    if type(state) is not type(like):
        if type(state) in _BEGUN and not _tree.nodes(type(state), like):
            return _move(path, _take_off(state, where), like, count, injected)
        if type(like) in _BEGUN:
            return _BEGUN[type(like)](like._replace(inner=_move(path, state, like.inner, count, injected)))
    if not jax.tree.leaves((state, like)):
        return like
    if isinstance(state, optax.ScaleByScheduleState) and isinstance(like, optax.EmptyState):
        _check_one_count(count, state.count, where)
        return like
    if isinstance(like, optax.ScaleByScheduleState) and isinstance(state, optax.EmptyState) and count is not None:
        return optax.ScaleByScheduleState(count)
    (children, outer), (others, other) = _children(state), _children(like)
    if outer != other or (children and children[0][1] is state and _avals(state) != _avals(like)):
        raise ValueError(
            f"the state at {where} is {_kind(state)} where `like` has {_kind(like)}: give as `like` what the optimizer "
            "that goes on returns from `init`"
        )
    if children and children[0][1] is state:
        return state
    counts = [child.count for _, child in children if is_adam(child)]
    counts = counts[0] if len(counts) == 1 else None
    injected = getattr(state, "hyperparams", injected)
    return outer.unflatten(
        [_move((*path, *key), x, y, counts, injected) for (key, x), (_, y) in zip(children, others, strict=True)]
    )


def _avals(x):
    return jnp.shape(x), jnp.result_type(x)


def _kind(x) -> str:
    if hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    inside = f" of {sorted(x)}" if isinstance(x, dict) else f" of {len(x)}" if isinstance(x, tuple) else ""
    return f"a {type(x).__name__}{inside}"


def _check_one_count(count, scheduled, where: str) -> None:
    if count is None:
        raise ValueError(f"the schedule at {where} has no Adam beside it whose count could serve for both: give `like`")
    if isinstance(count, jax.core.Tracer) or isinstance(scheduled, jax.core.Tracer):
        return
    ahead = int(scheduled) - int(count)
    if ahead:
        raise ValueError(
            f"Adam has taken {int(count)} steps, the schedule at {where} {int(scheduled)}; here one count serves for "
            f"both: set the schedule's count to Adam's and give the new optimizer schedule(t + {ahead})"
        )


def _in_full(state, kind):
    """The form of a preset's state with float32 moments and a constant learning rate, as shapes and dtypes."""

    def full(node):
        if isinstance(node, optax.ScaleByScheduleState):
            return optax.EmptyState()
        if not is_adam(node):
            return node
        outer, kept = of_adam(node, "the tree itself")

        def restore(mu, nu, one):
            m, v = one._replace(mu=mu, nu=nu).read()
            return m, jnp.broadcast_to(v, m.shape)

        def shapes(one):
            full = functools.partial(restore, one=one)
            return (None, None) if one is None else jax.eval_shape(full, one.mu, one.nu)

        ms, vs = zip(*map(shapes, kept), strict=True) if kept else ((), ())
        new = kind(node.count, outer.unflatten(ms), outer.unflatten(vs))
        return marked(new, mark_of(node)) if isinstance(new, ScaleBySnrState) else new

    return jax.tree.map(
        full, state, is_leaf=lambda x: is_adam(x) or isinstance(x, (optax.ScaleByScheduleState, optax.EmptyState))
    )


def _to(owner: str, kind, state, like):
    """`state` with its Adams as `kind`, in the form of `like`, and in its boxes if it has any."""
    form, state = like, readable(owner, state, ScaleBySnrState, optax.ScaleByAdamState)
    like = _in_full(state, kind) if like is None else plain(like)
    for what, tree, kinds in (("state", state, (ScaleBySnrState, optax.ScaleByAdamState)), ("like", like, kind)):
        if not any(isinstance(x, kinds) for x in jax.tree.leaves(tree, is_leaf=is_adam)):
            raise ValueError(
                f"{what} is {_kind(tree)} and holds no {getattr(kinds, '__name__', 'state of an Adam')}: give what the "
                "`init` or `update` of such an optimizer returns"
            )
    new = _move((), state, like, None, {})
    return new if form is None else boxed_like(new, form)


def from_optax(state: Any, like: Any = None) -> Any:
    """The state with which this package goes on where `optax.adam` or `optax.adamw` stopped.

    Args:
      state: an optimizer's state that holds a `ScaleByAdamState` (or a `ScaleBySnrState` in another storage), after any
        number of steps. An `nnx.Optimizer` or its `opt_state` will do.
      like: what `init` returns for the optimizer that goes on, or its `jax.eval_shape` (of an `observe` the former). By
        default that of the preset of the same name with float32 moments. It may be wrapped in `guard`, `observe`,
        `averaged`, `accumulate` or `carry_remainder` where `state` is not, or the other way round.

    Returns:
      A state of the form of `like` (of an `nnx.Optimizer`, in its boxes) with the moments and the count of `state`.
      Moments are exact but where `like` is narrower, bfloat16 or packed: there they are rounded stochastically, as in a
      step.

    Raises:
      ValueError: naming the place, if the two belong to different models, if something in `state` has no place in
      `like`, or if a schedule has taken another number of steps than its Adam.

    >>> import snr_adam
    >>> w, g = jnp.ones(2), jnp.array([0.5, -2.0])
    >>> _, old = optax.adam(1e-3).update(g, optax.adam(1e-3).init(w))
    >>> packed = snr_adam.adam(1e-3, storage="packed")
    >>> state = from_optax(old, packed.init(w))
    >>> print(state[0].count, state[0].mu.dtype, to_optax(state)[0].mu)
    1 uint32 [ 0.05004883 -0.20019531]
    """
    return _to("from_optax", ScaleBySnrState, state, like)


def to_optax(state: Any, like: Any = None) -> Any:
    """The state with which `optax.adam` or `optax.adamw` goes on where this package stopped; see `from_optax`.

    By default the form is that of a constant learning rate; for a schedule give what Optax's `init` returns as `like`.
    """
    return _to("to_optax", optax.ScaleByAdamState, state, like)
