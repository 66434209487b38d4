"""The experiments behind the advice count what they say, and what is printed is what they found."""

import json

import numpy as np
import pytest
from cases import script
from scipy.stats import ttest_1samp

from snr_adam.telemetry.advice import advise
from snr_adam.telemetry.noise_scale import NoiseScale

batch_size, persistence = (script("benchmarks", name) for name in ("batch_size", "persistence"))


def results(name: str) -> list[dict]:
    return json.loads((batch_size.RESULTS / f"{name}.json").read_text())["rows"]


def test_the_step_at_which_a_loss_was_passed_lies_on_the_line_between_two():
    assert batch_size.crossing(np.array([3.0, 2.0, 1.0, 2.0, 0.5]), 1.5) == 1.5
    assert batch_size.crossing(np.array([3.0, 2.0]), 2.0) == 1.0
    assert np.isnan(batch_size.crossing(np.array([3.0, 2.0]), 1.0))


def test_what_was_printed_for_a_batch_is_what_advise_prints():
    """For the batch that it advises itself."""
    advice = advise(NoiseScale(96.0, 10.0, 80.0, 120.0, "given"), 32, 1e-3)
    ((steps, low, high),) = batch_size.multiples([advice], 128)
    assert f"{steps:.2g} times the steps ({low:.2g} to {high:.2g})" in str(advice)


def test_multiples_of_steps_and_examples_lie_within_their_printed_intervals():
    """On two workloads, from 8 to 512: the mean over starts, within what was printed to nearly every one of them."""
    rows = results("batch_size")
    assert {(row["workload"], row["batch"]) for row in rows} == {
        (name, batch) for name in batch_size.GOALS for batch in batch_size.BATCHES
    }
    for row in rows:
        assert np.isfinite(row["times"])
        assert row["low"] <= row["times"] <= row["high"]
        inside = [low <= row["times"] <= high for _, low, high in row["printed"]]
        assert sum(inside) == row["inside"] >= 0.8 * len(inside)
        base = next(x for x in rows if (x["workload"], x["batch"]) == (row["workload"], batch_size.BATCH))
        assert row["times"] == pytest.approx(row["steps"] / base["steps"])
        scales = [NoiseScale(*scale, "mean over the run") for scale in row["noise_scales"]]
        now = batch_size.multiples([advise(scale, batch_size.BATCH, 1e-3) for scale in scales], row["batch"])
        np.testing.assert_allclose(
            now, row["printed"], rtol=1e-6, err_msg="advise says something else now: run it again"
        )


def test_the_docs_show_the_results():
    page = batch_size.DOCS.read_text()
    assert batch_size.render(page, results("batch_size"), results("persistence")) == page, "run batch_size.py --docs"


def test_a_rate_is_better_if_a_t_test_says_so():
    rng = np.random.default_rng(0)
    found = []
    for shift in (0.0, -0.3, -1.0, 1.0):
        changes = rng.normal(shift, 1.0, 12)
        found.append(persistence.is_below_0(changes))
        assert found[-1] == (ttest_1samp(changes, 0).confidence_interval(0.95).high < 0)
    assert True in found
    assert False in found
    losses = np.array([[1.0, 2.0, 1.5, np.nan], [1.1, 2.2, 1.6, 3.0]])
    assert persistence.verdict(losses)["falls"] is False
    assert persistence.verdict(losses)["twice"] is False


def state(low, high, **what) -> dict:
    falls = {"workload": "convolutional", "twice": False, "half": False, "falls": True}
    return falls | {"persistence_low": low, "persistence_high": high} | what


def test_states_are_sorted_by_what_advise_says_of_them():
    rows = [state(0.2, 0.5, twice=True), state(0.2, 0.5), state(-0.1, 0.05, half=True, falls=False)]
    rows += [state(0.0, 0.3), state(None, None), state(0.2, 0.5, workload="quadratic", half=True)]
    lines = persistence.table(rows).splitlines()[2:]
    assert [line.strip("| ").split(" | ") for line in lines] == [
        ["two networks", "above .1, loss falls", "2", "50%", "0%", "50%"],
        ["two networks", "below .1, loss has stopped falling", "1", "0%", "100%", "0%"],
        ["two networks", "around .1", "1", "0%", "0%", "100%"],
        ["two networks", "not known", "1", "0%", "0%", "100%"],
        ["quadratic", "above .1, loss falls", "1", "0%", "100%", "0%"],
    ]


def test_what_advise_says_of_the_learning_rate_is_borne_out():
    """Not too large while the loss falls; or a larger one unlikely to help, and a lower one does at a standstill."""
    said: dict = {}
    for row in results("persistence"):
        ends = [np.nan if row[f"persistence_{end}"] is None else row[f"persistence_{end}"] for end in ("low", "high")]
        advice = advise(NoiseScale(96.0, 10.0, 80.0, 120.0, "given"), 32, 1e-3, persistence=ends)
        said.setdefault(advice.learning_rate.split(".")[0], []).append(row)
    fine, steep = (
        said[key]
        for key in (
            "The learning rate is not too large while the loss falls: gradients agree over the memory of m",
            "Steep directions are in balance with the noise",
        )
    )
    assert {row["workload"] for row in fine} == {row["workload"] for row in steep} == set(persistence.WORKLOADS)
    falling, standing = [row for row in fine if row["falls"]], [row for row in steep if not row["falls"]]
    assert len(falling) > 50
    assert len(standing) > 15
    assert np.mean([row["half"] for row in falling]) < 0.05
    assert np.mean([row["twice"] for row in steep]) < 0.15
    assert np.mean([row["half"] for row in standing]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [batch_size, persistence], ids=["batch_size", "persistence"])
def test_in_short(experiment, capsys):
    experiment.main(["--quick"])
    assert len(capsys.readouterr().out.splitlines()) >= 3
