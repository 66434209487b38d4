"""Numbers that cannot be right are refused where they are given: one table of names and ranges for the whole package.

    learning_rate, weight_decay, ...    finite, not negative
    b1, b2, b3, b, decay, momentum      in [0, 1), and told from 1 by the dtype in use: float32 takes 1 - 2e-8 for 1
    eps                                 positive, and not 0 once rounded to the dtype in use: then 0 / 0 is NaN
    clip_norm                           positive, and not so small that squares are lost

Presets and estimators look their arguments up here by name. What is not known yet is left alone: schedules, and traced
numbers, for which `check_hyperparams` is there. The dtype in use is float32, or float64 where 64-bit types are on.
"""

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify


class Range(NamedTuple):
    """What a number must be, in words, and a test for numbers and traced numbers alike, given the dtype in use."""

    words: str
    holds: Any


_NOT_NEGATIVE = Range("a finite number >= 0", lambda x, f: (x >= 0) & (x < math.inf))
_POSITIVE = Range(
    "a finite number > 0, also once rounded to the dtype in use (float32: at least 1.2e-38)",
    lambda x, f: (x >= float(f.tiny)) & (x < math.inf),
)
_NOT_LOST = Range(f"0, or {_POSITIVE.words}", lambda x, f: (x == 0) | _POSITIVE.holds(x, f))
_DECAY = Range(
    "in [0, 1), and under 1 also once rounded to the dtype in use (float32: at most 1 - 6e-8)",
    lambda x, f: (x >= 0) & (x < 1 - float(f.epsneg) / 2),
)
_MEASURED = Range(
    "a finite number > 0, and at least the third root of the least one (float32: 2.3e-13), or gradients so short have "
    "squares that are 0",
    lambda x, f: (x >= float(f.tiny) ** (1 / 3)) & (x < math.inf),
)
_LENGTH = Range(
    "a finite number >= 4, the length from which on the noise has a variance", lambda x, f: (x >= 4) & (x < math.inf)
)
_SPREADS = Range(
    "a finite number >= 2, from which on a lasting change of level is soon taken",
    lambda x, f: (x >= 2) & (x < math.inf),
)

_PLAIN = (
    "learning_rate",
    "weight_decay",
    "eps_root",
    "alpha",
    "gamma",
    "initial",
    "initial_scale",
    "clip",
    "clip_value_fn",
)
RANGES = {
    **dict.fromkeys(_PLAIN, _NOT_NEGATIVE),
    **dict.fromkeys(("b1", "b2", "b3", "b", "decay", "momentum"), _DECAY),
    **dict.fromkeys(("eps", "peak", "height", "width"), _POSITIVE),
    "clip_norm": _MEASURED,
    "threshold": _LENGTH,
    "z": _SPREADS,
}
_OF_PARTS = {**RANGES, "eps": _NOT_LOST}  # a part may leave eps to its eps_root, or to `_numerics.root`
MASKS = ("mask", "normalized", "ball")  # arguments that say yes or no to each parameter
_NONE = {"momentum", "clip", "clip_norm", "peak"}  # None is a value of these


def check_fields(self) -> None:
    """The `__post_init__` of an estimator: its fields are in their ranges."""
    for field in dataclasses.fields(self):
        if field.name in _OF_PARTS:
            _check(f"{type(self).__name__}: {field.name}", getattr(self, field.name), _OF_PARTS[field.name], field.name)


def check_value(name: str, schedule, value, dtype) -> None:
    """What a schedule has returned is a number in the range of what it is for, if its value is known."""
    what = f"{name}: the value of schedule {getattr(schedule, '__name__', schedule)}"
    check_scalar(what, value, "one real number")
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return
    allowed = _OF_PARTS[name]
    if not allowed.holds(np.asarray(value, float), jnp.finfo(dtype or jnp.result_type(float))):
        raise ValueError(f"{what} is {value}: must be {allowed.words}")


def in_range(name: str, hyper, dtype=None):
    """A hyper-parameter of that name; of a schedule one whose values are checked for their range."""
    if callable(hyper):
        return functools.wraps(hyper)(lambda count: _checked(name, hyper, hyper(count), dtype))
    known = name == "eps" and isinstance(hyper, (int, float, np.generic))
    if known and dtype == np.float32 and not _NOT_LOST.holds(float(hyper), jnp.finfo(dtype)):
        raise ValueError(
            f"eps={hyper} is 0 in {jnp.dtype(dtype).name}, in which the step is computed: give a larger one"
        )
    return hyper


def _checked(name: str, schedule, value, dtype):
    check_value(name, schedule, value, dtype)
    return value


def is_mask(on) -> bool:
    """Whether `on` says yes or no: a bool, an array of them, or the None of a frozen parameter."""
    dtype = getattr(on, "dtype", None)
    return on is None or isinstance(on, bool) or (dtype is not None and jnp.issubdtype(dtype, jnp.bool_))


def check_arguments(owner: str, arguments: dict) -> None:
    """The arguments of a preset are in their ranges, and in their places."""
    _check_order(owner, arguments)
    for name, value in arguments.items():
        if name in ("learning_rate", "weight_decay"):
            _check_tree(f"{owner}: {name}", value, name)
        elif name in MASKS:
            check_mask(owner, value, name)
        elif name in RANGES:
            _check(f"{owner}: {name}", value, RANGES[name], name)


def check_hyperparams(**hyperparams) -> None:
    """Checks numbers by their names, traced ones too, in a function that runs under `checkify`.

    Traced numbers, such as those of `optax.inject_hyperparams` in a jitted step, have no value while the step is built.
    Called in the step, this adds a check of every one to it, which `checkify` turns into an error; without `checkify`
    the check is left out of the program and costs nothing. (It is not called for you, because `jax.export` refuses
    programs with such checks.)

    Args:
      **hyperparams: numbers, scalar arrays or schedules under the names that the presets give them.

    Raises:
      ValueError, TypeError: at once for a number that is known and wrong.

    >>> from jax.experimental import checkify
    >>> @jax.jit
    ... def step(b2):
    ...     check_hyperparams(b2=b2)
    ...     return b2
    >>> error, _ = checkify.checkify(step)(jnp.float32(1.5))
    >>> print(error.get().split(" (")[0])
    b2=1.5: must be in [0, 1), and under 1 also once rounded to the dtype in use
    """
    for name, value in hyperparams.items():
        if name not in RANGES:
            raise TypeError(f"check_hyperparams: {name} is no hyper-parameter; use one of {sorted(RANGES)}")
        if isinstance(value, jax.core.Tracer):
            value = value.astype(jnp.result_type(float))
            within = jnp.all(RANGES[name].holds(value, jnp.finfo(value.dtype)))
            checkify.debug_check(within, f"{name}={{x}}: must be {RANGES[name].words}", x=value)
        else:
            _check(name, value, RANGES[name], name)


def check_optimizer(owner: str, tx):
    """`tx`, ready for extra arguments; raises TypeError unless it is an optimizer."""
    if isinstance(tx, optax.GradientTransformation):
        return optax.with_extra_args_support(tx)
    instead = f"write {owner}(snr_adam.adamw(1e-3))"
    if hasattr(tx, "gradient_transformation"):
        instead = f"write {owner}(tx.gradient_transformation())"
    elif callable(tx):
        instead = f"call it first, {owner}({getattr(tx, '__name__', 'make')}(1e-3))"
    raise TypeError(f"{owner}: tx={tx!r:.80} is of type {type(tx).__name__}, no optimizer: {instead}")


def check_whole(what: str, value, least: int = 1, words: str = "") -> int:
    """A whole number, of Python or NumPy, of at least so much."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))
    if not whole or value < least:
        raise ValueError(f"{what}={value!r}: must be an int >= {least}{words}")
    return int(value)


def check_pattern(what: str, pattern) -> re.Pattern:
    """A regular expression, compiled."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{what}: the pattern {pattern!r} is no regular expression ({error}): to find a name as it is, write "
            "re.escape(name)"
        ) from error


def check_layer_axis(owner: str, rule) -> None:
    """Which axis stacks layers: an int, a dict from patterns to ints, or None."""
    by_pattern = isinstance(rule, Mapping)
    for pattern, axis in rule.items() if by_pattern else ((None, rule),):
        if by_pattern:
            check_pattern(f"{owner}: layer_axis", pattern)
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, numbers.Integral)):
            raise TypeError(
                f"{owner}: layer_axis={rule!r}: must be an int, a dict from patterns to ints, or None where no axis "
                "stacks layers"
            )


def check_mask(owner: str, mask, name: str = "mask") -> None:
    """A mask is None, a function, or a tree of truth values."""
    if mask is None or callable(mask):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask, is_leaf=lambda x: x is None):
        if not is_mask(leaf):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"{owner}: {name}{' at ' + where if where else ''} is {leaf!r:.60}, a {type(leaf).__name__}: give a "
                "tree of True and False that is a prefix of the parameters, or a function from them to one"
            )


def _check_tree(what: str, tree, name: str) -> None:
    """A learning rate or a weight decay may be a tree: every leaf is a number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        _check(f"{what} at {where}" if where else what, leaf, RANGES[name], name)


def _check(what: str, value, allowed: Range, name: str) -> None:
    """Raises unless `value` is a scalar in its range, or is not known yet."""
    if (value is None and name in _NONE) or (callable(value) and not isinstance(value, type)):
        return
    check_scalar(what, value, allowed.words)
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return
    # in float64: float16 would round the ends of the range to its own numbers, the least eps to 0
    if not allowed.holds(np.asarray(value, float), jnp.finfo(jnp.result_type(float))):
        raise ValueError(f"{what}={value}: must be {allowed.words}")


def check_scalar(what: str, value, words: str) -> None:
    """Raises unless `value` is one real number, be it known or traced."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        pair = what.endswith("b1") and isinstance(value, (tuple, list)) and len(value) == 2
        hint = f". A pair of decays is given as b1={value[0]}, b2={value[1]}" if pair else ""
        raise TypeError(f"{what}={value!r} is of type {type(value).__name__}: must be {words}, or a schedule{hint}")
    if np.shape(value) != ():
        raise ValueError(
            f"{what} has shape {np.shape(value)}: must be one number, {words}. Parameters are not given here but to "
            "init(params) and update(grads, state, params)"
        )


def _check_order(owner: str, arguments: dict) -> None:
    """Raises for (b1, b2, learning_rate) where the learning rate should be first."""
    rate, b1, b2 = (arguments.get(name) for name in ("learning_rate", "b1", "b2"))
    if not (isinstance(rate, float) and isinstance(b1, float) and isinstance(b2, float)):
        return
    if 0.5 <= rate < 1 and b1 >= 0.9 and b2 <= 0.1:
        raise ValueError(
            f"{owner}: learning_rate={rate}, b1={b1}, b2={b2} look like b1, b2 and the learning rate: the order is "
            f"(learning_rate, b1, b2), here ({b2}, {rate}, {b1})"
        )
