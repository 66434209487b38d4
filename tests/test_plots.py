"""The pictures hold the numbers of the history, name what they show, and need no global state."""

import subprocess
import sys
import time
from types import SimpleNamespace

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


def over_time(**numbers) -> History:
    """Reports at steps 1, 2, ... of nothing but these numbers, (T,) or (T, L); in total, those of the first layer."""
    rows = {key: np.reshape(np.asarray(x, float), (len(x), -1)) for key, x in numbers.items()}
    times, layers = next(iter(rows.values())).shape
    names = tuple(f"{i}" for i in range(layers))
    return History(
        SimpleNamespace(
            step=t + 1,
            names=names,
            columns={key: x[t] for key, x in rows.items()},
            total={key: x[t, 0] for key, x in rows.items()},
        )
        for t in range(times)
    )


def ends(band, step):
    """Where a band is at a step, from and to."""
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    return sorted(set(corners[corners[:, 0] == step, 1]))


def test_signal_and_noise_are_those_of_the_reports(history):
    axes = plots.signal_and_noise(history)
    drawn, total = lines(axes), history.total
    expected = {
        "noise": total["gradient_noise"],
        "signal": total["gradient_signal"],
        "limit": total["gradient_noise"] * np.sqrt(1.96 * total["snr_error"]),
    }
    assert list(drawn) == list(expected)
    for key, (x, y) in drawn.items():
        np.testing.assert_array_equal(x, history.steps)
        np.testing.assert_allclose(y, expected[key], rtol=1e-12)
    assert "limit: less signal cannot be seen" in legend(axes)


def test_a_layer_can_be_chosen(history):
    axes = plots.signal_and_noise(history, history.names[4])
    np.testing.assert_allclose(lines(axes)["signal"][1], history.columns["gradient_signal"][:, 4])
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
    np.testing.assert_array_equal(y, total["noise_scale_low"][~known])
    np.testing.assert_array_equal(drawn["batch size used"][1], [32, 32])
    assert "batch size used: 32" in legend(axes)
    corners = axes.collections[0].get_paths()[0].vertices
    ends = [total[f"noise_scale_{end}"][2] for end in ("low", "high")]
    np.testing.assert_allclose(np.unique(corners[corners[:, 0] == 30, 1]), ends)
    in_batches = plots.noise_scale(history)
    assert in_batches.get_ylabel() == "noise scale (batches)"
    np.testing.assert_array_equal(lines(in_batches)["the batch that was used"][1], [1, 1])


def colours(low, high, key="noise", least=-1e9):
    """How numbers become colours on a heat map of which the 1st and the 99th percentile are these."""
    values = np.array([least, low, *np.linspace(low, high, 97), high, 1e9])
    (image,) = plots.heat_map(over_time(**{key: values, "floor": np.ones(101)}), key).images
    return image.norm


def assert_logarithmic(norm, low, high):
    assert (norm.vmin, norm.vmax) == pytest.approx((low, high))
    assert float(norm((low * high) ** 0.5)) == pytest.approx(0.5)


@pytest.mark.parametrize(("low", "high"), [(1.0, 10.1), (1e-6, 1e3)])
def test_colours_are_logarithmic_over_more_than_a_factor_of_ten(low, high):
    """From the 1st to the 99th percentile: few wild numbers do not make all others look the same."""
    assert_logarithmic(colours(low, high), low, high)


@pytest.mark.parametrize(("low", "high"), [(1.0, 10.0), (3.0, 4.0), (0.0, 100.0), (-1.0, 100.0)])
def test_colours_are_linear_over_less_and_where_numbers_are_not_positive(low, high):
    norm = colours(low, high)
    assert (norm.vmin, norm.vmax) == pytest.approx((low, high))
    assert float(norm((low + high) / 2)) == pytest.approx(0.5)


def test_colours_of_an_snr_begin_at_its_floor():
    """Logarithmic, up to the 99th percentile, but to half above the floor at least: pure noise is not made to shine."""
    for high in (1.2, 1.6, 3.0, 40.0):
        assert_logarithmic(colours(0.8, high, "pseudo_snr", 0.0), 1.0, max(high, 1.5))
        axes = plots.heat_map(over_time(pseudo_snr=np.full((3, 2), high), floor=np.ones((3, 2))))
        bar = axes.figure.axes[-1]
        named = {1.0: "floor"} | {x: f"{x:g}" for x in (1.25, 1.5, 2, 3, 4, 6, 10) if x <= max(high, 1.5)}
        assert dict(zip(bar.get_yticks(), [t.get_text() for t in bar.get_yticklabels()], strict=True)) == named
        assert bar.get_ylim() == pytest.approx((1.0, max(high, 1.5)))


def test_the_colours_say_what_they_are_of():
    """Each quantity has its name and unit beside its colours, no two the same; one that is new, its name."""
    labels = {}
    keys = ("signal", "noise", "gradient_norm", "significant", "snr", "effective_step", "update_rms", "param_rms")
    for key in (*keys, "persistence", "gradient_signal", "gradient_noise"):
        labels[key] = plots.heat_map(over_time(**{key: [1.0, 2.0]}), key).figure.axes[-1].get_ylabel()
    of = {"gradient_norm": "norm of the gradient", "significant": "share", "snr": "SNR of one gradient"}
    of |= {"gradient_signal": "norm of the true gradient", "gradient_noise": "noise of one gradient"}
    of |= {"effective_step": "effective step", "update_rms": "RMS of the update", "param_rms": "RMS of the parameters"}
    for key, label in labels.items():
        assert label.startswith(of.get(key, key))
    assert len(set(labels.values())) == len(labels)
    assert plots.heat_map(over_time(loss=[1.0, 2.0]), "loss").figure.axes[-1].get_ylabel() == "loss"


def test_what_has_no_floor_is_gray_and_not_a_number():
    """Gray is no colour of the scale, so that no number looks like none."""
    (image,) = plots.heat_map(over_time(pseudo_snr=[[1.0, 2.0]] * 3, floor=[[0.0, 0.5]] * 3)).images
    np.testing.assert_array_equal(image.get_array().mask, [[True] * 3, [False] * 3])
    gray = image.cmap(np.ma.masked_all(1))[0]
    assert gray[0] == gray[1] == gray[2] > 0.5
    assert tuple(gray) not in set(map(tuple, image.cmap(np.linspace(0, 1, 256))))


@pytest.mark.parametrize("picture", ["heat_map", "depth", "overview"])
@pytest.mark.parametrize("layers", [40, 41, 400])
def test_no_axis_has_more_names_than_can_be_read(picture, layers):
    """Up to 40 layers have their names; more have a dozen whole numbers at most, and no picture grows with them."""
    drawn = getattr(plots, picture)(History(fake_reports(3, layers)))
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    titled = {axes.get_title(): axes for axes in figure.axes}
    pictures = [titled[title] for title in ("Every layer over time", "SNR against depth") if title in titled]
    assert len(pictures) == (2 if picture == "overview" else 1)
    for axes in pictures:
        ticks = [y for y in axes.get_yticks() if 0 <= y < layers]
        texts = [axes.yaxis.get_major_formatter()(y) for y in ticks]
        assert axes.get_ylim() == (layers - 0.5, -0.5)
        if layers == 40:
            assert texts == [f"layers/{i}/kernel" for i in range(layers)]
        else:
            assert 2 < len(ticks) <= 12
            assert texts == [f"{y:.0f}" for y in ticks] == [str(int(y)) for y in ticks]
            assert pictures[0].get_ylabel() == f"number of the layer, of {layers}"
    assert figure.get_size_inches()[1] <= (15 if picture == "overview" else 10)


def test_few_of_many_layers_have_their_names_and_marks():
    """What counts is what is shown; dots are for lines of few layers."""
    history = History(fake_reports(3, 400))
    few = plots.depth(history, "layers/1./")
    assert [tick.get_text() for tick in few.get_yticklabels()] == [f"layers/{i}/kernel" for i in range(10, 20)]
    for axes, seen in ((few, True), (plots.depth(history), False)):
        assert {line.get_markersize() > 0 for line in axes.get_lines()[:-1]} == {seen}


def test_layers_are_in_the_order_of_the_network_and_rounding_is_hatched():
    columns = {"pseudo_snr": [3.0, 2.0, 1.0], "floor": [1.0] * 3, "gradient_norm": [1.0, 1e-9, 1.0], "size": [1.0] * 3}
    columns = {key: np.array(x) for key, x in columns.items()}
    seen = [SimpleNamespace(step=t, names=("h_1", "h_10", "h_2"), columns=columns, total={}) for t in (1, 2)]
    axes = plots.heat_map(seen)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["h_1", "h_2", "h_10"]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(-1)[:, 0], [3, 1, -1])
    (hatched,) = [patch for patch in axes.patches if patch.get_hatch()]
    assert hatched.get_y() == 1.5
    axes = plots.depth(seen)
    np.testing.assert_array_equal(axes.get_lines()[0].get_xdata(), [3, 1, np.nan])
    assert [patch.get_y() for patch in axes.patches if patch.get_hatch()] == [1.5]


def test_the_batch_size_is_that_of_the_reports():
    reports = list(fake_reports(4, 2))
    for report, batch in zip(reports, (32, 32, 64, 64), strict=True):
        report.batch_size = batch
    axes = plots.noise_scale(reports)
    np.testing.assert_array_equal(lines(axes)["batch size used"][1], [32, 32, 64, 64])
    assert "batch size used: 32 to 64" in legend(axes)
    assert axes.get_ylabel() == "noise scale (examples)"
    assert "batch size used: 32" in legend(plots.noise_scale(reports[:2]))
    assert "batch size used: 8" in legend(plots.noise_scale(reports, 8))


def test_the_band_of_a_noise_scale_ends_at_a_tenth_of_it():
    """And at ten times: on a logarithmic axis what goes to 0 or without end would go to the end of the world."""
    low, high = np.array([80.0, 12, 9, 0, 50]), np.array([120, 400, 990, np.inf, 2000])
    numbers = {"noise_scale": np.full(5, 100.0), "noise_scale_low": low, "noise_scale_high": high}
    axes = plots.noise_scale(over_time(**numbers))
    (band,) = axes.collections
    for step, drawn in enumerate(zip((80, 12, 10, 10, 50), (120, 400, 990, 1000, 1000), strict=True), start=1):
        assert ends(band, step) == pytest.approx(drawn)
    assert axes.get_yscale() == "log"
    assert "95 % interval" in legend(axes)


def test_a_noise_scale_that_has_no_place_on_its_axis_is_a_gap():
    """0 is one, and so is a bound of 0 or of nothing; a bound stands only where the scale is beyond it."""
    scale = [50.0, 0.0, np.nan, np.inf, np.inf, np.inf, np.inf]
    low = [40.0, 0.0, 70.0, 60.0, 0.0, np.nan, np.inf]
    axes = plots.noise_scale(over_time(noise_scale=scale, noise_scale_low=low, noise_scale_high=[90.0] + [np.inf] * 6))
    drawn = lines(axes)
    np.testing.assert_array_equal(drawn["noise scale"][1], [50] + [np.nan] * 6)
    np.testing.assert_array_equal(drawn["at least"], [[4], [60]])
    (band,) = axes.collections
    assert [ends(band, step) for step in range(2, 8)] == [[]] * 6


def test_an_snr_is_shaded_only_where_it_is_above_its_floor():
    """Shown from 0 on, so that what looks twice as high is twice as much."""
    axes = plots.snr(over_time(pseudo_snr=[0.6, 0.5, 0.2, 0.25], floor=[0.3] * 4))
    (shade,) = axes.collections
    assert [ends(shade, step) for step in (1, 2, 3, 4)] == [[0.3, 0.6], [0.3, 0.5], [], []]
    assert axes.get_ylim()[0] == 0


def test_norms_are_drawn_from_none_on():
    """So that what looks twice as high is twice as much, and no signal is on the axis."""
    numbers = {"gradient_signal": [5**0.5, 0.5, 4.0], "gradient_noise": [2.0, 3.0, 1.0], "snr_error": [0.5, 0.125, 2.0]}
    axes = plots.signal_and_noise(over_time(**numbers))
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["signal"][1], numbers["gradient_signal"])
    np.testing.assert_allclose(drawn["noise"][1], numbers["gradient_noise"])
    np.testing.assert_allclose(drawn["limit"][1], [2 * 0.98**0.5, 3 * 0.245**0.5, 3.92**0.5])
    assert axes.get_ylim()[0] == 0
    depth = plots.depth(over_time(pseudo_snr=[[3.0, 2.0]] * 3, floor=[[1.0, 1.0]] * 3))
    assert depth.get_xlim()[0] == 0


def test_one_report_is_drawn_as_points():
    """A line from a number to itself cannot be seen."""
    history = History(fake_reports(1, 2))
    for draw in (plots.signal_and_noise, plots.snr, plots.noise_scale):
        for line in draw(history).get_lines():
            assert line.get_marker() not in ("", "None") or len(line.get_xdata()) == 2  # across the whole picture
    for draw in (plots.signal_and_noise, plots.snr):
        assert {line.get_marker() for line in draw(History(fake_reports(2, 2))).get_lines()} == {""}


def test_large_numbers_have_their_thousands():
    history = History(fake_reports(3, 2, every=10_000))
    for draw in PICTURES[:3]:
        assert draw(history).xaxis.get_major_formatter()(20_000) == "20,000"
    assert plots.noise_scale(history).yaxis.get_major_formatter()(1000.0) == "1,000"
    assert "batch size used: 4,096" in legend(plots.noise_scale(history, 4096))


def test_overview_hands_on_what_it_is_given(history):
    """The batch size, and one axis of layers for both pictures that have one."""
    titled = {axes.get_title(): axes for axes in plots.overview(history, 32).axes}
    assert "batch size used: 32" in legend(titled["Noise scale"])
    assert titled["Noise scale"].get_ylabel() == "noise scale (examples)"
    heat, depth = titled["Every layer over time"], titled["SNR against depth"]
    assert heat.get_shared_y_axes().joined(heat, depth)


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


@pytest.mark.slow
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
    for row in history.total._rows["gradient_noise"]:
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


def test_curves_run_against_examples():
    """Which need not be as many in every step; without a batch size there is no such axis."""
    seen = list(fake_reports(3, 2, every=10))
    for report, size in zip(seen, (8, 8, 16), strict=True):
        report.batch_size = size
    for picture in (plots.signal_and_noise, plots.snr, plots.noise_scale):
        axes = picture(seen, against="examples")
        assert axes.get_xlabel() == "examples"
        assert axes.get_lines()[0].get_xdata().tolist() == [80, 160, 320]
        with pytest.raises(ValueError, match="against='examples': some reports were not told a batch size"):
            picture(list(fake_reports(3, 2)), against="examples")
        with pytest.raises(ValueError, match="against='epochs': give 'steps' or 'examples'"):
            picture(seen, against="epochs")
