"""How moments rest between two steps.

A step decodes the moments, estimates with them in float32, and encodes them again. A storage says in what form they
lie in between. It sees all that one parameter keeps, (mu, nu), never changes an array's shape, and decides nothing
from the size of a shard:

    encode(mu, nu, dither) -> (mu, nu)            the form at rest
    decode(mu, nu, dtype) -> (mu, nu)             back to `dtype` (float32, or float64 for float64 parameters)

`dither()` gives random bits for stochastic rounding.

    Full      as they are computed; the state of `optax.adam`
    Cast      either moment in another dtype of one's choice, rounded to nearest
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Full:
    """Moments in the dtype they are computed in: float32, or float64 for float64 parameters."""

    def encode(self, mu, nu, dither):
        return mu, nu

    def decode(self, mu, nu, dtype):
        return mu, nu


def _cast(tree, dtype):
    """Casts to `dtype`, or to the complex dtype that holds it."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(jnp.result_type(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype), tree
    )


@dataclass(frozen=True)
class Cast:
    """The signal's moments in dtype `mu`, the noise's in dtype `nu`; None leaves a moment as it is computed.

    Rounds to nearest, as `optax.adam(mu_dtype=...)` does. With nu in bfloat16 that stalls: at b2 = .999 a step changes
    v by a thousandth of its distance, less than half of the last of bfloat16's 8 bits, so v stands still at a wrong
    value.
    """

    mu: Any = None
    nu: Any = None

    def __post_init__(self):
        for name in ("mu", "nu"):
            dtype = getattr(self, name)
            if dtype is not None:
                if not jnp.issubdtype(dtype, jnp.floating):
                    raise ValueError(
                        f"Cast({name}={dtype!r}): a moment needs a floating dtype, such as 'bfloat16' or 'float32'"
                    )
                object.__setattr__(self, name, jnp.dtype(dtype).name)  # a name: comparable, hashable, and not callable

    def encode(self, mu, nu, dither):
        return _cast(mu, self.mu), _cast(nu, self.nu)

    def decode(self, mu, nu, dtype):
        return _cast(mu, dtype if self.mu else None), _cast(nu, dtype if self.nu else None)


Storage = Full | Cast
_BY_NAME = {"float32": Full()}


def resolve(storage: "str | Storage") -> Any:
    """The storage of that name, or the object itself."""
    if isinstance(storage, str) and storage in _BY_NAME:
        return _BY_NAME[storage]
    if hasattr(storage, "encode") and hasattr(storage, "decode"):
        return storage
    raise ValueError(
        f"storage={storage!r}: use one of the names {sorted(_BY_NAME)} or an object such as Cast(mu='bfloat16')"
    )
