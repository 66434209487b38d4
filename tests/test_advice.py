"""Advice: a batch next to the noise scale, and hyper-parameters that keep what they mean."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snr_adam import History
from snr_adam.telemetry import advise
from snr_adam.telemetry.advice import over_run
from snr_adam.telemetry.noise_scale import NoiseScale, from_scalars


def measured(value, error=1.0, low=None):
    """A noise scale with an interval from .8 to 1.25 of it, if no lower end is given."""
    return NoiseScale(value, error, 0.8 * value if low is None else low, 1.25 * value, "given")


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


@given(st.floats(1e-3, 1e6), st.floats(0, 1), st.floats(1, 1e3), st.integers(1, 10**4))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_steps_and_examples_are_between_those_of_the_ends(value, below, above, batch_size):
    """Of the noise scale's interval, and of learning rates from far below the best up to it."""
    noise_scale = NoiseScale(value, 1.0, value * below, value * above, "given")
    advice = advise(noise_scale, batch_size, 1e-3)
    now, then = batch_size, advice.advised.batch_size
    best = [(1 + scale / then) / (1 + scale / now) for scale in (value * below, value * above)]
    timid = [
        math.sqrt((1 / then + scale / then**2) / (1 / now + scale / now**2)) for scale in (value * below, value * above)
    ]
    ends = [min(best + timid), max(best + timid)]
    assert advice.steps_interval == pytest.approx(ends, rel=1e-9)
    assert advice.examples_interval == pytest.approx([x * then / now for x in ends], rel=1e-9)
    for x, (low, high) in ((advice.steps, advice.steps_interval), (advice.examples, advice.examples_interval)):
        assert low * (1 - 1e-9) <= x <= high * (1 + 1e-9)


def test_without_an_upper_end_as_many_steps_as_the_batch_is_larger_may_be_saved():
    advice = advise(measured(np.inf, np.inf, 400.0), 32, 1e-3)
    assert advice.steps_interval == pytest.approx((1 / 8, (1 + 400 / 256) / (1 + 400 / 32)))
    assert advice.examples_interval == pytest.approx((1, 8 * (1 + 400 / 256) / (1 + 400 / 32)))


NOT_TOO_LARGE = "The learning rate is not too large while the loss falls"
IN_BALANCE = (
    "A larger learning rate is unlikely to help; a lower one, or a\ndecay, helps if the loss has stopped falling"
)


@pytest.mark.parametrize("batch_size", [32, 96])
@pytest.mark.parametrize(
    ("persistence", "said"),
    [
        ((0.11, 0.5), NOT_TOO_LARGE),
        ((0.2, np.inf), NOT_TOO_LARGE),
        ((-0.3, 0.09), IN_BALANCE),
        ((-0.9, -0.2), IN_BALANCE),
        ((0.09, 0.11), None),
        ((0.1, 0.5), None),
        ((-0.5, 0.1), None),
        ((np.nan, np.nan), None),
        (None, None),
    ],
)
def test_of_the_learning_rate_only_what_experiments_bear_out_is_said(persistence, said, batch_size):
    """Above .1 not too large while the loss falls, below .1 that a larger one is unlikely to help, else nothing."""
    advice = advise(measured(96.0), batch_size, 1e-3, persistence=persistence)
    text = str(advice)
    assert advice.advised.batch_size == (128 if batch_size == 32 else 96)
    for sentence in (NOT_TOO_LARGE, IN_BALANCE):
        assert (sentence in text) == (sentence in advice.learning_rate) == (sentence == said)
    assert (advice.learning_rate == "") == (said is None)
    assert max(map(len, text.splitlines())) < 125


def run_of(*rows) -> History:
    """A history of reports: step, SNR, and the ends of its interval."""
    keys = ("snr", "snr_low", "snr_high")
    return History(
        SimpleNamespace(step=step, names=(), columns={}, total=dict(zip(keys, row, strict=True))) for step, *row in rows
    )


def of_shares(batch_size, share, low, high) -> list:
    """A noise scale and its ends, of shares of signal."""
    value, *ends = (batch_size * (1 - x) / x for x in (share, high, low))
    return [value, batch_size * (high - share) / 1.96 / share**2, *ends]


def test_the_noise_scale_of_a_run_is_that_of_its_mean_share_of_signal():
    """Each report counts for the steps since the one before it."""
    history = run_of((10, 1 / 9, 0.0, 0.25), (20, 0.25, 1 / 9, 1.0), (50, 1.0, 0.25, 4.0))
    share, low, high = (0.1 + 0.2 + 3 * 0.5) / 5, (0.1 + 3 * 0.2) / 5, (0.2 + 0.5 + 3 * 0.8) / 5
    found = over_run(history, 32)
    assert found[:4] == pytest.approx(of_shares(32, share, low, high))
    late = over_run(history, 32, since=10)
    assert late.value == pytest.approx(32 * (1 - 0.425) / 0.425)
    for since in (20, 30, 49):
        assert over_run(history, 32, since=since).value == pytest.approx(32)
    assert advise(found, 32, 1e-3).advised.batch_size == 64


def test_steps_of_a_run_are_those_of_its_moments():
    """What the noise scale of a run predicts is the mean of what those of its moments do, each for as many steps."""
    rng = np.random.default_rng(0)
    snr = np.exp(rng.normal(size=20))
    whole = advise(over_run(run_of(*((10 * i, x, x, x) for i, x in enumerate(snr, 1))), 32), 32, 1e-3, largest=10**6)
    moments = [advise(measured(32 / x), 32, 1e-3)._replace(advised=whole.now.at(512)).steps for x in snr]
    assert whole._replace(advised=whole.now.at(512)).steps == pytest.approx(np.mean(moments))


def test_where_no_signal_was_found_it_counts_from_none():
    """And reports that know nothing do not count."""
    unknown = (2, np.nan, np.nan, np.nan)
    mixed = run_of(unknown, (12, -0.1, -0.3, 1 / 9), (22, 1.0, 0.25, 4.0))
    assert over_run(mixed, 10)[:4] == pytest.approx(of_shares(10, 0.25, 0.1, 0.45))
    none = over_run(run_of(unknown, (12, 0.1, -0.3, 0.25)), 10)
    assert (none.value, none.error, none.high) == (np.inf,) * 3
    assert none.low == pytest.approx(40)
    assert str(none) == ">= 40"


def test_all_signal_counts_as_all():
    """An SNR, or an upper end, that is infinite: so the large ones of the start of a run are not left out."""
    found = over_run(run_of((10, 1.0, 0.25, np.inf), (20, np.inf, 1.0, np.inf)), 32)
    assert found[:4] == pytest.approx(of_shares(32, 0.75, 0.35, 1.0))
    assert over_run(run_of((10, *3 * (np.inf,))), 32)[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "history",
    [History(), run_of((2, *(np.nan,) * 3)), run_of((2, 0.1, 0.1, 0.1))],
    ids=["no report", "no SNR", "all before"],
)
def test_a_run_without_an_snr_says_when_there_is_one(history):
    with pytest.raises(ValueError, match="no report of this history has an SNR: the first comes six steps after"):
        over_run(history, 32, since=2)


def test_without_momentum_decays_stay_zero():
    assert advise(measured(96.0), 32, 0.1, 0.0, 0.0).advised[2:] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("noise_scale", "said"),
    [
        (
            measured(96.0, 13.0),
            [
                *("96 (77 to 120)", "25% signal", "0.002", "0.44 times the steps (0.32 to 0.47)"),
                *("1.8 times the examples (1.3 to 1.9)", "211 and 22,170 examples"),
            ],
        ),
        (measured(32.0), ["50% signal", "advised  the same"]),
        (measured(np.inf, np.inf, 400.0), [">= 400", "at most 7% signal", "256 examples", "measure again"]),
        (measured(np.inf, np.inf, 400.0), ["0.19 times the steps (0.12 to 0.19)"]),
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
