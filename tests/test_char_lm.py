"""The language model of `examples/char_lm.py`, small: for 60 updates all memories learn alike, the table tells what was
measured, and sharing a noise costs the update what was predicted."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SEEDS = (0, 1)
VARIANTS = ("optax", "carried")  # the baseline, and bfloat16 weights with packed moments


@pytest.fixture(scope="module")
def char_lm():
    spec = importlib.util.spec_from_file_location("char_lm", Path(__file__).parents[1] / "examples" / "char_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(char_lm):
    return char_lm.Size(width=32, context=32, batch=8, held_out=256)


@pytest.mark.slow
def test_a_short_table(char_lm, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(char_lm, "SEEDS", SEEDS)
    monkeypatch.setattr(char_lm, "VARIANTS", VARIANTS)
    monkeypatch.setattr(char_lm, "CHUNK", 60)  # compiles once
    file = tmp_path / "new" / "results.json"
    char_lm.main(["--table", "--steps", "60", "--json", str(file)], small)
    told = json.loads(file.read_text())
    losses = {variant: np.array([run["validation"] for run in runs]) for variant, runs in told["runs"].items()}
    assert list(losses) == list(VARIANTS)
    for each in losses.values():
        assert each.shape == (len(SEEDS),)
        assert each[0] != each[1]
        assert (each < 3.5).all()  # from log 256 = 5.5
    # same data, same start: 3e-4 apart when this was written, while two seeds are 2e-2 apart
    np.testing.assert_allclose(losses["carried"], losses["optax"], rtol=0, atol=3e-3)
    kept = [told["runs"][variant][0]["bytes_per_parameter"] for variant in VARIANTS]
    np.testing.assert_allclose(kept, [4 + 8, 2 + 1 + 4], atol=0.01)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| opt", "| car"))]
    assert [float(row[4]) for row in rows] == [round(each.mean(), 4) for each in losses.values()]


@pytest.mark.slow
def test_sharing_costs_what_was_predicted(char_lm, small):
    """The prediction is of first order in the spread of v, so it is asked for where that is small. Measured over two
    Python versions, three seeds and two lengths the quotient is 0.77 to 1.09 from SNR_K = 3 on, 0.68 to 1.12 from 2."""
    cutoff, moment = 3.0, 100
    run, alone = (
        char_lm.train("shared", steps=150, size=small, share_after=after, cutoff=cutoff) for after in (moment, 150)
    )
    rows = {row.path: row for row in run.suggestion.rows}
    assert [shared.path for shared in run.sharing] == [path for path, row in rows.items() if row.axes]
    assert run.sharing  # else there would be nothing to compare
    for shared in run.sharing:
        assert rows[shared.path].snr >= cutoff
        assert shared.predicted / 1.5 <= shared.measured <= shared.predicted * 1.5, shared
    # tokens differ by orders of magnitude in how often they are seen
    assert 0 not in rows["token/embedding"].axes
    assert 1 not in rows["head/kernel"].axes
    # up to the moment of sharing it is the same run; then another, but on the same batches almost as good
    assert alone.suggestion is None
    np.testing.assert_array_equal(run.losses[: moment + 1], alone.losses[: moment + 1])
    assert (run.losses[moment + 1 :] != alone.losses[moment + 1 :]).any()
    assert abs(run.validation - alone.validation) < 0.03
    assert run.bytes_per_parameter < alone.bytes_per_parameter


def test_everyone_sees_the_same_text(char_lm):
    train, held_out = char_lm.corpus()
    assert len(train) > 8 * len(held_out) > 1_000_000
    starts = np.array([[0, 5], [len(held_out) - 9, 1]])
    np.testing.assert_array_equal(char_lm.windows(held_out, starts, 8)[1, 0], held_out[-9:])


@pytest.mark.parametrize("steps", [1, 60])
def test_every_optimizer_has_a_name(char_lm, steps):
    made = [char_lm.optimizer(variant, steps) for variant in char_lm.VARIANTS]
    assert all(callable(tx.update) for tx in made)
    with pytest.raises(ValueError, match="carried"):
        char_lm.optimizer("adam", steps)
