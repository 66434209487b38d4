"""Adam as signal over noise, for JAX and Optax.

    w := w - alpha * SNR,    SNR = signal / noise = m^ / (sqrt(v^) + eps)

The signal is the bias-corrected moving average of the gradients, the noise the root of the moving average of their
squares. A member of the family is a choice of how the one and the other are estimated:

    snr_adam.adamw(1e-3)                                    by name, with the arguments of `optax.adamw`
    snr_adam.scale_by_snr(EMA(0.9), RMS(0.999))             by its parts, for use in `optax.chain`
"""

from snr_adam import noise_scale as noise_scale
from snr_adam.accumulation import accumulate as accumulate
from snr_adam.accumulation import apply_accumulated as apply_accumulated
from snr_adam.advice import advise as advise
from snr_adam.checkpoint import digest as digest
from snr_adam.checks import check_hyperparams as check_hyperparams
from snr_adam.guard import GuardState as GuardState
from snr_adam.guard import guard as guard
from snr_adam.guard import health as health
from snr_adam.history import History as History
from snr_adam.loggers import histograms as histograms
from snr_adam.loggers import metrics as metrics
from snr_adam.memory import footprint as footprint
from snr_adam.migration import from_optax as from_optax
from snr_adam.migration import to_optax as to_optax
from snr_adam.noise import RMS as RMS
from snr_adam.noise import Belief as Belief
from snr_adam.noise import Deviation as Deviation
from snr_adam.noise import Infinity as Infinity
from snr_adam.noise import Maximum as Maximum
from snr_adam.noise import Previous as Previous
from snr_adam.noise import Rectified as Rectified
from snr_adam.noise import Shared as Shared
from snr_adam.noise import Spread as Spread
from snr_adam.noise import Unit as Unit
from snr_adam.noise import Yogi as Yogi
from snr_adam.optimizers import adabelief as adabelief
from snr_adam.optimizers import adam as adam
from snr_adam.optimizers import adamax as adamax
from snr_adam.optimizers import adamaxw as adamaxw
from snr_adam.optimizers import adamw as adamw
from snr_adam.optimizers import ademamix as ademamix
from snr_adam.optimizers import adopt as adopt
from snr_adam.optimizers import amsgrad as amsgrad
from snr_adam.optimizers import centered_adam as centered_adam
from snr_adam.optimizers import lamb as lamb
from snr_adam.optimizers import lion as lion
from snr_adam.optimizers import nadam as nadam
from snr_adam.optimizers import nadamw as nadamw
from snr_adam.optimizers import radam as radam
from snr_adam.optimizers import rmsprop as rmsprop
from snr_adam.optimizers import yogi as yogi
from snr_adam.precision import carry_remainder as carry_remainder
from snr_adam.precision import round_stochastically as round_stochastically
from snr_adam.precision import whole_weights as whole_weights
from snr_adam.reports import Report as Report
from snr_adam.reports import report as report
from snr_adam.sharding import state_sharding as state_sharding
from snr_adam.sharing import share as share
from snr_adam.sharing import suggest_sharing as suggest_sharing
from snr_adam.signal import EMA as EMA
from snr_adam.signal import Gradient as Gradient
from snr_adam.signal import Mean as Mean
from snr_adam.signal import Mixture as Mixture
from snr_adam.signal import Nesterov as Nesterov
from snr_adam.signal import Sign as Sign
from snr_adam.storage import Cast as Cast
from snr_adam.storage import Full as Full
from snr_adam.storage import Packed as Packed
from snr_adam.telemetry import ObserveState as ObserveState
from snr_adam.telemetry import observe as observe
from snr_adam.transform import ScaleBySnrState as ScaleBySnrState
from snr_adam.transform import descend as descend
from snr_adam.transform import scale_by_snr as scale_by_snr

__version__ = "0.1.0"
