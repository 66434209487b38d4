"""Adam as signal over noise, for JAX and Optax.

    w := w - descent(signal / noise)          signal = m^,   noise = sqrt(v^) + eps

The signal is the bias-corrected moving average of the gradients, the noise the root of the moving average of their
squares, and their ratio the SNR. A member of the family is a choice of how signal and noise are estimated, and of what
the descent does with their ratio.

    train      adam, adamw, nadam, nadamw, adamax, adamaxw, amsgrad, adabelief, yogi, radam, rmsprop, lion, adopt,
               ademamix, lamb, centered_adam: the arguments of their namesakes in Optax, and storage=
               adam_atan2, adamc, adamh, adams, bcos, cautious_adamw, laprop, mars, msvag, stable_adamw: Optax has none
    build      scale_by_snr, descend: the same from parts (snr_adam.parts), for use in optax.chain; scale_by_adam: the
               former from Adam's numbers
    protect    guard, health: skip steps that are not finite, clip the others; Spikes: skip or clip sudden large ones;
               check_hyperparams: traced numbers too
               accumulate: one step for several microbatches;  carry_remainder: train bfloat16 weights as float32 ones
               averaged, averaged_params: a moving average of the weights, to evaluate with
    see        observe, report, metrics, History: the signal-to-noise ratio of every layer (snr_adam.telemetry)
    keep       from_optax, to_optax: go on with the state of another optimizer; in snr_adam.state: from_torch, ...
"""

from snr_adam import parts as parts
from snr_adam import state as state
from snr_adam import telemetry as telemetry
from snr_adam._checks import check_hyperparams
from snr_adam.accumulation import accumulate
from snr_adam.averaging import averaged, averaged_params
from snr_adam.guard import guard, health
from snr_adam.optimizers import (
    adabelief,
    adam,
    adamax,
    adamaxw,
    adamw,
    ademamix,
    adopt,
    amsgrad,
    centered_adam,
    lamb,
    lion,
    nadam,
    nadamw,
    radam,
    rmsprop,
    scale_by_adam,
    yogi,
)
from snr_adam.precision import carry_remainder
from snr_adam.spikes import Spikes
from snr_adam.state import from_optax, to_optax
from snr_adam.telemetry import History, metrics, observe, report
from snr_adam.transform import descend, scale_by_snr
from snr_adam.variants import (
    adam_atan2,
    adamc,
    adamh,
    adams,
    bcos,
    cautious_adamw,
    laprop,
    mars,
    msvag,
    stable_adamw,
)

__version__ = "0.1.0"

__all__ = [
    "History",
    "Spikes",
    "accumulate",
    "adabelief",
    "adam",
    "adam_atan2",
    "adamax",
    "adamaxw",
    "adamc",
    "adamh",
    "adams",
    "adamw",
    "ademamix",
    "adopt",
    "amsgrad",
    "averaged",
    "averaged_params",
    "bcos",
    "carry_remainder",
    "cautious_adamw",
    "centered_adam",
    "check_hyperparams",
    "descend",
    "from_optax",
    "guard",
    "health",
    "lamb",
    "laprop",
    "lion",
    "mars",
    "metrics",
    "msvag",
    "nadam",
    "nadamw",
    "observe",
    "radam",
    "report",
    "rmsprop",
    "scale_by_adam",
    "scale_by_snr",
    "stable_adamw",
    "to_optax",
    "yogi",
]

_ELSEWHERE = {
    **dict.fromkeys(parts.__all__, "snr_adam.parts"),
    **dict.fromkeys(telemetry.__all__, "snr_adam.telemetry"),
    **dict.fromkeys(state.__all__, "snr_adam.state"),
    **dict.fromkeys(("round_stochastically", "whole_weights", "CarryRemainderState"), "snr_adam.precision"),
    **dict.fromkeys(("apply_accumulated", "AccumulateState"), "snr_adam.accumulation"),
    **dict.fromkeys(("GuardState", "Health"), "snr_adam.guard"),
    "AveragedState": "snr_adam.averaging",
    "ScaleBySnrState": "snr_adam.transform",
    "plots": "snr_adam.telemetry",
    "files": "snr_adam.state",
}


def __getattr__(name: str):
    """Names that live in a folder say so."""
    if name in _ELSEWHERE:
        raise AttributeError(f"snr_adam has no {name!r}: write `from {_ELSEWHERE[name]} import {name}`")
    raise AttributeError(f"module 'snr_adam' has no attribute {name!r}")
