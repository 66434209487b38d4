"""What `report` and `metrics` read: through every wrapper and host, under the parameters' own names."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from types import SimpleNamespace

import equinox as eqx
import flax.core
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import quick_jit
from fake_reports import measured
from flax import nnx
from flax.training.train_state import TrainState

import snr_adam
import snr_adam.telemetry.trackers as loggers
from snr_adam.telemetry.trackers import BINS, metric_name

PARAMS = {"enc": {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}, "dec": jnp.ones((3, 5))}
NAMES = ("dec", "enc/b", "enc/w")


def _after(tx, params=PARAMS, steps=6):
    state, update = tx.init(params), quick_jit(tx.update)
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.sin(p + t + jnp.arange(p.size).reshape(p.shape)), params)
        _, state = update(grads, state, params)
    return state


@functools.cache
def _watched():
    """A state that many tests read."""
    return _after(snr_adam.observe(optax.adam(0.1)))


WRAPPED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), snr_adam.observe(optax.adamw(0.1))),
    "around a chain": lambda: snr_adam.observe(optax.chain(optax.clip_by_global_norm(1.0), snr_adam.adamw(0.1))),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", snr_adam.observe(optax.adam(0.1)))),
    "MultiSteps": lambda: optax.MultiSteps(snr_adam.observe(optax.adam(0.1)), 2),
    "inject_hyperparams": lambda: snr_adam.observe(optax.inject_hyperparams(snr_adam.adamw)(0.1)),
    "apply_if_finite": lambda: optax.apply_if_finite(snr_adam.observe(snr_adam.adamw(0.1)), 3),
    "around partition": lambda: snr_adam.observe(
        optax.partition({"x": optax.adam(0.1), "y": optax.lion(0.1)}, {"enc": {"w": "x", "b": "y"}, "dec": "x"})
    ),
    "packed": lambda: snr_adam.observe(snr_adam.adamw(0.1, storage="packed")),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_is_found_wherever_it_is(name):
    got = snr_adam.report(_after(WRAPPED[name]()))
    assert got.names == NAMES
    assert np.all(got.columns["gradient_norm"] > 0)
    assert list(got.columns["size"]) == [15, 3, 12]


LABELS = {"enc": {"w": "x", "b": "y"}, "dec": "x"}
PARTS = {
    "Optax's": lambda: {"x": optax.adam(0.1), "y": optax.lion(0.1)},
    "ours": lambda: {"x": snr_adam.adamw(0.1, storage="packed"), "y": snr_adam.ademamix(0.1)},
    "a chain": lambda: {"x": optax.chain(optax.trace(0.9), optax.scale(-0.1)), "y": optax.adam(0.1)},
    "one without parameters": lambda: {"x": optax.adam(0.1), "y": optax.lion(0.1), "z": optax.adam(0.1)},
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_observed_one_by_one_are_reported_together(name):
    """Each layer's numbers are those of one `observe` around all; the total adds up what the rows hold."""
    parts = PARTS[name]()
    got = snr_adam.report(_after(optax.partition({key: snr_adam.observe(tx) for key, tx in parts.items()}, LABELS)))
    around = snr_adam.report(_after(snr_adam.observe(optax.partition(parts, LABELS))))
    assert got.names == ("dec", "enc/w", "enc/b")
    order = [around.names.index(name) for name in got.names]
    for key, column in got.columns.items():
        np.testing.assert_allclose(column, around.columns[key][order], rtol=1e-4, err_msg=key)
    for key in ("signal", "noise", "pseudo_snr", "snr", "gradient_norm", "persistent", "update_rms"):
        np.testing.assert_allclose(got.total[key], around.total[key], rtol=1e-3, err_msg=key)


def test_a_part_that_is_not_observed_has_no_row():
    got = snr_adam.report(
        _after(optax.partition({"x": snr_adam.observe(optax.adam(0.1)), "y": optax.sgd(0.1)}, LABELS))
    )
    assert got.names == ("dec", "enc/w")


def test_masked_leaves_have_no_row():
    on = {"enc": {"w": True, "b": False}, "dec": True}
    assert snr_adam.report(_after(optax.masked(snr_adam.observe(optax.adam(0.1)), on))).names == ("dec", "enc/w")
    assert snr_adam.report(_after(snr_adam.observe(optax.masked(optax.adam(0.1), on)))).names == ("dec", "enc/w")


def test_a_state_without_telemetry_says_what_to_do():
    with pytest.raises(ValueError, match=re.escape("snr_adam.observe(tx)")):
        snr_adam.report(optax.adam(0.1).init(PARAMS))


def test_stacked_layers_are_reported_one_by_one():
    params = {"layers": {"kernel": jnp.ones((4, 3, 2))}, "head": jnp.ones(5)}
    stacked = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1), layer_axis={"layers": 0}), params))
    assert stacked.names == ("head", *(f"layers/kernel[{i}]" for i in range(4)))
    whole = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1)), params))
    joined = stacked.group({"head": "head", "layers": "layers"})
    for key in ("signal", "noise", "persistent", "gradient_norm", "update_rms", "significant"):
        np.testing.assert_allclose(joined.columns[key], whole.columns[key], rtol=1e-4)
    np.testing.assert_allclose(joined.columns["snr"], whole.columns["snr"], rtol=1e-2)  # its corrections are per layer


CORRECTED = {"snr", "gradient_signal", "gradient_noise", "noise_scale", "persistence"}
"""What is corrected in each row for gradients that turn round: a group adds up corrected numbers."""


def test_groups_are_ratios_of_sums():
    got = snr_adam.report(_watched())
    everything = got.group(["."])
    for key in got.columns:  # one run has its own errors
        if not re.search("_(error|low|high)$", key):
            near = 1e-2 if key in CORRECTED else 1e-4
            np.testing.assert_allclose(everything.columns[key][0], got.total[key], rtol=near, err_msg=key)
    assert got.group({"encoder": "^enc", "none": "xyz"}).names == ("encoder",)


LAYERS = {
    "size": [10, 30, 60],
    "counted": [8, 30, 2],
    "signal": [3.0, 1.0, 2.0],
    "noise": [1.0, 4.0, 2.0],
    "floor": [0.2, 0.5, 0.9],
    "significant": [0.9, 0.3, 0.05],
    "update_rms": [0.3, 0.1, 0.2],
    "param_rms": [1.0, 3.0, 2.0],
    "gradient_norm": [2.0, 5.0, 3.0],
    "persistent": [1.0, 3.0, 2.0],
    "persistent_half": [0.2, 0.5, 0.3],
    "share_sum": [1.0, 2.0, 4.0],
    "power_sum": [4.0, 20.0, 10.0],
    "half": [0.3, 3.0, 0.8],
    "slack": [0.05, 0.2, 0.0],
    "above": [0.0, 0.5, 0.1],
    "least_sum": [0.2, -1.0, 4.5],
    "learning_rate": [0.1, 0.2, 0.4],
    "step_gradient_norm": [2.5, 4.0, 1.0],
    "unclipped_norm": [5.0, 8.0, 2.0],
    "clipped": [0.5, 0.25, 0.75],
    "skipped": [0.01, 0.01, 0.01],
    "product": [0.5, -2.0, 0.1],
    "before": [1.0, 2.0, 0.5],
    "spike": [1.0, 7.0, -2.0],
    "spike_step": [3.0, 5.0, 4.0],
    "spike_peak": [9.0, 8.0, 12.0],
    "zero_gradients": [0.5, 0.0, 0.1],
    "relative_gradient": [1.5, 1.0, 0.5],
    "largest_gradient": [1.0, 3.0, 0.3],
    "largest_signal": [0.5, 0.2, 0.9],
    "largest_update": [0.01, 0.02, 0.04],
    "moved": [5, 30, 54],
    "lost_updates": [0.2, 0.1, 0.5],
}
"""The lags alone find no signal in b, where gradients persist; in c they know that it is at least 4.5."""
WEAK = LAYERS | {"persistent": [0.1, -3.0, 0.2], "half": [2.0, 3.0, 6.0], "least_sum": [-1.0, -5.0, -2.0]}
"""Nothing is found in any; in b gradients turn round."""


def interval(x, added):
    """The share of signal with the ends of its interval, from the sums of rows."""
    power, size = x["power_sum"], x["gradient_norm"] ** 2
    share = max(x["share_sum"], x["least_sum"]) / power
    half = (x["half"] + x["slack"]) / power
    low, high = max(share - half, x["least_sum"] / power), share + half + x["above"] / power
    if low / (1 - low) + added <= 0:
        low = max(low, 0.75 * (x["persistent"] - 1.4 * x["persistent_half"]) / size)
        high = max(share, x["persistent"] / size, 0) + 1.5 * half + x["above"] / power
        if low / (1 - low) + added > 0:
            share = max(share, low)
        else:
            low = min(share, low)
    return share, half, low, high


def by_hand(rows, batch_size=None, examples=None, layers=LAYERS) -> dict[str, float]:
    """What those layers are together: the numbers of a report from its definitions."""
    x = {key: np.array(values, float)[rows] for key, values in layers.items()}
    size_of = x["size"]
    size, power, persistent = np.sum(x["size"]), np.sum(x["gradient_norm"] ** 2), np.sum(x["persistent"])
    batch, added = batch_size or 1, batch_size / examples if examples else 0.0
    squares = {key: np.sqrt(np.sum(x[key] ** 2)) for key in ("gradient_norm", "persistent_half", "half")}
    share, half, low, high = interval({key: np.sum(values) for key, values in x.items()} | squares, added)
    snr, snr_low, snr_high = (y / (1 - y) + added if y < 1 else np.inf for y in (share, low, high))
    found = snr_low > 0
    rms = {key: np.sqrt(np.sum(x[key] ** 2 * x["size"]) / size) for key in ("update_rms", "param_rms")}
    signal, noise = np.sqrt(np.sum(x["signal"] ** 2)), np.sqrt(np.sum(x["noise"] ** 2))
    lasting, lasting_half = persistent / power, squares["persistent_half"] / power
    a, c = share**2 - half**2, lasting**2 - lasting_half**2
    root = np.sqrt(lasting**2 * share**2 - a * c) if a > 0 and share > 0 else np.nan
    return rms | {
        "size": size,
        "signal": signal,
        "noise": noise,
        "pseudo_snr": signal / noise,
        "floor": np.sqrt(np.sum(x["floor"] ** 2 * x["noise"] ** 2)) / noise,
        "snr": snr,
        "snr_error": (snr_high - snr) / 1.96,
        "snr_low": snr_low,
        "snr_high": snr_high,
        "persistence": lasting / share + 0 * root,
        "persistence_low": (lasting * share - root) / a,
        "persistence_high": (lasting * share + root) / a,
        "significant": np.sum(x["significant"] * x["counted"]) / np.sum(x["counted"]),
        "effective_step": rms["update_rms"] / rms["param_rms"],
        "gradient_norm": np.sqrt(power),
        "gradient_signal": np.sqrt(max(share * power, 0)),
        "gradient_noise": np.sqrt((1 - share) * power),
        "persistent": persistent,
        "learning_rate": np.sum(x["learning_rate"] * size_of) / size,
        "effective_rate": np.sum(x["learning_rate"] * size_of) / size * signal / noise,
        **{key: np.sqrt(np.sum(x[key] ** 2)) for key in ("step_gradient_norm", "unclipped_norm")},
        "cosine": np.sum(x["product"]) / np.sqrt(np.sum(x["before"] ** 2) * np.sum(x["step_gradient_norm"] ** 2)),
        **{key: np.max(x[key]) for key in ("clipped", "spike", "spike_step", "spike_peak")},
        "skipped_share": np.max(x["skipped"]),
        "zero_gradients": np.sum(x["zero_gradients"] * size_of) / size,
        "relative_gradient": np.sqrt(np.sum(x["relative_gradient"] ** 2 * size_of) / size),
        **{f"largest_{key}": np.max(x[f"largest_{key}"]) for key in ("gradient", "signal", "update")},
        "lost_updates": np.sum(x["lost_updates"] * x["moved"]) / np.sum(x["moved"]),
        "noise_scale": batch / snr if found else np.inf,
        "noise_scale_error": batch / snr * (snr_high - snr) / 1.96 / snr if found else np.inf,
        "noise_scale_low": batch / snr_high,
        "noise_scale_high": batch / snr_low if found else np.inf,
    }


def approximately(numbers):
    return {key: pytest.approx(x, rel=1e-12, nan_ok=True) for key, x in numbers.items()}


GROUPS = {"each layer": ["a", "b", "c"], "two and one": ["a|b", "c"], "all": ["."]}


@pytest.mark.parametrize("layers", [LAYERS, WEAK], ids=["found", "not found"])
@pytest.mark.parametrize(("batch_size", "examples"), [(None, None), (32, None), (32, 200)])
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_weighs_its_layers(name, batch_size, examples, layers):
    """A floor by noise, shares of signal by power, means by elements; errors add up in squares."""
    made = measured(batch_size, examples, **layers)
    grouped = made.group(GROUPS[name])
    assert list(grouped.names) == GROUPS[name]
    assert (grouped.batch_size, grouped.examples) == (batch_size, examples)
    for pattern, row in zip(GROUPS[name], grouped.rows, strict=True):
        expected = by_hand([bool(re.search(pattern, layer)) for layer in made.names], batch_size, examples, layers)
        assert row == {"name": pattern} | approximately(expected)
    assert grouped.total == made.total == approximately(by_hand([True] * 3, batch_size, examples, layers))


def random_layers(seed: int) -> dict[str, np.ndarray]:
    """Layers with more signal than power, with less than none, found by one, by the other, by neither."""
    rng = np.random.default_rng(seed)
    n = 40
    power = rng.lognormal(size=n)
    x = {"power_sum": power, "gradient_norm": np.sqrt(power * rng.uniform(0.8, 1.2, n))}
    x["share_sum"] = power * rng.choice([-0.4, 0.0, 0.1, 0.5, 0.9, 1.1], n)
    x["persistent"] = power * rng.choice([-0.1, 0.0, 0.05, 0.4], n)
    x |= {key: power * rng.choice([0.0, 0.02, 0.2, 0.9], n) for key in ("half", "persistent_half")}
    x |= {key: power * rng.choice([0.0, 0.1], n) for key in ("slack", "above")}
    return x | {"least_sum": power * rng.choice([-1.0, 0.0, 0.3], n)}


@pytest.mark.parametrize("examples", [None, 100])
def test_an_interval_holds_its_number_and_the_relative_errors_are_equal(examples):
    """Of SNR, noise scale and persistence; a signal is found by all numbers of a row or by none."""
    told = set()
    for seed in range(20):
        x = measured(20, examples, **random_layers(seed)).columns
        for key in ("snr", "noise_scale", "persistence"):
            value, low, high = (x[f"{key}{end}"] for end in ("", "_low", "_high"))
            known = ~np.isnan(value)
            near = 1e-9 * abs(value[known]) + 1e-12
            assert np.all(low[known] <= value[known] + near), key
            assert np.all(value[known] <= high[known] + near), key
        assert known.any()
        found = x["snr_low"] > 0
        told |= {*found.tolist()}
        np.testing.assert_array_equal(np.isfinite(x["noise_scale"]), found)
        np.testing.assert_array_equal(np.isfinite(x["noise_scale_high"]), found)
        assert not np.any(x["noise_scale_low"] < 0)
        assert not np.any(x["noise_scale"] < 0)
        some = found & np.isfinite(x["snr_error"])
        assert some.any()
        of_snr, of_scale = (x[f"{key}_error"][some] / x[key][some] for key in ("snr", "noise_scale"))
        np.testing.assert_allclose(of_snr, of_scale, rtol=1e-6)
        np.testing.assert_allclose(x["noise_scale"][some], 20 / x["snr"][some], rtol=1e-12)
    assert told == {True, False}


def test_norms_are_never_below_none():
    """The signal as estimated may be below 0, or more than the power: then one of the norms is 0."""
    made = measured(share_sum=[-1.0, 5.0, 1.0], power_sum=[4.0] * 3, gradient_norm=[2.0] * 3, least_sum=[-9.0] * 3)
    np.testing.assert_allclose(made.columns["gradient_signal"], [0, 5**0.5, 1])
    np.testing.assert_allclose(made.columns["gradient_noise"], [5**0.5, 0, 3**0.5])


def test_batches_without_replacement_add_their_share_of_an_epoch_to_the_snr():
    """And to both ends of its interval; nothing else of the signal changes but the noise scale."""
    plain, drawn = (measured(20, n, **LAYERS | {"half": [0.3, 0.5, 0.8]}).columns for n in (None, 80))
    for key in ("snr", "snr_low", "snr_high"):
        np.testing.assert_allclose(drawn[key], plain[key] + 0.25, rtol=1e-12)
    np.testing.assert_allclose(drawn["noise_scale_low"], 20 / (plain["snr_high"] + 0.25), rtol=1e-12)
    for key in ("snr_error", "persistence", "persistence_low", "persistent", "gradient_norm"):
        np.testing.assert_allclose(drawn[key], plain[key], rtol=1e-12)


REFUSED = {
    "batch_size=0:": {"batch_size": 0},
    "batch_size=-1:": {"batch_size": -1},
    "batch_size=nan:": {"batch_size": np.nan},
    "batch_size=inf:": {"batch_size": np.inf},
    "batch_size=array([8, 8]):": {"batch_size": np.array([8, 8])},
    "examples=1000 with batch_size=None": {"examples": 1000},
    "examples=31 with batch_size=32": {"batch_size": 32, "examples": 31},
    "examples=nan with batch_size=32": {"batch_size": 32, "examples": np.nan},
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("read", [snr_adam.report, snr_adam.metrics], ids=["report", "metrics"])
def test_batches_that_cannot_be_are_refused(read, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(_watched(), **REFUSED[message])
    read(_watched(), batch_size=32, examples=32)


def test_before_the_first_step_nothing_is_known():
    """No zeros where nothing was measured: no number at all but the sizes."""
    state = snr_adam.observe(optax.adam(0.1)).init(PARAMS)
    seen = snr_adam.report(state)
    assert seen.step == seen.looked == seen.window == 0
    assert {key for key, x in seen.columns.items() if not np.all(np.isnan(x))} == {"size"}
    assert snr_adam.metrics(state, layers=True) == {
        f"snr/layer/size/{name}": size for name, size in zip(NAMES, (15, 3, 12), strict=True)
    }
    assert "0 +- 0" not in str(seen)
    assert [line.split()[1:] for line in str(seen).split("\n")[2:5]] == [["-"] * 9] * 3


OF_LAGS = ("snr", "persistence", "gradient_signal", "gradient_noise", "noise_scale")


def test_no_estimate_before_the_first_burst_ends():
    """The pseudo-SNR is there from the first step on, what needs gradients of several steps from the sixth."""
    tx = snr_adam.observe(optax.adam(0.1))
    for steps in (1, 2, 5, 6):
        seen = snr_adam.report(_after(tx, steps=steps))
        assert np.all(seen.columns["pseudo_snr"] > 0)
        for key in (key for key in seen.columns if key.startswith(OF_LAGS)):
            known = [*~np.isnan(seen.columns[key]), not np.isnan(seen.total[key])]
            assert known == [steps >= 6] * 4 or (steps == 6 and "persistence" in key), (steps, key)
    assert (seen.step, seen.looked, seen.window) == (6, 6, 6)


def test_every_quantity_is_explained_in_a_sentence():
    seen = snr_adam.report(_watched())
    text = seen.explain()
    assert max(map(len, text.splitlines())) <= 100
    lines = re.sub(r"\n +", " ", text).split("\n")
    assert [line.split()[0] for line in lines] == list(seen.columns)
    for line in lines:
        said = line.split(maxsplit=1)[1]
        assert re.fullmatch(r"[A-Za-z/_].*[.]", said), line
        assert len(said.split()) >= 4
    assert len({line.split(maxsplit=1)[1] for line in lines}) == len(lines)


def test_a_layer_belongs_to_the_first_pattern_that_it_matches():
    made = measured(**LAYERS)
    got = made.group({"last": "c", "all": ".", "none": "a"})
    assert got.names == ("last", "all")
    assert list(got.columns["size"]) == [60, 40]


def test_what_one_layer_does_not_know_its_group_knows_only_if_the_others_say_it():
    """No signal of the whole without that of a part; a share, a floor and norms are those of the layers that know."""
    blind = {key: np.nan for key in ("persistent", "persistent_half", "share_sum", "half")}
    unseen = {"significant": np.nan, "counted": np.nan, "signal": np.nan}
    made = {
        key: measured(**{name: [*values[:2], lost.get(name, values[2])] for name, values in LAYERS.items()}).total
        for key, lost in (("blind", blind), ("unseen", unseen))
    }
    whole, two = by_hand([True] * 3), by_hand([True, True, False])
    unknown = {key for key in whole if key.startswith(OF_LAGS)} | {"persistent"}
    assert {key for key, x in made["blind"].items() if np.isnan(x)} == unknown
    for key in set(whole) - unknown:
        assert made["blind"][key] == pytest.approx(whole[key], rel=1e-12)
    assert {key for key, x in made["unseen"].items() if np.isnan(x)} == set()
    assert made["unseen"]["significant"] == pytest.approx(two["significant"], rel=1e-12)
    assert made["unseen"]["floor"] == pytest.approx(whole["floor"], rel=1e-12)


def test_a_dict_of_a_report_is_what_it_says():
    made = measured(32, 200, **LAYERS | {"param_rms": [1.0, np.nan, 0.0]})
    made = dataclasses.replace(made, looked=5, detailed=3, window=40)
    said = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert (said["step"], said["batch_size"], said["examples"], said["names"]) == (7, 32, 200, ["a", "b", "c"])
    assert (said["looked"], said["detailed"], said["window"]) == (5, 3, 40)
    assert said["columns"]["effective_step"] == [0.3, None, None]
    assert said["total"] == made.total
    assert {key: said["columns"][key] for key in ("signal", "floor")} == {
        key: LAYERS[key] for key in ("signal", "floor")
    }


@contextlib.contextmanager
def reported(numbers):
    """What reads a state is given this report in its place, in batches or examples as asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers, "report", lambda _, *batches: measured(*batches, **numbers))
        yield measured(**numbers)


ORDER = np.argsort(np.sin(np.arange(1, 22)))  # 21 layers: the third smallest is the 10th percentile, and so on
SKEWED = {
    "signal": 1.1**ORDER,
    "significant": 0.9 * 0.8**ORDER,
    "gradient_norm": np.full(21, 10.0),
    "persistent": 1.15**ORDER,
    "persistent_half": np.full(21, 0.1),
    "share_sum": 1.2**ORDER,
    "power_sum": np.full(21, 100.0),
    "half": np.full(21, 0.1),
}
TOTALS = (
    *("signal", "noise", "pseudo_snr", "floor", "snr", "snr_error", "snr_low", "snr_high", "persistence"),
    *("persistence_low", "persistence_high", "significant", "effective_step", "update_rms", "gradient_norm"),
    *("gradient_signal", "gradient_noise", "persistent", "learning_rate", "effective_rate", "step_gradient_norm"),
    *("unclipped_norm", "clipped", "skipped_share", "cosine", "spike", "spike_step", "spike_peak", "zero_gradients"),
    *("relative_gradient", "largest_gradient", "largest_signal", "largest_update", "lost_updates"),
    *("noise_scale", "noise_scale_error", "noise_scale_low", "noise_scale_high"),
)


def test_a_metric_is_what_its_name_says():
    """The totals of the report, and the layers below which 10, 50 and 90 % of the others are."""
    with reported(SKEWED) as seen:
        got = loggers.metrics(None)
    expected = {f"snr/{key}": seen.total[key] for key in TOTALS}
    for key in ("snr", "pseudo_snr", "significant"):
        low, middle, high = np.sort(seen.columns[key])[[2, 10, 18]]
        expected |= {f"snr/{key}_p10": low, f"snr/{key}_p50": middle, f"snr/{key}_p90": high}
    assert got == pytest.approx(expected, rel=1e-12)


def test_metrics_of_layers_are_their_numbers():
    with reported(LAYERS) as seen:
        few, all_of_it = loggers.metrics(None, "x/"), loggers.metrics(None, "x/", layers=True)
    rows = {
        f"x/layer/{key}/{name}": column[i] for key, column in seen.columns.items() for i, name in enumerate(seen.names)
    }
    assert {key for key, x in rows.items() if np.isnan(x)} == {
        f"x/layer/persistence{end}/b" for end in ("", "_low", "_high")
    }
    assert all_of_it == few | {key: x for key, x in rows.items() if not np.isnan(x)}


def test_metrics_count_in_examples_where_a_batch_size_is_given():
    """Noise scales are that many times those in batches, of all and of each layer; nothing else changes."""
    with reported(LAYERS):
        batches, examples = (loggers.metrics(None, layers=True, batch_size=b) for b in (None, 32))
    factor = {key: 32 if "noise_scale" in key else 1 for key in batches}
    assert sum(x == 32 for x in factor.values()) == 4 * 4
    assert examples == pytest.approx({key: factor[key] * x for key, x in batches.items()}, rel=1e-12)


def test_metrics_know_of_epochs():
    with reported(LAYERS):
        drawn, epochs = (loggers.metrics(None, batch_size=20, examples=n) for n in (None, 80))
    assert epochs["snr/snr"] == pytest.approx(drawn["snr/snr"] + 0.25, rel=1e-12)


def test_metrics_leave_out_what_is_no_number():
    """An unknown noise scale leaves its lower end; a layer without a number leaves percentiles to the others."""
    unseen = {"significant": [0.2, np.nan, 0.4], "share_sum": [-1.0, 9.0, -1.0], "power_sum": [9.0, 9.0, 9.0]}
    unseen |= {"half": [1.0, 0.1, 1.0], "persistent": [0.0] * 3, "least_sum": [-9.0] * 3}
    with reported(unseen | {"param_rms": [0.0] * 3, "slack": [9.0] * 3}) as seen:
        got = loggers.metrics(None)
    assert seen.columns["snr"][1] == np.inf
    gone = {"noise_scale", "noise_scale_error", "noise_scale_high", "snr_high", "snr_error", "effective_step"}
    gone |= {"persistence", "persistence_low", "persistence_high"}
    spread = {f"{key}_p{p}" for key in ("snr", "pseudo_snr", "significant") for p in (10, 50, 90)}
    assert set(got) == {f"snr/{key}" for key in (set(TOTALS) | spread) - gone}
    assert got["snr/significant_p50"] == pytest.approx(0.3)
    assert got["snr/snr_p90"] == pytest.approx(-0.1)


def test_a_histogram_is_of_the_quantity_that_it_names():
    """Each bin holds the layers whose number is in it, for every quantity on its own edges."""
    with reported(SKEWED | {"floor": 0.9**ORDER, "param_rms": 2 * 1.3**ORDER, "noise": 1.05**ORDER}) as seen:
        got = loggers.histograms(None)
    for key, edges in BINS.items():
        inside = [np.sum((seen.columns[key] >= a) & (seen.columns[key] < b)) for a, b in itertools.pairwise(edges)]
        assert sum(inside) == 21
        np.testing.assert_array_equal(got[f"snr/layers/{key}"][0], inside)


def test_the_table_and_its_forms():
    got = snr_adam.report(_watched(), batch_size=32)
    lines = str(got).split("\n")
    assert len({len(line) for line in lines[1:7]}) == 1  # aligned
    assert all(name in str(got) for name in (*NAMES, "total", "examples"))
    assert [row["name"] for row in got.rows] == list(NAMES)
    assert json.loads(json.dumps(got.to_dict()))["names"] == list(NAMES)
    batches = snr_adam.report(_watched())
    for key in ("noise_scale", "noise_scale_error", "noise_scale_low", "noise_scale_high"):
        np.testing.assert_allclose(got.columns[key], 32 * batches.columns[key])
        np.testing.assert_allclose(got.total[key], 32 * batches.total[key])
    assert np.isfinite(got.total["noise_scale_low"])


def test_metrics_are_plain_finite_floats_under_clean_names():
    state = _after(snr_adam.observe(optax.adam(0.1)), {"mlp/~/linear_0": {"w": jnp.ones((2, 3))}})
    few, many = snr_adam.metrics(state), snr_adam.metrics(state, "x/", layers=True)
    assert len(few) < 50
    assert all(type(x) is float and np.isfinite(x) for x in many.values())
    assert few["snr/snr"] == snr_adam.report(state).total["snr"]
    assert "x/layer/snr/mlp/linear_0/w" in many
    assert all(re.fullmatch(r"[\w\-./ ]+", key) and "//" not in key for key in many)
    assert metric_name("layers/kernel[3]") == "layers/kernel.3"


def test_no_key_is_a_folder_of_another():
    """Which MLflow's store of files refuses; histograms are logged beside them."""
    state = _after(snr_adam.observe(optax.adam(0.1)), {"signal": jnp.ones((2, 3)), "enc": {"kernel": jnp.ones(4)}})
    keys = [*snr_adam.metrics(state, layers=True), *snr_adam.telemetry.histograms(state)]
    assert "snr/layer/signal/enc/kernel" in keys
    folders = {key.rsplit("/", n)[0] for key in keys for n in range(1, key.count("/") + 1)}
    assert not folders & set(keys)


def test_histograms_count_every_layer_that_has_a_number():
    state = _after(snr_adam.observe(optax.adam(0.1)), {f"{i:02}": jnp.ones((2, i + 1)) for i in range(12)})
    seen, got = snr_adam.report(state), snr_adam.telemetry.histograms(state)
    assert set(got) == {f"snr/layers/{key}" for key in BINS}
    assert not set(got) & set(snr_adam.metrics(state, layers=True))
    for key, edges in BINS.items():
        counts, same = got[f"snr/layers/{key}"]
        np.testing.assert_array_equal(same, edges)
        assert counts.shape == (len(edges) - 1,)
        assert counts.sum() == np.sum(~np.isnan(seen.columns[key])) == 12
    noise, edges = seen.columns["noise"], np.median(seen.columns["noise"]) * np.array([0.5, 1.0, 1.5])
    counts, _ = snr_adam.telemetry.histograms(state, "", bins={"noise": edges})["layers/noise"]
    assert list(counts) == [np.sum(noise < edges[1]), np.sum(noise >= edges[1])]


def test_histograms_lose_nothing_but_nan(monkeypatch):
    """What is outside of the edges is in the bins at the ends, also infinities and what no logarithm shows."""
    values = np.array([-np.inf, -3.0, 0.0, 1e-30, 2.0, 99.0, 100.0, 1e30, np.inf, np.nan])
    monkeypatch.setattr(loggers, "report", lambda *_: SimpleNamespace(columns={"snr": values}))
    counts, edges = snr_adam.telemetry.histograms(None, bins={"snr": [1, 10, 50, 100]})["snr/layers/snr"]
    assert list(counts) == [5, 0, 4]
    assert edges.dtype == float


def test_noise_scales_have_histograms_in_examples():
    bins = {"noise_scale": np.array([0.5, 20.0, 1e9])}
    with reported(LAYERS):
        (few, _), (many, _) = (
            loggers.histograms(None, "", bins=bins, batch_size=b)["layers/noise_scale"] for b in (None, 32)
        )
    assert (list(few), list(many)) == ([3, 0], [0, 3])


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ({"nose": np.ones(2)}, "no quantity 'nose'; there are size, signal"),
        ({"snr": 30}, "'snr' has the edges 30; give two or more numbers"),
        ({"snr": [1.0]}, "give two or more"),
        ({"snr": [1.0, 3.0, 2.0]}, "each above the one before"),
        ({"snr": [1.0, np.nan]}, "each above the one before"),
    ],
)
def test_bins_that_cannot_be_are_refused(bins, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        snr_adam.telemetry.histograms(_watched(), bins=bins)


HOSTED = {
    "alone": lambda: snr_adam.observe(snr_adam.adamw(0.1)),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), snr_adam.observe(optax.adam(0.1))),
    "around a chain": lambda: snr_adam.observe(optax.chain(optax.clip(1.0), snr_adam.adamw(0.1))),
    "partition": lambda: optax.partition(
        {"kernel": snr_adam.observe(optax.adam(0.1)), "bias": snr_adam.observe(optax.lion(0.1))},
        lambda params: jax.tree.map(lambda x: "kernel" if x.ndim == 2 else "bias", params),
    ),
}
X = np.linspace(-1.0, 1.0, 16, dtype="float32").reshape(4, 4)


def _loss(y):
    return jnp.mean((y - np.sin(2 * X)) ** 2)


@pytest.mark.parametrize("name", HOSTED)
def test_nnx(name):
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, HOSTED[name](), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: _loss(m(X)))(model))

    for _ in range(4):
        step(model, optimizer)
    for state in (optimizer, optimizer.opt_state, nnx.as_pure(optimizer.opt_state)):
        got = snr_adam.report(state)
        sizes = dict(zip(got.names, got.columns["size"], strict=True))
        assert sizes == {"layers/0/bias": 3, "layers/0/kernel": 12, "layers/1/bias": 4, "layers/1/kernel": 12}
        assert got.step == 4
        assert np.all(got.columns["gradient_norm"] > 0)
        np.testing.assert_allclose(got.total["gradient_norm"], np.linalg.norm(got.columns["gradient_norm"]), rtol=1e-4)


class Mlp(nn.Module):
    """Linen keeps parameters in a dict, and boxes those that are to be partitioned."""

    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(3, kernel_init=nn.with_partitioning(init, (None, "x")) if self.boxed else init)(x)
        return nn.Dense(4)(nn.tanh(x))


@pytest.mark.parametrize(
    ("name", "boxed", "freeze"),
    [*((name, False, dict) for name in HOSTED), ("alone", True, dict), ("partition", False, flax.core.freeze)],
)
def test_linen(name, boxed, freeze):
    model = Mlp(boxed)
    params = freeze(model.init(jax.random.key(0), X)["params"])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=HOSTED[name]())

    @quick_jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(lambda p: _loss(state.apply_fn({"params": p}, X)))(state.params))

    for _ in range(4):
        state = step(state)
    for part in (state, state.opt_state):
        got = snr_adam.report(part)
        sizes = dict(zip(got.names, got.columns["size"], strict=True))
        assert sizes == {"Dense_0/bias": 3, "Dense_0/kernel": 12, "Dense_1/bias": 4, "Dense_1/kernel": 12}
        assert got.step == 4
        np.testing.assert_allclose(got.total["gradient_norm"], np.linalg.norm(got.columns["gradient_norm"]), rtol=1e-4)


def test_equinox_and_haiku():
    model = eqx.filter(eqx.nn.Linear(4, 3, key=jax.random.key(0)), eqx.is_inexact_array)
    assert snr_adam.report(_after(snr_adam.observe(optax.adam(0.1)), model)).names == ("weight", "bias")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([3])(x)))
    params = net.init(jax.random.key(0), jnp.ones((2, 4)))
    names = snr_adam.report(_after(snr_adam.observe(optax.adam(0.1)), params)).names
    assert names == ("mlp/~/linear_0/b", "mlp/~/linear_0/w")
