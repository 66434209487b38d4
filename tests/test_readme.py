"""What the README says is true: its code runs, its numbers are those of the results."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", [code for code in CODE if re.search(r"print\(.*\)  # ", code)])
def test_the_code_prints_what_it_says(code, capsys):
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", code)


def test_the_first_block_prints_a_table(capsys):
    """As it stands, in one paste: every layer, the total, and a signal that was found."""
    assert len(CODE[0].splitlines()) <= 16
    exec(CODE[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 200; snr, persistence and noise scale over about 80 steps")
    assert [line.split()[0] for line in lines[2:6] if "---" not in line] == ["hidden", "out", "total"]
    assert ">=" not in lines[5]


@pytest.mark.parametrize("code", [code for code in CODE if "def step(" in code])
def test_the_code_trains(code):
    names: dict = {}
    exec(code, names)
    x, y = jax.random.normal(jax.random.key(0), (32, 64)), jnp.ones((32, 10))
    losses = []
    for _ in range(20):
        if "optimizer" in names:
            losses.append(names["step"](names["model"], names["optimizer"], x, y))
        else:
            names["model"], names["state"], loss = names["step"](names["model"], names["state"], x, y)
            losses.append(loss)
    assert losses[-1] < 0.99 * losses[0]


def test_the_numbers_are_those_of_the_results():
    readme = script("benchmarks", "readme")
    assert readme.render(README) == README, "run benchmarks/readme.py"
