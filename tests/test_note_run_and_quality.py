"""The benchmarks run, small, and what they write is what they measured."""

import json
import sys

import numpy as np
import pytest
from cases import script
from scipy.stats import ttest_rel

note_run, quality, readme = (script("benchmarks", name) for name in ("note_run", "quality", "readme"))


@pytest.mark.slow
def test_note_run_in_short(tmp_path, monkeypatch, capsys):
    """Optimizers of JAX learn to read digits, alike; their rows go beside those of another width."""
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    names = ["optax.adam", "snr_adam.adam observed", "torch.optim.Adam"]
    file = tmp_path / "note_run.json"
    other = {"contender": "optax.adam", "width": 8, "error": "not measured: another day"}
    file.write_text(json.dumps({"rows": [other, other | {"width": 16}]}))
    options = ["--width", "16", "--samples", "2560", "--rounds", "3", "--json", str(file)]
    note_run.main([*options, "--contenders", *names])
    kept, *measured, missing = json.loads(file.read_text())["rows"]
    assert kept == other
    assert [row["contender"] for row in (*measured, missing)] == names
    assert "not measured" in missing["error"]
    base, observed = measured
    assert base["to_optax"] == 1
    for row in measured:
        assert row["updates"] == 3 * 4 * 20
        assert row["accuracy"] > 0.5  # by chance: 0.1
        assert row["updates_per_second"] * row["seconds"] == pytest.approx(row["updates"], rel=0.5)
    assert abs(observed["accuracy"] - base["accuracy"]) < 0.03
    said = capsys.readouterr().out
    assert said.startswith("step 240\n")  # the report of the observed one
    assert "| 16 | `torch.optim.Adam`, eager | not measured |" in said


@pytest.mark.slow
def test_quality_in_short(tmp_path, monkeypatch, capsys):
    """Cheaper memory changes the loss by less than seeds do; the interval is that of a paired t-test."""
    monkeypatch.setattr(quality, "VARIANTS", (quality.BASE, "shared", "carried"))
    file = tmp_path / "new" / "quality.json"
    quality.main(["--seeds", "3", "--steps", "90", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["variant"] for row in rows] == list(quality.VARIANTS)
    base = rows[0]
    assert base["mean"] < 1.5  # from log 10 = 2.3
    assert rows[-1]["bytes_per_parameter"] == pytest.approx(7, abs=0.1)
    for row in rows[1:]:
        interval = ttest_rel(row["losses"], base["losses"]).confidence_interval(0.95)
        np.testing.assert_allclose(
            [row["difference"] - row["interval"], row["difference"] + row["interval"]], interval, atol=1e-9
        )
        assert row["losses"] != base["losses"]
    assert abs(rows[-1]["difference"]) < base["spread"] / 10
    assert rows[1]["shared"]["hidden/kernel"]["error"] > 0.3
    said = capsys.readouterr().out
    assert readme.quality_table(readme.load("char_lm")) in said
    assert "mean of 3 seeds" in said
