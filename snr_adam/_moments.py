"""What a state keeps: where the moments of each parameter are in it, whichever optimizer it is, and in what form.

Optax's states are nested NamedTuples, and those that hold a moving average of the gradients call it `mu`, `trace`,
`ema`, `m1` or `m`, those of their squares `nu`. The average is a tree like the parameters, in which `masked` and
`partition` leave a `MaskedNode` where another optimizer, or none, is in charge. So for each parameter the moment is in
the first such state that has an array of the parameter's shape at the parameter's place.

The form is what the state says it is, by the type of its `nu` (`transform.ScaleBySnrState`), never by a dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._numerics import complex_like, compute_dtype
from snr_adam.noise import AverageAndMaximum
from snr_adam.shared import SharedNoise
from snr_adam.storage import InOwnForm, InWords, Packed
from snr_adam.transform import ScaleBySnrState
from snr_adam.twofold import FastAndSlow, MeanAndGradient

_FIRST = ("mu", "trace", "ema", "m1", "m")


class Moments(NamedTuple):
    """One parameter's moments as they rest; nu is None where there is none apart from mu.

    form: "numbers"; "words" if both lie in the words of mu; "own" in a storage that only its optimizer can read.
    owner: the state that keeps them.
    """

    mu: Any
    nu: Any
    form: str
    owner: Any

    def read(self) -> tuple[Any, Any]:
        """m and v as they are computed with, in float32 or float64; v is None where there is none."""
        if self.form == "own":
            raise ValueError(
                f"the moments of this {type(self.owner).__name__} rest in the form of a storage that this package does "
                "not know (its nu is InOwnForm): put observe right around that optimizer, inside of what steps it in a "
                "branch, in a loop or under jit"
            )
        if self.form == "words":
            return Packed().decode(self.mu, (), jnp.float32)
        dtype = compute_dtype(self.mu, *(() if self.nu is None else (self.nu,)))
        m = self.mu.astype(complex_like(dtype) if jnp.iscomplexobj(self.mu) else dtype)
        # Optax's v of a complex parameter is complex too, with nothing in its imaginary part
        return m, None if self.nu is None else self.nu.real.astype(dtype)


def form_of(owner) -> str:
    """The form in which a state keeps its moments, see `Moments`."""
    nu = getattr(owner, "nu", ())
    return "words" if isinstance(nu, InWords) else "own" if isinstance(nu, InOwnForm) else "numbers"


def field_of(node) -> str | None:
    """The name under which a state keeps a first moment."""
    fields = getattr(node, "_fields", ())
    return next((name for name in _FIRST if name in fields and hasattr(node, name)), None)


def _owners(state) -> list:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: field_of(node) is not None)
    return [node for node in nodes if field_of(node)]


def _first(owner):
    mu = getattr(owner, field_of(owner) or "")
    if form_of(owner) == "own" and not jax.tree.leaves(mu):  # some storage has all in the other place
        mu = owner.nu.nu
    return mu.m1 if isinstance(mu, FastAndSlow) else mu.m if isinstance(mu, MeanAndGradient) else mu


def _second(owner, outer) -> list:
    """One second moment per leaf, or None for each."""
    nu = getattr(owner, "nu", ())
    nu = nu.v if isinstance(nu, AverageAndMaximum) else nu
    if isinstance(nu, SharedNoise):
        return list(nu.v) if len(nu.v) == outer.num_leaves else [None] * outer.num_leaves
    return _matching(nu, outer) or [None] * outer.num_leaves


def _matching(tree, outer) -> list | None:
    """The leaves of a tree of this structure, of any if it has another."""
    try:
        return outer.flatten_up_to(tree)
    except ValueError:
        return None


def _is_array(x) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def find(state, outer, leaves) -> list[Moments | None]:
    """The moments of each leaf of a tree of parameters or gradients; None where there are none."""
    found: list[Moments | None] = [None] * len(leaves)
    for owner in _owners(state):
        mus, nus = _matching(_first(owner), outer), _second(owner, outer)
        for i, (x, mu, nu) in enumerate(zip(leaves, mus or [], nus, strict=False)):
            if found[i] is None and x is not None and _is_array(mu) and mu.shape == jnp.shape(x):
                nu = nu if _is_array(nu) and nu.ndim == len(mu.shape) else None
                found[i] = Moments(mu, nu, form_of(owner), owner)
    return found


def is_adam(node) -> bool:
    """Whether a state is that of an Adam, of this package or of Optax: a count, mu and nu."""
    return isinstance(node, (ScaleBySnrState, optax.ScaleByAdamState))


def of_adam(state, where: str) -> tuple[Any, list[Moments | None]]:
    """The structure of the parameters, and the m and v of each from the state of an Adam; refuses what keeps more."""
    form, (ms, outer) = form_of(state), _tree.flatten(state.mu)
    if form == "own":
        raise ValueError(
            f"the state at {where} keeps its moments in the form of a storage that this package does not know (its nu "
            "is InOwnForm): only its own optimizer can read them"
        )
    shared = isinstance(state.nu, SharedNoise)
    vs, structure = (list(state.nu.v), outer) if shared else _tree.flatten(state.nu)
    vs, structure = ([None] * len(ms), outer) if form == "words" else (vs, structure)
    if structure != outer or len(vs) != len(ms):
        raise ValueError(
            f"the state at {where} does not keep one m and one v per parameter (its mu is a {type(state.mu).__name__}, "
            f"its nu a {type(state.nu).__name__}): only the state of an Adam can move, whatever its storage"
        )
    pairs = zip(ms, vs, strict=True)
    return outer, [None if m is None else Moments(m, v, form, state) for m, v in pairs]


def kinds_in(state) -> str:
    """What a state consists of, for people."""
    kinds: list[str] = []

    def visit(node):
        if hasattr(node, "_fields"):
            kinds.append(type(node).__name__)
        return False

    jax.tree.leaves(state, is_leaf=visit)
    return ", ".join(dict.fromkeys(kinds)) or "its states"


def named_shapes(state) -> list[tuple[str, tuple[int, ...]]]:
    """Path and shape of every parameter with a first moment, in the order of the leaves."""
    columns: list[list] = []
    for owner in _owners(state):
        leaves = jax.tree_util.tree_leaves_with_path(_first(owner), is_leaf=_is_place)
        places = [(_tree.name(path), x) for path, x in leaves]
        if not columns or len(places) == len(columns):
            columns = [[*old, place] for old, place in zip(columns or [[] for _ in places], places, strict=True)]
    chosen = [next((place for place in column if _is_array(place[1])), None) for column in columns]
    return [(name, tuple(x.shape)) for name, x in filter(None, chosen)]


def leaf_names(state) -> list[str] | None:
    """The paths of all parameters that the first optimizer in a state was given, frozen and masked ones included."""
    for owner in _owners(state):
        leaves = jax.tree_util.tree_leaves_with_path(_first(owner), is_leaf=_is_place)
        return [_tree.name(path) for path, _ in leaves]
    return None


def _is_place(x) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)
