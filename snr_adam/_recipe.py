"""An optimizer knows how it was made: by which function, from which arguments.

    adamw(1e-3) == adamw(1e-3)          made alike, they are equal, and so are their hashes: a function that is compiled
                                        with an optimizer as a static argument is not traced again for an equal one
    pickle.dumps(adamw(1e-3))           is the recipe, of which the other process makes the optimizer anew

`init` and `update` are functions made within functions, which Python compares by identity and cannot pickle. So each is
wrapped in an object that carries the recipe and calls it. Numbers, strings and parts are equal by value; arrays and
functions, such as schedules, only if they are the same object.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Make = TypeVar("Make", bound=Callable[..., Any])


class _Recipe:
    """The function that made an optimizer, its arguments as they were given, and all of them by name."""

    def __init__(self, make, args: tuple, kwargs: dict, arguments: dict):
        self.make, self.args, self.kwargs, self.arguments = make, args, kwargs, arguments
        self.tx: Any = None

    @functools.cached_property
    def key(self):
        return self.make, tuple((name, _key(x)) for name, x in self.arguments.items())

    def __reduce__(self):
        return _follow, (self.make, self.args, self.kwargs)


def _follow(make, args, kwargs) -> _Recipe:
    return make(*args, **kwargs).init.recipe


class _Verb:
    """`init` or `update` of an optimizer."""

    def __init__(self, function, recipe: _Recipe, name: str):
        functools.update_wrapper(self, function)
        self.function, self.recipe, self.name = function, recipe, name

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __eq__(self, other):
        return isinstance(other, _Verb) and self.name == other.name and self.recipe.key == other.recipe.key

    def __hash__(self):
        return hash((self.name, self.recipe.key))

    def __repr__(self):
        return f"<{self.name} of snr_adam's {self.recipe.make.__name__}>"

    def __reduce__(self):
        return _verb, (self.recipe, self.name)


def _verb(recipe: _Recipe, name: str) -> _Verb:
    return getattr(recipe.tx, name)


class _Same:
    """Something that is equal to itself alone."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return isinstance(other, _Same) and self.x is other.x

    def __hash__(self):
        return id(self.x)


def _key(x):
    """What stands for an argument where two are compared; hashable."""
    if x is None or isinstance(x, (bool, int, float, complex, str)):
        return type(x), repr(x)  # -0.0 is not 0.0 here, and True not 1
    if dataclasses.is_dataclass(x) and not isinstance(x, type) and type(x).__hash__ is not None:
        if type(x).__eq__ is object.__eq__:
            return _Same(x)
        return type(x), tuple((field.name, _key(getattr(x, field.name))) for field in dataclasses.fields(x))
    if isinstance(x, (tuple, list, dict)):
        try:
            leaves, tree = jax.tree.flatten(x, is_leaf=lambda y: y is None)
        except (TypeError, ValueError):  # keys that have no order
            return _Same(x)
        return tree, tuple(map(_key, leaves))
    try:
        hash(x)
    except TypeError:
        return _Same(x)
    return type(x), x


def made_by(make, signature: inspect.Signature, tx, args: tuple, kwargs: dict):
    """`tx` with its recipe: what `make(*args, **kwargs)` has returned."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    recipe = _Recipe(make, args, kwargs, dict(bound.arguments))
    recipe.tx = tx._replace(init=_Verb(tx.init, recipe, "init"), update=_Verb(tx.update, recipe, "update"))
    return recipe.tx


def with_recipe(make: Make) -> Make:
    """For a function that makes an optimizer: what it makes knows how it was made."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args, **kwargs):
        return made_by(made, signature, make(*args, **kwargs), args, kwargs)

    return made  # type: ignore[return-value]
