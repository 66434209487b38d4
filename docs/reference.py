"""Writes the reference from the code: a page for each public name, the family, and every error.

names       the modules below, and those whose names `snr_adam` says live elsewhere
family      what each preset builds, read off the parts that it hands to the step
errors      every `raise` in the package, with the text that it shows
"""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp

import snr_adam
from snr_adam import transform
from snr_adam.telemetry.columns import COLUMNS

MODULES = {
    "snr_adam": "What training needs.",
    "snr_adam.parts": "Signals, noises, descents, storages, and how a state lies on a mesh.",
    "snr_adam.telemetry": "Seeing signal and noise while a model trains.",
    "snr_adam.telemetry.noise_scale": "The noise scale from gradients, moments or groups of examples.",
    "snr_adam.telemetry.groups": "Gradients of groups of examples, for `from_groups`.",
    "snr_adam.telemetry.advice": "From a noise scale to a batch size and a learning rate.",
    "snr_adam.telemetry.plots": "Figures; needs matplotlib.",
    "snr_adam.state": "What becomes of an optimizer's state between steps.",
    "snr_adam.state.files": "Checkpoints that are verified bit by bit; needs orbax-checkpoint.",
    "snr_adam.precision": "16-bit parameters that lose nothing.",
    "snr_adam.accumulation": "One step for several microbatches.",
    "snr_adam.guard": "What a guard keeps and says.",
    "snr_adam.transform": "The state of this package's optimizers.",
}
EXPLAINED = {  # modules whose docstring lists equations
    "snr_adam.signal": "Numerators",
    "snr_adam.noise": "Denominators",
    "snr_adam.deviation": "Denominators that measure around the signal",
    "snr_adam.quotient": "Parts that divide first",
    "snr_adam.twofold": "Parts that keep two arrays",
    "snr_adam.descent": "Descents",
    "snr_adam.storage": "Storages",
    "snr_adam.measure": "Times a step with each storage on this machine",
    "snr_adam.plan": "Memory, messages and time on paper",
}


def module_of(name: str) -> ModuleType:
    importlib.import_module(name)  # `snr_adam.guard` is a function by that name, and a module by this
    return importlib.import_module(name)


def public(name: str) -> list[str]:
    """The public names of a module: `__all__`, or what it defines and `snr_adam` does not have."""
    module = module_of(name)
    if hasattr(module, "__all__"):
        return [key for key in module.__all__ if not inspect.ismodule(getattr(module, key))]
    own = [
        key
        for key, x in vars(module).items()
        if getattr(x, "__module__", None) == name and not key.startswith("_") and callable(x)
    ]
    listed = [key for key in own if snr_adam._ELSEWHERE.get(key) == name]
    documented = [key for key in own if inspect.getdoc(getattr(module, key)) and not hasattr(snr_adam, key)]
    return listed or documented


def pages() -> dict[str, list[tuple[str, str]]]:
    """For each module its names, each with the page that it is on: an object has one page, where it is met first."""
    first: dict[int, str] = {}
    found = {}
    for name in MODULES:
        module = module_of(name)
        found[name] = [(key, first.setdefault(id(getattr(module, key)), f"{name}.{key}")) for key in public(name)]
    return found


def _summary(x) -> str:
    text = (inspect.getdoc(x) or "").split("\n\n")[0].replace("\n", " ")
    if not isinstance(x, type) and not callable(x):
        return ""
    text = re.sub(rf"^{getattr(x, '__name__', '')}\(.*\)$", "", text)  # what dataclass writes where there is none
    return _escape_table(text.partition(" Args:")[0])


def _escape_table(text: str) -> str:
    """Plain text in the cell of a Markdown table."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*_<>\[\]$~^])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


def _page(full: str) -> str:
    name, key = full.rsplit(".", 1)
    x = getattr(module_of(name), key)
    lines = [full, "=" * len(full), "", f".. currentmodule:: {name}", ""]
    if isinstance(x, type):
        lines += [f".. autoclass:: {key}", "   :members:", ""]
    elif callable(x):
        lines += [f".. autofunction:: {key}", ""]
    else:
        lines += [f".. autodata:: {key}", ""]
    return "\n".join(lines)


def _index(found) -> str:
    lines = ["# Names", ""]
    for name, names in found.items():
        lines += [f"## {name}", "", MODULES[name], "", "| name | |", "|---|---|"]
        module = module_of(name)
        lines += [f"| [`{key}`]({page}.rst) | {_summary(getattr(module, key))} |" for key, page in names]
        lines += [""]
    every = {page: key for names in found.values() for key, page in names}
    entries = [f"{key} <{page}>" for page, key in every.items()]
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", *entries, "```", ""])


def _part(x) -> str:
    """A part with those of its numbers that are not its defaults."""
    if inspect.isfunction(x):  # a descent for each parameter: those of a matrix and of a vector
        return ", ".join(dict.fromkeys(_part(each) for each in x([jnp.ones((2, 2)), jnp.ones(2)])))
    changed = [
        f"{f.name}={getattr(x, f.name)!r}"
        for f in dataclasses.fields(x)
        if f.init and f.name != "then" and getattr(x, f.name) != f.default and not callable(getattr(x, f.name))
    ]
    return f"{type(x).__name__}({', '.join(changed)})"


def built(preset):
    """Signal, noise and descent that a preset hands to the step, and the optimizer."""
    seen, build = [], transform._build

    def watch(owner, signal, noise, storage, per_leaf):
        seen.append((signal, noise, per_leaf.descent))
        return build(owner, signal, noise, storage, per_leaf)

    with mock.patch.object(transform, "_build", watch):
        tx = preset(1e-3, **({"peak": 1e-3} if "peak" in inspect.signature(preset).parameters else {}))
    return *seen[0], tx


def presets() -> list[str]:
    """The optimizers by name: what takes a learning rate first, and says where it comes from."""
    takes = {key: next(iter(inspect.signature(getattr(snr_adam, key)).parameters), "") for key in snr_adam.__all__}
    return [key for key, first in takes.items() if first == "learning_rate" and key != "descend"]


def _bytes(tx) -> float:
    """Bytes of state per parameter."""
    n = 2**16
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((n // 256, 256), jnp.float32))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) // n


def _link(text: str) -> str:
    """The names of parts as links to their pages."""

    def to(match):
        return f"[`{match[0]}`](snr_adam.parts.{match[1]}.rst)" if match[1] in snr_adam.parts.__all__ else match[0]

    return re.sub(r"(\w+)\([^)]*\)", to, text)


def _source(doc: str) -> str:
    """Where a method comes from: authors, and the papers as links."""
    text = doc.partition("Reference: ")[2].split("\n\n")[0].replace("\n", " ")
    found = []
    for each in re.split(r"\. (?=[A-Z])", text)[0].split("; "):
        authors = re.match(r"(?:[\w-]+, )*[\w-]+ & [\w-]+|[\w-]+ et al\.|[\w-]+", each)
        paper = re.search(r"\d{4}\.\d{4,5}", each)
        who = authors[0] if authors and authors[0] != "arXiv" else ""
        link = f"[{paper[0]}](https://arxiv.org/abs/{paper[0]})" if paper else ""
        found.append(f"{who} {link}".strip())
    return " ".join(found)


def _family() -> str:
    lines = [
        "# The family",
        "",
        "Every optimizer by name, as the parts that it hands to one step, `w := w - descent(signal / noise)`. Numbers",
        "are shown where they are not the part's own defaults; bytes are those of the state per float32 parameter.",
        "This table is made from the code, by building each optimizer.",
        "",
        "| optimizer | signal | noise | descent | bytes | from |",
        "|---|---|---|---|--:|---|",
    ]
    for key in presets():
        preset = getattr(snr_adam, key)
        *parts, tx = built(preset)
        cells = [f"[`{key}`](snr_adam.{key}.rst)", *(_link(_part(x)) for x in parts)]
        lines.append("| " + " | ".join([*cells, str(_bytes(tx)), _source(inspect.getdoc(preset) or "")]) + " |")
    lines += [
        "",
        "`adopt` and `laprop` divide each gradient before they average it: their noise is that of single gradients.",
        "`rmsprop(centered=True)` divides by `Deviation` instead of `RMS`. Any other pair of signal and noise is",
        "`snr_adam.scale_by_snr(signal, noise)`, and any other descent `adamw(..., descent=...)`.",
        "",
    ]
    return "\n".join(lines)


def _shown(node) -> str | None:
    """The text of a message as its reader sees it, with what is filled in as {what}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [x.value if isinstance(x, ast.Constant) else "{" + ast.unparse(x.value) + "}" for x in node.values]
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp):
        left, right = _shown(node.left), _shown(node.right)
        return None if left is None and right is None else f"{left or '{...}'}{right or '{...}'}"
    return None


def messages(source: str) -> list[tuple[str, str, int]]:
    """Text, type and line of every error that a module makes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
            text = _shown(node.args[0]) if node.args else None
            if text:
                found.append((text, node.func.id, node.lineno))
    return sorted(found, key=lambda x: x[2])


def _errors() -> str:
    root = Path(snr_adam.__file__).parent
    lines = [
        "# Errors",
        "",
        "Every message that the package raises, by module. What stands in braces is filled in: the name of the",
        "argument or the path of the leaf, and what was got. Search this page for the words that do not change.",
        "",
    ]
    for file in sorted(root.rglob("*.py")):
        found = messages(file.read_text())
        if found:
            name = ".".join(("snr_adam", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
            lines += [f"## {name}", "", "| error | message |", "|---|---|"]
            lines += [f"| `{kind}` | {_escape_table(text)} |" for text, kind, _ in found]
            lines += [""]
    return "\n".join(lines)


def _columns() -> str:
    lines = [
        "# Columns of a report",
        "",
        "The keys of `report.columns`, one number per layer, and of `report.total`; `metrics` calls them `snr/<name>`.",
        "[Read the table](../../how_to/read_the_table.md) says what to do with those that are printed.",
        "",
        "| column | what it says |",
        "|---|---|",
    ]
    lines += [f"| `{key}` | {_escape_table(column.says)} |" for key, column in COLUMNS.items()]
    return "\n".join([*lines, ""])


def _equations() -> str:
    lines = ["# Equations", "", "The parts by module, with the equations that they stand for.", ""]
    for name, title in EXPLAINED.items():
        heading = f"{title}: {name}"
        lines += [
            "```{eval-rst}",
            heading,
            "-" * len(heading),
            "",
            f".. automodule:: {name}",
            "   :no-index:",
            "```",
            "",
        ]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """All generated pages; a file is touched only if its text is new, so that a second build reads less."""
    folder.mkdir(parents=True, exist_ok=True)
    found = pages()
    texts = {f"{page}.rst": _page(page) for names in found.values() for _, page in names}
    texts |= {"names.md": _index(found), "family.md": _family(), "columns.md": _columns()}
    texts |= {"errors.md": _errors(), "equations.md": _equations()}
    for old in folder.iterdir():
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields)\b.*")


def _plain(text: str) -> str:
    """Plain text and `code` as reStructuredText."""
    parts = re.split(r"(`[^`]+`|(?<!\S)\*\w[\w ]*\*)", text)
    for i, part in enumerate(parts):
        if i % 2:
            joined = "\\ " if re.match(r"\w", parts[i + 1]) else ""  # `Alarm`s
            parts[i] = (_code(part[1:-1]) if part[0] == "`" else part) + joined
        else:
            parts[i] = re.sub(r"([\\*|]|_(?!\w))", r"\\\1", part)
    return "".join(parts)


def _code(text: str) -> str:
    where, _, last = text.rpartition(".")
    ours = where.partition(".")[0] in ("", "snr_adam") or f"snr_adam.{where}" in {*MODULES, *EXPLAINED}
    page = _WHERE.get(last) if ours else None
    if page:
        return f":py:obj:`{text} <{page}>`"
    return f":py:obj:`{text}`" if re.fullmatch(r"[A-Za-z][\w.]*", text) else f"``{text}``"


_WHERE = {key: page for names in reversed(pages().values()) for key, page in names}


def _whole_code(lines) -> list[str]:
    """The lines with `code` that goes on in the next line in one of them."""
    out: list[str] = []
    for line in lines:
        if out and out[-1].count("`") % 2 and line.strip() and ">>>" not in out[-1]:
            out[-1] += " " + line.strip()
        else:
            out.append(line)
    return out


def as_rst(app, what, name, obj, options, lines) -> None:
    """Docstrings as they are written here, in reStructuredText: indented equations, `code`, Args and Returns."""
    lines[:] = _whole_code(lines)
    out, section, literal, doctest = [], "", False, False
    for i, line in enumerate(lines):
        text, indented = line.strip(), line.startswith(" ")
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(text))
        if not text:
            out.append("")
        elif doctest:
            out.append(line)
        elif not indented:
            literal, section = False, ""
            following = i + 1 < len(lines) and lines[i + 1].startswith(" ")
            if (match := _SECTION.fullmatch(text)) and following:
                section = match[1]
                if text.rstrip(":") != section:  # "Args: as `adam`, and"
                    out += [_plain(text), "", f"{section}:"]
                else:
                    out.append(":returns:" if section == "Returns" else text)
            else:
                out.append(_plain(text))
        elif section:
            out.append(line[: len(line) - len(line.lstrip())] + _plain(line.lstrip()))
        else:
            if not literal:
                out += ["", ".. code-block:: text", ""]
                literal = True
            out.append(line)
    lines[:] = [*out, ""]
