"""Denominators that divide first: the signal averages quotients g / noise. Their contract is that of `noise.py`.

Previous      max(sqrt(v_{t-1}), eps)            the noise before this gradient    ADOPT (Taniguchi et al. 2024)
Normalized    sqrt(v_t / (1 - b2^t)) + eps       the noise with it                 LaProp (Ziyin et al. 2020)
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from snr_adam._checks import check_fields
from snr_adam._numerics import Hyper, Scalar, decay_at, eps_at, lerp, root, square_like, square_onto
from snr_adam.noise import Squares, noise_of


class _Before(NamedTuple):
    gain: Scalar
    eps: Scalar
    inverse_clip: Scalar | None
    first: Any


@dataclass(frozen=True)
class Previous:
    """max(sqrt(v_{t-1}), eps): the noise as it was before this gradient, so that the two are independent.

    The quotient g / noise is clipped to +-clip(t - 1), by raising the noise to |g| / clip. The first gradient only
    fills v_1 = g_1^2: its noise is infinite and nothing moves.
    """

    b2: Hyper = 0.9999
    eps: Hyper = 1e-6
    clip: Hyper | None = None
    divides_first: ClassVar[bool] = True
    __post_init__ = check_fields

    def init(self, p):
        return square_like(p)

    def at(self, t, dtype):
        first = t == 1
        gain = jnp.where(first, 1.0, decay_at(self.b2, t, dtype).gain).astype(dtype)
        clip = self.clip((t - 1).astype(dtype)) if callable(self.clip) else self.clip
        # not 0 at first, which makes 0 / 0 where g is 0; inverted here, because a division by a scalar is compiled as a
        # product with its inverse, but not for leaves of one element
        inverse_clip = None if clip is None else 1.0 / jnp.where(first, 1.0, clip)
        return _Before(gain, eps_at(self.eps, t, dtype), inverse_clip, first)

    def update(self, v, g, k: _Before, center):
        return lerp(v, square_onto(v, g), k.gain)

    def estimate(self, v, g, k: _Before, center):
        noise = jnp.maximum(root(v), k.eps)
        if k.inverse_clip is not None:
            noise = jnp.maximum(noise, abs(g) * k.inverse_clip)
        return jnp.where(k.first, jnp.inf, noise)


@dataclass(frozen=True)
class Normalized(Squares):
    """The noise of RMS, by which each gradient is divided before the signal averages: it averages quotients.

    So a gradient keeps the size that it had against the noise of its own time.
    """

    b2: Hyper = 0.999
    eps: Hyper = 1e-15
    eps_root: Hyper = 0.0
    divides_first: ClassVar[bool] = True
    divides_by_new: ClassVar[bool] = True

    def update(self, v, g, k, center):
        return lerp(v, square_onto(v, g), k.v.gain)

    def estimate(self, v, g, k, center):
        return noise_of(v, k)
