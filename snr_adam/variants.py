"""The family by name, continued: Adam's variants that Optax does not have.

Arguments, their order and their defaults are those of `adamw` as far as a method has them; the state is that of
`adamw` as far as it has two moments, so that `from_optax` takes a run of `optax.adamw` over. What a method changes is
one part: a signal, a noise, or what the descent does with their ratio.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from snr_adam import deviation as d
from snr_adam import noise as n
from snr_adam import quotient as q
from snr_adam import signal as s
from snr_adam._checks import is_mask
from snr_adam._numerics import Hyper
from snr_adam._per_leaf import Rate
from snr_adam._presets import Mask, Tx, average, preset, stored, with_parts
from snr_adam._tree import named_leaves
from snr_adam.descent import (
    Arctangent,
    CautiousUpdate,
    ClippedUpdate,
    CorrectedDecay,
    Decoupled,
    Hyperball,
)
from snr_adam.storage import Name, Storage
from snr_adam.transform import descend
from snr_adam.twofold import VarianceReduced


def _adamw(learning_rate, signal, noise, descent, weight_decay, mask, storage) -> Tx:
    """These parts, with a state that lies as that of `adamw` does."""
    how = {"weight_decay": weight_decay, "mask": mask, "descent": descent, "storage": storage}
    return with_parts(descend(learning_rate, signal, noise, **how), 2)


def _matrices(params):
    """Which parameters have two axes or more."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def _either(name: str, which: Mask, yes, no):
    """A function from the parameters to `yes` where the mask of this name is on, and to `no` elsewhere."""

    def choose(params):
        mask = jax.tree.broadcast(which(params) if callable(which) else which, params)
        for path, on in named_leaves(mask):
            if not is_mask(on):
                raise TypeError(f"{name} at {path} is {on!r}: must be True or False")
        return jax.tree.map(lambda on: yes if on else no, mask)

    return choose


@preset
def stable_adamw(
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
) -> Tx:
    """StableAdamW: AdamW whose step is shorter where gradients outgrow the noise; `descent.ClippedUpdate`.

    w := w - alpha_t (m^ / (sqrt(v^) + eps) + lambda w), alpha_t = alpha / max(1, sqrt(mean(g^2 / max(v^, eps^2)))), the
    mean over one array.

    Args: as `adamw`. `eps` is that of the mean too, and no schedule.

    Raises:
      TypeError: if `eps` is a schedule; as `adamw`.

    >>> import jax.numpy as jnp
    >>> tx = stable_adamw(0.125, b2=0.99)
    >>> w = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([1.0, -1.0]), tx.init(w), w)
    >>> updates, _ = tx.update(jnp.array([100.0, -100.0]), state, w)
    >>> print(updates.round(4))  # adam(0.125, b2=0.99) takes a step of 0.0936
    [-0.0664  0.0664]

    The mean comes before the update, so what it is made of is read twice: 36 bytes per float32 parameter where `adamw`
    moves 28, as `benchmarks/compiled.py` compiles both for an H100 and a TPU v5e.

    Reference: Wortsman et al., Stable and Low-Precision Training for Large-Scale Vision-Language Models,
    arXiv 2304.13013, Algorithm 2.
    """
    if callable(eps):
        raise TypeError("stable_adamw: eps is a schedule: must be a number or a scalar array, the mean has it too")
    parts = average(b1, nesterov), n.RMS(b2, eps, eps_root), ClippedUpdate(eps)
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


@preset
def cautious_adamw(
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
) -> Tx:
    """Cautious AdamW: only elements whose step agrees with the gradient at hand move; `descent.CautiousUpdate`.

    w := w - alpha (r phi n / (sum phi + 1) + lambda w), r = m^ / (sqrt(v^) + eps), phi = 1[r g > 0], n elements.

    Args: as `adamw`. For cautious weight decay, another method, give `adamw` the descent `CautiousDecay()`.

    The share of elements that move comes before the update: 38 bytes per float32 parameter where `adamw` moves 28,
    and a byte of temporaries for each of a leaf, as `benchmarks/compiled.py` compiles both for an H100; 36 and none for
    a TPU v5e.

    Reference: Liang et al., Cautious Optimizers, arXiv 2411.16085, Algorithm 1. The authors' code divides by
    max(mean phi, 1e-3) where the paper has (sum phi + 1) / n.
    """
    parts = average(b1, nesterov), n.RMS(b2, eps, eps_root), CautiousUpdate()
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


@preset
def adamc(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    peak: float | None = None,
    normalized: Mask = _matrices,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
) -> Tx:
    """AdamC: AdamW whose decay of normalised layers goes with the square of the learning rate; `CorrectedDecay`.

    w := w - alpha r - (alpha^2 / peak) lambda w where `normalized`, else w - alpha (r + lambda w).

    Args: as `adamw`, and
      peak: the largest learning rate of the schedule, in units of the parameters per step. A constant rate is its own.
      normalized: which parameters' outputs are normalised: a tree of bools that is a prefix of the parameters, or a
        function from them to one. By default all of two axes or more; leave out the last layer of a model that does not
        normalise its output.

    Raises:
      ValueError: for a learning rate that may change without a `peak`.

    Reference: Defazio, Why Gradients Rapidly Increase Near the End of Training, arXiv 2506.02285, Algorithm 1.
    """
    if peak is None and (callable(learning_rate) or not jax.tree.all(jax.tree.map(_is_number, learning_rate))):
        raise ValueError(
            "adamc: a learning rate that is a schedule needs peak=, its largest value: lambda goes with alpha^2 / peak"
        )
    corrected = Decoupled() if peak is None else CorrectedDecay(peak)
    parts = average(b1, nesterov), n.RMS(b2, eps, eps_root), _either("normalized", normalized, corrected, Decoupled())
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


def _is_number(x) -> bool:
    return not callable(x)


@preset
def adam_atan2(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    height: float = 4 / math.pi,
    width: float = 1.0,
    storage: Name | Storage = "float32",
) -> Tx:
    """Adam-atan2: no eps, exactly scale-free, no step over alpha height pi / 2; `descent.Arctangent`.

    w := w - alpha (height atan2(m^, width sqrt(v^)) + lambda w).

    Args: as `adamw`, and
      height, width: the paper's a and b. By default m^ = sqrt(v^) takes the step alpha, as Adam's does.

    Reference: Everett et al., Scaling Exponents Across Parameterizations and Optimizers, arXiv 2407.05872, section 4.4.
    """
    parts = s.EMA(b1), n.RMS(b2, eps=0.0), Arctangent(height, width)
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


@preset
def laprop(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-15,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    weight_decay: Rate = 0.0,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
) -> Tx:
    """LaProp: EMA of g / Normalized: each gradient is divided by the noise of its own time, then averaged.

    w := w - alpha (m / (1 - b1^t) + lambda w), m := b1 m + (1-b1) g / (sqrt(v^) + eps).

    Args: as `adamw`; eps as in the authors' code, which has alpha in m, so that it acts with a delay if it changes.

    Reference: Ziyin, Wang & Ueda, LaProp: Separating Momentum and Adaptivity in Adam, arXiv 2002.04839, Algorithm 1.
    """
    parts = average(b1, nesterov), q.Normalized(b2, eps, eps_root), Decoupled()
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


@preset
def adams(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.95,
    eps: Hyper = 1e-8,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """AdamS: EMA / FromMean. There is no second moment: 4 bytes of state per parameter, 2 with storage="bfloat16".

    w := w - alpha (m / (sqrt(b2 m'^2 + (1-b2) g^2) + eps) + lambda w), with m' the average before this gradient and
    neither corrected for its start.

    Args: as `adamw`. A decay b1 that is a schedule is that of m as it is.

    Reference: Zhang et al., AdamS: Momentum Itself Can Be A Normalizer, arXiv 2505.16363, Algorithm 1.
    """
    parts = s.EMA(b1, debias=False), d.FromMean(b1, b2, eps), Decoupled()
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


@preset
def bcos(
    learning_rate: Rate,
    b: Hyper = 0.9,
    eps: Hyper = 1e-6,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """BCOS-c: FromFirst / FromMean, one decay and no second moment: 4 bytes of state, 2 with storage="bfloat16".

    w := w - alpha (m / (sqrt((1 - (1-b)^2) m'^2 + (1-b)^2 g^2) + eps) + lambda w), with m' the average before this
    gradient; before the first one m' = g, as in the authors' code.

    Args: as `adamw`; b is the only decay.

    Reference: Jiang & Xiao, Stochastic Approximation with Block Coordinate Optimal Stepsizes, arXiv 2507.08963.
    """
    parts = s.FromFirst(b), d.FromMean(b, None, eps), Decoupled()
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


@preset
def mars(
    learning_rate: Rate,
    b1: Hyper = 0.95,
    b2: Hyper = 0.99,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    gamma: Hyper = 0.025,
    storage: Name | Storage = "float32",
) -> Tx:
    """MARS-AdamW: VarianceReduced / RMS: AdamW on gradients from which a part of their noise is taken.

    c = g + gamma b1/(1-b1) (g - g'), with g' the gradient of the step before; then AdamW on c / max(1, |c|), with the
    norm of one array.

    Args: as `adamw`, and
      gamma: how much of the correction is used, 0 for none. `mu_dtype` is that of g' too.

    The authors' code leaves arrays of one axis to plain AdamW: use `optax.partition` for that.

    The gradient g' is 4 bytes of state more than `adamw` keeps, and the norm comes before the step: 52 bytes per
    float32 parameter where `adamw` moves 28, and 8 bytes of temporaries for each of a leaf, as `benchmarks/compiled.py`
    compiles both for an H100; 36 and none for a TPU v5e.

    Reference: Yuan et al., MARS: Unleashing the Power of Variance Reduction for Training Large Models,
    arXiv 2411.10438, Algorithm 2 ("MARS-approx", with Algorithm 3's preconditioner).
    """
    parts = VarianceReduced(b1, gamma), n.RMS(b2, eps, eps_root), Decoupled()
    return _adamw(learning_rate, *parts, weight_decay, mask, stored(storage, mu_dtype))


@preset
def adamh(
    learning_rate: Rate,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    ball: Mask = _matrices,
    nesterov: bool = False,
    storage: Name | Storage = "float32",
) -> Tx:
    """AdamH: Adam whose matrices keep their norm and turn, `descent.Hyperball`; AdamW for the rest.

    w := R n(w - alpha R n(m^ / (sqrt(v^) + eps))), R = |w|, n(x) = x / |x|, where `ball`; there alpha is relative, .01
    for a step of a hundredth of the norm.

    Args: as `adamw`, and
      ball: which parameters keep their norm, and do not decay: a tree of bools that is a prefix of the parameters, or a
        function from them to one. By default all of two axes or more; the authors leave out embeddings.

    A learning rate for the rest of its own is a tree: `learning_rate={"layers": 0.01, "norms": 1e-3}`.

    Two norms come before the update: 48 bytes per float32 parameter where `adamw` moves 28, and 4 bytes of
    temporaries for each of a leaf, as `benchmarks/compiled.py` compiles both for an H100; 36 and none for a TPU v5e.

    Reference: Wen et al., Fantastic Pretraining Optimizers and Where to Find Them 2.1: Hyperball Optimization, 2025;
    arXiv 2606.16899.
    """

    def decaying(params):
        on = _either("mask", True if mask is None else mask, True, False)(params)
        kept = _either("ball", ball, True, False)(params)
        return jax.tree.map(lambda decays, keeps: decays and not keeps, on, kept)

    parts = average(b1, nesterov), n.RMS(b2, eps, eps_root), _either("ball", ball, Hyperball(), Decoupled())
    return _adamw(learning_rate, *parts, weight_decay, decaying, stored(storage, mu_dtype))


@preset
def msvag(
    learning_rate: Rate,
    b: Hyper = 0.9,
    weight_decay: Rate = 0.0,
    mask: Mask = None,
    *,
    storage: Name | Storage = "float32",
) -> Tx:
    """M-SVAG: Mean / Adapted: momentum whose elements shrink by the share of their power that is noise.

    w := w - alpha (m^ m^^2 / (m^^2 + rho s^) + lambda w), s^ = (v^ - m^^2) / (1 - rho), both averages of decay b, and
    rho is the floor that telemetry shows. Steps have the unit of the gradient: use learning rates of plain descent.

    Args: as `adamw`; b is both decays.

    Reference: Balles & Hennig, Dissecting Adam, arXiv 1705.07774, Algorithm 2. The authors' code cuts rho off at .999,
    which matters at the first step alone, where v^ = m^^2; here v^ - m^^2 is never formed, see `deviation.Adapted`.
    """
    return _adamw(learning_rate, s.Mean(b), d.Adapted(b), Decoupled(), weight_decay, mask, storage)
