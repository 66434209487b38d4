"""The lists that the laws run over: every numerator, every denominator, every preset, and trees with awkward leaves.

A new estimator or preset is one row here.
"""

import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import snr_adam
from snr_adam.parts import (
    EMA,
    RMS,
    Adapted,
    Arctangent,
    Belief,
    Cast,
    CautiousDecay,
    CautiousUpdate,
    ClippedUpdate,
    CorrectedDecay,
    Decoupled,
    Deviation,
    FromFirst,
    FromMean,
    Full,
    Gradient,
    Hyperball,
    IndependentDecay,
    Infinity,
    Maximum,
    Mean,
    Mixture,
    Nesterov,
    Normalized,
    Packed,
    Previous,
    Rectified,
    Sign,
    Spread,
    TrustRatio,
    Unit,
    VarianceReduced,
    Yogi,
)

SIGNALS = {
    "gradient": Gradient(),
    "ema": EMA(0.9),
    "ema_raw": EMA(0.9, debias=False),
    "mean": Mean(0.95),
    "nesterov": Nesterov(0.9),
    "nesterov_raw": Nesterov(0.9, debias=False),
    "mixture": Mixture(0.9, 0.999, 5.0),
    "sign": Sign(0.9, 0.99),
    "from_first": FromFirst(0.9),
    "variance_reduced": VarianceReduced(0.95, 0.025),
}
NOISES = {
    "rms": RMS(0.999),
    "rms_raw": RMS(0.9, eps=0.0, eps_root=1e-8, debias=False, initial=0.1),
    "maximum": Maximum(0.999),
    "infinity": Infinity(0.999),
    "belief": Belief(0.999),
    "yogi": Yogi(0.999),
    "rectified": Rectified(0.999),
    "previous": Previous(0.9999, clip=lambda count: count**0.25),
    "previous_unclipped": Previous(0.9999),
    "deviation": Deviation(0.9),
    "deviation_debiased": Deviation(0.9, eps_in_sqrt=False, debias=True),
    "spread": Spread(0.95),
    "unit": Unit(),
    "normalized": Normalized(0.999),
    "adapted": Adapted(0.95),
    "from_mean": FromMean(0.9, 0.95),
    "from_mean_alone": FromMean(0.9),
}
DESCENTS = {
    "decoupled": Decoupled(),
    "trust_ratio": TrustRatio(),
    "hyperball": Hyperball(),
    "cautious_decay": CautiousDecay(),
    "independent_decay": IndependentDecay(0.1),
    "corrected_decay": CorrectedDecay(0.1),
    "cautious_update": CautiousUpdate(),
    "clipped_update": ClippedUpdate(),
    "arctangent": Arctangent(),
    "nested": ClippedUpdate(then=CautiousUpdate(CorrectedDecay(0.1, CautiousDecay(TrustRatio())))),
}


def go_together(signal, noise) -> bool:
    """Whether the noise measures around something that this signal keeps; see `_contracts.check_fit`."""
    return not (hasattr(noise, "misfit") and noise.misfit(signal))


def signal_for(noise: str):
    """The EMA, or the signal that this noise measures around."""
    return SIGNALS["mean" if noise in ("spread", "adapted") else "ema"]


STORAGES = {
    "float32": Full(),
    "bfloat16": Cast("bfloat16", "bfloat16"),
    "signal in bfloat16": Cast(mu="bfloat16"),
    "signal in float16": Cast(mu="float16"),
    "noise in bfloat16": Cast(nu="bfloat16"),
    "packed": Packed(),
}
# name -> the preset, its Optax namesake (None if there is none)
PRESETS = {
    name: (getattr(snr_adam, name), getattr(optax, name, None) or getattr(optax.contrib, name, None))
    for name in (
        "adam",
        "adamw",
        "nadam",
        "nadamw",
        "adamax",
        "adamaxw",
        "amsgrad",
        "adabelief",
        "yogi",
        "radam",
        "rmsprop",
        "lion",
        "adopt",
        "ademamix",
        "lamb",
        "centered_adam",
        "stable_adamw",
        "cautious_adamw",
        "adamc",
        "adam_atan2",
        "laprop",
        "adams",
        "bcos",
        "mars",
        "adamh",
        "msvag",
    )
}

# those whose step takes a norm, a mean or a count of the whole array
SUMS = ("lamb", "stable_adamw", "cautious_adamw", "mars", "adamh")


def tree(seed: int = 0, dtype=None, scale: float = 1.0):
    """A nested tree with a scalar, odd, matrix and empty leaves, drawn from a normal distribution."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), dtype or jnp.result_type(float))

    return {"scalar": draw(), "one": draw(1), "block": [draw(7), draw(3, 5)], "empty": draw(0, 3)}


def gradients(steps: int, seed: int = 1, dtype=None):
    """`steps` gradient trees for `tree()`, of changing size and a mean that is not zero."""
    rng = np.random.default_rng(seed)
    for t in range(steps):
        size = float(np.exp(rng.normal()))
        yield jax.tree.map(lambda x, size=size: x * size + 0.1, tree(1000 * seed + t, dtype))


def stacked(steps: int, seed: int = 1, dtype=None):
    """`gradients` as one tree whose leaves have a leading axis of length `steps`, for `run`."""
    return jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *gradients(steps, seed, dtype))


def _known(option: str, value) -> bool:
    """Whether this XLA has the option."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


# Tests of what a program computes, to a tolerance, spend most of their time in XLA, and an unoptimized program is as
# good as another: without MLIR, LLVM's passes and a module per kernel, compiling takes a fifth. Tests of bits between
# programs, of bytes and of what the compiler makes of a trick compile as users do.
QUICK = {
    option: value
    for option, value in {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }.items()
    if _known(option, value)
}
# ... and the same for programs that run for long
FAST = {option: value for option, value in QUICK.items() if option != "xla_backend_optimization_level"}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
fast_jit = functools.partial(jax.jit, compiler_options=FAST)


def run(tx, params, grads, compiler_options=None):
    """Every update, the last parameters and the last state of one jitted scan over stacked gradients."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    def scan(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)

    (params, state), updates = jax.jit(scan, compiler_options=compiler_options)(params, grads)
    return updates, params, state


def script(folder: str, name: str):
    """A module of `examples` or `benchmarks`; they import each other, as they do when they are run."""
    path = str(Path(__file__).parent.parent / folder)
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)
