"""The family by name: each optimizer is a numerator, a denominator and one line.

    w := w - alpha signal / noise

Names, arguments, their order and their defaults are those of Optax (0.2.8), plus `storage=`: how the moments rest
between steps. Every number may be a float, a scalar array or a schedule; a learning rate may also be a tree that is a
prefix of the parameters. Moments and arithmetic are float32 also for bfloat16 and float16 parameters (float64 for
64-bit ones), and `mu_dtype` is that of the stored signal only.

Bias corrections are computed as expm1(t log b) where Optax computes 1 - b**t, so in float32 results differ from Optax
by Optax's own rounding, about 1e-5 at b2 = .999. Where a definition differs from Optax's, the docstring says so.

Decays may change in time, as schedules or in the state of `inject_hyperparams`, where `advise` may have new ones set in
the middle of a run. The weights of an average that is corrected sum to 1 all the same (see `_numerics`); Optax divides
by 1 - b(t)**t, which is the sum of the weights only if b was b(t) from the beginning. For Adafactor's b2 = 1 - t**-.8
exactly as it is, which needs no correction, build the step from `RMS(b2, debias=False)`.
"""

from typing import Any

import jax
import optax

from snr_adam import deviation as d
from snr_adam import noise as n
from snr_adam import quotient as q
from snr_adam import signal as s
from snr_adam._numerics import Hyper
from snr_adam._per_leaf import Descents, Rate
from snr_adam._presets import Mask, Tx, average, preset, stored, with_parts
from snr_adam.descent import Decoupled, TrustRatio
from snr_adam.step import OPEN, Gate
from snr_adam.storage import Name, Storage
from snr_adam.transform import descend, scale_by_snr
from snr_adam.twofold import Mixture


def _momentum(decay, nesterov: bool) -> Tx:
    """`optax.trace`, whose state takes a guard's gate in: the update is computed from the trace that is kept."""
    trace = optax.trace(decay)

    def update(updates, state, params=None, *, gate: Gate = OPEN, **extra_args):
        del params, extra_args
        us, new = trace.update(updates, state)
        if gate is not OPEN:
            new = gate.choose(new, state)
            us = new.trace
            gate.held.append(new)
        if nesterov:
            us = jax.tree.map(lambda g, t: g + decay * t, updates, us)
        return us, new

    return optax.GradientTransformationExtraArgs(trace.init, update)


@preset
def scale_by_adam(
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
) -> Tx:
    """Adam's ratio without a learning rate: `optax.scale_by_adam`, for chains and configurations of names and numbers.

    u = m^ / (sqrt(v^ + eps_root) + eps); the same as `scale_by_snr(EMA(b1), RMS(b2, eps, eps_root), storage)`.

    Args, Raises: as `adam`.

    Returns:
      A transformation with state `ScaleBySnrState`, to be followed by `optax.scale_by_learning_rate`.

    >>> tx = scale_by_adam(b1=0.5, b2=0.5)
    >>> updates, state = tx.update(jax.numpy.array([3.0, -0.5]), tx.init(jax.numpy.zeros(2)))
    >>> print(updates.round(5))
    [ 1. -1.]

    Reference: Kingma & Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980, Algorithm 1.
    """
    return scale_by_snr(average(b1, nesterov), n.RMS(b2, eps, eps_root), stored(storage, mu_dtype))


@preset
def adam(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
) -> Tx:
    """Adam: EMA / RMS.

    w := w - alpha m^ / (sqrt(v^ + eps_root) + eps), m^ = m / (1 - b1^t), v^ = v / (1 - b2^t), where
    m := b1 m + (1-b1) g and v := b2 v + (1-b2) |g|^2.

    Args:
      learning_rate: alpha, in units of the parameters per step. A float, a scalar array, a schedule (a function of the
        number of steps taken so far), or a tree of these that is a prefix of the parameters.
      b1: decay of the signal, in [0, 1). It averages over about 1 / (1 - b1) gradients.
      b2: decay of the noise, in [0, 1).
      eps: added to the noise, in units of the gradient.
      eps_root: added under the root, in units of the squared gradient. In Optax it is for derivatives through a step
        whose gradients are 0; here those are right without it.
      mu_dtype: dtype in which the signal rests; float32 if None. Unlike Optax's, bfloat16 is rounded stochastically
        and the step reads the signal as it rests.
      nesterov: uses `signal.Nesterov`, which makes it NAdam.
      storage: how both moments rest between steps: "float32", or an object such as `Cast(mu="bfloat16")`.

    Returns:
      A transformation; its state is that of `optax.adam`, with a `ScaleBySnrState` first.

    Raises:
      ValueError: for an unknown storage, or if gradients, state and parameters do not belong together.
      TypeError: for parameters that are neither floating nor complex.

    >>> import jax.numpy as jnp
    >>> tx = adam(learning_rate=0.125)
    >>> w = jnp.array([1.0, -2.0])
    >>> updates, state = tx.update(2 * w, tx.init(w), w)
    >>> print(updates.round(5))
    [-0.125  0.125]

    Reference: Kingma & Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980, Algorithm 1.
    """
    return with_parts(
        descend(learning_rate, average(b1, nesterov), n.RMS(b2, eps, eps_root), storage=stored(storage, mu_dtype)), 1
    )


@preset
def adamw(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
    descent: Descents = Decoupled(),
) -> Tx:
    """AdamW: EMA / RMS with decoupled weight decay, w := w - alpha (m^ / (sqrt(v^ + eps_root) + eps) + lambda w).

    Args: as `adam`, and
      weight_decay: lambda, multiplied by the learning rate as in Optax and PyTorch. It too may be a tree that is a
        prefix of the parameters.
      mask: which parameters decay: a tree of bools that is a prefix of the parameters, or a function from them to one.
        `mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)` leaves out norms and biases.
      descent: what is done with the ratio, a part of `snr_adam.descent` such as `CautiousDecay()`; or a tree of them
        that is a prefix of the parameters, or a function from them to one.

    Reference: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, Algorithm 2.
    """
    return with_parts(
        descend(
            learning_rate,
            average(b1, nesterov),
            n.RMS(b2, eps, eps_root),
            weight_decay=weight_decay,
            mask=mask,
            descent=descent,
            storage=stored(storage, mu_dtype),
        ),
        2,
    )


@preset
def nadam(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    storage: Name | Storage = "float32",
) -> Tx:
    """NAdam: Nesterov / RMS. Args: as `adam`.

    The signal is b1 m / (1 - b1^{t+1}) + (1-b1) g / (1 - b1^t), without Dozat's schedule of b1.

    Reference: Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016.
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, storage=storage)


@preset
def nadamw(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = True,
    storage: Name | Storage = "float32",
) -> Tx:
    """NAdamW: Nesterov / RMS with decoupled weight decay. Args: as `adamw`.

    Reference: Dozat 2016; Loshchilov & Hutter, arXiv 1711.05101.
    """
    return adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov, storage=storage)


@preset
def adamax(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """AdaMax: EMA / Infinity, the noise being max(b2 n, |g| + eps). Args: as `adam`.

    Reference: Kingma & Ba, arXiv 1412.6980, Algorithm 2.
    """
    return with_parts(descend(learning_rate, s.EMA(b1), n.Infinity(b2, eps), storage=storage), 1)


@preset
def adamaxw(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """AdaMax with decoupled weight decay. Args: as `adamw`.

    Reference: Kingma & Ba, arXiv 1412.6980, Algorithm 2; Loshchilov & Hutter, arXiv 1711.05101.
    """
    return with_parts(
        descend(learning_rate, s.EMA(b1), n.Infinity(b2, eps), weight_decay=weight_decay, mask=mask, storage=storage), 2
    )


@preset
def amsgrad(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """AMSGrad: EMA / Maximum, whose noise never falls. Args: as `adam`, and whether each moment is bias-corrected.

    Reference: Reddi, Kale & Kumar, On the Convergence of Adam and Beyond, arXiv 1904.09237, Algorithm 2.
    """
    noise = n.Maximum(b2, eps, eps_root, bias_correction_nu)
    return with_parts(
        descend(learning_rate, s.EMA(b1, bias_correction_mu), noise, storage=stored(storage, mu_dtype)), 1
    )


@preset
def adabelief(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-16,
    eps_root: Hyper = 1e-16,
    *,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
) -> Tx:
    """AdaBelief: EMA / Belief, the noise measured around the signal. Args: as `adam`.

    As in Optax and the authors' code, eps_root is added to v at every step and accumulates there.

    Reference: Zhuang et al., AdaBelief Optimizer, arXiv 2010.07468, Algorithm 2.
    """
    return with_parts(descend(learning_rate, average(b1, nesterov), d.Belief(b2, eps, eps_root), storage=storage), 1)


@preset
def yogi(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-3,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """Yogi: EMA / Yogi. Args: as `adam`.

    As in Optax, both moments start at 1e-6 and are bias-corrected as if they had started at 0; so parameters that get
    no gradient still move a little at first.

    Reference: Zaheer et al., Adaptive Methods for Nonconvex Optimization, NeurIPS 2018, Algorithm 2.
    """
    return with_parts(descend(learning_rate, s.EMA(b1, initial=1e-6), n.Yogi(b2, eps), storage=storage), 1)


@preset
def radam(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    threshold: Hyper = 5.0,
    *,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
) -> Tx:
    """RAdam: EMA / Rectified. Args: as `adam`, and the length rho_t of v's memory from which on it is divided by.

    Reference: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, arXiv 1908.03265, Algorithm 2.
    """
    noise = n.Rectified(b2, eps, eps_root, threshold)
    return with_parts(descend(learning_rate, average(b1, nesterov), noise, storage=storage), 1)


@preset
def rmsprop(
    learning_rate: Rate,
    decay: Hyper = 0.9,
    eps: Hyper = 1e-8,
    initial_scale: float | jax.Array = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | jax.Array | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """RMSProp: Gradient / RMS, or Gradient / Deviation if centred; then, if asked for, momentum on the steps.

    Args: learning_rate and storage as `adam`, and
      decay: decay of the noise, in [0, 1).
      eps: added under the root, or outside of it if not `eps_in_sqrt`.
      initial_scale: the second moment at the start.
      centered: divides by the standard deviation instead of the root of the raw second moment.
      momentum: decay of a trace of the scaled steps; `nesterov` looks one step ahead along it. None for no trace.
      bias_correction: divides the moments by 1 - decay^t.

    Centred, the variance is kept itself and v - m^2 never formed; Optax's difference can cancel to a negative number.

    Reference: Hinton, Neural Networks for Machine Learning, lecture 6; Graves, arXiv 1308.0850, eq. 38-41.
    """
    if nesterov and momentum is None:
        raise ValueError("rmsprop: nesterov=True looks ahead along a momentum, and momentum is None: give one, as 0.9")
    if centered:
        noise = d.Deviation(decay, eps, eps_in_sqrt, bias_correction, initial_scale)
    else:
        noise = n.RMS(decay, *((0.0, eps) if eps_in_sqrt else (eps, 0.0)), bias_correction, initial_scale)
    step = descend(learning_rate, s.Gradient(), noise, storage=storage)
    return (
        with_parts(step, 2) if momentum is None else optax.chain(step, optax.identity(), _momentum(momentum, nesterov))
    )


@preset
def lion(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.99,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-3,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """Lion: Sign / Unit with decoupled weight decay. Args: as `adamw`; b1 interpolates the step, b2 decays the memory.

    Reference: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, Algorithm 2.
    """
    rest = stored(storage, mu_dtype)
    return with_parts(
        descend(learning_rate, s.Sign(b1, b2), n.Unit(), weight_decay=weight_decay, mask=mask, storage=rest), 2
    )


@preset
def adopt(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.9999,
    eps: Hyper = 1e-6,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Hyper = lambda count: count**0.25,
    storage: Name | Storage = "float32",
) -> Tx:
    """ADOPT: EMA of g / Previous: the gradient is divided by the noise of the steps before it, then averaged.

    Args: as `adam`, and
      use_clipping: clips each quotient to +-clip_value_fn(steps taken so far), as the authors' second version does.
      clip_value_fn: that bound.

    Reference: Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2, arXiv 2411.02853, Algorithm 2.
    """
    noise = q.Previous(b2, eps, clip_value_fn if use_clipping else None)
    return with_parts(
        descend(learning_rate, average(b1, nesterov, debias=False), noise, storage=stored(storage, mu_dtype)), 1
    )


@preset
def ademamix(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    b3: Hyper = 0.9999,
    alpha: Hyper = 5.0,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    weight_decay: Rate = 0.0,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """AdEMAMix: Mixture / RMS with decoupled weight decay; the signal is m1^ + alpha m2, m2 of decay b3.

    Args: as `adamw`, and
      b3: decay of the slow average. `alpha` and b3 are usually warmed up by schedules.
      alpha: weight of the slow average.

    `mu_dtype` is the dtype of both averages of the signal; in Optax it is also that of nu at the start.

    Reference: Pagliardini, Ablin & Grangier, The AdEMAMix Optimizer, arXiv 2409.03137, section 3.
    """
    return with_parts(
        descend(
            learning_rate,
            Mixture(b1, b3, alpha),
            n.RMS(b2, eps, eps_root),
            weight_decay=weight_decay,
            mask=mask,
            storage=stored(storage, mu_dtype),
        ),
        2,
    )


@preset
def lamb(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-6,
    eps_root: Hyper = 0.0,
    weight_decay: Rate = 0.0,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """LAMB: AdamW whose step has, parameter by parameter, the norm of the parameter. Args: as `adamw`.

    The norms come before the update: 40 bytes per float32 parameter where `adamw` moves 28, as
    `benchmarks/compiled.py` compiles both for an H100; 36 for a TPU v5e.

    Reference: You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962, Algorithm 2.
    """
    return with_parts(
        descend(
            learning_rate,
            s.EMA(b1),
            n.RMS(b2, eps, eps_root),
            weight_decay=weight_decay,
            mask=mask,
            descent=TrustRatio(),
            storage=storage,
        ),
        3,
    )


@preset
def centered_adam(
    learning_rate: Rate,
    b: Hyper = 0.95,
    eps: Hyper = 1e-8,
    weight_decay: Rate = 0.0,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """Adam(W) with b1 = b2 = b, kept as mean and variance: Mean / Spread. Optax has no namesake.

    w := w - alpha m^ / (sqrt(s^ + m^^2) + eps), where m^ is the bias-corrected mean of the gradients and s^ their
    variance around it. s^ + m^^2 is Adam's v^ exactly, so every |step| is at most alpha: sign(m^) SNR / sqrt(1 +
    SNR^2) with SNR = |m^| / sqrt(s^). `state[0].mu` is m^ and `state[0].nu` is s^: the signal and the variance around
    it, with nothing to subtract.

    Args: as `adamw`; b is both decays.

    Reference: Orvieto & Gower, In Search of Adam's Secret Sauce, arXiv 2505.21829, section 4.
    """
    return with_parts(
        descend(learning_rate, s.Mean(b), d.Spread(b, eps), weight_decay=weight_decay, mask=mask, storage=storage), 2
    )
