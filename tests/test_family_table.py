"""`benchmarks/family.py`, small: what it writes is what it measured, and a run that stopped goes on."""

import json

import numpy as np
import pytest
from cases import PRESETS, script
from scipy.stats import t as student

family = script("benchmarks", "family")


def row(problem, preset, losses, steps=100):
    rates = [1e-3, 3e-3, 9e-3]
    return {"problem": problem, "preset": preset, "steps": steps, "rates": rates, "losses": losses, "state": 8.01}


def test_a_table_says_which_rate_was_best_and_how_sure_that_is():
    worse, best = [3.0, 3.1, 3.2], [2.0, 2.1, 2.3]
    rows = [
        row("digits", "adamw", [worse, best, worse]),
        row("digits", "adams", [worse, worse, [1.9, 2.1, 2.2]]) | {"state": 4.01},
        row("digits", "lion", [[np.nan] * 3, worse, [np.inf] * 3]),
    ]
    lines = family.table({"rows": rows, "seeds": 3}).splitlines()
    assert lines[0] == "| optimizer | state, bytes | moved, bytes | digits: rate | loss | to `adamw` |"
    spread = student.ppf(0.975, 2) * np.std(best, ddof=1) / 3**0.5
    assert lines[2] == f"| `adamw` | 8 | 28 | 0.003 | 2.133 ± {spread:.3f} | - |"
    assert lines[3].startswith("| `adams` | 4 | ")
    assert "| 0.009 ^ | 2.067 ±" in lines[3]
    apart = np.subtract([1.9, 2.1, 2.2], best)
    half = student.ppf(0.975, 2) * np.std(apart, ddof=1) / 3**0.5
    assert lines[3].endswith(f"| {apart.mean():+.3f} ± {half:.3f} |")
    assert "| 0.003 | 3.100 ±" in lines[4]  # what diverged is never best


def test_it_measures_every_preset():
    assert set(family.PRESETS) == set(PRESETS)
    for name in family.PRESETS:
        family.optimizer(name, 1e-3, family.PROBLEMS["digits"], 10)


@pytest.mark.slow
def test_a_run_in_short_goes_on_where_it_was(tmp_path, capsys):
    file = tmp_path / "family.json"
    options = ["--problems", "digits", "--share", "0.03", "--json", str(file)]
    family.main([*options, "--presets", "adamw"])
    first = json.loads(file.read_text())["rows"]
    family.main([*options, "--presets", "adamw", "adams", "adamc"])
    rows = json.loads(file.read_text())["rows"]
    assert rows[0] == first[0]  # not made again
    assert [x["preset"] for x in rows] == ["adamw", "adams", "adamc"]
    assert [round(x["state"]) for x in rows] == [8, 4, 8]
    assert np.shape(rows[0]["losses"]) == (3, 3)
    assert np.all(np.array(rows[0]["losses"])[-1] < 2.2)  # from log 10 = 2.3
    assert family.table({"rows": rows, "seeds": 3}) in capsys.readouterr().out
