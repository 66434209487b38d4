"""Fingerprints that tell whether a restored state is bit for bit the saved one.

A run is its parameters and its optimizer's state and nothing else: no hidden step, no key, no clock. Saved and restored
bit by bit it is the same run. But a disk, a copy or a cast may change a bit without a word, and nothing downstream
would notice. A digest does:

    digest(tree)              64 bits that change with any bit of any leaf, and with its name, shape and dtype
    manifest(tree)            the same leaf by leaf, as plain data to keep beside a checkpoint of any format
    verify(tree, manifest)    raises an error that names the leaf which is not what was saved

With w_i the i-th 32-bit word of a leaf, mix a bijection of 32-bit words and c odd, the two halves of its digest are

    sum_i mix(w_i ^ c i)    and    sum_i mix(mix(w_i ^ c i) ^ i)        modulo 2^32

For a given i each term is a bijection of w_i, so that a change of one word always changes both sums; changes of more
words pass unseen with probability 2^-64. A sum has no order, so the bits do not depend on how many devices share the
leaf. It detects corruption, not tampering.

`snr_adam.state.files` saves, restores and verifies with Orbax; `snr_adam.state.migration` moves a run to another
optimizer.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam import _tree
from snr_adam._bits import element_index, mix


def _words(x) -> list[jax.Array]:
    """The bits of an array as uint32: one array, two of a complex one; 64 bits are two words on an axis behind."""
    if isinstance(x, tuple):
        return [jnp.asarray(words) for words in x]
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.iscomplexobj(x):
        return [*_words(x.real), *_words(x.imag)]
    if x.dtype == bool:
        return [x.astype(jnp.uint32)]
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    bits = (jnp.iinfo if whole else jnp.finfo)(x.dtype).bits
    if bits >= 32:
        return [jax.lax.bitcast_convert_type(x, jnp.uint32)]
    return [(x if whole else jax.lax.bitcast_convert_type(x, f"uint{bits}")).astype(jnp.uint32)]


@jax.jit
def _sums(x) -> jax.Array:
    """The two sums over one leaf, in one pass: a reduction of pairs, which reads its input once and stores nothing."""
    words = _words(x)
    pairs = []
    for k, w in enumerate(words):
        i = element_index(w.shape) * np.uint32(len(words)) + np.uint32(k)
        a = mix(w ^ (i * np.uint32(0x9E3779B1)))
        pairs.append((a, mix(a ^ i)))
    a, b = (sum(half[1:], half[0]) for half in zip(*pairs, strict=True))
    zero = np.uint32(0)
    both = jax.lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(a.ndim)))
    return jnp.stack(both)


class Leaf(NamedTuple):
    """One line of a manifest: a leaf's path, dtype and shape, and its digest in 16 hexadecimal digits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _describe(tree) -> list[Leaf]:
    """Name, dtype and shape of every leaf, None included, and no digests: reads no bits, takes ShapeDtypeStructs."""
    rows = []
    for path, x in _tree.named_leaves(tree):
        if not (x is None or isinstance(x, (bool, int, float, complex)) or _has_numbers(x)):
            raise _no_bits(path, x)
        x = None if x is None else _tree.as_array(x)
        rows.append(Leaf(path, str(getattr(x, "dtype", None)), tuple(map(int, getattr(x, "shape", ()))), ""))
    return rows


def _has_numbers(x) -> bool:
    """Whether x is an array of numbers as JAX knows them: no strings, dates, records or foreign orders of bytes."""
    kinds = (jnp.number, np.bool_, jax.dtypes.extended)
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        return False
    return any(jnp.issubdtype(x.dtype, kind) for kind in kinds) and getattr(x.dtype, "isnative", True)


def _no_bits(path: str, x) -> TypeError:
    of = f" of {x.dtype}" if isinstance(x, np.ndarray) else ""
    return TypeError(f"leaf {path} is a {type(x).__name__}{of}, which has no bits to read: keep it out of the state")


def _bits_on_host(path: str, x):
    """None as no words, and NumPy's 64-bit numbers as pairs of words: the device would cut them in half without x64."""
    if x is None:
        return (np.zeros(0, np.uint32),)
    if _tree.is_abstract(x):
        raise _no_bits(path, x)
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.name in ("float64", "int64", "uint64", "complex128"):
        parts = (x.real, x.imag) if np.iscomplexobj(x) else (x,)
        return tuple(np.array(part)[..., None].view(np.uint32) for part in parts)
    return _tree.as_array(x)


def _token(place: int, row: Leaf) -> bytes:
    return hashlib.blake2b(f"{place} {row.name} {row}".encode(), digest_size=8).digest()


def _leaf_digests(tree):
    """Rows without digests, and (leaves, 2): the two sums of each leaf and, through its token, its place and type."""
    rows = _describe(tree)
    tokens = np.frombuffer(b"".join(_token(i, row) for i, row in enumerate(rows)), "<u4").reshape(-1, 2)
    sums = [_sums(_bits_on_host(path, x)) for path, x in _tree.named_leaves(tree)]
    if not sums:
        return rows, tokens
    # outside of a trace on the host: leaves may lie on different devices, and one program cannot read them all
    traced = any(isinstance(pair, jax.core.Tracer) for pair in sums)
    return rows, mix((jnp.stack(sums) if traced else np.stack(jax.device_get(sums))) ^ tokens)


def digest(tree: Any) -> jax.Array:
    """A 64-bit fingerprint of every bit of a tree.

    The sum of its leaves' digests (see above), computed on the devices where they lie, in one read.

    Args:
      tree: parameters, an optimizer's state, or both. Leaves of any dtype, PRNG keys and None included.

    Returns:
      uint32[2]: the same for any number of devices, for NumPy and JAX arrays, inside and outside of jit; another if any
      bit of a leaf, or its place, name, dtype or shape, is another.

    Raises:
      TypeError: for a leaf that is no array, by its name.

    >>> state = {"w": jnp.zeros(3)}
    >>> a, b = digest(state), digest({"w": jnp.asarray([0.0, -0.0, 0.0])})
    >>> print((a == b).any())
    False
    """
    return jnp.asarray(_leaf_digests(tree)[1].sum(axis=0, dtype=np.uint32))


def manifest(tree: Any) -> list[Leaf]:
    """Name, dtype, shape and digest of every leaf, as plain tuples that JSON and pickle can hold.

    Raises:
      TypeError: for a leaf that is no array, by its name, and inside of jit, where there are no bits yet.
      ValueError: if two leaves have one name, as those of {"a": {"b": x}, "a/b": y}.

    >>> for leaf in manifest({"w": jnp.zeros((2, 3)), "b": jnp.ones(3)}):
    ...     print(leaf.name, leaf, leaf.digest)
    b float32[3] 66e53092d99cefc9
    w float32[2,3] 1cf5c8f20bcc6318
    """
    traced = next((path for path, x in _tree.named_leaves(tree) if isinstance(x, jax.core.Tracer)), None)
    if traced is not None:
        raise TypeError(f"leaf {traced} has no bits inside of jit: give what the compiled step has returned")
    rows, digests = _leaf_digests(tree)
    _by_name(rows)
    return [row._replace(digest=f"{a:08x}{b:08x}") for row, (a, b) in zip(rows, digests, strict=True)]


def compare(tree: Any, saved: Sequence[Leaf]) -> None:
    """Raises ValueError, naming the leaf, unless `tree` has the names, dtypes and shapes that a manifest says."""
    want, got = _by_name(rows_of(saved)), _by_name(_describe(tree))
    lost, new = [n for n in want if n not in got], [n for n in got if n not in want]
    if lost or new:
        raise ValueError(
            f"the saved state has {_some(lost)} that this one has not, and lacks {_some(new)}: restore it with the "
            "optimizer and the model that it was saved with, or rename the leaves first"
        )
    for leaf, there in got.items():
        if want[leaf].shape != there.shape:
            raise ValueError(
                f"leaf {leaf} was saved with shape {want[leaf].shape}, here it has {there.shape}: restore it "
                "with the model it was saved with"
            )
        if want[leaf].dtype != there.dtype:
            raise ValueError(
                f"leaf {leaf} was saved as {want[leaf].dtype}, here it is {there.dtype}: restore it as it was saved "
                "and convert it then, for instance with from_optax and to_optax"
            )


def rows_of(saved) -> list[Leaf]:
    """A manifest as it came back from JSON or pickle; raises ValueError if it is none."""

    def is_row(row) -> bool:
        if not (isinstance(row, (list, tuple)) and len(row) == 4 and isinstance(row[2], (list, tuple))):
            return False
        name, dtype, shape, digest = row
        return all(isinstance(x, str) for x in (name, dtype, digest)) and all(type(n) is int for n in shape)

    rows = saved if isinstance(saved, (list, tuple)) else [saved]
    wrong = next((row for row in rows if not is_row(row)), None)
    if wrong is not None or rows is not saved:
        raise ValueError(
            f"the manifest is damaged or none: it has {wrong!r:.80} where (name, dtype, shape, digest) of a leaf "
            "should be. Give what `manifest` has returned"
        )
    return [Leaf(row[0], row[1], tuple(row[2]), row[3]) for row in rows]


def _by_name(rows: Sequence[Leaf]) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for row in rows:
        if row.name in found:
            raise ValueError(f"two leaves are called {row.name}, {found[row.name]} and {row}: rename a key")
        found[row.name] = row
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"leaf {', '.join(names[:3])}{more}" if names else "no leaf"


def verify(tree: Any, saved: Sequence[Leaf]) -> None:
    """Raises ValueError unless `tree` is, bit for bit, the one that `saved = manifest(...)` was made of.

    The error names the first leaf that is another, and says whether by name, shape, dtype or value.
    """
    compare(tree, saved)
    want = _by_name(rows_of(saved))
    bad = [row.name for row in manifest(tree) if row.digest != want[row.name].digest]
    if bad:
        raise ValueError(
            f"{_some(bad)} of {len(want)} is damaged: its digest is not the one it was saved with, so at least one bit "
            "has changed since. Go back to an older checkpoint"
        )
