"""Reports as a telemetry would give them, made of known numbers: for the tests of what reads, keeps and draws them."""

import string
from types import SimpleNamespace

import numpy as np

from snr_adam.telemetry.report import Report, _Raw

B1 = 0.9
QUANTITIES = (
    *("size", "signal", "noise", "pseudo_snr", "floor", "snr", "snr_error", "significant", "effective_step"),
    *(
        "update_rms",
        "param_rms",
        "gradient_norm",
        "persistent",
        "noise_scale",
        "noise_scale_error",
        "noise_scale_limit",
    ),
)


def floor(t):
    """What pure noise shows at step t."""
    return np.sqrt((1 - B1) * (1 + B1**t) / ((1 + B1) * (1 - B1**t)))


def fake_reports(times: int, layers: int, every: int = 10, seed: int = 0):
    """Signal that fades, in deeper layers first, and noise that stays; the last noise scale is beyond its limit."""
    rng = np.random.default_rng(seed)
    names = tuple(f"layers/{i}/kernel" for i in range(layers))
    depth = np.arange(layers) / max(layers - 1, 1)
    for i in range(times):
        step, signal = every * (i + 1), np.exp(-4 * (i + 1) / times * (0.5 + depth))
        noise = 0.8 + 0.1 * rng.random(layers)
        rho = floor(step) ** 2
        columns = {key: rng.lognormal(size=layers) for key in QUANTITIES}
        columns |= {"signal": signal, "noise": noise, "floor": np.full(layers, rho**0.5)}
        columns["pseudo_snr"] = np.sqrt((signal**2 + rho * noise**2) / (signal**2 + noise**2))
        columns |= {"persistent": signal**2, "gradient_norm": np.sqrt(signal**2 + noise**2)}
        columns["param_rms"] = np.full(layers, np.nan)
        total = {key: float(values.mean()) for key, values in columns.items()}
        scale = 32 * noise.mean() ** 2 / signal.mean() ** 2
        total |= {"noise_scale": scale, "noise_scale_error": 0.2 * scale, "noise_scale_limit": 1e4}
        if scale > 1e4:
            total |= {"noise_scale": np.inf, "noise_scale_error": np.inf}
        yield SimpleNamespace(step=step, names=names, columns=columns, total=total)


def measured(batch_size=None, step=7, **numbers) -> Report:
    """A report of layers that have these numbers, a list for each quantity, with the sums that groups are made of.

    What is not given is 1, and of the elements all are `counted`. `persistent_error` is the standard error of
    `persistent`. The only place that knows how a report keeps its sums.
    """
    layers = len(next(iter(numbers.values())))
    x = {key: np.array(values, float) for key, values in numbers.items()}

    def of(key, default=None):
        return x.get(key, np.ones(layers) if default is None else default)

    size = of("size")
    counted = of("counted", size)
    raw = _Raw(
        size=size,
        signal_sq=of("signal") ** 2,
        noise_sq=of("noise") ** 2,
        floor_sq=of("floor") ** 2,
        significant=of("significant") * counted,
        counted=counted,
        update_sq=of("update_rms") ** 2 * size,
        param_sq=of("param_rms") ** 2 * size,
        gradient_sq=of("gradient_norm") ** 2,
        persistent=of("persistent"),
        persistent_var=of("persistent_error") ** 2,
        snr_var=of("snr_error") ** 2,
    )
    total = {key: float(column[0]) for key, column in raw.add().columns(batch_size).items()}
    return Report(step, tuple(string.ascii_letters[:layers]), raw.columns(batch_size), total, batch_size, raw)
