"""The parts of an optimizer: signals, noises, descents, storages, and how a state lies on a mesh.

    scale_by_snr(EMA(0.9), RMS(0.999), storage=Packed())

Each is a frozen dataclass. What a part of your own needs is written down as a Protocol: `Signal`, `Noise`, `Descent`
and `Storage`. `Average` is what a part says of itself to telemetry, see `snr_adam.signal`.
"""

from snr_adam._numerics import Average
from snr_adam.descent import (
    Arctangent,
    CautiousDecay,
    CautiousUpdate,
    ClippedUpdate,
    CorrectedDecay,
    Decoupled,
    Descent,
    Hyperball,
    IndependentDecay,
    TrustRatio,
)
from snr_adam.deviation import Adapted, Belief, Deviation, FromMean, Spread
from snr_adam.noise import RMS, Infinity, Maximum, Noise, Rectified, Unit, Yogi
from snr_adam.quotient import Normalized, Previous
from snr_adam.shared import Shared
from snr_adam.signal import EMA, FromFirst, Gradient, Mean, Nesterov, Sign, Signal
from snr_adam.state.sharding import LikeParameters, Zero1
from snr_adam.storage import Cast, Full, Packed, Storage
from snr_adam.twofold import Mixture, VarianceReduced

__all__ = [
    "EMA",
    "RMS",
    "Adapted",
    "Arctangent",
    "Average",
    "Belief",
    "Cast",
    "CautiousDecay",
    "CautiousUpdate",
    "ClippedUpdate",
    "CorrectedDecay",
    "Decoupled",
    "Descent",
    "Deviation",
    "FromFirst",
    "FromMean",
    "Full",
    "Gradient",
    "Hyperball",
    "IndependentDecay",
    "Infinity",
    "LikeParameters",
    "Maximum",
    "Mean",
    "Mixture",
    "Nesterov",
    "Noise",
    "Normalized",
    "Packed",
    "Previous",
    "Rectified",
    "Shared",
    "Sign",
    "Signal",
    "Spread",
    "Storage",
    "TrustRatio",
    "Unit",
    "VarianceReduced",
    "Yogi",
    "Zero1",
]
