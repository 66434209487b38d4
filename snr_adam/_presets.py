"""The signatures of the optimizers by name: arguments checked where they are given, and ready for `inject_hyperparams`.

`optax.inject_hyperparams` reads an optimizer's signature, turns its numbers into arrays in the state and its functions
into schedules. Three things go wrong there unless the signature helps, see `_Signature`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snr_adam import signal as s
from snr_adam import storage as storages
from snr_adam._checks import MASKS, check_arguments
from snr_adam._numerics import Hyper
from snr_adam._recipe import made_by
from snr_adam.transform import wrong_state

Make = TypeVar("Make", bound=Callable[..., Any])
Mask: TypeAlias = Any
Tx: TypeAlias = optax.GradientTransformationExtraArgs


class _Signature(inspect.Signature):
    """The signature that `optax.inject_hyperparams` binds arguments with.

    It would cast every number to the parameters' dtype, and in bfloat16 b2 = 0.999 is 1. So numbers leave here as what
    becomes a float32 array (float64 with x64), a new one at every `init`: two states share no buffer, and may both be
    donated. Schedules leave as schedules of such arrays; a mask that is a function is kept from being taken for one.
    """

    __slots__ = ("owner",)
    owner: str

    def checked(self, args, kwargs):
        """The arguments, bound to their names and in their ranges."""
        unknown = sorted(set(kwargs) - set(self.parameters))
        if unknown:
            near = {"lr": "learning_rate", "betas": "b1 and b2", "beta1": "b1", "beta2": "b2"}.get(unknown[0])
            meant = f" (did you mean {near}?)" if near else ""
            raise TypeError(f"{self.owner} has no argument {unknown[0]!r}{meant}: use {', '.join(self.parameters)}")
        try:
            bound = super().bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.owner}: {error}: use {', '.join(self.parameters)}") from None
        bound.apply_defaults()
        check_arguments(self.owner, bound.arguments)
        return bound

    def bind(self, /, *args, **kwargs):
        bound = self.checked(args, kwargs)
        bound.arguments.update({name: _strong(name, x) for name, x in bound.arguments.items()})
        return bound


_FUNCTIONS = (*MASKS, "descent")


def _strong(name: str, x):
    if name == "mu_dtype" and x is not None:
        return jnp.dtype(x).name  # a dtype class is callable, and would be taken for a schedule
    if callable(x) and name in _FUNCTIONS:
        return _Held(x)
    if callable(x):
        return lambda count: jnp.asarray(_strong(name, x(count)))
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return np.asarray(x, jnp.result_type(float)).view(_Number)
    if isinstance(x, jax.Array) and x.shape == () and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable:
        return np.asarray(x).view(_Number)
    return x


class _Number(np.ndarray):
    """A number that is no array of JAX yet: each `init` makes one of its own of it, in the dtype that it has here.

    Optax casts to the parameters' dtype what has a floating one, so this gives itself out for something else.
    """

    dtype = np.dtype(object)

    def __jax_array__(self):
        return jnp.array(self.view(np.ndarray))


@dataclass(frozen=True)
class _Held:
    """A mask or a descent that is a function, in a form that is not taken for a schedule."""

    function: Any


def preset(make: Make) -> Make:
    """Gives an optimizer its signature for `inject_hyperparams`; to type checkers it stays what it is."""
    signature = inspect.signature(make)
    held = _Signature(list(signature.parameters.values()), return_annotation=signature.return_annotation)
    held.owner = getattr(make, "__name__", "optimizer")

    @functools.wraps(make)
    def made(*args, **kwargs):
        kwargs = {name: x.function if isinstance(x, _Held) else x for name, x in kwargs.items()}
        held.checked(args, kwargs)
        return made_by(made, signature, make(*args, **kwargs), args, kwargs)

    vars(made)["__signature__"] = held
    return made  # type: ignore[return-value]


def stored(storage: storages.Name | storages.Storage, mu_dtype) -> storages.Name | storages.Storage:
    """`mu_dtype` is a storage under another name."""
    if mu_dtype is None:
        return storage
    if storage != "float32":
        raise ValueError(
            f"mu_dtype={mu_dtype!r} and storage={storage!r} both say how the signal rests: give one of them"
        )
    return storages.Cast(mu=mu_dtype)


def average(b1: Hyper, nesterov: bool, debias: bool = True) -> s.Signal:
    return s.Nesterov(b1, debias) if nesterov else s.EMA(b1, debias)


def with_parts(tx: Tx, empty: int) -> Tx:
    """`tx` with as many empty states behind it as Optax's chain has parts there: states and checkpoints line up."""
    chain = optax.chain(tx, *(optax.identity() for _ in range(empty)))

    def update(updates, state, params=None, **extra_args):
        if not (isinstance(state, tuple) and len(state) == 1 + empty):
            raise wrong_state(state)
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update)
