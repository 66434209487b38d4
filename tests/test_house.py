"""Imports run one way: from the top layer to the bottom, at the top of a module, to nothing but JAX and Optax."""

import ast
import pathlib
import sys

import pytest

import snr_adam

PACKAGE = "snr_adam"
LAYERS = (
    {"_checks", "_compiler", "_contracts", "_derivatives", "_recipe", "_state", "_tree"},
    {"_bits", "_given", "_numerics"},
    {"_norm", "descent", "noise", "shared", "signal", "spikes", "storage"},
    {"_per_leaf", "deviation", "quotient", "step", "twofold"},
    {"_look"},
    {"transform"},
    {"_moments", "telemetry._averages", "telemetry._rows", "telemetry._sums", "telemetry.groups"},
    {"telemetry._lags", "telemetry._outside", "telemetry._spikes", "telemetry.noise_scale"},
    {
        "telemetry._layers",
        "telemetry._reading",
        "telemetry._seen",
        "telemetry._state",
        "telemetry._table",
        "telemetry.advice",
        "telemetry.columns",
    },
    {"telemetry._details", "telemetry._matplotlib", "telemetry._writing", "telemetry.alarms", "telemetry.text"},
    {"telemetry._frame", "telemetry.page"},
    {
        "accumulation",
        "averaging",
        "guard",
        "precision",
        "state._savers",
        "state.digest",
        "state.footprint",
        "state.sharding",
        "state.shared_noise",
        "telemetry.history",
        "telemetry.observe",
    },
    {"_presets", "state.forms", "telemetry.report"},
    {"optimizers", "state.migration", "state.resizing", "telemetry.trackers", "variants"},
    {"state.pytorch"},
    {"parts", "state", "telemetry"},
    {"__init__", "measure", "plan", "state.files", "telemetry.plots"},
)
LAYER = {module: height for height, layer in enumerate(LAYERS) for module in layer}
THIRD_PARTY = {"numpy", "jax", "optax"}
LONGEST = {"optimizers": 600, "step": 200, "variants": 500}
RIM = {"telemetry._matplotlib": {"matplotlib"}, "state.files": {"orbax"}, "telemetry._lags": {"scipy"}}
LAZY = {"telemetry._lags": {"scipy.special"}}  # comes with JAX, and takes as long to load as half of it


def imported(node) -> list[str]:
    """The modules that an import statement names, dotted; `from snr_adam import x` is `snr_adam.x`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = "." * node.level + (node.module or "")
    if node.level:
        return [f"{origin.rstrip('.')}.{alias.name}" for alias in node.names]
    whole = [f"{origin}.{alias.name}" for alias in node.names]
    return [name if origin == PACKAGE or name.removeprefix(f"{PACKAGE}.") in LAYER else origin for name in whole]


def complaints(module: str, source: str) -> list[str]:
    """Everything that a module imports and should not. Going strictly down, imports cannot form a cycle."""
    if module not in LAYER:
        return [f"{module} is in no layer: add it to LAYERS"]
    tree = ast.parse(source)
    found, at_the_top = [], list(tree.body)
    if module in RIM:  # what is missing there is said in a sentence
        at_the_top += [node for part in tree.body if isinstance(part, ast.Try) for node in part.body]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "__import__":
            found.append(f"{module}: __import__ hides an import")
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if node not in at_the_top and not (isinstance(node, ast.ImportFrom) and node.module in LAZY.get(module, ())):
            found.append(f"{module}:{node.lineno}: lazy import")
        for name in imported(node):
            top, *rest = name.split(".")
            if not top:
                found.append(f"{module}: relative import {name}")
            elif top == PACKAGE:
                if not rest or LAYER.get(".".join(rest), len(LAYERS)) >= LAYER[module]:
                    found.append(f"{module}: {name} is not below it")
            elif top == "importlib" or top not in sys.stdlib_module_names | THIRD_PARTY | RIM.get(module, set()):
                found.append(f"{module}: imports {name}")
    return found


def modules() -> dict[str, str]:
    """Every module of the package by its dotted name, and its source; a folder is its `__init__`."""
    root = pathlib.Path(snr_adam.__file__).parent
    names = {file: ".".join(file.relative_to(root).with_suffix("").parts) for file in root.rglob("*.py")}
    return {name.removesuffix(".__init__"): file.read_text() for file, name in names.items()}


def test_imports_run_one_way():
    assert [complaint for name, source in modules().items() for complaint in complaints(name, source)] == []


def test_every_layer_is_there():
    assert set(LAYER) == set(modules())


def test_no_module_is_too_long():
    """A module fits in one reading; the heart on little more than one screen."""
    lines = {name: source.count("\n") for name, source in modules().items()}
    assert {name: n for name, n in lines.items() if n > LONGEST.get(name, 300)} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("signal", "from snr_adam.transform import descend"),
        ("signal", "from snr_adam.noise import RMS"),
        ("step", "from snr_adam.guard import guard"),
        ("signal", "from snr_adam import noise as n"),
        ("transform", "import snr_adam"),
        ("transform", "import snr_adam.optimizers"),
        ("transform", "from snr_adam.transform import descend"),
        ("transform", "from . import _tree"),
        ("transform", "from .signal import EMA"),
        ("optimizers", "def f():\n    from snr_adam import transform"),
        ("optimizers", "if True:\n    import jax"),
        ("optimizers", "import flax"),
        ("optimizers", "from chex import dataclass"),
        ("optimizers", "import importlib"),
        ("optimizers", "__import__('flax')"),
        ("__init__", "from snr_adam.telemetry.plots import plot"),
        ("__init__", "from snr_adam.state.files import save_state"),
        ("__init__", "import matplotlib"),
        ("attic", "import jax"),
        ("state.files", "import matplotlib"),
        ("transform", "try:\n    import flax\nexcept ImportError:\n    pass"),
        ("telemetry.plots", "import matplotlib"),
        ("telemetry._lags", "def f():\n    from scipy import stats"),
        ("signal", "def f():\n    from scipy.special import stdtrit"),
        ("telemetry.text", "from snr_adam.telemetry import report"),
        ("telemetry._lags", "def f():\n    from matplotlib import pyplot"),
        ("telemetry._lags", "def f():\n    from snr_adam import _bits"),
        ("telemetry._seen", "from scipy.special import stdtrit"),
        ("telemetry.columns", "from snr_adam.telemetry import report"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "optimizers",
            "import math\nimport jax.numpy as jnp\nfrom optax import chain\nfrom snr_adam import noise as n",
        ),
        ("telemetry._lags", "def f():\n    from scipy.special import stdtrit"),
        ("telemetry._matplotlib", "try:\n    import matplotlib.pyplot as plt\nexcept ImportError:\n    raise"),
    ],
)
def test_a_right_import_is_not(module, source):
    assert complaints(module, source) == []
