"""Alarms: each rule speaks where its interval or its count says so, and is silent where nothing is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import quick_jit
from fake_reports import fake_reports
from sklearn.datasets import load_digits

import snr_adam
from snr_adam import History
from snr_adam.telemetry import alarms
from snr_adam.telemetry._layers import is_rounding, network_order

REPORTS = 20


def total(**numbers) -> History:
    """Reports of the whole model that have these numbers, one for all times or one for each."""
    rows = {key: np.broadcast_to(np.asarray(x, float), REPORTS) for key, x in numbers.items()}
    each = [{key: x[t] for key, x in rows.items()} for t in range(REPORTS)]
    return History(SimpleNamespace(step=10 * t, names=(), columns={}, total=each[t]) for t in range(REPORTS))


def layers(**numbers) -> History:
    """Reports of three layers, b2, b10 and c, that have these numbers; (3,) or (T, 3)."""
    rows = {key: np.broadcast_to(np.asarray(x, float), (REPORTS, 3)) for key, x in numbers.items()}
    each = [{key: x[t] for key, x in rows.items()} for t in range(REPORTS)]
    names = ("b10", "b2", "c")
    return History(SimpleNamespace(step=10 * t, names=names, columns=each[t], total={}) for t in range(REPORTS))


def since(number, before, last: int):
    """A quantity that has had this number in the last reports only."""
    return np.array([before] * (REPORTS - last) + [number] * last)


FLOOR = 0.229
WALK = {"pseudo_snr": 0.23, "floor": FLOOR, "persistence_high": 0.05}
SNR = {"snr": 0.05, "snr_error": 0.01, "snr_low": 0.02, "snr_high": 0.07}
FINE = [1.0, 1.0, 1.0]
SIZE = [4.0, 4.0, 4.0]
SPEAKS = {
    "no signal": total(snr_low=-0.1, snr_high=0.01),
    "batch too small": total(**SNR),
    "batch too large": total(snr=50.0, snr_error=5.0, snr_low=40.0, snr_high=60.0),
    "turning round": total(persistence_high=-0.2, floor=FLOOR),
    "random walk": total(**WALK),
    "skipped steps": total(skipped_share=since(0.02, 0.0, 1)),
    "spike": total(spike_step=170.0, spike_peak=9.0),
    "not finite": layers(signal=since(np.nan, 1.0, 1)[:, None] * [1, 1, 1]),
    "no gradient": layers(gradient_norm=[1.0, 0.0, 0.0]),
    "rounding": layers(gradient_norm=[1.0, 1.0, 1e-8], size=SIZE),
    "updates lost": layers(lost_updates=[0.1, 0.6, 0.4]),
}
SILENT = {
    "signal was found once": total(snr_low=since(-0.1, 0.1, 4), snr_high=0.01),
    "no upper end": total(snr_low=-0.1, snr_high=np.inf),
    "a noise scale that may be 8 batches": total(**{**SNR, "snr_high": 0.13}),
    "a noise scale that may be 1/20 batch": total(snr=50.0, snr_error=5.0, snr_low=19.0, snr_high=60.0),
    "in balance": total(persistence_high=-0.05, floor=FLOOR),
    "turned round before": total(persistence_high=since(0.3, -0.2, 1), floor=FLOOR),
    "above the floor": total(**{**WALK, "pseudo_snr": 0.26}),
    "persistent, while v remembers larger gradients": total(**{**WALK, "pseudo_snr": 0.01, "persistence_high": 1.3}),
    "persistence unknown": total(**{**WALK, "persistence_high": np.nan}),
    "a step in 200": total(skipped_share=0.005),
    "a spike long ago": total(spike_step=140.0, spike_peak=9.0),
    "no spike": total(spike_step=np.nan, spike_peak=np.nan),
    "never known": layers(signal=[np.nan, 1.0, 1.0]),
    "no gradient in one report": layers(gradient_norm=since(0.0, 1.0, 4)[:, None] * [1, 1, 1]),
    "small, and signal was found": layers(gradient_norm=[1.0, 1.0, 5e-7], size=SIZE, snr_low=[1.0, 1.0, 0.1]),
    "small, and large": layers(gradient_norm=[1e-3, 1e-3, 1.0], size=[1.0, 1.0, 1e6]),
    "no numbers": total(**dict.fromkeys([*WALK, *SNR, "skipped_share", "persistence_low"], np.nan)),
    "no quantities": layers(),
}


@pytest.mark.parametrize("rule", SPEAKS)
def test_a_rule_speaks(rule):
    (alarm,) = alarms(SPEAKS[rule])
    assert alarm.rule == rule
    assert str(alarm) == alarm.says
    assert alarm.says.endswith((".", "?"))
    if rule not in ("not finite", "no gradient"):
        assert alarm.number != alarm.limit


@pytest.mark.parametrize("why", SILENT)
def test_a_rule_is_silent(why):
    assert alarms(SILENT[why]) == []


def test_a_sentence_has_its_number_and_its_steps():
    said = {rule: str(*alarms(history)) for rule, history in SPEAKS.items()}
    assert said["no signal"].startswith(
        "No signal was found in the last 20 reports (steps 0 to 190): the SNR is below 0.01, so at least 99% of a"
    )
    assert "14 to 50 times the batch (95 % interval)" in said["batch too small"]
    assert "0.017 to 0.025 of the batch (95 % interval)" in said["batch too large"]
    assert "persistence is at most -0.2 (upper end of its 95 % interval)" in said["turning round"]
    assert "balance with the noise show -0.052" in said["turning round"]
    assert "at most 1.00 times its floor, and persistence below 0.05" in said["random walk"]
    assert said["skipped steps"].startswith("The guard has skipped 2.0% of the steps")
    assert said["not finite"].startswith("At step 190 the moments are not finite in 3 layers: b2, b10, c.")
    assert said["no gradient"].startswith(
        "In the last 5 reports (steps 150 to 190) no gradient reached 2 layers: b2, c."
    )


def test_what_has_begun_is_dated():
    (alarm,) = alarms(total(persistence_high=since(-0.2, 0.3, 7), floor=FLOOR))
    assert (alarm.since, alarm.number) == (130, -0.2)
    assert "the last 7 reports (steps 130 to 190)" in str(alarm)
    assert alarms(total(persistence_high=since(-0.2, 0.3, 7), floor=FLOOR), last=8) == []


def test_a_spike_says_where_it_began():
    """Of layers that spiked at the same step in the largest; not in one that spiked before."""
    columns = {"spike_step": [95.0, 90.0, 90.0, 10.0, np.nan], "spike_peak": [40.0, 8.0, 9.0, 99.0, np.nan]}
    whole = {"spike_step": 92.0, "spike_peak": 12.0}
    seen = {"names": tuple("abcde"), "columns": columns, "total": whole}
    (alarm,) = alarms(History(SimpleNamespace(step=step, **seen) for step in (80, 100)))
    assert (alarm.layers, alarm.since, alarm.number) == (("c",), 92, 12.0)
    assert str(alarm).endswith("by 12.0 standard deviations of its norm's logarithm. It began in c.")


def test_many_layers_are_counted():
    seen = {"gradient_norm": np.zeros(30)}
    names = tuple(f"{i}" for i in range(30))
    (alarm,) = alarms(History(SimpleNamespace(step=t, names=names, columns=seen, total={}) for t in range(5)))
    assert "30 layers: 0, 1, 2, 3 and 26 more." in str(alarm)
    assert alarm.layers == names


def test_few_reports_or_none_say_nothing():
    assert alarms(History()) == []
    seen = {"gradient_norm": [0.0], "size": [1.0]}
    assert alarms(History([SimpleNamespace(step=1, names=("a",), columns=seen, total=dict(WALK))])) == []


def test_what_is_no_history_is_refused():
    with pytest.raises(TypeError, match="alarms: got a list, give a History"):
        alarms(list(fake_reports(1, 1)))
    with pytest.raises(ValueError, match="last=0: a rule must hold in 1 report"):
        alarms(History(), last=0)


def test_a_healthy_run_has_no_alarm():
    """Digits, at every look of 300 steps; the bias of keys before a softmax beside it is found to be rounding."""
    data = load_digits()
    x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (64, 32)) * 0.18, "out": jnp.zeros((32, 10)), "shift": jnp.zeros(())}
    tx = snr_adam.observe(snr_adam.adam(2e-3))

    def loss(params, rows):
        scores = jax.nn.relu(x[rows] @ params["w"]) @ params["out"]
        scores = scores + params["shift"]  # the same for all scores: no gradient but that of rounding
        return optax.softmax_cross_entropy_with_integer_labels(scores, y[rows]).mean()

    @quick_jit
    def steps(params, state, rows):
        def step(carry, rows):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), rows)[0]

    history, state = History(), tx.init(params)
    for rows in np.random.default_rng(0).integers(0, len(y), (20, 15, 32)):
        params, state = steps(params, state, rows)
        history.append(snr_adam.report(state, batch_size=32))
        found = [alarm for alarm in alarms(history) if alarm.rule != "rounding"]
        assert found == []
    (alarm,) = alarms(history)
    assert (alarm.rule, alarm.layers) == ("rounding", ("shift",))


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["h_0", "h_1", "h_10", "h_11", "h_2"], [0, 1, 4, 2, 3]),
        (["layers/10/w", "layers/2/w", "norm"], [1, 0, 2]),
        (["zebra", "apple/10", "apple/9", "mango"], [0, 2, 1, 3]),
        (["b10/a", "head", "b9/a"], [2, 1, 0]),
        (["w[1]", "w[10]", "w[2]"], [0, 2, 1]),
        (["a/b", "a"], [1, 0]),
        (["", "", "x"], [0, 1, 2]),
        ([], []),
    ],
)
def test_the_order_of_the_network(names, order):
    assert network_order(names) == order


def test_rounding_is_told_at_each_time():
    columns = {"gradient_norm": np.array([[1.0, 1e-8], [1.0, 1.0], [np.nan, 1.0]]), "size": np.ones((3, 2))}
    np.testing.assert_array_equal(is_rounding(columns), [[False, True], [False, False], [False, False]])
    assert is_rounding({}).shape == (0,)
    assert is_rounding({"x": np.ones((3, 2))}).shape == (3, 2)
