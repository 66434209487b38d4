"""What `examples/adam_by_hand.py` tells a beginner is true of the numbers that it computed."""

import runpy
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "adam_by_hand.py"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_hand")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return SimpleNamespace(folder=folder, **runpy.run_path(str(SCRIPT)))


def test_the_hand_written_adam_is_that_of_the_package(told):
    assert 0 < told.difference < told.allowed
    assert told.t == told.UPDATES == 1600


def test_the_signal_goes_and_the_noise_stays(told):
    assert told.late < told.early / 3
    assert told.size(told.noises[-1]) > told.size(told.noises[0])


@pytest.mark.slow
def test_noise_falls_as_the_root_of_the_batch(told):
    np.testing.assert_allclose(
        told.measured * np.sqrt(told.sizes), told.size(np.asarray(told.spread(told.start))), rtol=0.1
    )


def test_an_average_is_nearer_to_the_signal(told):
    raw, averaged = told.error
    assert averaged < raw / 3


def test_without_correction_the_first_step_is_too_long(told):
    assert told.short == pytest.approx(0.1 / np.sqrt(0.001), rel=1e-3)
    np.testing.assert_allclose(told.snr[0, told.alive & (told.gs[0] != 0)] ** 2, 1, atol=2e-2)


def test_pure_noise_shows_the_floor_and_the_run_ends_there(told):
    seen, noise = told.typical(told.snr), told.typical(told.rest_snr)
    assert told.floor[-1] == pytest.approx(0.2294, abs=1e-4)
    assert seen[1:6].min() > 1.7 * told.floor[-1]
    np.testing.assert_allclose(noise[1:], told.floor[-1], rtol=0.35)
    np.testing.assert_allclose([seen[-10:].mean(), noise[-10:].mean()], told.floor[-1], rtol=0.1)


def test_steps_are_alike_where_gradients_are_not(told):
    gradients, steps = told.ratio
    assert gradients > 100
    assert steps < 4


def test_the_best_memory_grows(told):
    early, middle, late = told.best.values()
    assert early < middle <= late


def test_adam_does_not_notice_the_unit_of_the_loss(told):
    batches = told.batches[:300]
    one, many = (np.asarray(told.train(factor, batches)) for factor in (1.0, 32.0))
    np.testing.assert_allclose(one, many, rtol=1e-3)
    assert one[-1] < 0.6 * one[0]
    plain = np.asarray(told.descend(0.1 * 32, batches))
    assert plain[-1] > 0.9 * plain[0]


def test_every_section_has_its_picture(told):
    pictures = sorted((told.folder / "build" / "adam_by_hand").iterdir())
    assert [path.name[0] for path in pictures] == list("12345678")
    for path in pictures:
        header = path.read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        assert struct.unpack(">I", header[16:20])[0] >= 1000  # pixels wide
