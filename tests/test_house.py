"""Imports run one way: from the top layer to the bottom, at the top of a module, to nothing but JAX and Optax."""

import ast
import pathlib
import sys

import pytest

import snr_adam

PACKAGE = "snr_adam"
LAYERS = (
    {"checks"},
    {"_numerics", "_tree"},
    {"signal", "noise", "storage", "descent", "gate"},
    {"transform"},
    {"noise_scale", "moments", "averages", "sums"},
    {"tables"},
    {
        "precision",
        "telemetry",
        "guard",
        "sharing",
        "sharding",
        "accumulation",
        "memory",
        "checkpoint",
        "migration",
        "history",
    },
    {"reports"},
    {"control", "advice", "loggers", "optimizers"},
    {"plots", "plan", "files", "__init__"},
)
LAYER = {module: height for height, layer in enumerate(LAYERS) for module in layer}
THIRD_PARTY = {"numpy", "jax", "optax"}
RIM = {"plots": {"matplotlib"}, "files": {"orbax"}}


def imported(node) -> list[str]:
    """The dotted names of an import statement; `from snr_adam import x` is `snr_adam.x`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = "." * node.level + (node.module or "")
    if origin == PACKAGE or node.level:
        return [f"{origin.rstrip('.')}.{alias.name}" for alias in node.names]
    return [origin]


def complaints(module: str, source: str) -> list[str]:
    """Everything that a module imports and should not. Going strictly down, imports cannot form a cycle."""
    if module not in LAYER:
        return [f"{module} is in no layer: add it to LAYERS"]
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "__import__":
            found.append(f"{module}: __import__ hides an import")
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if node not in tree.body:
            found.append(f"{module}:{node.lineno}: lazy import")
        for name in imported(node):
            top, *rest = name.split(".")
            if not top:
                found.append(f"{module}: relative import {name}")
            elif top == PACKAGE:
                if not rest or LAYER.get(rest[0], len(LAYERS)) >= LAYER[module]:
                    found.append(f"{module}: {name} is not below it")
            elif top == "importlib" or top not in sys.stdlib_module_names | THIRD_PARTY | RIM.get(module, set()):
                found.append(f"{module}: imports {name}")
    return found


def test_imports_run_one_way():
    files = sorted(pathlib.Path(snr_adam.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    assert [complaint for file in files for complaint in complaints(file.stem, file.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("signal", "from snr_adam.transform import descend"),
        ("signal", "from snr_adam.noise import RMS"),
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
        ("__init__", "from snr_adam.plots import plot"),
        ("__init__", "from snr_adam.files import save_state"),
        ("__init__", "import matplotlib"),
        ("attic", "import jax"),
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
        ("plots", "import matplotlib.pyplot as plt\nfrom snr_adam.telemetry import observe"),
    ],
)
def test_a_right_import_is_not(module, source):
    assert complaints(module, source) == []
