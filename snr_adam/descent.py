"""What is done with the ratio of signal and noise: how it becomes the update of a parameter.

    Decoupled     u = -alpha r - (alpha lambda) p, r = signal / noise        Adam; Loshchilov & Hutter 2019, Algorithm 2
    TrustRatio    u = -alpha |p| / |r'| r', r' = r + lambda p                LAMB; You et al. 2020, Algorithm 2
    Hyperball     p + u = R n(p - alpha R n(r)), R = |p|, n(x) = x / |x|     Wen et al. 2025

and rules that change something and hand on to another descent, by default to `Decoupled`:

    CautiousDecay      lambda only where r p >= 0                            Chen et al. 2025
    IndependentDecay   lambda / alpha_max in place of lambda                 Loshchilov & Hutter 2019, section 3
    CorrectedDecay     lambda alpha / alpha_max in place of lambda           Defazio 2025
    CautiousUpdate     r only where r g > 0, the rest longer                 Liang et al. 2024
    ClippedUpdate      alpha / max(1, RMS(g / sqrt(v^))) in place of alpha   StableAdamW; Wortsman et al. 2023
    Arctangent         atan2 in place of the quotient                        Everett et al. 2024

They combine by nesting, the first to act outermost: `ClippedUpdate(then=CautiousDecay(TrustRatio()))`. What has no
meaning is refused: a decay onto a `Hyperball`, whose radius is fixed, and two rules for the size of one decay.

alpha, the learning rate, is in units of the parameters per step; lambda is the weight decay, decoupled from signal and
noise; norms, means and sums are those of one array. A descent is a frozen dataclass that knows one array, never a tree:

    update(ratio, p, alpha, decay) -> u       the update, from `step.Ratio`, the parameter (or None), alpha and lambda
    needs_params                              whether it reads p even where nothing decays

`alpha` and `decay` are numbers of this step: floats, or scalar arrays; a decay may also be an array like p. The float
0.0 is known to be no decay, and without decay p may be None. `ratio.value` is signal / noise; `ratio.times(k)` is k
times that in one division, and the way to end an update so that its bits do not depend on the program around it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam._checks import check_fields
from snr_adam._derivatives import arctan2, quotient, sqrt
from snr_adam._numerics import Scalar, abs_sq, times


@runtime_checkable
class Descent(Protocol):
    """What a descent has; see the module.

    `needs_params` may be a field, a property, or belong to the class. No type says that: it is looked for at run time.
    """

    if not TYPE_CHECKING:

        @property
        def needs_params(self) -> bool: ...

    def update(self, ratio, p, alpha, decay, /) -> Any: ...


def decays(decay) -> bool:
    """Whether there is weight decay, as far as one knows before the step."""
    return not (isinstance(decay, (int, float)) and decay == 0)


@dataclass(frozen=True)
class Decoupled:
    """-alpha signal / noise - (alpha lambda) p."""

    needs_params: ClassVar[bool] = False

    def update(self, ratio, p, alpha, decay):
        u = ratio.times(-alpha)
        return u - times(p, alpha * decay) if decays(decay) else u


@dataclass(frozen=True)
class TrustRatio:
    """The same, each array's step scaled to the norm of its parameter; inside of `jax.shard_map`, of its shard."""

    needs_params: ClassVar[bool] = True

    def update(self, ratio, p, alpha, decay):
        u = ratio.value
        u = u + times(p, decay) if decays(decay) else u
        return times(u, -alpha * _trust_ratio(p, u)) + ratio.zero


def _trust_ratio(p, u):
    """|p| / |u|, and 1 where either is 0 (LAMB, with phi the identity)."""
    p_norm, u_norm = _norm(p), _norm(u)
    return jnp.where((p_norm > 0) & (u_norm > 0), p_norm / jnp.where(u_norm > 0, u_norm, 1.0), 1.0)


def _norm(x):
    return sqrt(jnp.sum(abs_sq(x)))


@dataclass(frozen=True)
class Hyperball:
    """The parameter keeps its norm R and turns: p + u = R n(p - alpha R n(signal / noise)), n(x) = x / |x|.

    alpha is then the step's length over that of the parameter. R is read off the parameter at every step, which stays
    where it starts but for rounding, so nothing is kept. Meant for matrices; a parameter of norm 0 has no direction
    and takes plain steps until it has one, so begin with one. There is no weight decay.

    Reference: Wen et al., Fantastic Pretraining Optimizers and Where to Find Them 2.1: Hyperball Optimization, 2025;
    arXiv 2606.16899.
    """

    needs_params: ClassVar[bool] = True

    def update(self, ratio, p, alpha, decay):
        if decays(decay):
            raise ValueError(
                f"Hyperball with weight_decay={decay}: the norm of the parameter is fixed, and there is nothing to "
                "decay. Give weight_decay=0.0, or a mask that leaves these parameters out"
            )
        r, radius = ratio.value, _norm(p)
        size = _norm(r)
        step = times(r, jnp.where(radius > 0, alpha * radius / jnp.where(size > 0, size, 1.0), alpha))
        length = _norm(p - step)
        back = jnp.where((radius > 0) & (length > 0), radius / jnp.where(length > 0, length, 1.0), 1.0)
        return (times(p, back - 1.0) - times(step, back)) + ratio.zero


class _Rule:
    """What descents share that change something and hand on to another: `then`."""

    if TYPE_CHECKING:

        @property
        def then(self) -> Any: ...

    __post_init__ = check_fields

    @property
    def needs_params(self) -> bool:
        return self.then.needs_params


def _agreement(x, y):
    """The sign of x y; of Re(conj(x) y) for complex arrays. Not of a product that may be lost to rounding."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        return jnp.sign(x.real * y.real + x.imag * y.imag)
    return jnp.sign(x) * jnp.sign(y)


@dataclass(frozen=True)
class CautiousDecay(_Rule):
    """Decays only where the step and the decay pull the same way: lambda 1[(signal / noise) p >= 0].

    Reference: Chen et al., Cautious Weight Decay, arXiv 2510.12402, Algorithm 1.
    """

    then: Descent = Decoupled()

    def update(self, ratio, p, alpha, decay):
        if decays(decay):
            decay = jnp.where(_agreement(ratio.signal, p) >= 0, decay, 0.0)
        return self.then.update(ratio, p, alpha, decay)


class _SizeOfDecay(_Rule):
    """A rule that says how large a decay is: at most one of these."""

    def __post_init__(self):
        check_fields(self)
        inner = self.then
        while inner is not None:
            if isinstance(inner, (_SizeOfDecay, Hyperball)):
                what = "has no decay" if isinstance(inner, Hyperball) else "says how large the decay is, too"
                raise ValueError(f"{type(self).__name__}({self.then!r}): {type(inner).__name__} {what}: leave one out")
            inner = getattr(inner, "then", None)


@dataclass(frozen=True)
class IndependentDecay(_SizeOfDecay):
    """Decay that does not go with the learning rate, only with its schedule: (alpha / peak) lambda p.

    peak: alpha_max, the learning rate of which alpha is a share, in units of the parameters per step.

    Reference: Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2, with eta_t = alpha / peak.
    """

    peak: Scalar
    then: Descent = Decoupled()

    def update(self, ratio, p, alpha, decay):
        return self.then.update(ratio, p, alpha, decay / self.peak if decays(decay) else decay)


@dataclass(frozen=True)
class CorrectedDecay(_SizeOfDecay):
    """Decay that goes with the square of the learning rate, for layers that are normalised: (alpha^2 / peak) lambda p.

    There the norm of p settles where |u| / |p| is sqrt(2 alpha lambda): with alpha lambda it grows while alpha falls,
    and gradients with it. peak: alpha_max, in units of the parameters per step.

    Reference: Defazio, Why Gradients Rapidly Increase Near the End of Training, arXiv 2506.02285, Algorithm 1.
    """

    peak: Scalar
    then: Descent = Decoupled()

    def update(self, ratio, p, alpha, decay):
        return self.then.update(ratio, p, alpha, decay * (alpha / self.peak) if decays(decay) else decay)


@dataclass(frozen=True)
class CautiousUpdate(_Rule):
    """Only elements that agree with this step's gradient move, and they move further: r phi n / (sum phi + 1).

    phi = 1[r g > 0], n the number of elements, so that an array of one element takes half a step. The authors' code
    divides by max(mean phi, 1e-3) instead.

    Reference: Liang et al., Cautious Optimizers: Improving Training with One Line of Code, arXiv 2411.16085,
    Algorithm 1.
    """

    then: Descent = Decoupled()

    def update(self, ratio, p, alpha, decay):
        agree = _agreement(ratio.signal, ratio.gradient) > 0
        longer = agree.size / (jnp.sum(agree, dtype=ratio.zero.real.dtype) + 1.0)
        signal = jnp.where(agree, ratio.signal, jnp.zeros_like(ratio.signal))
        return self.then.update(ratio._replace(signal=signal, scale=ratio.scale * longer), p, alpha, decay)


@dataclass(frozen=True)
class ClippedUpdate(_Rule):
    """A shorter step where the gradient is larger than its noise knows: alpha / max(1, RMS), of decay too.

    RMS = sqrt(mean(g^2 / max(v^, eps^2))), the mean over one array. Noises that are no root of an average of squares
    have their own square for v^.

    Reference: Wortsman et al., Stable and Low-Precision Training for Large-Scale Vision-Language Models,
    arXiv 2304.13013, Algorithm 2; Shazeer & Stern, Adafactor, arXiv 1804.04235, section 6.
    """

    eps: Scalar | np.floating = 1e-8
    then: Descent = Decoupled()

    def update(self, ratio, p, alpha, decay):
        if isinstance(ratio.noise, float):
            raise ValueError(
                "ClippedUpdate measures a gradient against the noise that divides it, and here nothing divides the "
                "average of the gradients (Unit, Previous and Normalized do not): leave it out, or use RMS"
            )
        tiny, least = float(jnp.finfo(ratio.noise.dtype).tiny), self.eps * self.eps
        v = jnp.maximum(ratio.second(), jnp.maximum(least, tiny) if isinstance(least, jax.Array) else max(least, tiny))
        square = jnp.sum(quotient(abs_sq(ratio.gradient), v)) / max(ratio.gradient.size, 1)
        return self.then.update(ratio, p, alpha / jnp.maximum(1.0, sqrt(square)), decay)


@dataclass(frozen=True)
class Arctangent(_Rule):
    """height atan2(signal, width noise): scale-free, bounded by height pi / 2, and without eps if the noise has none.

    The paper's a is `height`, its b `width`. By default height is 4 / pi, so that a signal as large as its noise takes
    the step alpha, as Adam's does. Parts of complex numbers are taken one by one.

    Reference: Everett et al., Scaling Exponents Across Parameterizations and Optimizers, arXiv 2407.05872, section 4.4.
    """

    height: Scalar = 4 / math.pi
    width: Scalar = 1.0
    then: Descent = Decoupled()

    def update(self, ratio, p, alpha, decay):
        x, noise = times(ratio.signal, ratio.scale), self.width * ratio.noise

        def arctangent(part):
            return arctan2(part, jnp.asarray(noise, part.dtype))

        angle = jax.lax.complex(arctangent(x.real), arctangent(x.imag)) if jnp.iscomplexobj(x) else arctangent(x)
        return self.then.update(ratio._replace(signal=angle, scale=self.height, noise=1.0), p, alpha, decay)
