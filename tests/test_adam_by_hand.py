"""What `examples/adam_by_hand.py` and its lesson tell a beginner is true of the numbers that were computed.

Runs and figures are cached where they are made, so what costs time here is the first test that needs a program.
"""

import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import fast_jit, script

LESSON = Path(__file__).parents[1] / "docs" / "tutorials" / "adam_by_hand.md"

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "jit", fast_jit)  # the example's programs compile in half the time
    lesson, by = script("examples", "adam_by_hand"), script("examples", "by_hand")
figures = lesson.FIGURES


def numbers(name):
    return figures[name]().numbers


def test_the_hand_written_adam_is_that_of_the_package():
    assert 0 < numbers("units")["difference"] < 12 * 2.0**-23


def test_mini_batches_make_descent_shake():
    seen = numbers("descent_shakes")
    assert seen["shaking"] > 4 * seen["fair"] > 40 * seen["smooth"]


def test_noise_falls_as_the_root_of_the_batch():
    assert numbers("signal_and_noise")["off"] < 0.1


def test_the_signal_goes_and_the_noise_does_not():
    seen = numbers("noise_grows")
    early, late = seen["true"]
    assert late < early / 2
    assert seen["noise"][1] == pytest.approx(1.5 * seen["noise"][0], rel=0.05)  # "by half", says the title
    assert seen["right"][1] < 0.95 * seen["right"][0]
    assert seen["share"][0] == pytest.approx(by.wrong.mean(), abs=0.02)
    assert seen["share"][1] > 0.5


def test_an_average_is_nearer_to_the_true_gradient():
    seen = numbers("moving_averages")
    assert seen["average"] < seen["raw"] / 2


def test_without_correction_the_first_step_is_too_long():
    seen = numbers("bias_correction")
    assert seen["first"] == pytest.approx(0.1 / np.sqrt(0.001), rel=1e-3)
    assert seen["off"] < 0.15
    assert seen["shares"][0] > 5 * seen["shares"][1]


def test_the_first_snr_is_plus_or_minus_one():
    seen = numbers("first_steps")
    assert seen["first"] == pytest.approx((1, 1), abs=1e-2)
    assert seen["floors"][0] == pytest.approx(1)
    assert seen["floors"][1] == pytest.approx(0.5**0.5, rel=0.01)


def test_pure_noise_shows_the_floor_and_the_run_ends_there():
    seen = numbers("snr_and_floor")
    assert pytest.approx(0.2294, abs=1e-4) == lesson.FLOOR
    assert seen["early"] > 1.7 * lesson.FLOOR
    assert seen["noise"] == pytest.approx(lesson.FLOOR, rel=0.2)
    assert seen["late"] == pytest.approx(lesson.FLOOR, rel=0.05)


def test_the_spike_at_zero_is_of_weights_that_hardly_move():
    never, rarely, others = numbers("spike_at_zero")["near"]
    normal = 0.05 / (lesson.FLOOR * np.sqrt(2 * np.pi))
    assert never == 1
    assert rarely > 2.5 * normal
    assert others == pytest.approx(normal, rel=0.1)


def test_two_reasons_explain_an_snr_below_its_floor():
    for seen in (given := numbers("below_the_floor")["given"], right := numbers("below_the_floor")["right"]):
        assert seen["snr"] < 0.95 * lesson.FLOOR
        assert seen["turn"] < 0
        assert seen["expected"] == pytest.approx(seen["snr"], rel=0.06)
    assert given["longer"] == pytest.approx(1, abs=0.05)
    assert right["longer"] > 1.2


def test_steps_are_alike_where_gradients_are_not():
    seen = numbers("effective_step")
    assert seen["gradients"] > 100
    assert seen["steps"] < 4


def test_steps_become_a_random_walk_and_do_not_cease():
    seen = numbers("random_walk")
    assert seen["early"] > 3
    assert seen["late"] == pytest.approx(1, abs=0.15)
    assert seen["step"] == pytest.approx(lesson.FLOOR, rel=0.1)


def test_the_best_memory_grows():
    early, middle, late = numbers("beta_is_a_time")["best"].values()
    assert early < middle <= late


@pytest.mark.slow
def test_where_weights_move_a_memory_of_ten_is_better_than_one_of_a_hundred():
    seen = numbers("why_these_betas")
    assert seen["loss"][100] > seen["loss"][10] + 0.05
    assert abs(seen["loss"][1] - seen["loss"][10]) < 0.02
    assert seen["shake"][0] > 3 * seen["shake"][1]
    assert seen["noise"][1] > seen["noise"][10] > seen["noise"][1000]
    assert abs(seen["b2"][0.9] - seen["b2"][0.999]) < 0.02


def test_adam_does_not_notice_the_unit_of_the_loss():
    seen = numbers("units")
    np.testing.assert_allclose(seen["adam"], seen["adam"][1], rtol=1e-3)
    assert min(seen["descent"][0], seen["descent"][2]) > 1.5 * seen["descent"][1]


def test_each_optimizer_has_a_best_rate():
    for seen in numbers("sweep").values():
        assert seen["good"][0] <= seen["best"] <= seen["good"][1]
        assert min(seen["ends"][0], seen["ends"][-1]) > 1.2 * seen["loss"]


def test_adam_shakes_less_at_equal_loss():
    seen = numbers("adam_shakes_less")
    plain, division, average, both = seen.values()
    assert both["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert plain[1] > 6 * both[1]
    assert plain[1] > division[1] > average[1] > both[1]
    assert plain[20] < 3 * both[20]  # the average does not undo what it spreads


def test_gradients_near_eps_stop_the_learning():
    seen = numbers("what_eps_does")
    losses = list(seen["ends"].values())
    assert losses == sorted(losses)
    assert losses[1] < 1.02 * losses[0]
    assert losses[-1] > 1.8 * losses[0]
    assert seen["idle"] >= 96  # three pixels are never lit


@pytest.mark.slow
def test_later_updates_add_little():
    first, second, third, cooled = numbers("hundred_thousand")["gains"]
    assert first > 2 * second > 8 * third > 0
    assert cooled > third


@pytest.mark.slow
def test_no_sentence_of_the_note_is_without_figure_and_number():
    rows = lesson.note()
    assert len(rows) == 15
    for sentence, figure, shown in rows:
        assert sentence
        assert 1 <= figure <= len(figures)
        assert re.search(r"\d", shown)


def test_what_is_said_holds_the_numbers_and_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lesson.main(["snr_and_floor"])
    seen, said = numbers("snr_and_floor"), " ".join(capsys.readouterr().out.split())
    assert f"Figure 7. The SNR of a typical weight falls from {seen['early']:.2f} to {seen['late']:.2f}" in said
    (path,) = (tmp_path / "build" / "adam_by_hand").iterdir()
    assert path.name in said
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">I", header[16:20])[0] >= 1000  # pixels wide


def test_an_unknown_figure_is_refused(capsys):
    with pytest.raises(SystemExit):
        lesson.main(["snr"])
    assert "no figure snr; there are descent_shakes," in capsys.readouterr().err


def test_the_lesson_shows_every_figure_once_and_in_order():
    assert re.findall(r"^show\(lesson\.(\w+)\)", LESSON.read_text(), re.MULTILINE) == list(figures)
    headings = re.findall(r"^## (\d+)\. ", LESSON.read_text(), re.MULTILINE)
    assert headings == [str(number) for number in range(1, len(figures) + 1)]
