"""Parts that a user might write outside of the package: nothing is imported but JAX and what `snr_adam.parts` says.

`test_own_parts.py` runs them, `test_typing.py` has two type checkers read them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from snr_adam.parts import Average


@dataclass(frozen=True)
class HeavyBall:
    """A numerator: h = b h + g, times (1-b) / (1 - b^t), which is Adam's m^ by another recursion."""

    b: float = 0.9

    def init(self, p):
        return jnp.zeros_like(p, jnp.float32)

    def at(self, t, dtype):
        return (1 - self.b) / (1 - self.b ** t.astype(dtype))

    def update(self, h, g, scale):
        return self.b * h + g

    def estimate(self, h, g, scale):
        return h, scale

    def average(self, scale):
        return Average(gain=1.0, leak=1 - self.b, debias=scale)


@dataclass(frozen=True)
class ClippedMean:
    """A numerator that is no linear average, and so has no `average`: an EMA of clipped gradients, not corrected."""

    b: float = 0.9
    most: float = 1.0

    def init(self, param: jax.Array) -> jax.Array:
        return jnp.zeros_like(param, jnp.float32)

    def at(self, step: jax.Array, real: Any) -> tuple[()]:
        return ()

    def update(self, memory: jax.Array, gradient: jax.Array, numbers: tuple[()]) -> jax.Array:
        return self.b * memory + (1 - self.b) * jnp.clip(gradient, -self.most, self.most)

    def estimate(self, memory: jax.Array, gradient: jax.Array, numbers: tuple[()]) -> tuple[jax.Array, float]:
        return memory, 1.0


@dataclass(frozen=True)
class Squares:
    """A denominator: the root of b v + g^2 (1-b) over 1 - b^t, plus eps; it says what telemetry asks."""

    b: float = 0.99
    eps: float = 1e-8

    def init(self, p):
        return jnp.zeros_like(p, jnp.float32)

    def at(self, t, dtype):
        return 1 / (1 - self.b ** t.astype(dtype))

    def update(self, v, g, debias, center):
        return self.b * v + (1 - self.b) * g * g

    def estimate(self, v, g, debias, center):
        return jnp.sqrt(debias * v) + self.eps

    def average(self, debias):
        return Average(1 - self.b, 1 - self.b, debias)

    def second(self, v, center):
        return v


@dataclass(frozen=True)
class MeanSize:
    """A denominator that is no root of squares: the average of |g|, corrected."""

    b: float = 0.99

    def init(self, p):
        return jnp.zeros_like(p, jnp.float32)

    def at(self, t, dtype):
        return 1 / (1 - self.b ** t.astype(dtype))

    def update(self, n, g, debias, center):
        return self.b * n + (1 - self.b) * abs(g)

    def estimate(self, n, g, debias, center):
        return n * debias + 1e-8


@dataclass(frozen=True)
class Bounded:
    """A descent: no element of signal / noise counts more than `most`; weight decay as AdamW's."""

    most: float = 0.5
    needs_params: ClassVar[bool] = False

    def update(self, ratio, p, alpha, decay):
        u = -alpha * jnp.clip(ratio.value, -self.most, self.most)
        return u if p is None else u - alpha * decay * p


@dataclass(frozen=True)
class HalvesExchanged:
    """A storage like `Packed` with the halves exchanged: v in the high half of a word, m in the low one."""

    def encode(self, mu, nu, dither):
        m, v = (jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) for x in (mu, nu))
        bits = dither(mu.shape, 0)
        high = (v + (bits & 0xFFFF)) & jnp.uint32(0xFFFF0000)
        return high | (m + (bits >> 16)) >> 16, ()

    def decode(self, mu, nu, dtype):
        m, v = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in (mu << 16, mu & jnp.uint32(0xFFFF0000)))
        return m.astype(dtype), v.astype(dtype)


@dataclass(frozen=True)
class Exchanged:
    """A storage that has the moments as they are, each in the other's place."""

    def encode(self, mu: Any, nu: Any, dither: Any) -> tuple[Any, Any]:
        return nu, mu

    def decode(self, mu: Any, nu: Any, dtype: Any) -> tuple[Any, Any]:
        return nu, mu


@dataclass(frozen=True)
class Root:
    """A storage of sqrt(v) in place of v."""

    def encode(self, mu, nu, dither):
        return mu, jnp.sqrt(nu)

    def decode(self, mu, nu, dtype):
        return mu, nu * nu
