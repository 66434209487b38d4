"""Reports as a telemetry would give them, made of known numbers: for the tests of what reads, keeps and draws them."""

import string
from types import SimpleNamespace

import numpy as np

from snr_adam.telemetry._rows import Sums
from snr_adam.telemetry.columns import COLUMNS, columns
from snr_adam.telemetry.report import Report

B1 = 0.9
QUANTITIES = tuple(COLUMNS)


def floor(t):
    """What pure noise shows at step t."""
    return np.sqrt((1 - B1) * (1 + B1**t) / ((1 + B1) * (1 - B1**t)))


def fake_reports(times: int, layers: int, every: int = 10, seed: int = 0):
    """Signal that fades, in deeper layers first, and noise that stays; of the last noise scales a bound is known."""
    rng = np.random.default_rng(seed)
    names = tuple(f"layers/{i}/kernel" for i in range(layers))
    depth = np.arange(layers) / max(layers - 1, 1)
    for i in range(times):
        step, signal = every * (i + 1), np.exp(-4 * (i + 1) / times * (0.5 + depth))
        noise = 0.8 + 0.1 * rng.random(layers)
        rho = floor(step) ** 2
        made = {key: rng.lognormal(size=layers) for key in QUANTITIES}
        made |= {"signal": signal, "noise": noise, "floor": np.full(layers, rho**0.5)}
        made["pseudo_snr"] = np.sqrt((signal**2 + rho * noise**2) / (signal**2 + noise**2))
        made |= {"gradient_signal": signal, "gradient_noise": noise, "gradient_norm": np.hypot(signal, noise)}
        made["param_rms"] = np.full(layers, np.nan)
        total = {key: float(values.mean()) for key, values in made.items()}
        scale = 32 * noise.mean() ** 2 / signal.mean() ** 2
        seen = scale <= 1e4
        ends = {"_error": 0.2 * scale, "_low": 0.7 * scale, "_high": 1.5 * scale} if seen else {"_low": 1e4}
        total |= {f"noise_scale{end}": ends.get(end, np.inf) for end in ("_error", "_low", "_high")}
        total["noise_scale"] = scale if seen else np.inf
        yield SimpleNamespace(step=step, names=names, columns=made, total=total)


ROOT_OF = {
    **{f"{key}_sq": key for key in ("signal", "noise", "floor")},
    **{"gradient_sq": "gradient_norm", "persistent_half": "persistent_half", "spread": "half"},
    **{"power": "step_gradient_norm", "unclipped_sq": "unclipped_norm", "before_sq": "before"},
}
"""Sums that are squares, and of what."""


def measured(batch_size=None, examples=None, step=7, **numbers) -> Report:
    """A report of layers that have these numbers, a list for each quantity, with the sums that groups are made of.

    What is not given is 1, and of the elements all are `counted` and `moved`. share_sum and power_sum are S and a of
    the lags, half half the width of the interval of S, persistent_half that of `persistent`; slack, above and least_sum
    are 0 if not given; `before` is the root of before_sq. The only place that knows how a report keeps its sums.
    """
    layers = len(next(iter(numbers.values())))
    x = {"slack": np.zeros(layers), "above": np.zeros(layers), "least_sum": np.zeros(layers)}
    x |= {key: np.array(values, float) for key, values in numbers.items()}

    def of(key, default=None):
        return x.get(key, np.ones(layers) if default is None else default)

    size = of("size")
    counted = of("counted", size)
    means = {"significant": of("significant") * counted}
    means |= {f"{key}_sq": of(f"{key}_rms") ** 2 * size for key in ("update", "param")}
    means |= {"relative_sq": of("relative_gradient") ** 2 * size, "rate_sum": of("learning_rate") * size}
    moved = of("moved", size)
    means |= {"moved": moved, "lost": of("lost_updates") * moved, "zeros": of("zero_gradients") * size}
    squares = {key: of(name) ** 2 for key, name in ROOT_OF.items()}
    plain = {key: of(key) for key in ("persistent", "share_sum", "power_sum", "slack", "above", "least_sum")}
    plain |= {key: of(key) for key in ("product", "clipped", "spike", "spike_step", "spike_peak", "skipped")}
    plain |= {f"largest_{key}": of(f"largest_{key}") for key in ("gradient", "signal", "update")}
    sums = Sums(size=size, counted=counted, **means, **squares, **plain)
    of_all = columns(sums.add(), batch_size, examples)
    total = {key: float(column[0]) for key, column in of_all.items()}
    names = tuple(string.ascii_letters[:layers])
    return Report(step, names, columns(sums, batch_size, examples), total, batch_size, examples, sums=sums)
