"""Parameters in 16 bits that lose nothing.

A bfloat16 weight near 1 has a spacing of 2^-7. A step of 1e-3 is less than half of that, and `params + update` rounds
it away, every time. Two cures, for any optimizer:

    carry_remainder(tx)       keeps what the 16 bits could not hold, as 16 or 8 integer bits beside them. The optimizer
                              sees and moves the whole weight; the parameter is that weight, rounded.
    round_stochastically()    ends a chain; the weight is rounded up or down, on average to the right value.

Both return the update that lands on the new parameter when `optax.apply_updates` adds it, in float32, because a 16-bit
update could not.

The whole weight w is a float32. As integers, bits(w) = bits(p) + r: consecutive floats have consecutive bits, so r is
how many float32 numbers w is away from p, at most half of the 2^16 (bfloat16) or 2^13 (float16) that share p. Sixteen
bits hold r exactly; eight bits hold it in units of 2^8 (2^5), a mean relative error of the weight of 5.5e-6.
"""

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._bits import float_of, random_bits, round_to, seeds_at, word_of
from snr_adam._checks import check_optimizer
from snr_adam._derivatives import with_derivative_of, without_derivative
from snr_adam._recipe import with_recipe

_DROPPED = {"bfloat16": 16, "float16": 13}  # mantissa bits that float32 has and the parameter has not
_CODE = {"16": jnp.int16, "8": jnp.int8}
_STREAM = 3  # of the random bits; the storages use 0 to 2


@_tree.exportable
class CarryRemainderState(NamedTuple):
    """count: int32 scalar; inner: the wrapped optimizer's state; remainder: int16 or int8, like the parameters."""

    count: Any
    inner: Any
    remainder: Any


_BRANCHES = ("apply_if_finite", "conditionally_transform", "conditionally_mask")


def _optax_around() -> list[tuple[str, dict]]:
    """The functions of Optax that are running this step, and their variables: the innermost first.

    Nothing else tells a transformation what will be done with its updates, and these two are only right as they are.
    """
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("optax."):
            found.append((frame.f_code.co_qualname.partition(".")[0], frame.f_locals))
        frame = frame.f_back
    return found


def _check_place(owner: str, updates, params) -> None:
    """Raises where the updates will be changed afterwards, or must have the gradients' dtype."""
    if not any(map(_is_narrow, params)):
        return
    for name, variables in _optax_around():
        after = len(variables.get("update_fns", variables.get("transforms", ()))) - len(variables.get("new_state", ()))
        if name in ("chain", "named_chain") and "new_state" in variables and after > 1:
            raise ValueError(
                f"{owner} is followed by {after - 1} more in an optax.{name}: its updates land on 16-bit parameters as "
                f"they are, and changed ones do not. Put it last, or around all: {owner}(optax.chain(...))"
            )
        if name in _BRANCHES and any(map(_is_narrow, updates)):
            raise TypeError(
                f"{owner} inside of optax.{name}: dtypes do not match: its updates of 16-bit parameters are float32, "
                f"and the other branch of {name} has the gradients' dtype. Put {name}, or guard, inside of {owner}"
            )


def _is_narrow(p) -> bool:
    return p is not None and jnp.result_type(p).name in _DROPPED


def _shift(p, code) -> int:
    return max(_DROPPED[p.dtype.name] - jnp.iinfo(code).bits, 0)


def _whole(p, remainder):
    """The float32 weight that p and its remainder stand for."""
    if not _is_narrow(p):
        return p
    shift = _shift(p, remainder.dtype)
    whole = float_of(((word_of(p) >> shift) + remainder.astype(jnp.uint32)) << shift)
    return with_derivative_of(whole, _widen(p))


def _split(whole, old, p, code, dither):
    """The update that takes p to the parameter nearest to `whole`, and the remainder there; `old` was the weight."""
    whole = without_derivative("carry_remainder keeps the bits of a weight apart", whole)
    word, shift = word_of(whole), _shift(p, code)
    if p.dtype == jnp.bfloat16:  # half away from zero: the other half of a tie would need a 65,537th code
        nearest = float_of((word + 0x8000) & jnp.uint32(0xFFFF0000))
    else:
        nearest = round_to(p.dtype, whole).astype(jnp.float32)
    update = nearest - p.astype(jnp.float32)
    # p + (p' - p) is not p' if |p'| < 2^-16 |p|: the remainder counts from where the addition will land
    landed = word_of((p.astype(jnp.float32) + update).astype(p.dtype))
    if shift:
        # a move of few units is rounded stochastically, or it would be lost or doubled at every step
        moved = jnp.abs((word - word_of(old)).astype(jnp.int32))
        unit = 1 << shift
        word = word + jnp.where(moved < 16 * unit, dither() & (unit - 1), jnp.uint32(unit // 2))
    limit = jnp.iinfo(code)
    distance = ((word >> shift) - (landed >> shift)).astype(jnp.int32)
    distance = jnp.where(landed == 0, 0, distance)  # a remainder cannot change the sign: from +0 it leads to NaN
    return update, jnp.clip(distance, limit.min, limit.max).astype(code)


@with_recipe
def carry_remainder(tx: optax.GradientTransformation, bits: str = "16") -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 and float16 parameters as if they were float32.

    `tx` is given float32 gradients and, as `params`, the whole float32 weights; so its moments, weight decay and trust
    ratios are those of a float32 run, and with "16" so are the weights, bit for bit (bfloat16; float16 above 7.6e-6,
    under which it is as exact as float16's own spacing there, 6e-8). Parameters of other dtypes pass through.

    Args:
      tx: any optimizer; the result replaces it, as the outermost transformation.
      bits: "16" for all that float32 holds, at 2 bytes per parameter, or "8" for a weight of 24 bits, at 1 byte.

    Returns:
      A transformation whose `update` needs `params` and gives float32 updates for narrow parameters. Its state is a
      `CarryRemainderState`.

    Raises:
      ValueError: for other `bits`, or if `params` is missing.

    >>> tx = carry_remainder(optax.sgd(1e-3))
    >>> w = jnp.ones((), jnp.bfloat16)
    >>> state = tx.init(w)
    >>> for _ in range(4):
    ...     updates, state = tx.update(jnp.ones((), jnp.bfloat16), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> print(w, whole_weights(w, state))  # four steps of 0.001; alone, bfloat16 would still be at 1
    0.996094 0.99600005

    Reference: the integer form of a split master weight is that of NVIDIA Apex's DistributedFusedAdam (2022).
    """
    if bits not in _CODE:
        raise ValueError(f"bits={bits!r}: use '16' (exact) or '8' (24-bit weights)")
    code, tx = _CODE[bits], check_optimizer("carry_remainder", tx)

    def init(params):
        def remainder(p):
            return jnp.zeros_like(p, dtype=code if _is_narrow(p) else jnp.int8)

        leaves, outer = _tree.flatten(params)
        _tree.check_arrays("carry_remainder: parameter", params, leaves)
        _tree.check_floating("parameter", params, leaves)
        rest = [None if p is None else _tree.init_like(remainder, _tree.jax_array(p)) for p in leaves]
        whole = jax.tree.map(lambda p: _tree.init_like(_widen, p) if _is_narrow(p) else p, params)
        return CarryRemainderState(_tree.new_count(leaves), tx.init(whole), outer.unflatten(rest))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("carry_remainder moves the parameters: call update(grads, state, params), got params=None")
        count = optax.safe_increment(_tree.checked_count(state.count))
        gs, outer = _tree.flatten(updates)
        _tree.check_arrays("carry_remainder: parameter", params, _tree.flatten(params)[0])
        ps, rest = (
            _tree.match(outer, x, updates, what)
            for x, what in ((params, "parameters"), (state.remainder, "remainders"))
        )
        _check_place("carry_remainder", gs, ps)
        olds = [_whole(p, r) for p, r in zip(ps, rest, strict=True)]
        gs = [_widen(g) if g is not None and _is_narrow(p) else g for g, p in zip(gs, ps, strict=True)]
        us, inner = tx.update(outer.unflatten(gs), state.inner, outer.unflatten(olds), **extra_args)
        us, seeds = outer.flatten_up_to(us), seeds_at(count, len(ps))
        for i, (p, u, old) in enumerate(zip(ps, us, olds, strict=True)):
            if u is not None and _is_narrow(p):
                dither = functools.partial(random_bits, p.shape, _STREAM, seeds[i])
                us[i], rest[i] = _split(old + u, old, p, rest[i].dtype, dither)
        return outer.unflatten(us), CarryRemainderState(count, inner, outer.unflatten(rest))

    return optax.GradientTransformationExtraArgs(init, update)


def _widen(x):
    return x.astype(jnp.float32)


def whole_weights(params, state: CarryRemainderState):
    """The float32 weights that `params` and the remainders in `state` stand for; use them to evaluate or to export."""
    leaves, outer = _tree.flatten(params)
    rest = outer.flatten_up_to(state.remainder)
    return outer.unflatten([_whole(p, r) for p, r in zip(leaves, rest, strict=True)])


@_tree.exportable
class RoundStochasticallyState(NamedTuple):
    """count: int32 scalar, the number of steps taken; the random bits are a function of it."""

    count: Any


@with_recipe
def round_stochastically() -> optax.GradientTransformationExtraArgs:
    """Makes params + update land, for bfloat16 and float16 parameters, on one of the two neighbours of the exact sum.

    The upper one with the probability that makes the mean exact, so small steps are taken rarely instead of never.
    Ends a chain; `update` needs `params`. Parameters of other dtypes pass through.

    >>> tx = optax.chain(optax.adam(1e-3), round_stochastically())
    """

    def init(params):
        return RoundStochasticallyState(_tree.new_count(_tree.flatten(params)[0]))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("round_stochastically needs the parameters: call update(grads, state, params)")
        count = optax.safe_increment(_tree.checked_count(state.count))
        us, outer = _tree.flatten(updates)
        ps, seeds = _tree.match(outer, params, updates, "parameters"), seeds_at(count, len(us))
        _check_place("round_stochastically", us, ps)
        for i, (u, p) in enumerate(zip(us, ps, strict=True)):
            if u is not None and _is_narrow(p):
                old = _widen(p)
                target = round_to(p.dtype, old + _widen(u), random_bits(p.shape, _STREAM, seeds[i]))
                us[i] = with_derivative_of(_widen(target) - old, _widen(u))
        return outer.unflatten(us), RoundStochasticallyState(count)

    return optax.GradientTransformationExtraArgs(init, update)
