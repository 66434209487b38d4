"""What a part must have to be one: the methods of its Protocol, and a signal that its noise measures around."""

import inspect


def check_part(owner: str, name: str, part, kind, example: str) -> None:
    """Raises TypeError unless `part` has what a part of this kind (a Protocol) has."""
    fault = fault_of(part, kind)
    if fault:
        order = ", and the signal before the noise" if name in ("signal", "noise") and hasattr(part, "update") else ""
        instead = "" if isinstance(part, type) else f": give a part such as {example}, from snr_adam.parts{order}"
        raise TypeError(f"{owner}: {name}={part!r} {fault}{instead}")


def fault_of(part, kind) -> str | None:
    """What `part` lacks of a part of this kind (a Protocol): a method, a field, or an argument of a method.

    Signals and noises have methods of the same names; what tells them apart is how many arguments `update` takes.
    """
    a, members = f"a {kind.__name__.lower()}", {name: x for name, x in vars(kind).items() if not name.startswith("_")}
    methods = {name: x for name, x in members.items() if inspect.isfunction(x)}
    fields = [name for name, x in members.items() if isinstance(x, property)]
    if isinstance(part, type):
        return f"is a class: write {part.__name__}()"
    lacks = [name for name in (*methods, *fields) if not hasattr(part, name)]
    if len(lacks) == len(methods) + len(fields) or isinstance(part, (str, bytes, int, float)):
        return f"is of type {type(part).__name__}, not {a}"
    if lacks:
        return f"lacks {' and '.join(map(repr, lacks))}, which {a} has"
    for name, method in methods.items():
        takes = list(inspect.signature(method).parameters)[1:]
        try:
            inspect.signature(getattr(part, name)).bind(*takes)
        except (TypeError, ValueError):
            return f"is not {a}, whose {name!r} takes ({', '.join(takes)})"
    return None


def check_fit(owner: str, signal, noise) -> None:
    """Raises ValueError where a noise says that it does not go with this signal, by its method `misfit(signal)`."""
    misfit = getattr(noise, "misfit", None)
    if misfit and (fault := misfit(signal)):
        raise ValueError(f"{owner}: noise={noise!r} does not go with signal={signal!r}: {fault}")
