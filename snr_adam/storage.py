"""How moments rest between two steps.

A step decodes the moments, updates them in float32, and encodes them again. A storage says in what form they lie in
between. It sees all that one parameter keeps, (mu, nu), never changes an array's shape, and decides nothing from the
size of a shard:

    encode(mu, nu, dither) -> (mu, nu)      the form at rest; dither(shape, stream) gives random uint32 words
    decode(mu, nu, dtype) -> (mu, nu)       back to `dtype`: float32, or float64 for float64 parameters

What was decoded encodes to the bits it came from, whatever the dither: so a step that is not taken changes nothing.

    Full      as they are computed: the state of `optax.adam`                8 bytes per parameter
    Cast      either moment in another dtype, "bfloat16" for both            4
    Packed    both in one 32-bit word                                        4, and one array to read and write

Narrow formats are rounded *stochastically*: up with the probability that makes the mean right. A step changes v by a
thousandth of its distance to g^2 (b2 = .999); rounding to the nearest of bfloat16's 8 bits drops every such change and
v stands still at a wrong value, for ever. Rounded stochastically it arrives, with an error that averages out: the
stored v then has a relative variance of about half a step of the format, whatever b2. The random bits are a function of
step, leaf and place in the array; inside of `jax.shard_map`, of the place in the shard: all shards round alike.

Bits are moved with integer operations on whole 32-bit words. Every backend has those, and none may "simplify" them away
as some do with a conversion to a narrow float and back.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._bits import float_of, round_to, word_of
from snr_adam._contracts import fault_of
from snr_adam._derivatives import without_derivative
from snr_adam._tree import exportable


@runtime_checkable
class Storage(Protocol):
    """What a storage has; see the module."""

    def encode(self, mu, nu, dither, /) -> tuple[Any, Any]: ...

    def decode(self, mu, nu, dtype, /) -> tuple[Any, Any]: ...


Name = Literal["float32", "bfloat16", "packed"]


@exportable
class InWords(NamedTuple):
    """The `nu` of a state whose two moments lie together in the words of `mu` (`Packed`)."""


@exportable
class InOwnForm(NamedTuple):
    """The `nu` of a state in a storage that this package does not know: only the optimizer itself can read it.

    nu: what the storage's `encode` has returned.
    """

    nu: Any


@dataclass(frozen=True)
class Full:
    """Moments in the dtype they are computed in: float32, or float64 for float64 parameters."""

    def encode(self, mu, nu, dither):
        return mu, nu

    def decode(self, mu, nu, dtype):
        return mu, nu


@dataclass(frozen=True)
class Cast:
    """The signal's moments in dtype `mu`, the noise's in dtype `nu`; None leaves a moment as it is computed.

    float32 to bfloat16 or float16 is rounded stochastically. Complex moments stay complex64, or become so with the
    dtype complex64, which for real ones is float32.
    """

    mu: Any = None
    nu: Any = None

    def __post_init__(self):
        for name in ("mu", "nu"):
            dtype = getattr(self, name)
            if dtype is not None:
                if not (_is_floating(dtype) or (name == "mu" and _is_complex(dtype))):
                    raise ValueError(
                        f"Cast({name}={dtype!r}): a moment needs a floating dtype, such as 'bfloat16' or 'float32'"
                    )
                if jnp.finfo(dtype).bits < 16:
                    raise ValueError(f"Cast({name}={dtype!r}): moments stand still in so few bits: use 'bfloat16'")
                if name == "nu" and jnp.finfo(dtype).maxexp < 128:
                    raise ValueError(
                        f"Cast(nu={dtype!r}): squares of gradients over {float(jnp.finfo(dtype).max) ** 0.5:.0f} do "
                        "not fit: use 'bfloat16', which has float32's range"
                    )
                object.__setattr__(self, name, jnp.dtype(dtype).name)  # a name: comparable, hashable, and not callable

    def encode(self, mu, nu, dither):
        return _cast(mu, self.mu, dither), _cast(nu, self.nu, lambda *which: dither(*which) >> 16)

    def decode(self, mu, nu, dtype):
        wide = np.result_type(dtype, np.complex64) if self.mu and _is_complex(self.mu) else dtype
        return _cast(mu, self.mu and wide), _cast(nu, self.nu and dtype)


def _is_floating(dtype, kind=jnp.floating) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), kind)
    except TypeError:
        return False


def _is_complex(dtype) -> bool:
    return _is_floating(dtype, jnp.complexfloating)


def _cast(tree, dtype, dither=None):
    """Each real array of `tree` in `dtype` (None: as it is); the i-th rounded with the low 16 bits of `dither(shape,
    i)`."""
    leaves, structure = jax.tree.flatten(tree)
    if dtype is None:
        return tree
    return structure.unflatten([_round(dtype, x, dither and dither(x.shape, i)) for i, x in enumerate(leaves)])


def _round(dtype, x, bits):
    if jnp.iscomplexobj(x):
        return x.astype(dtype) if _is_complex(dtype) else x
    if _is_complex(dtype):
        dtype = jnp.finfo(dtype).dtype
    if jnp.finfo(dtype).bits < 32:
        x = without_derivative(f"a moment of {x.dtype} that rests in {jnp.dtype(dtype).name} is rounded", x)
    limit = float(jnp.finfo(dtype).max)  # an infinite moment, as float16 makes of 1e5, never comes back
    return round_to(dtype, jnp.clip(x, -limit, limit) if limit < float(jnp.finfo(x.dtype).max) else x, bits)


_HIGH = np.uint32(0xFFFF0000)


@dataclass(frozen=True)
class Packed:
    """One signed and one non-negative moment in the two halves of a uint32 word, both rounded stochastically.

        m   1 sign + 8 exponent + 7 mantissa bits    bfloat16, the high half of float32's own word
        v       8 exponent + 8 mantissa bits         its sign bit, never used, is one more mantissa bit

    Both keep float32's exponents: no scales, no blocks, nothing depends on a neighbour; zero is exact; subnormals are
    zero. RMS error of Adam's update against float32 moments: 0.6 % at b2 = .95, 1.4 % at .999, 1.6 % at .9999
    (`benchmarks/storage.py`). The words are the state's `mu`; its `nu` is the mark `InWords()`.
    """

    def encode(self, mu, nu, dither):
        _require_one_of_each(mu, nu)
        m, v = (word_of(without_derivative("storage='packed' rounds its moments", x)) for x in (mu, nu))
        bits = dither(mu.shape, 0)
        m = (m + (bits >> 16)) & _HIGH
        v = (v + (bits & 0x7FFF)) >> 15
        return m | v, ()

    def decode(self, mu, nu, dtype):
        m = float_of(mu & _HIGH)
        v = float_of((mu & 0xFFFF) << 15)
        return m.astype(dtype), v.astype(dtype)


def _require_one_of_each(mu, nu):
    if not (hasattr(mu, "dtype") and hasattr(nu, "dtype")):
        raise ValueError(
            "storage='packed' holds one signal moment and one noise moment per parameter; this optimizer keeps "
            f"{_kept(mu)} and {_kept(nu)}. Use storage='bfloat16', which rounds each moment by itself, or 'float32'"
        )
    if jnp.iscomplexobj(mu):
        raise ValueError("storage='packed' has no room for a complex moment: use storage='bfloat16' or 'float32'")


def _kept(tree) -> str:
    number = len(jax.tree.leaves(tree))
    return "no moment" if not number else f"{number} moments ({type(tree).__name__})" if number > 1 else "one moment"


_BY_NAME = {"float32": Full(), "bfloat16": Cast("bfloat16", "bfloat16"), "packed": Packed()}


def resolve(storage: Name | Storage) -> Any:
    """The storage of that name, or the object itself."""
    if isinstance(storage, str) and storage in _BY_NAME:
        return _BY_NAME[storage]
    fault = "is no name of a storage" if isinstance(storage, str) else fault_of(storage, Storage)
    if fault is None:
        return storage
    instead = f": use one of the names {sorted(_BY_NAME)} or an object such as Cast(nu='bfloat16')"
    raise ValueError(f"storage={storage!r} {fault}{'' if isinstance(storage, type) else instead}")


def is_apart(storage: Storage) -> bool:
    """Whether the storage is known to keep mu and nu as numbers, each in its own place. A subclass may do anything."""
    return type(storage) in (Full, Cast)


def mark(storage: Storage, nu) -> Any:
    """`nu`, the tree of a whole state, marked with the form in which this storage keeps the moments."""
    if type(storage) is Packed:
        return InWords()
    return nu if is_apart(storage) else InOwnForm(nu)


def unmark(nu) -> Any:
    """What `mark` was given."""
    return () if isinstance(nu, InWords) else nu.nu if isinstance(nu, InOwnForm) else nu
