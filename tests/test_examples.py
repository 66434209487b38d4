"""The examples run, and what they tell the reader is true of the numbers they computed."""

import contextlib
import csv
import io
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from cases import script
from flax import nnx
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

import snr_adam
from snr_adam.telemetry.advice import over_run

EPOCHS = 48


digits, hundred_thousand, noise_scale, trackers, see_the_signal = (
    script("examples", name) for name in ("digits", "hundred_thousand", "noise_scale", "trackers", "see_the_signal")
)


class Told(NamedTuple):
    """Adam's run, and what the reader got to see."""

    run: Any
    said: str
    picture: Path


def run_digits(flags, folder) -> Told:
    picture, said = folder / "new" / "picture.png", io.StringIO()
    with contextlib.redirect_stdout(said):
        runs = digits.main([*flags, "--epochs", str(EPOCHS), "--out", str(picture)])
    return Told(runs["Adam"], said.getvalue(), picture)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return run_digits([], tmp_path_factory.mktemp("noisy"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return run_digits(["--clean"], tmp_path_factory.mktemp("clean"))


def begin_and_end(told):
    """All layers together: after the first epoch, and on average over the last quarter of the run."""
    reports = told.run.reports
    late = reports[-len(reports) // 4 :]
    return reports[0].total, {key: np.mean([report.total[key] for report in late]) for key in reports[0].total}


def test_with_wrong_labels_the_signal_goes_and_the_noise_stays(noisy):
    begin, end = begin_and_end(noisy)
    floor = snr_adam.parts.EMA(digits.BETA).floor(10**4) ** 0.5
    assert noisy.run.reports[-1].total["snr_low"] < 0.05 < begin["snr_low"]
    assert abs(end["snr"]) < begin["snr"] / 3
    assert end["gradient_noise"] > 0.9 * begin["gradient_noise"]
    assert abs(end["persistent"]) < begin["persistent"] / 16
    assert end["noise"] > 0.9 * begin["noise"]
    assert begin["pseudo_snr"] > 2.5 * floor
    assert abs(end["pseudo_snr"] / floor - 1) < 0.1
    assert end["update_rms"] == pytest.approx(
        digits.RATES["Adam"] * floor, rel=0.3
    )  # so the weights' step is noise, too
    assert noisy.run.accuracy > 0.9


def test_with_right_labels_the_noise_falls_too(noisy, clean):
    begin, end = begin_and_end(clean)
    assert abs(end["persistent"]) < begin["persistent"] / 64
    assert end["noise"] < 0.7 * begin["noise"]
    assert end["noise"] < 0.5 * begin_and_end(noisy)[1]["noise"]
    assert clean.run.accuracy > 0.95
    assert "the noise fell too" in clean.said
    assert "the noise did not fall" in noisy.said


def test_what_is_said_at_the_end_is_what_was_seen(noisy):
    begin, end = (noisy.run.reports[i].total for i in (0, -1))
    noises = begin["gradient_noise"], end["gradient_noise"]
    left = f"{end['snr']:.2f}" if end["snr_low"] > 0 else f"at most {end['snr_high']:.2f}"
    assert f"had {begin['snr']:.2f} times the power of the noise, and has {left} in the end" in noisy.said
    assert f"the noise did not fall: {noises[0]:.2f}, then {noises[1]:.2f}." in noisy.said
    assert f"SNR fell from {begin['pseudo_snr']:.2f} to {end['pseudo_snr']:.3f}" in noisy.said
    assert "pure noise would show 0.160" in noisy.said


def test_a_share_of_the_training_labels_is_wrong_and_no_held_out_one():
    right, given = digits.load(0.0), digits.load(digits.WRONG)
    assert np.mean(np.asarray(right[1] != given[1])) == pytest.approx(digits.WRONG, abs=0.03)
    for i in (0, 2, 3):
        np.testing.assert_array_equal(right[i], given[i])


def test_the_tables_are_the_first_and_the_last_report(noisy):
    layers = ("hidden/bias", "hidden/kernel", "out/bias", "out/kernel")
    assert noisy.run.reports[0].names == layers
    n = len(noisy.run.loss) // EPOCHS
    assert [report.step for report in noisy.run.reports] == [n * (epoch + 1) for epoch in range(EPOCHS)]
    for epoch in (1, EPOCHS):
        assert f"Epoch {epoch}\n{noisy.run.reports[epoch - 1]}\n" in noisy.said


def test_the_panels_hold_the_reports(noisy, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    runs = {"Adam": noisy.run, "gradient descent": noisy.run._replace(reports=[])}
    digits.draw(runs, EPOCHS, digits.WRONG, noisy.picture)
    left, middle, right = figures[0].axes
    steps = [report.step for report in noisy.run.reports]
    assert [len(axes.get_lines()) for axes in (left, middle, right)] == [3, 3, 2]
    seen, floor = right.get_lines()
    np.testing.assert_array_equal(seen.get_xydata().T, [steps, [r.total["pseudo_snr"] for r in noisy.run.reports]])
    np.testing.assert_array_equal(floor.get_ydata(), [r.total["floor"] for r in noisy.run.reports])
    assert "floor: pure noise shows 0.16" in [text.get_text() for text in right.get_legend().get_texts()]
    assert all(axes.get_xlabel() == "updates (mini-batches of 32 digits)" for axes in (left, middle, right))


@pytest.mark.parametrize("which", ["noisy", "clean"])
def test_picture_is_written_and_named(which, request):
    told = request.getfixturevalue(which)
    picture = told.picture.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">I", picture[16:20])[0] >= 1000  # pixels wide
    assert str(told.picture) in told.said


def test_samples_are_digits_moved_by_at_most_one_pixel_with_noise():
    (images, labels), _ = hundred_thousand.load()
    x, y = jax.jit(hundred_thousand.make_samples, static_argnums=3)(jax.random.key(0), images[:1], labels[:1], 500)
    frame = np.pad(np.asarray(images[0]).reshape(8, 8), 1)
    moved = np.stack([frame[i : i + 8, j : j + 8].ravel() for i in range(3) for j in range(3)])
    off = np.asarray(x)[:, None] - moved
    nearest = np.abs(off).mean(-1).argmin(axis=1)
    assert set(nearest) == set(range(9))
    assert off[np.arange(500), nearest].std() == pytest.approx(0.1, rel=0.02)
    assert set(np.asarray(y)) == {int(labels[0])}


def test_hundred_thousand_in_short(tmp_path, capsys):
    picture = tmp_path / "new" / "picture.png"
    result = hundred_thousand.main(["--epochs", "2", "--samples", "12800", "--out", str(picture)])
    said = capsys.readouterr().out
    assert result.updates == 200
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert result.accuracy > 0.85  # by chance: 0.1
    assert "200 Adam updates in" in said
    assert f"Held-out digits read: {result.accuracy:.1%}" in said
    assert [report.step for report in result.reports] == [100, 200]
    assert f"{result.held_out[0]:.3f} after the first epoch" in said
    assert str(result.reports[-1]) in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in said


@pytest.fixture(scope="module")
def scales():
    """Three runs of the noise-scale example, from different starts and on different batches: its looks by step."""
    runs = [noise_scale.train(wrong=0.0, steps=400, seed=seed) for seed in range(3)]
    return {looks[0].step: looks for looks in zip(*runs, strict=True)}


@pytest.mark.slow
def test_lags_tell_the_noise_scale_of_a_real_run(scales):
    """An average over some 80 steps, beside the truth of one: in its interval in 75 % of looks, 25 % off on average."""
    looks = [look for step in scales for look in scales[step] if step <= 400]
    assert np.mean([look.lags.low <= look.exact <= look.lags.high for look in looks]) > 0.75
    off = [look.lags.value / look.exact for look in looks if np.isfinite(look.lags.value)]
    assert np.median(off) == pytest.approx(1, abs=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("step", [50, 100, 150, 200])
def test_l1_tells_the_noise_scale_in_adams_geometry(scales, step):
    found, exact = (np.mean(x) for x in zip(*((look.l1.value, look.l1_exact) for look in scales[step]), strict=True))
    assert found == pytest.approx(exact, rel=0.25)


@pytest.mark.slow  # for what it is measured on; that an estimate is never negative is in test_noise_scale.py
def test_noise_scales_are_never_negative(scales):
    looks = [look for step in scales for look in scales[step]]
    assert min(min(look.lags.value, look.l1.value, look.exact, look.l1_exact) for look in looks) >= 0


def test_noise_lies_in_few_directions():
    """What `noise_scale.D_EFF` stands for: in the example's network about 13, whatever the diagonal of Sigma says."""
    x, y = noise_scale.load(0.0)
    graph, params = nnx.split(noise_scale.MLP(nnx.Rngs(0)))

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y)

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, x, y)
    each = np.concatenate([np.asarray(g, float).reshape(len(x), -1) for g in jax.tree.leaves(each)], axis=1)
    each -= each.mean(0)
    of_trace = (each**2).mean(0).sum() ** 2
    assert of_trace / ((each @ each.T / len(x)) ** 2).sum() == pytest.approx(13, abs=2)
    assert of_trace / ((each**2).mean(0) ** 2).sum() == pytest.approx(155, rel=0.2)
    assert snr_adam.telemetry.noise_scale.D_EFF == 10


def test_noise_scale_says_what_it_measured(tmp_path, capsys):
    """With wrong labels the signal is lost in the end; the reader is told so, and what to do."""
    picture = tmp_path / "new" / "picture.png"
    looks = noise_scale.main(["--wrong", "0.2", "--steps", "800", "--out", str(picture)])
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()[2:] if line[:6].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800]
    assert np.isinf(looks[-1].lags.value)
    bounds = [look for look in looks if np.isinf(look.lags.value)]
    assert len(bounds) > 5
    for look in bounds:  # the next column contradicts none of them
        assert look.lags.low < look.exact
    inside = sum(look.lags.low <= look.exact <= look.lags.high for look in looks)
    assert inside > 0.75 * len(looks)
    assert f"in the interval of the lags in {inside} of {len(looks)} looks" in said
    assert f"Where not, in {len(bounds)}, the noise scale was above what they say in {len(bounds)}." in said
    for row in rows:
        (look,) = (look for look in looks if look.step == int(row[0]))
        assert str(look.lags) in " ".join(row)
        assert f"{look.exact:,.0f}" in row
    whole = over_run(snr_adam.History(look.report for look in looks), noise_scale.BATCH)
    assert f"The noise scale is {whole}" in said
    assert np.isfinite(whole.value)
    assert ">= " in said
    assert "inf" not in said
    assert "nan" not in said
    assert struct.unpack(">I", picture.read_bytes()[16:20])[0] >= 1000  # pixels wide
    assert str(picture) in said


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        noise_scale.main(["--steps", "10"])
    assert "at least 25 steps" in capsys.readouterr().err


@pytest.mark.parametrize("example", [digits, hundred_thousand], ids=["digits", "hundred_thousand"])
def test_no_epochs_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
    assert "at least 1 epoch" in capsys.readouterr().err


def events(folder):
    """The scalars and the histograms of TensorBoard's files: (name, step) -> a number, or how many numbers."""
    found = {}
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                number = value.histo.num if value.HasField("histo") else value.simple_value
                found[value.tag, event.step] = number
    return found


def test_trackers_are_told_what_the_reports_say(tmp_path, capsys):
    trackers.main(["--updates", "60", "--out", str(tmp_path)])
    history = snr_adam.History.load(tmp_path / "history.npz")
    np.testing.assert_array_equal(history.steps, [20, 40, 60])
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = events(tmp_path / "tensorboard")
    for i, (step, row) in enumerate(zip(history.steps, rows, strict=True)):
        assert int(row["step"]) == step
        assert float(row["snr/gradient_norm"]) == pytest.approx(history.total["gradient_norm"][i])
        for name, value in row.items():
            if value and name != "step":
                assert told[name, step] == pytest.approx(float(value), rel=1e-5)
        assert told["layers/noise", step] == len(history.names)
    said = capsys.readouterr().out
    assert str(history) in said
    assert str(tmp_path) in said


def test_a_table_takes_numbers_that_come_and_go(tmp_path):
    table = trackers.Table(tmp_path / "metrics.csv")
    for step, metrics in enumerate(({"a": 1.0}, {"a": 2.0, "b": 3.0}, {"b": 4.0}, {})):
        table.write(step, metrics, {})
    table.close()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [
        ("0", "1.0", ""),
        ("1", "2.0", "3.0"),
        ("2", "", "4.0"),
        ("3", "", ""),
    ]


@pytest.mark.slow
def test_see_the_signal_in_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(see_the_signal, "EVERY", 10)
    size = see_the_signal.SIZE._replace(width=16, context=16, batch=4, layers=1)
    results = tmp_path / "signal.json"
    reports = see_the_signal.main(
        ["--steps", "20", "--out", str(tmp_path / "new" / "signal.png"), "--json", str(results)], size
    )
    said = capsys.readouterr().out
    assert [report.step for report in reports] == [10, 20]
    table = json.loads(results.read_text())["table"]
    assert table == str(reports[-1].group(see_the_signal.GROUPS))
    assert table in said
    grouped = reports[-1].group(see_the_signal.GROUPS)
    assert grouped.columns["size"].sum() == reports[-1].columns["size"].sum()  # every layer is in a group
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["signal.png"]


@pytest.mark.slow
def test_what_the_readme_says_of_the_heat_map():
    reports, _ = see_the_signal.train(see_the_signal.STEPS)
    history = snr_adam.History(reports)
    ratio, at = history.columns["pseudo_snr"] / history.columns["floor"], history.steps
    first, plateau, last = (
        ratio[at == 20][0],
        ratio[(at >= 75) & (at <= 110)].mean(axis=0),
        ratio[at > 150].mean(axis=0),
    )
    attention = [history.names.index(f"blocks/0/attention/{name}/kernel") for name in ("query", "key")]
    assert (first > 1.5).all()
    assert np.mean(plateau < 1.1) > 0.7
    assert (plateau[attention] > 1.5).all()
    assert np.mean(last > plateau) > 0.7
