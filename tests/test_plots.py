"""The pictures hold the numbers of the history, name what they show, and need no global state."""

import subprocess
import sys
import time

import numpy as np
import pytest
from fake_reports import fake_reports
from matplotlib.figure import Figure

from snr_adam import History
from snr_adam.telemetry import plots

LAYERS, TIMES = 6, 30
PICTURES = (plots.signal_and_noise, plots.snr, plots.heat_map, plots.depth, plots.noise_scale)


@pytest.fixture(scope="module")
def history():
    return History(fake_reports(TIMES, LAYERS))


def lines(axes):
    """What is drawn as lines, by the beginning of the name."""
    return {line.get_label().split(":")[0]: line.get_xydata().T for line in axes.get_lines()}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_signal_and_noise_are_those_of_the_reports(history):
    axes = plots.signal_and_noise(history)
    drawn, total = lines(axes), history.total
    noise = np.sqrt(total["gradient_norm"] ** 2 - total["persistent"])
    expected = {
        "noise": noise,
        "signal": np.sqrt(total["persistent"]),
        "floor": noise * np.sqrt(2 * total["snr_error"]),
    }
    assert list(drawn) == list(expected)
    for key, (x, y) in drawn.items():
        np.testing.assert_array_equal(x, history.steps)
        np.testing.assert_allclose(y, expected[key], rtol=1e-12)
    assert "floor: less signal cannot be seen" in legend(axes)


def test_a_layer_can_be_chosen(history):
    axes = plots.signal_and_noise(history, history.names[4])
    np.testing.assert_allclose(lines(axes)["signal"][1], history.columns["signal"][:, 4])
    assert history.names[4] in axes.get_title()
    np.testing.assert_array_equal(
        lines(plots.snr(history, history.names[2]))["floor"][1], history.columns["floor"][:, 2]
    )


def test_the_floor_is_drawn_and_named(history):
    axes = plots.snr(history)
    drawn = lines(axes)
    np.testing.assert_array_equal(drawn["SNR as the optimizer sees it"][1], history.total["pseudo_snr"])
    np.testing.assert_array_equal(drawn["floor"][1], history.total["floor"])
    assert "floor: pure noise shows 0.23" in legend(axes)
    (shade,) = axes.collections  # from the floor to the SNR
    corners = shade.get_paths()[0].vertices
    assert {history.total["floor"][3], history.total["pseudo_snr"][3]} <= set(corners[corners[:, 0] == 40, 1])


def test_the_heat_map_has_a_row_for_each_layer_and_a_column_for_each_step(history):
    axes = plots.heat_map(history)
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), (history.columns["pseudo_snr"] / history.columns["floor"]).T)
    np.testing.assert_allclose(image.get_extent()[:2], (5, 305))  # a report stands for the steps around it
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(history.names)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is on top
    assert image.norm.vmin == 1
    bar = axes.figure.axes[-1]
    assert "floor" in bar.get_ylabel()
    assert dict(zip(bar.get_yticks(), (t.get_text() for t in bar.get_yticklabels()), strict=True))[1] == "floor"


def test_the_heat_map_of_other_quantities_and_layers(history):
    axes = plots.heat_map(history, "noise", r"layers/[24]")
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), history.columns["noise"][:, [2, 4]].T)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["layers/2/kernel", "layers/4/kernel"]
    assert axes.figure.axes[-1].get_ylabel() == "noise (loss per unit of weight)"
    assert plots.heat_map(history, "param_rms").images[0].get_array().mask.all()  # nan: not available


def test_the_heat_map_puts_uneven_steps_where_they_belong():
    uneven = History(fake_reports(4, 2))
    uneven._steps[-1] = 100
    (image,) = plots.heat_map(uneven).images
    np.testing.assert_array_equal(image._Ax, [5, 15, 25, 65, 135])


def test_depth_shows_each_third_of_the_run(history):
    axes = plots.depth(history)
    drawn = lines(axes)
    squares = (history.columns["pseudo_snr"] / history.columns["floor"]) ** 2
    for i, label in enumerate(("steps 10 to 100", "steps 110 to 200", "steps 210 to 300")):
        x, y = drawn[label]
        np.testing.assert_allclose(x, np.sqrt(squares[10 * i : 10 * i + 10].mean(axis=0)))
        np.testing.assert_array_equal(y, np.arange(LAYERS))
    assert set(drawn["floor"][0]) == {1}
    assert "floor: pure noise" in legend(axes)
    assert [line.get_xydata().shape for line in plots.depth(history, "layers/[01]/").get_lines()[:-1]] == [(2, 2)] * 3


def test_the_noise_scale_has_a_band_a_limit_and_the_batch_size(history):
    axes = plots.noise_scale(history, batch_size=32)
    drawn, total = lines(axes), history.total
    known = np.isfinite(total["noise_scale"])
    assert 1 < known.sum() < TIMES
    np.testing.assert_array_equal(drawn["noise scale"][1], np.where(known, total["noise_scale"], np.nan))
    x, y = drawn["at least"]
    np.testing.assert_array_equal(x, history.steps[~known])
    np.testing.assert_array_equal(y, total["noise_scale_limit"][~known])
    np.testing.assert_array_equal(drawn["batch size used"][1], [32, 32])
    assert "batch size used: 32" in legend(axes)
    corners = axes.collections[0].get_paths()[0].vertices
    ends = total["noise_scale"][2] + 1.96 * total["noise_scale_error"][2] * np.array([-1, 1])
    np.testing.assert_allclose(np.unique(corners[corners[:, 0] == 30, 1]), ends)
    in_batches = plots.noise_scale(history)
    assert in_batches.get_ylabel() == "noise scale (batches)"
    np.testing.assert_array_equal(lines(in_batches)["the batch that was used"][1], [1, 1])


def test_every_axis_is_labelled_with_its_unit(history):
    for draw in PICTURES:
        axes = draw(history)
        assert axes.get_title()
        for label in (axes.get_xlabel(), axes.get_ylabel() or axes.get_yticklabels()[0].get_text()):
            assert label, draw
    assert plots.noise_scale(history, 32).get_ylabel() == "noise scale (examples)"
    assert plots.snr(history).get_xlabel() == "steps (updates)"


@pytest.mark.parametrize("draw", PICTURES)
def test_axes_or_reports_can_be_given(draw, history):
    figure = Figure()
    axes = figure.subplots()
    assert draw(history, axes=axes) is axes
    from_list = draw(list(fake_reports(TIMES, LAYERS)))
    for line, again in zip(axes.get_lines(), from_list.get_lines(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), again.get_xydata())


@pytest.mark.parametrize("draw", [*PICTURES, plots.overview])
@pytest.mark.parametrize("awkward", ["one report", "no number", "many layers", "no signal"])
def test_awkward_histories_are_drawn(draw, awkward, tmp_path):
    history = History(fake_reports(1 if awkward == "one report" else 3, 100 if awkward == "many layers" else 2))
    for rows in (*history.columns._rows.values(), *history.total._rows.values()):
        for row in rows:
            if awkward in ("no number", "no signal"):
                row[...] = np.nan if awkward == "no number" else 0.0
    drawn = draw(history)
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    figure.savefig(tmp_path / "picture.png")


def test_a_missing_quantity_is_named():
    history = History(fake_reports(3, 2))
    for row in history.total._rows["gradient_norm"]:
        row[...] = np.nan
    assert "noise: how mini-batches differ (not available)" in legend(plots.signal_and_noise(history))


def test_overview_has_all_pictures(history):
    figure = plots.overview(history, 32)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert sorted(titles) == sorted(draw(history).get_title() for draw in PICTURES)
    assert figure.get_size_inches()[0] * figure.dpi >= 1000


def test_errors_teach(history):
    with pytest.raises(ValueError, match="no reports"):
        plots.snr(History())
    with pytest.raises(ValueError, match=r"no layer 'head'; there are layers/0/kernel, "):
        plots.snr(history, "head")
    with pytest.raises(ValueError, match="no layer's name contains 'head'"):
        plots.heat_map(history, layers="head")
    with pytest.raises(KeyError, match="no quantity 'nose'"):
        plots.heat_map(history, "nose")


def test_pyplot_is_not_touched():
    code = "import sys, snr_adam.telemetry.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_large_heat_map_takes_less_than_a_second(tmp_path):
    history = History(fake_reports(300, 2000))
    plots.heat_map(History(fake_reports(2, 2))).figure.savefig(tmp_path / "small.png")  # loads the fonts
    start = time.process_time()  # of the processor, so that other work on the machine does not count
    plots.heat_map(history).figure.savefig(tmp_path / "large.png")
    assert time.process_time() - start < 1
