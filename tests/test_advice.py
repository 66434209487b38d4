"""Advice: a batch next to the noise scale, and hyper-parameters that keep what they mean."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snr_adam.telemetry import advise
from snr_adam.telemetry.noise_scale import NoiseScale, from_scalars


def measured(value, error=1.0, limit=1e9):
    return NoiseScale(value, error, limit, "given")


@pytest.mark.parametrize(
    ("noise_scale", "batch_size", "advised"),
    [
        (measured(96.0), 32, 128),
        (measured(80.0), 32, 64),
        (measured(32.0), 32, 32),
        (measured(44.0), 32, 32),
        (measured(17.0), 32, 16),
        (measured(1e6), 32, 256),
        (measured(0.0), 32, 4),
        (measured(0.3), 2, 1),
        (measured(1.0), 7, 0.875),
        (measured(np.inf, np.inf, 100.0), 32, 64),
        (measured(np.inf, np.inf, 10.0), 32, 32),
        (measured(np.inf, np.inf, np.nan), 32, 32),
        (measured(np.inf, np.inf, np.inf), 32, 32),
        (measured(300.0), 96, 384),
    ],
)
def test_batch_next_to_the_noise_scale(noise_scale, batch_size, advised):
    assert advise(noise_scale, batch_size, 1e-3).advised.batch_size == max(1, math.floor(advised))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.floats(0, 1e9), st.integers(1, 10**6), st.floats(0.01, 0.9999), st.floats(0.01, 0.9999))
def test_half_lives_in_examples_and_noise_per_step_are_kept(value, batch_size, b1, b2):
    advice = advise(measured(value), batch_size, 1e-3, b1, b2)
    now, then = advice.now, advice.advised
    for a, b in ((now.b1, then.b1), (now.b2, then.b2)):
        assert then.half_life(b) == pytest.approx(now.half_life(a), rel=1e-6)
    assert then.learning_rate / math.sqrt(then.batch_size) == pytest.approx(1e-3 / math.sqrt(batch_size), rel=1e-9)
    back = then.at(batch_size)
    np.testing.assert_allclose(back, now, rtol=1e-6)


@given(st.floats(1, 1e6), st.integers(1, 10**4), st.integers(1, 10**4))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_never_larger_than_possible_and_a_good_bargain(value, batch_size, largest):
    advice = advise(measured(value), batch_size, 1e-3, largest=largest)
    assert advice.advised.batch_size <= largest
    if advice.advised.batch_size > batch_size:
        assert advice.steps < 1 < advice.examples
        assert advice.steps * advice.examples < 1.2  # to pass the noise scale by sqrt(2) at most never costs more
    if advice.advised.batch_size < batch_size:
        assert advice.examples < 1 < advice.steps
    assert 0 < advice.signal <= 1


def test_steps_and_examples_are_mccandlishs():
    """(S / S_min - 1) (E / E_min - 1) = 1, before and after."""
    advice = advise(measured(96.0), 32, 1e-3)
    steps, examples = 1 + 96 / 32, 1 + 32 / 96  # now, in units of the least
    assert (steps - 1) * (examples - 1) == pytest.approx(1)
    assert (steps * advice.steps - 1) * (examples * advice.examples - 1) == pytest.approx(1)


def test_without_momentum_decays_stay_zero():
    assert advise(measured(96.0), 32, 0.1, 0.0, 0.0).advised[2:] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("noise_scale", "said"),
    [
        (measured(96.0, 13.0), ["96 +- 13", "25% signal", "0.002", "0.44 times the steps", "211 and 22,170 examples"]),
        (measured(32.0), ["50% signal", "advised  the same"]),
        (measured(np.inf, np.inf, 400.0), [">= 400", "at most 7% signal", "256 examples", "measure again"]),
    ],
)
def test_advice_explains_itself(noise_scale, said):
    text = str(advise(noise_scale, 32, 1e-3))
    for part in said:
        assert part in text
    assert max(map(len, text.splitlines())) < 100


@pytest.mark.parametrize(
    "noise_scale",
    [from_scalars(np.nan, 1.0, 1.0), from_scalars([4.0, 4.0], [1.0, 2.0], [0.1, 0.1])],
    ids=["nan", "several"],
)
def test_no_advice_without_one_number(noise_scale):
    with pytest.raises(ValueError, match="needs one number"):
        advise(noise_scale, 32, 1e-3)
