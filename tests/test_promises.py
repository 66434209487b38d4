"""Every promise of docs/explanation/promises.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISES = (ROOT / "docs" / "explanation" / "promises.md").read_text()
ROWS = [line for line in PROMISES.splitlines() if line.startswith("| ") and not line.startswith("| promise")]


def functions_of(file: str) -> set[str]:
    """The test functions of a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_there_are_promises():
    assert len(ROWS) > 20
    assert "/explanation/promises.html)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("row", ROWS, ids=[row[2:40] for row in ROWS])
def test_a_promise_names_tests_that_exist(row):
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
    assert named
    assert row.count("tests/") == len(named)
    for file, test in named:
        assert test in functions_of(file), f"{file} has no {test}"


def test_the_limits_are_those_of_the_tests():
    """The numbers of the error bound are read off the test that holds it."""
    source = (ROOT / "tests" / "test_accuracy.py").read_text()
    limits = dict(re.findall(r"(0\.\d+): (\d+)", re.search(r"LIMITS = \{(.*)\}", source)[1]))
    first = next(row for row in ROWS if "test_worst_error_over_a_thousand_steps" in row)
    assert re.findall(r"\d+", first.split("units")[0].split("within")[1]) == list(limits.values())
    assert [f"0{x}" for x in re.findall(r"\.9+5?\b", first.split("b2 =")[1].split(", over")[0])] == list(limits)
