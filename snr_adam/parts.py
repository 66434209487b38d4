"""The parts of an optimizer: signals, noises, descents, storages, and how a state lies on a mesh.

    scale_by_snr(EMA(0.9), RMS(0.999), storage=Packed())

Each is a frozen dataclass. What a part of your own needs is written down as a Protocol: `Signal`, `Noise`, `Descent`
and `Storage`. `Average` is what a part says of itself to telemetry, see `snr_adam.signal`.
"""

from snr_adam._numerics import Average
from snr_adam.descent import Decoupled, Descent, TrustRatio
from snr_adam.deviation import Belief, Deviation, Spread
from snr_adam.noise import RMS, Infinity, Maximum, Noise, Rectified, Unit, Yogi
from snr_adam.quotient import Previous
from snr_adam.shared import Shared
from snr_adam.signal import EMA, Gradient, Mean, Nesterov, Sign, Signal
from snr_adam.state.sharding import LikeParameters, Zero1
from snr_adam.storage import Cast, Full, Packed, Storage
from snr_adam.twofold import Mixture

__all__ = [
    "EMA",
    "RMS",
    "Average",
    "Belief",
    "Cast",
    "Decoupled",
    "Descent",
    "Deviation",
    "Full",
    "Gradient",
    "Infinity",
    "LikeParameters",
    "Maximum",
    "Mean",
    "Mixture",
    "Nesterov",
    "Noise",
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
    "Yogi",
    "Zero1",
]
