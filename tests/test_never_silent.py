"""A table of things that go wrong, and what must come of each: an error that teaches, or a stated result, not silence.

A row is an input and what is expected of it. `Refused` expects an error whose text names the path or the argument, the
value or the shape that was got, and what to do; anything else is a function that looks at the result. A row about
something new is one line; rows of one subject stand together.
"""

import functools
import itertools
from typing import Any, NamedTuple

import equinox as eqx
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import quick_jit
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import snr_adam
from snr_adam import accumulate, adam, adamw, guard, observe, scale_by_snr
from snr_adam.parts import (
    EMA,
    RMS,
    Adapted,
    Belief,
    Cast,
    FromMean,
    Gradient,
    Infinity,
    Mean,
    Packed,
    Shared,
    Spread,
    TrustRatio,
)
from snr_adam.precision import round_stochastically
from snr_adam.state import manifest, share, suggest_sharing
from snr_adam.telemetry import plots
from snr_adam.transform import ScaleBySnrState


class Refused(NamedTuple):
    """The error, and texts that it must contain: where (path or argument), what was got, and what to do."""

    error: type
    where: str
    got: str
    do: str


number = functools.partial(Refused, ValueError)
kind = functools.partial(Refused, TypeError)
RANGE, DECAY, POSITIVE = "must be a finite number >= 0", "must be in [0, 1)", "must be a finite number > 0"

F8, WHOLE = "float8_e4m3fn", "a whole number of microbatches from 1 on"
KIN = (
    ("adam", "nadam", "adamax", "adabelief", "yogi", "radam", "adopt"),
    ("adamw", "adamaxw", "nadamw", "centered_adam", "laprop", "msvag"),
    ("adams", "bcos"),
)
MADE = {
    **dict.fromkeys(("adam", "adamw"), "EMA/RMS"),
    **dict.fromkeys(("nadam", "nadamw"), "Nesterov/RMS"),
    **dict.fromkeys(("adamax", "adamaxw"), "EMA/Infinity"),
    "adabelief": "EMA/Belief",
    "yogi": "EMA/Yogi",
    "radam": "EMA/Rectified",
    "adopt": "EMA/Previous",
    "centered_adam": "Mean/Spread",
    "laprop": "EMA/Normalized",
    "msvag": "Mean/Adapted",
    "adams": "EMA/FromMean",
    "bcos": "FromFirst/FromMean",
}

HYPERPARAMETERS = {
    "learning rate negative": (lambda: adam(-1.0), number("learning_rate", "-1.0", RANGE)),
    "learning rate NaN": (lambda: adam(float("nan")), number("learning_rate", "nan", RANGE)),
    "learning rate infinite": (lambda: adamw(float("inf")), number("learning_rate", "inf", RANGE)),
    "learning rate None": (lambda: adam(None), kind("learning_rate", "None", RANGE)),
    "learning rate a string": (lambda: adam("1e-3"), kind("learning_rate", "'1e-3'", RANGE)),
    "learning rate True": (lambda: adam(True), kind("learning_rate", "True", RANGE)),
    "learning rate complex": (lambda: adam(1j), kind("learning_rate", "1j", RANGE)),
    "learning rate a class": (lambda: adam(float), kind("learning_rate", "float", RANGE)),
    "learning rate a negative array": (lambda: adam(jnp.float32(-1)), number("learning_rate", "-1", RANGE)),
    "learning rate a negative NumPy number": (lambda: adam(np.float64(-1)), number("learning_rate", "-1", RANGE)),
    "learning rate a vector": (lambda: adam(jnp.ones(3)), number("learning_rate", "(3,)", "one number")),
    "learning rate the parameters": (lambda: adam({"w": jnp.ones(3)}), number("at w", "(3,)", "init(params)")),
    "learning rate negative in a tree": (lambda: adam({"a": 1.0, "b": -1.0}), number("at b", "-1.0", RANGE)),
    "learning rate None in a tree": (lambda: adam({"a": 1.0, "b": None}), kind("at b", "None", RANGE)),
    "learning rate missing": (lambda: adam(), kind("learning_rate", "missing", "use learning_rate, b1")),
    "lr": (lambda: adam(lr=1e-3), kind("adam", "'lr'", "did you mean learning_rate?")),
    "betas": (lambda: adam(1e-3, betas=(0.9, 0.99)), kind("adam", "'betas'", "did you mean b1 and b2?")),
    "b1 a pair": (lambda: adam(1e-3, (0.9, 0.99)), kind("b1", "(0.9, 0.99)", "given as b1=0.9, b2=0.99")),
    "b1 negative": (lambda: adam(1e-3, -0.1), number("b1", "-0.1", DECAY)),
    "b1 one": (lambda: adam(1e-3, 1), number("b1", "1", DECAY)),
    "b1 in the part": (lambda: EMA(1.5), number("b1", "1.5", DECAY)),
    "b2 one": (lambda: adam(1e-3, b2=1.0), number("b2", "1.0", DECAY)),
    "b2 NaN": (lambda: adam(1e-3, b2=float("nan")), number("b2", "nan", DECAY)),
    "b2 that float32 takes for 1": (lambda: adam(1e-3, b2=1 - 1e-9), number("b2", "0.999999999", "float32")),
    "b2 in the part": (lambda: scale_by_snr(EMA(), RMS(1.0)), number("b2", "1.0", DECAY)),
    "b3 of ademamix": (lambda: snr_adam.ademamix(1e-3, b3=1.0), number("b3", "1.0", DECAY)),
    "b of centered_adam": (lambda: snr_adam.centered_adam(1e-3, 1.0), number("centered_adam: b", "1.0", DECAY)),
    "decay of rmsprop": (lambda: snr_adam.rmsprop(1e-3, 1.1), number("decay", "1.1", DECAY)),
    "momentum of rmsprop": (lambda: snr_adam.rmsprop(1e-3, momentum=1.0), number("momentum", "1.0", DECAY)),
    "threshold of radam": (lambda: snr_adam.radam(1e-3, threshold=3.0), number("threshold", "3.0", ">= 4")),
    "alpha of ademamix": (lambda: snr_adam.ademamix(1e-3, alpha=-1.0), number("alpha", "-1.0", RANGE)),
    "eps negative": (lambda: adam(1e-3, eps=-1e-8), number("eps", "-1e-08", POSITIVE)),
    "eps zero": (lambda: adam(1e-3, eps=0.0), number("eps", "0.0", POSITIVE)),
    "eps zero in float32": (lambda: adam(1e-3, eps=1e-50), number("eps", "1e-50", "float32: at least 1.2e-38")),
    "eps zero in float32, part": (lambda: RMS(eps=1e-50), number("eps", "1e-50", "float32: at least 1.2e-38")),
    "eps_root negative": (lambda: adam(1e-3, eps_root=-1.0), number("eps_root", "-1.0", RANGE)),
    "weight decay negative": (lambda: adamw(1e-3, weight_decay=-0.1), number("weight_decay", "-0.1", RANGE)),
    "weight decay None": (lambda: adamw(1e-3, weight_decay=None), kind("weight_decay", "None", RANGE)),
    "weight decay of descend": (lambda: snr_adam.descend(1e-3, weight_decay=-1.0), number("weight", "-1.0", RANGE)),
    "storage unknown": (lambda: adam(1e-3, storage="fp8"), number("storage", "'fp8'", "['bfloat16', 'float32', 'pa")),
    "storage None": (lambda: adam(1e-3, storage=None), number("storage", "None", "use one of")),
    "storage and mu_dtype": (
        lambda: adam(1e-3, mu_dtype="bfloat16", storage="packed"),
        number("mu", "packed", "give one"),
    ),
    "moments as integers": (lambda: adam(1e-3, mu_dtype="int8"), number("mu", "int8", "a floating dtype, such as")),
    "moments as nonsense": (lambda: adam(1e-3, mu_dtype="small"), number("mu", "'small'", "a floating dtype, such as")),
    "v as float16": (lambda: Cast(nu="float16"), number("nu", "float16", "use 'bfloat16'")),
    "b1, b2, learning rate": (lambda: adam(0.9, 0.999, 1e-3), number("learning_rate", "0.9", "the order is")),
    "injected": (lambda: optax.inject_hyperparams(adam)(-1.0), number("learning_rate", "-1.0", RANGE)),
    "clip_norm zero": (lambda: guard(adam(1e-3), 0.0), number("clip_norm", "0.0", POSITIVE)),
    "clip_norm a string": (lambda: guard(adam(1e-3), "1"), kind("clip_norm", "'1'", POSITIVE)),
    "max_consecutive zero": (lambda: guard(adam(1e-3), max_consecutive=0), number("max_consec", "0", "int >= 1")),
    "guard of a number": (lambda: guard(1.0), kind("tx", "1.0", "write guard(")),
    "bits of the remainder": (lambda: snr_adam.carry_remainder(adam(1.0), "4"), number("bits", "'4'", "use '16'")),
    "schedule of None": (lambda: step(adam(lambda count: None)), kind("schedule", "None", "must be one real number")),
    "schedule of a string": (lambda: step(adam(lambda count: "1")), kind("schedule", "'1'", "must be one real number")),
    "schedule of a vector": (lambda: step(adam(lambda t: jnp.ones(2))), number("schedule", "(2,)", "one number")),
    "schedule of a negative rate": (lambda: step(adam(lambda t: -1.0)), number("learning_rate", "is -1.0", RANGE)),
    "schedule of NaN": (lambda: step(adam(lambda t: np.nan)), number("learning_rate", "is nan", RANGE)),
    "schedule of a negative rate, step by step": (
        lambda: adam(lambda t: -0.1 * (t + 1)).update(G, adam(1.0).init(W), W),
        number("learning_rate", "is -0.1", RANGE),
    ),
    "schedule of a negative rate in a tree": (
        lambda: step(adam({"w": lambda t: -2.0, "layer": 0.1})),
        number("learning_rate", "is -2.0", RANGE),
    ),
    "schedule of a decay over 1": (lambda: step(adam(0.1, b1=lambda t: 1.5)), number("b", "is 1.5", DECAY)),
    "schedule of a decay that is 1": (lambda: step(adam(0.1, b2=lambda t: 1.0)), number("b", "is 1.0", DECAY)),
    "schedule of a negative weight decay": (
        lambda: step(adamw(0.1, weight_decay=lambda t: -1.0)),
        number("weight_decay", "is -1.0", RANGE),
    ),
    "schedule of a negative eps": (
        lambda: step(adam(0.1, eps=lambda t: -1.0)),
        number("eps", "is -1.0", "must be 0, or"),
    ),
    "schedule of a negative alpha": (
        lambda: step(snr_adam.ademamix(0.1, alpha=lambda t: -5.0)),
        number("alpha", "is -5.0", RANGE),
    ),
    "eps zero in float16": (lambda: adam(1e-3, eps=np.float16(1e-8)), number("eps", "0.0", POSITIVE)),
    "eps zero in float16 of JAX": (lambda: adam(1e-3, eps=jnp.float16(1e-8)), number("eps", "0.0", POSITIVE)),
    "eps zero where nothing else divides": (
        lambda: step(scale_by_snr(noise=Infinity(eps=0.0)), jnp.zeros(2), jnp.zeros(2)),
        lambda u: not np.any(u),
    ),
    "eps zero in float32, with float64 on": (
        lambda: wide(lambda: step(adam(1e-3, eps=1e-50), jnp.ones(2, "float32"), jnp.ones(2, "float32"))),
        number("eps", "1e-50", "is 0 in float32"),
    ),
    "eps zero in float32, adamax": (
        lambda: wide(lambda: step(snr_adam.adamax(1e-3, eps=1e-50), *[jnp.zeros(2, "float32")] * 2)),
        number("eps", "1e-50", "give a larger one"),
    ),
    "moments in 8 bits": (lambda: adam(1e-3, mu_dtype="float8_e4m3fn"), number("mu", "float8", "use 'bfloat16'")),
    "rmsprop looks ahead along nothing": (
        lambda: snr_adam.rmsprop(1e-3, nesterov=True),
        number("rmsprop", "momentum is None", "give one"),
    ),
    "clip_norm whose squares are lost": (lambda: guard(adam(1e-3), 1e-20), number("clip_norm", "1e-20", "at least")),
    "every of a half": (lambda: accumulate(A, 0.5), number("every", "0.5", WHOLE)),
    "every of two and a half": (lambda: accumulate(A, 2.5), number("every", "2.5", WHOLE)),
    "every of zero": (lambda: accumulate(A, 0), number("every", "0", WHOLE)),
    "every of NumPy's zero": (lambda: accumulate(A, np.int64(0)), number("every", "0", WHOLE)),
    "every of infinity": (lambda: accumulate(A, np.inf), number("every", "inf", WHOLE)),
    "every of NaN": (lambda: accumulate(A, np.nan), number("every", "nan", WHOLE)),
    "every a string": (lambda: accumulate(A, "4"), kind("every", "'4'", WHOLE)),
    "every True": (lambda: accumulate(A, True), kind("every", "True", WHOLE)),
    "every None": (lambda: accumulate(A, None), kind("every", "None", WHOLE)),
    "every a vector": (lambda: accumulate(A, jnp.ones(2)), number("every", "(2,)", WHOLE)),
    "every a schedule of 0": (lambda: step(accumulate(A, lambda t: 0)), number("every", "0", WHOLE)),
    "every a schedule of a half": (lambda: step(accumulate(A, lambda t: 0.5)), number("every", "0.5", WHOLE)),
    "every a schedule of 0, not known": (
        lambda: step(accumulate(A, lambda t: 0 * t))["w"],
        lambda u: np.allclose(u, [-0.1, 0.1, -0.1]),
    ),
    "every NumPy's 1": (lambda: step(accumulate(A, np.int32(1)))["w"], lambda u: np.allclose(u, [-0.1, 0.1, -0.1])),
    "every an array": (lambda: step(accumulate(A, jnp.int32(2)))["w"], lambda u: not np.any(u)),
    "learning rate zero": (lambda: step(adam(0.0)), lambda u: not np.any(u["w"])),
    "b1 zero": (lambda: step(adam(0.1, b1=0.0)), lambda u: np.allclose(u["w"], [-0.1, 0.1, -0.1])),
    "b2 zero": (lambda: step(adam(0.1, b2=0)), lambda u: np.allclose(u["w"], [-0.1, 0.1, -0.1])),
    "b2 just under 1": (lambda: step(adam(0.1, b2=1 - 6e-8)), lambda u: np.allclose(u["w"], [-0.1, 0.1, -0.1])),
    "traced, under checkify": (lambda: checked(b2=1.5), lambda text: "b2=1.5: must be in [0, 1)" in text),
    "traced and right, under checkify": (lambda: checked(b2=0.5, learning_rate=0.1), lambda text: text is None),
    "traced, injected": (lambda: checked_injection(-2.0), lambda text: "learning_rate=-2.0: must be" in text),
    "an unknown name to check": (lambda: checked(beta=1.0), kind("beta", "no hyper-parameter", "use one of")),
}


class NoEstimate:
    """A denominator that lacks a method."""

    def init(self, p): ...

    def at(self, t, dtype): ...

    def update(self, v, g, numbers, center): ...


class NoField:
    """A descent that lacks a field."""

    def update(self, ratio, p, alpha, decay): ...


class NoDecay(NoField):
    """A descent that takes too little."""

    needs_params = False

    def update(self, ratio, p, alpha): ...


class NoDecode:
    """A storage of which nothing comes back."""

    def encode(self, mu, nu, dither): ...


class NoDither(NoDecode):
    """A storage that takes too little."""

    def encode(self, mu, nu): ...

    def decode(self, mu, nu, dtype): ...


INSTEAD, NAMES = "give a part such as", "use one of the names ['bfloat16', 'float32', 'packed']"
PARTS = {
    "a noise by name": (lambda: scale_by_snr(noise="rms"), kind("noise='rms'", "str, not a noise", INSTEAD)),
    "no noise": (lambda: scale_by_snr(noise=None), kind("noise=None", "NoneType, not a noise", INSTEAD)),
    "decays for parts": (
        lambda: scale_by_snr(0.9, 0.999),
        kind("signal=0.9", "float, not a signal", "such as EMA(0.9)"),
    ),
    "parts exchanged": (
        lambda: scale_by_snr(RMS(), EMA()),
        kind("signal=RMS(", "not a signal, whose 'update' takes (state, g, numbers)", "the signal before the noise"),
    ),
    "a noise for both": (lambda: scale_by_snr(EMA(), EMA()), kind("noise=EMA(", "not a noise, whose", INSTEAD)),
    "an optimizer for a signal": (lambda: scale_by_snr(A), kind("signal=Gr", "lacks 'at' and 'estimate'", INSTEAD)),
    "a class for a signal": (lambda: scale_by_snr(EMA, RMS), kind("signal=", "EMA'> is a class", "write EMA()")),
    "a class for a noise": (lambda: scale_by_snr(EMA(), RMS), kind("noise=", "RMS'> is a class", "write RMS()")),
    "a class for a descent": (
        lambda: snr_adam.descend(0.1, descent=TrustRatio),
        kind("descent=", "TrustRatio'> is a class", "write TrustRatio()"),
    ),
    "a class for a storage": (
        lambda: scale_by_snr(storage=Packed),
        number("storage=", "Packed'> is a class", "write Packed()"),
    ),
    "a method missing": (
        lambda: scale_by_snr(noise=NoEstimate()),
        kind("noise=", "NoEstimate object", "lacks 'estimate', which a noise has"),
    ),
    "a field missing": (
        lambda: snr_adam.descend(0.1, descent=NoField()),
        kind("descent=", "NoField object", "lacks 'needs_params', which a descent has"),
    ),
    "an argument missing": (
        lambda: snr_adam.descend(0.1, descent=NoDecay()),
        kind("descent=", "NoDecay object", "whose 'update' takes (ratio, p, alpha, decay)"),
    ),
    "a descent by name": (
        lambda: snr_adam.descend(0.1, descent="plain"),
        kind("descend: descent='plain'", "str, not a descent", "such as Decoupled()"),
    ),
    "a storage with a typo": (lambda: adam(0.1, storage="pack"), number("storage='pack'", "no name", NAMES)),
    "a part for a storage": (lambda: scale_by_snr(storage=RMS()), number("storage=RMS(", "not a storage", NAMES)),
    "a storage without decode": (
        lambda: scale_by_snr(storage=NoDecode()),
        number("storage=", "lacks 'decode', which a storage has", NAMES),
    ),
    "a storage without dither": (
        lambda: scale_by_snr(storage=NoDither()),
        number("storage=", "not a storage, whose 'encode' takes (mu, nu, dither)", NAMES),
    ),
    "a shared noise by name": (
        lambda: scale_by_snr(noise=Shared(noise="rms", axes=0)),
        kind("Shared: noise='rms'", "str, not a noise", "such as RMS(0.999)"),
    ),
    "a shared class": (lambda: scale_by_snr(noise=Shared(RMS, 0)), kind("Shared: noise=", "is a class", "write RMS()")),
    "shared twice": (
        lambda: scale_by_snr(noise=Shared(Shared(RMS(), 0), 1)),
        kind("Shared: noise=Shared(", "of type Shared, not a noise", INSTEAD),
    ),
    "a spread around an EMA": (
        lambda: scale_by_snr(EMA(), Spread()),
        number("noise=Spread(", "signal=EMA(", "use Mean(0.95)"),
    ),
    "a spread of another decay": (
        lambda: scale_by_snr(Mean(0.9), Spread(0.95)),
        number("noise=Spread(b2=0.95", "signal=Mean(b1=0.9)", "use Mean(0.95)"),
    ),
    "a spread around no mean": (
        lambda: scale_by_snr(Gradient(), Spread()),
        number("noise=Spread(", "signal=Gradient(", "use Mean(0.95)"),
    ),
    "a mean that adapts to an EMA": (
        lambda: scale_by_snr(EMA(), Adapted()),
        number("noise=Adapted(", "signal=EMA(", "use Mean(0.9)"),
    ),
    "a noise of a mean that is not kept": (
        lambda: scale_by_snr(Gradient(), FromMean()),
        number("noise=FromMean(", "signal=Gradient(", "use EMA(0.9)"),
    ),
    "a noise of a mean of another decay": (
        lambda: scale_by_snr(EMA(0.95), FromMean(0.9)),
        number("noise=FromMean(", "signal=EMA(b1=0.95", "use EMA(0.9)"),
    ),
    "a belief in a corrected mean": (
        lambda: scale_by_snr(Mean(), Belief()),
        number("noise=Belief(", "signal=Mean(", "use EMA, Nesterov or Mixture"),
    ),
    "a belief in nothing": (
        lambda: snr_adam.descend(0.1, Gradient(), Belief()),
        number("noise=Belief(", "signal=Gradient(", "use EMA"),
    ),
    "a spread around its mean": (
        lambda: step(scale_by_snr(Mean(jnp.float32(0.9)), Spread(jnp.float32(0.9))))["w"],
        lambda u: np.allclose(abs(u), 1),
    ),
    "a spread around its mean, injected": (
        lambda: step(optax.inject_hyperparams(snr_adam.centered_adam)(0.1))["w"],
        lambda u: np.allclose(abs(u), 0.1),
    ),
    "a noise of its mean, injected": (
        lambda: step(optax.inject_hyperparams(snr_adam.adams)(0.1))["w"],
        lambda u: np.all(u),
    ),
    "shared as a signal": (lambda: scale_by_snr(Shared(RMS(), 0)), kind("signal=Shared(", "not a signal", INSTEAD)),
}

W = {"w": jnp.asarray([1.0, -2.0, 3.0]), "layer": [jnp.zeros(2), jnp.ones((2, 3))]}
G = {"w": jnp.asarray([0.5, -1.0, 2.0]), "layer": [jnp.ones(2), jnp.ones((2, 3))]}


def step(tx, grads=G, params=W, state=None):
    """The update of a first step."""
    return jax.jit(tx.update)(grads, tx.init(params) if state is None else state, params)[0]


def checked(**values):
    """What `checkify` says of a jitted step whose hyper-parameters are traced."""

    def body(values):
        snr_adam.check_hyperparams(**values)
        return 0

    return checkify.checkify(jax.jit(body))({name: jnp.float32(x) for name, x in values.items()})[0].get()


def checked_injection(learning_rate):
    tx = optax.inject_hyperparams(adam)(0.1)
    state = tx.init(W)
    state.hyperparams["learning_rate"] = jnp.float32(learning_rate)

    @jax.jit
    def body(state):
        snr_adam.check_hyperparams(**state.hyperparams)
        return tx.update(G, state, W)

    return checkify.checkify(body)(state)[0].get()


def with_leaf(tree, leaf):
    return {**tree, "layer": [tree["layer"][0], leaf]}


def state_of(tx, params=W):
    return tx.init(params)


def counted(count):
    return (A.init(W)[0]._replace(count=count), optax.EmptyState())


def after_nadams():
    """A jitted step that has run with the right state meets another one: it is traced again, and refused."""
    tx = snr_adam.nadam(0.1)
    update = jax.jit(tx.update)
    update(G, tx.init(W), W)
    return update(G, A.init(W), W)


PASS, ORDER = "pass the gradients of the parameters", "update(grads, state, params)"
A, RADAM, CARRY = adam(0.1), snr_adam.radam(0.1), snr_adam.carry_remainder(adam(0.1))
leaf = functools.partial(with_leaf, G)
shape = functools.partial(Refused, ValueError, "gradient layer/1")
no_moments = functools.partial(Refused, TypeError, do="leave it out of the trained parameters")

TREES = {
    "a missing key": (lambda: step(A, {"w": G["w"]}, None, state_of(A)), number("layer/0", "lack", ORDER)),
    "an extra key": (lambda: step(A, {**G, "b": G["w"]}, None, state_of(A)), number("b", "have besides", ORDER)),
    "a renamed key": (lambda: step(A, {"v": G["w"], "layer": G["layer"]}, W), number("lack w", "besides v", ORDER)),
    "a longer list": (lambda: step(A, {**G, "layer": [*G["layer"], G["w"]]}, W), number("layer/2", "have", ORDER)),
    "a tuple for a list": (lambda: step(A, {**G, "layer": tuple(G["layer"])}, W), number("moments", "[*, *]", ORDER)),
    "parameters of another model": (lambda: step(A, G, {"x": W["w"]}, state_of(A)), number("parameters", "w", ORDER)),
    "a state of another model": (lambda: step(A, G, W, state_of(A, {"x": W["w"]})), number("moments", "lack x", ORDER)),
    "a state of another width": (
        lambda: step(A, G, W, state_of(A, with_leaf(W, jnp.ones((4, 3))))),
        shape("(2, 3) and dtype float32 but its moments have shape (4, 3)", PASS),
    ),
    **{
        f"a state of {one} for {other}": (
            functools.partial(step, getattr(snr_adam, other)(0.1), G, W, getattr(snr_adam, one)(0.1).init(W)),
            number("moments are", f"those of {MADE[one]} (signal/noise)", f"not of {MADE[other]}"),
        )
        for kin in KIN
        for one, other in itertools.permutations(kin, 2)
    },
    "a state of adam for nadam, jitted with nadam's before": (after_nadams, number("moments", "EMA/RMS", "from_optax")),
    "a state whose parts are not known": (
        lambda: step(A, state=(ScaleBySnrState(*A.init(W)[0]), optax.EmptyState()))["w"],
        lambda u: np.allclose(abs(u), 0.1),
    ),
    "a state of adamax taken over": (
        lambda: snr_adam.from_optax(snr_adam.adamax(0.1).init(W), A.init(W)),
        number("moments at 0", "EMA/Infinity", "only Adam's move"),
    ),
    "a state of adamax for Optax": (
        lambda: snr_adam.to_optax(snr_adam.adamax(0.1).init(W)),
        number("moments at 0", "EMA/Infinity", "only Adam's move"),
    ),
    "a state of optax.adam for adamax": (
        lambda: snr_adam.from_optax(optax.adam(0.1).init(W), snr_adam.adamax(0.1).init(W)),
        number("moments at 0", "EMA/Infinity", "only Adam's move"),
    ),
    "a state of optax.adam, taken over, for adamax": (
        lambda: step(snr_adam.adamax(0.1), state=snr_adam.from_optax(optax.adam(0.1).init(W))),
        number("signal/noise", "those of Adam", "EMA/Infinity"),
    ),
    "a state of nadam taken over by radam": (
        lambda: step(RADAM, state=snr_adam.from_optax(snr_adam.nadam(0.1).init(W), RADAM.init(W)))["w"],
        lambda u: np.allclose(u, -0.1 * G["w"]),
    ),
    "a state of adamax in another storage": (
        lambda: snr_adam.from_optax(snr_adam.adamax(0.1).init(W), snr_adam.adamax(0.1, storage="bfloat16").init(W)),
        lambda state: state[0].made == "EMA/Infinity" and state[0].nu["w"].dtype == jnp.bfloat16,
    ),
    **{
        f"a state of adamw for {name}": (
            functools.partial(lambda make: step(make(0.1), state=adamw(0.1).init(W))["w"], getattr(snr_adam, name)),
            lambda u: np.all(u),
        )
        for name in ("stable_adamw", "cautious_adamw", "adamc", "adam_atan2", "adamh")
    },
    "a state of adamw for mars": (
        lambda: step(snr_adam.mars(0.1), state=adamw(0.1).init(W)),
        number("moments are", "those of EMA/RMS", "not of VarianceReduced/RMS"),
    ),
    "a state of optax.adamw for laprop": (
        lambda: snr_adam.from_optax(optax.adamw(0.1).init(W), snr_adam.laprop(0.1).init(W)),
        number("moments at 0", "EMA/Normalized", "only Adam's move"),
    ),
    "the noise of msvag shared": (
        lambda: share(snr_adam.msvag(0.1).init(W), W, 0),
        number("sharing", "Mean/Adapted", "a mean of squares"),
    ),
    "the noise of adamax shared": (
        lambda: share(snr_adam.adamax(0.1).init(W), W, 0),
        number("sharing", "EMA/Infinity", "a mean of squares"),
    ),
    "a gradient (1, 3) for (2, 3)": (lambda: step(A, leaf(jnp.ones((1, 3)))), shape("(1, 3)", PASS)),
    "a gradient (3,) for (2, 3)": (lambda: step(A, leaf(jnp.ones(3))), shape("(3,)", PASS)),
    "a scalar gradient for (2, 3)": (lambda: step(A, leaf(1.0)), shape("()", PASS)),
    "a transposed gradient": (lambda: step(A, leaf(jnp.ones((3, 2)))), shape("(3, 2)", PASS)),
    "a parameter that would broadcast": (
        lambda: step(A, G, with_leaf(W, jnp.ones((1, 3))), state_of(A)),
        shape("its parameter has shape (1, 3)", PASS),
    ),
    "an integer parameter": (lambda: A.init({"n": jnp.arange(3)}), no_moments("parameter n", "int32")),
    "an integer gradient": (lambda: step(A, leaf(jnp.ones((2, 3), int)), W), no_moments("gradient layer/1", "int32")),
    "a bool parameter": (lambda: A.init({"on": jnp.ones(3, bool)}), no_moments("parameter on", "bool")),
    "a PRNG key": (lambda: A.init({"key": jax.random.key(0)}), no_moments("parameter key", "key<fry>")),
    "a float0 gradient": (
        lambda: A.update({"n": np.zeros(3, jax.dtypes.float0)}, state_of(A, {"n": jnp.ones(3)})),
        no_moments("gradient n", "float0"),
    ),
    "a string": (lambda: A.init({"name": "layer"}), no_moments("parameter name", "type str")),
    "a function of an Equinox model": (
        lambda: A.init(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))),
        no_moments("parameter activation", "custom_jvp"),
    ),
    "an array of objects": (lambda: A.init({"x": np.array([None])}), no_moments("parameter x", "object")),
    "a float8 parameter": (lambda: A.init({"x": jnp.ones(3, F8)}), kind("parameter x", "float8", "train it in bf")),
    "a float8 gradient": (
        lambda: A.update({"x": jnp.ones(3, F8)}, state_of(A, {"x": jnp.ones(3)})),
        kind("gradient x", "float8", "train it in bfloat16"),
    ),
    "a float8 parameter and its remainder": (
        lambda: snr_adam.carry_remainder(optax.sgd(0.1)).init({"x": jnp.ones(3, F8)}),
        kind("parameter x", "float8", "train it in bfloat16"),
    ),
    "a float8 parameter, accumulated": (
        lambda: accumulate(optax.sgd(0.1), 2).init({"x": jnp.ones(3, F8)}),
        kind("parameter x", "float8", "train it in bfloat16"),
    ),
    "a count in float32": (
        lambda: step(A, state=counted(jnp.float32(3))),
        kind("count", "float32", "must be one int32"),
    ),
    "a count in int8": (lambda: step(A, state=counted(jnp.int8(3))), kind("count", "int8", "must be one int32")),
    "a count of two runs": (lambda: step(A, state=counted(jnp.zeros(2, int))), kind("count", "(2,)", "under jax.vmap")),
    "a count of observe in float32": (
        lambda: step(observe(A), state=observe(A).init(W)._replace(count=jnp.float32(3))),
        kind("count", "float32", "must be one int32"),
    ),
    "a gradient that observe had a parameter for": (
        lambda: step(observe(A), {**G, "w": None}, W),
        number("observe", "None: w", "optax.masked(observe(tx), mask)"),
    ),
    "a count of a remainder in float32": (
        lambda: step(CARRY, state=CARRY.init(W)._replace(count=jnp.float32(3))),
        kind("count", "float32", "must be one int32"),
    ),
    "a ball of numbers": (lambda: snr_adam.adamh(0.1, ball={"w": 1}), kind("adamh: ball at w", "1", "give a tree of")),
    "a ball of numbers, of a function": (
        lambda: step(snr_adam.adamh(0.1, ball=lambda params: {"w": 1, "layer": True})),
        kind("ball at w", "1", "must be True or False"),
    ),
    "normalized layers by name": (
        lambda: snr_adam.adamc(0.1, normalized="w"),
        kind("adamc: normalized", "'w'", "give a tree of"),
    ),
    "a mask of fractions": (
        lambda: step(adamw(0.1, mask=lambda params: {"w": 0.5, "layer": True})),
        kind("mask at w", "0.5", "must be True or False"),
    ),
    "a mask of numbers": (
        lambda: step(adamw(0.1, mask=lambda params: {"w": 1, "layer": 0})),
        kind("mask at layer/0", "0", "True or"),
    ),
    "a mask that is a name": (
        lambda: step(adamw(0.1, mask=lambda params: "w")),
        kind("mask at", "'w'", "must be True or False"),
    ),
    "a mask of float arrays": (
        lambda: step(adamw(0.1, mask=lambda params: {"w": np.ones(()), "layer": True})),
        kind("mask at w", "1", "must be True or False"),
    ),
    "a mask of arrays": (
        lambda: step(adamw(0.1, weight_decay=9.0, mask={"w": jnp.array(False), "layer": np.True_}))["w"],
        lambda u: np.allclose(abs(u), 0.1),
    ),
    "a gradient for a frozen parameter": (
        lambda: step(A, {"w": G["w"], "f": G["w"]}, {"w": W["w"], "f": None}),
        number("gradient f", "None", PASS),
    ),
    "a complex gradient": (lambda: step(A, leaf(jnp.ones((2, 3), complex))), shape("complex64", PASS)),
    "update(grads, params, state)": (lambda: A.update(G, W, state_of(A)), kind("state", "dict", ORDER)),
    "update(state, grads, params)": (lambda: A.update(state_of(A), G, W), kind("state", "dict", ORDER)),
    "update(grads, params)": (lambda: scale_by_snr().update(G, W), kind("state", "dict", ORDER)),
    "update(grads, state, state)": (lambda: A.update(G, state_of(A), state_of(A)), number("parameters", "w", ORDER)),
    "no parameters for weight decay": (
        lambda: adamw(0.1).update(G, adamw(0.1).init(W)),
        number("weight decay", "params=None", ORDER),
    ),
    "no parameters for the remainder": (
        lambda: snr_adam.carry_remainder(A).update(G, snr_adam.carry_remainder(A).init(W)),
        number("carry_remainder", "params=None", ORDER),
    ),
    "a state of optax.adam": (
        lambda: step(A, state=optax.adam(0.1).init(W)),
        kind("state", "ScaleByAdamState", "from_o"),
    ),
    "a state of optax.sgd": (lambda: step(A, state=optax.sgd(0.1).init(W)), kind("state", "EmptyState", ORDER)),
    "a state of adamw for adam": (lambda: step(A, state=adamw(0.1).init(W)), kind("state", "tuple", ORDER)),
    "a state that came back as dicts": (
        lambda: step(A, state=[{"count": 0, "mu": W, "nu": W}, None]),
        kind("state", "list", "init(params) as its target"),
    ),
    "the state of a part in a preset": (lambda: step(A, state=scale_by_snr().init(W)), kind("state", "Sc", ORDER)),
    "a packed state for float32": (
        lambda: step(A, state=adam(0.1, storage="packed").init(W)),
        number("moments", "its nu InWords", "another optimizer or storage"),
    ),
    "a packed state of one array for float32": (
        lambda: step(A, G["w"], W["w"], adam(0.1, storage="packed").init(W["w"])),
        number("another form", "its nu InWords", "another optimizer or storage"),
    ),
    "a float32 state for packed": (
        lambda: step(adam(0.1, storage="packed"), state=A.init(W)),
        number("nu", "dict", "another optimizer or storage"),
    ),
    "a bfloat16 state for float32": (
        lambda: step(A, state=adam(0.1, storage="bfloat16").init(W)),
        number("gradient layer/0", "bfloat16, not ['float32', 'float32']", "an optimizer with the same options"),
    ),
    "moments of amsgrad for adam": (
        lambda: step(A, state=snr_adam.amsgrad(0.1).init(W)),
        number("moments", "AverageAndMaximum", "another optimizer or storage"),
    ),
    "a mask of another tree": (lambda: step(adamw(0.1, mask={"x": True})), number("mask", "{'x': *}", "no prefix")),
    "learning rates of another tree": (
        lambda: step(adam({"x": 0.1})),
        number("learning_rate", "{'x': *}", "no prefix"),
    ),
    "a complex parameter, packed": (
        lambda: adam(0.1, storage="packed").init(jnp.ones(2, complex)),
        number("storage='packed'", "complex", "use storage='bfloat16'"),
    ),
    "shared axes out of range": (
        lambda: scale_by_snr(noise=Shared(RMS(), 2)).init(W),
        number("layer/0", "(2,)", "out of range"),
    ),
    "a tree with nothing in it": (lambda: step(A, {}, {}), lambda u: u == {}),
    "None leaves": (lambda: step(A, {"w": None}, {"w": None}), lambda u: u == {"w": None}),
}


def last_update(*gradients, tx=None, dtype=jnp.float32):
    """The update after single numbers as gradients, and the state."""
    tx = tx or scale_by_snr()
    state, update = tx.init(jnp.zeros((), dtype)), jax.jit(tx.update)
    for g in gradients:
        u, state = update(jnp.asarray(g, dtype), state, jnp.zeros((), dtype))
    return float(u), state


def recovers(tx, first, steps=400):
    """Steps of one huge gradient and then ones: is the last update that of ones, and every number finite?"""
    update = jax.jit(lambda state, g: tx.update(g, state, jnp.float32(0))[::-1])
    state, _ = update(tx.init(jnp.float32(0)), jnp.float32(first))
    state, us = jax.jit(lambda state: jax.lax.scan(update, state, jnp.ones(steps)))(state)
    return float(us[-1]), all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, us)))


QUICK = functools.partial(scale_by_snr, EMA(0.5), RMS(0.7))


def near_one(result):
    return result[1] and abs(result[0] - 1) < 0.01


VALUES = {
    "1e15 has the ratio 1": (lambda: last_update(1e15)[0], lambda u: np.isclose(u, 1.0)),
    "1e20 has the ratio 1": (lambda: last_update(1e20)[0], lambda u: np.isclose(u, 1.0)),
    "-3e38 has the ratio -1": (lambda: last_update(-3e38)[0], lambda u: np.isclose(u, -1.0)),
    "infinity is the limit of large": (lambda: last_update(np.inf)[0], lambda u: np.isclose(u, 1.0)),
    "1e20 in packed storage": (lambda: last_update(1e20, tx=QUICK("packed"))[0], lambda u: abs(u - 1) < 0.01),
    "1e20 is forgotten": (lambda: recovers(QUICK(), 1e20), near_one),
    "infinity is forgotten": (lambda: recovers(QUICK(), np.inf), near_one),
    "1e20 is forgotten, packed": (lambda: recovers(QUICK("packed"), 1e20), lambda r: r[1] and abs(r[0] - 1) < 0.1),
    "1e20 is forgotten, bfloat16": (lambda: recovers(QUICK("bfloat16"), 1e20), lambda r: r[1] and abs(r[0] - 1) < 0.2),
    "1e20 is forgotten, belief": (
        lambda: recovers(scale_by_snr(EMA(0.5), Belief(0.7)), 1e20),
        lambda r: r[1],
    ),
    "1e20 is forgotten, spread": (
        lambda: recovers(snr_adam.centered_adam(1.0, 0.7), 1e20),
        lambda r: r[1] and r[0] < -0.9,
    ),
    "1e20 is forgotten, deviation": (lambda: recovers(snr_adam.rmsprop(1.0, 0.7, centered=True), 1e20), lambda r: r[1]),
    "1e20 in lion": (lambda: last_update(1e20, tx=snr_adam.lion(1.0))[0], lambda u: u == -1.0),
    "1e20 shared over an axis": (
        lambda: step(scale_by_snr(noise=Shared(RMS(), 0)), jnp.full(4096, 1e20), jnp.ones(4096)),
        lambda u: np.allclose(u, 1.0),
    ),
    "1e30 complex": (
        lambda: step(scale_by_snr(), jnp.asarray([1e30 + 1e30j]), jnp.ones(1, complex)),
        lambda u: np.allclose(u, (1 + 1j) / 2**0.5),
    ),
    "1e300 in float64": (lambda: wide(lambda: last_update(1e300, dtype=jnp.float64)[0]), lambda u: np.isclose(u, 1.0)),
    "NaN is loud": (lambda: last_update(np.nan)[0], np.isnan),
    "1e-20 with eps 1e-8": (lambda: last_update(1e-20)[0], lambda u: np.isclose(u, 1e-12, atol=0)),
    "1e-20 with eps 1e-30": (
        lambda: last_update(1e-20, tx=scale_by_snr(noise=RMS(eps=1e-30)))[0],
        lambda u: 0 < u <= 1,
    ),
    "a subnormal gradient": (lambda: last_update(1e-40, tx=scale_by_snr(noise=RMS(eps=0.0)))[0], lambda u: 0 <= u <= 1),
    "zero with eps 0": (lambda: last_update(0.0, tx=scale_by_snr(noise=RMS(eps=0.0)))[0], lambda u: u == 0),
    "silence until v is gone, eps 0": (
        lambda: recovers_from_silence(scale_by_snr(EMA(0.9), RMS(0.9, eps=0.0))),
        lambda r: r,
    ),
    "float16 overflow is loud": (lambda: np.float32(last_update(np.nan, dtype=jnp.float16)[0]), np.isnan),
    "1e5 in a float16 moment": (
        lambda: recovers(scale_by_snr(EMA(0.5), RMS(0.7), Cast(mu="float16")), 1e5),
        lambda r: r[1] and abs(r[0] - 1) < 0.02,
    ),
    "NumPy's float64, clipped": (
        lambda: plain(guard(optax.sgd(1.0), clip_norm=0.1), np.ones(3)),
        lambda r: np.allclose(r[0], -0.1 / 3**0.5) and r[1].norm.dtype == np.float32 and np.isclose(r[1].norm, 3**0.5),
    ),
    "NumPy's float64 of 1e20": (
        lambda: plain(A, np.full(3, 1e20)),
        lambda r: np.allclose(r[0], -0.1) and np.all(np.isfinite(r[1][0].nu)),
    ),
    "NumPy's float64, packed": (
        lambda: plain(adam(0.1, storage="packed"), np.ones(3))[0],
        lambda u: np.allclose(u, -0.1, rtol=0.01),
    ),
    "NumPy's complex128": (
        lambda: plain(A, np.full(3, 1e20 + 1e20j), np.ones(3, complex)),
        lambda r: np.allclose(r[0], -0.1 * (1 + 1j) / 2**0.5) and r[0].dtype == np.complex64,
    ),
    "NumPy's float64, accumulated": (
        lambda: plain(accumulate(A, 1), np.full(3, 1e20))[0],
        lambda u: np.allclose(u, -0.1),
    ),
    "NumPy's float64, observed": (
        lambda: plain(observe(optax.adam(0.1)), np.ones(3)),
        lambda r: np.allclose(r[0], -0.1) and all(x.dtype != np.float64 for x in jax.tree.leaves(r[1])),
    ),
    "NumPy's float64, carried": (
        lambda: plain(CARRY, np.ones(3), np.ones(3, jnp.bfloat16)),
        lambda r: np.allclose(r[0], -0.1015625) and r[0].dtype == np.float32,
    ),
    "NumPy's scalar": (lambda: plain(A, np.float64(1e20), np.float64(1.0))[0], lambda u: np.allclose(u, -0.1)),
    "guarded NaN": (lambda: guarded(np.nan), lambda r: r == (0.0, 1)),
    "guarded infinity": (lambda: guarded(np.inf), lambda r: r == (0.0, 1)),
    "guarded 1e20": (lambda: guarded(1e20), lambda r: np.isclose(r[0], 1.0) and r[1] == 0),
    "guarded 3e38, clipped": (lambda: guarded(3e38, clip_norm=1.0), lambda r: np.isclose(r[0], 1.0) and r[1] == 0),
}


def wide(run):
    with jax.enable_x64(True):
        return run()


def plain(tx, g, p=None):
    """Update and state of a first step that is not jitted, of NumPy's arrays as they are."""
    p = np.ones(3) if p is None else p
    return tx.update(g, tx.init(p), p)


def guarded(g, **options):
    u, state = last_update(g, tx=guard(scale_by_snr(), **options))
    return u, int(state.skipped)


def recovers_from_silence(tx):
    """One gradient, zeros until v has underflown, and one more: nothing is NaN or large."""
    update = jax.jit(lambda state, g: tx.update(g, state)[::-1])
    gradients = jnp.zeros(3000).at[0].set(1.0).at[-1].set(1e-3)
    _, us = jax.lax.scan(update, tx.init(jnp.float32(0)), gradients)
    return bool(np.all(np.isfinite(us)) and np.max(np.abs(us)) < 10)


def out(tx, dtype, grad=None):
    p = jnp.ones(3, dtype)
    u, state = tx.update(jnp.ones(3, grad or dtype), tx.init(p), p)
    return str(u.dtype), {str(x.dtype) for x in jax.tree.leaves((state[0].mu, state[0].nu))}


def traces(calls):
    """How often a step was traced over calls with these (params, grads)."""
    tx, count = adam(0.1), []

    @jax.jit
    def run(params, state, grads):
        count.append(1)
        return tx.update(grads, state, params)

    state = tx.init(calls[0][0])
    for params, grads in calls:
        _, state = run(params, state, grads)
    return len(count)


def changed_learning_rate():
    tx = optax.inject_hyperparams(adamw)(0.1)
    state, update = tx.init(W), jax.jit(tx.update)
    for learning_rate in (0.1, 0.2, 0.3):
        state.hyperparams["learning_rate"] = jnp.float32(learning_rate)
        _, state = update(G, state, W)
    return update._cache_size()


DTYPES = {
    "bfloat16": (lambda: out(A, "bfloat16"), lambda r: r == ("bfloat16", {"float32"})),
    "float16": (lambda: out(A, "float16"), lambda r: r == ("float16", {"float32"})),
    "complex64": (lambda: out(A, "complex64"), lambda r: r == ("complex64", {"complex64", "float32"})),
    "float32 gradients of bfloat16": (lambda: out(A, "bfloat16", "float32"), lambda r: r == ("float32", {"float32"})),
    "float64": (lambda: wide(lambda: out(A, "float64")), lambda r: r == ("float64", {"float64"})),
    "float32 with 64 bits on": (lambda: wide(lambda: out(A, "float32")), lambda r: r == ("float32", {"float32"})),
    "b2 near 1 in float64": (lambda: wide(lambda: adam(1e-3, b2=1 - 1e-12)), lambda tx: tx is not None),
    "eps 1e-50 in float64": (lambda: wide(lambda: adam(1e-3, eps=1e-50)), lambda tx: tx is not None),
    "b2 .999 for bfloat16 parameters": (
        lambda: optax.inject_hyperparams(adam)(1e-3).init(jnp.ones(2, "bfloat16")).hyperparams["b2"],
        lambda b2: b2 == np.float32(0.999),
    ),
}
RECOMPILATION = {
    "same shapes": (lambda: traces([(W, G)] * 3), lambda n: n == 1),
    "NumPy gradients": (lambda: traces([(W, G), (W, jax.tree.map(np.asarray, G))]), lambda n: n == 1),
    "Python numbers": (lambda: traces([({"w": 1.0}, {"w": 0.5})] * 3), lambda n: n == 1),
    "an injected learning rate": (changed_learning_rate, lambda n: n == 1),
    "a guard after bad steps": (lambda: guard_traces(), lambda n: n == 1),
}


def guard_traces():
    tx = guard(adam(0.1), 1.0, 3)
    state, update = tx.init(W), jax.jit(tx.update)
    for scale in (1.0, jnp.nan, jnp.inf, 0.0):
        _, state = update(jax.tree.map(lambda g, scale=scale: g * scale, G), state, W)
    return update._cache_size()


def sharded(tx, axis_type, state_too=True):
    """The largest difference that sharding over eight devices makes to an update."""
    split = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(axis_type,)), PartitionSpec("x"))
    p, g = jnp.linspace(-1.0, 1.0, 64), jnp.sin(jnp.arange(64.0))
    want = jax.jit(tx.update)(g, tx.init(p), p)[0]
    with jax.set_mesh(split.mesh):
        ps, gs = jax.device_put((p, g), split)
        got, _ = jax.jit(tx.update)(gs, tx.init(ps) if state_too else jax.jit(tx.init)(ps), ps)
    return float(np.max(np.abs(np.asarray(got) - np.asarray(want))))


def uneven():
    """A leaf that eight devices cannot share evenly is replicated, and gives the same numbers."""
    split = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec())
    p = jax.device_put(W, split)
    return jax.tree.map(lambda x, y: np.array_equal(x, y), step(A, jax.device_put(G, split), p), step(A))


SHARDING = {
    "auto": (lambda: sharded(A, AxisType.Auto), lambda d: d == 0),
    "explicit": (lambda: sharded(A, AxisType.Explicit), lambda d: d == 0),
    "packed": (lambda: sharded(adam(0.1, storage="packed"), AxisType.Auto), lambda d: d == 0),
    "a state made under jit": (lambda: sharded(A, AxisType.Auto, False), lambda d: d == 0),
    "guarded and clipped": (lambda: sharded(guard(A, 0.5), AxisType.Auto), lambda d: d < 1e-6),
    "replicated": (uneven, lambda same: jax.tree.all(same)),
}


def learns(tx):
    """The distance to the bottom of a bowl after 60 steps of 0.1 from distance 2."""

    def body(carry, _):
        p, state = carry
        u, state = tx.update(2 * p, state, p)
        return (optax.apply_updates(p, u), state), None

    p = jnp.float32(2.0)
    return float(abs(jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=60)[0][0])(p)))


def frozen(tx):
    updates, _ = tx.update(G, tx.init(W), W)
    return updates["w"], G["w"]


def narrow(tx):
    """The update of a bfloat16 parameter."""
    return step(tx, jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))


BRANCHES = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step, **extra: step < 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step, **extra: step < 3),
}


COMPOSITION = {
    "a foreign clip before": (lambda: learns(optax.chain(optax.clip(1.0), A)), lambda d: d < 0.5),
    "guard outside a chain": (lambda: learns(guard(optax.chain(optax.clip(1.0), A))), lambda d: d < 0.5),
    "guard inside a chain": (lambda: learns(optax.chain(optax.clip(1.0), guard(A, 1.0))), lambda d: d < 0.5),
    "guard of a guard": (lambda: learns(guard(guard(A, 1.0), 1.0)), lambda d: d < 0.5),
    "guard of an injected optimizer": (lambda: learns(guard(optax.inject_hyperparams(adam)(0.1))), lambda d: d < 0.5),
    "an injected guard": (
        lambda: learns(optax.inject_hyperparams(lambda rate, clip: guard(adam(rate), clip))(rate=0.1, clip=1.0)),
        lambda d: d < 0.5,
    ),
    "guard of MultiSteps": (
        lambda: learns(guard(optax.MultiSteps(adam(0.2), 2).gradient_transformation())),
        lambda d: d < 0.6,
    ),
    "guard in carry_remainder": (lambda: learns(snr_adam.carry_remainder(guard(A, 1.0))), lambda d: d < 0.5),
    "masked leaves pass through": (
        lambda: frozen(optax.masked(A, {"w": False, "layer": True})),
        lambda pair: np.array_equal(*pair),
    ),
    "partition with a typo": (
        lambda: optax.partition({"train": A}, {"w": "trian", "layer": "train"}).init(W),
        number("trian", "Parameter labels", "Transforms keys"),
    ),
    "a remainder inside of a chain": (
        lambda: narrow(optax.chain(CARRY, optax.scale(0.5))),
        number("carry_remainder", "followed by 1 more in an optax.chain", "Put it last, or around all"),
    ),
    "a remainder inside of a named chain": (
        lambda: narrow(optax.named_chain(("a", CARRY), ("b", optax.scale(0.5)), ("c", optax.scale(0.5)))),
        number("carry_remainder", "followed by 2 more in an optax.named_chain", "Put it last"),
    ),
    "a remainder masked in a chain": (
        lambda: narrow(optax.chain(optax.masked(CARRY, True), optax.scale(0.5))),
        number("carry_remainder", "followed by 1 more", "Put it last, or around all"),
    ),
    "a rounding that does not end a chain": (
        lambda: narrow(optax.chain(optax.scale(-1.0), round_stochastically(), optax.scale(0.5))),
        number("round_stochastically", "followed by 1 more", "Put it last"),
    ),
    "a remainder last in a chain": (
        lambda: narrow(optax.chain(optax.clip(1.0), CARRY)),
        lambda u: np.allclose(u, -0.1015625),
    ),
    "a remainder of float32 in a chain": (
        lambda: step(optax.chain(CARRY, optax.scale(0.5)))["w"],
        lambda u: np.allclose(abs(u), 0.05),
    ),
    **{
        f"a remainder in {name}": (
            functools.partial(lambda wrap: narrow(wrap(CARRY)), wrap),
            kind(
                f"carry_remainder inside of optax.{name}", "dtypes do not match", "or guard, inside of carry_remainder"
            ),
        )
        for name, wrap in BRANCHES.items()
    },
    "observe around a branch with a spread": (
        lambda: step(observe(optax.apply_if_finite(snr_adam.centered_adam(0.1), 3)))["w"],
        lambda u: np.allclose(abs(u), 0.1),
    ),
    "no guard in the state": (lambda: snr_adam.health(A.init(W), W), number("GuardState", "found 0", "pass the guard")),
    "two guards in the state": (
        lambda: snr_adam.health(optax.chain(guard(A), guard(A)).init(W), W),
        number("GuardState", "found 2", "pass the guard"),
    ),
}
MISTAKES = {
    "a state used twice is not changed": (lambda: used_twice(), lambda same: same),
    "the learning rate is not forgotten": (lambda: step(adam(0.5))["w"], lambda u: np.allclose(abs(u), 0.5)),
    "updates are added, so they descend": (lambda: step(A)["w"] * G["w"], lambda x: np.all(x < 0)),
    "weight decay acts without a gradient": (
        lambda: step(adamw(0.1, weight_decay=0.5), jax.tree.map(jnp.zeros_like, G))["w"],
        lambda u: np.allclose(u, -0.05 * W["w"]),
    ),
    "layers whose names differ by what trackers do not take": (
        lambda: layers_of({"net/~/linear": 1.0, "net/linear": 2.0, "net": {"linear": 3.0}}),
        lambda found: sorted(found) == ["net/linear", "net/linear_2", "net/linear_3"] and len(set(found.values())) == 3,
    ),
    "a layer that has the name of another's number": (
        lambda: layers_of({"net/linear_2": 1.0, "net/~/linear": 2.0, "net/linear": 3.0}),
        lambda found: len(found) == 3,
    ),
    "a mask that is a function": (
        lambda: step(adamw(0.1, weight_decay=9.0, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)))["w"],
        lambda u: np.allclose(abs(u), 0.1),
    ),
    "eager is jitted, to rounding": (
        lambda: A.update(G, A.init(W), W)[0]["w"] - step(A)["w"],
        lambda d: np.allclose(d, 0),
    ),
}


def layers_of(params):
    """The signal of each layer by the name that trackers are given."""
    tx, params = observe(A), jax.tree.map(jnp.float32, params)
    state = jax.jit(tx.update)(params, tx.init(params), params)[1]
    prefix = "snr/layer/signal/"
    found = snr_adam.metrics(state, layers=True)
    return {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}


def used_twice():
    state = A.init(W)
    return np.array_equal(A.update(G, state, W)[0]["w"], A.update(G, state, W)[0]["w"])


ABC = {name: jnp.ones(2) for name in "abc"}
NESTED = {"a": [jnp.ones(2), jnp.ones(3)], "b": jnp.ones(2), "c": jnp.ones(2)}


def named(tx, params=ABC, **changed):
    """What `health` calls the leaf of a step whose gradient c is NaN."""
    grads = {**params, "c": jnp.full(2, jnp.nan), **changed}
    state = jax.jit(tx.update)(grads, tx.init(params), params)[1]
    return snr_adam.health(state, params).last_bad


def is_c(name):
    return name == "c"


NOT_A = {"a": False, "b": True, "c": True}
LABELS = {"a": "other", "b": "this", "c": "this"}


def parted(tx):
    return optax.partition({"this": tx, "other": optax.sgd(0.1)}, LABELS)


NAMES_OF_LEAVES = {
    "a gradient that is None": (lambda: named(guard(A), a=None), is_c),
    "a gradient that is None, of sgd": (lambda: named(guard(optax.sgd(0.1)), a=None), is_c),
    "two that are None": (lambda: named(guard(A), a=None, b=None), is_c),
    "a parameter that is None": (lambda: named(guard(A), {**ABC, "b": None}), is_c),
    "masked": (lambda: named(optax.masked(guard(A), NOT_A)), is_c),
    "masked by a prefix": (lambda: named(optax.masked(guard(A), NOT_A), NESTED), is_c),
    "masked, and None": (lambda: named(optax.masked(guard(A), NOT_A), b=None), is_c),
    "masked, packed": (lambda: named(optax.masked(guard(adam(0.1, storage="packed")), NOT_A)), is_c),
    "masked, of Optax": (lambda: named(optax.masked(guard(optax.adam(0.1)), NOT_A)), is_c),
    "masked inside": (lambda: named(guard(optax.masked(A, NOT_A)), NESTED), is_c),
    "partition": (lambda: named(parted(guard(A))), is_c),
    "partition by a prefix": (lambda: named(parted(guard(A)), NESTED), is_c),
    "partition inside": (lambda: named(guard(parted(A))), is_c),
    "masked, and nothing in the state that tells": (
        lambda: named(optax.masked(guard(optax.sgd(0.1)), NOT_A)),
        lambda name: "leaf number 2 of those that optax.masked shows" in name,
    ),
    "flattened": (lambda: named(optax.flatten(guard(A))), lambda name: name == "the tree itself"),
}


def observed_and_guarded():
    return snr_adam.observe(guard(adamw(0.1)))


def of_three_runs():
    """The state of three runs at once."""
    tx, three = observed_and_guarded(), jax.tree.map(lambda x: jnp.stack([x] * 3), W)
    return quick_jit(jax.vmap(tx.update))(three, jax.vmap(tx.init)(three), three)[1]


def inside(read, state=None):
    """What becomes of reading a state while a step is traced."""

    def body(state):
        read(state)
        return 0

    return jax.jit(body)(observed_and_guarded().init(W) if state is None else state)


def as_dicts(state=None):
    return flax.serialization.to_state_dict(observed_and_guarded().init(W) if state is None else state)


def one_of_three():
    return snr_adam.report(jax.tree.map(lambda x: x[1], of_three_runs())).names


def health_of(state):
    return snr_adam.health(state, W)


def suggest(state):
    return suggest_sharing(state, W)


several = functools.partial(number, got="the shape (3,)", do="lambda x: x[0], state)")
untyped = functools.partial(number, got="in this dict", do="restored again with init(params) as its target")
traced = functools.partial(kind, got="inside of jit", do="on the state that the compiled step has returned")
READ = {
    "report of three runs": (
        lambda: snr_adam.report(of_three_runs()),
        several("report: this state is that of several"),
    ),
    "metrics of three runs": (lambda: snr_adam.metrics(of_three_runs()), several("report: this state")),
    "histograms of three runs": (lambda: snr_adam.telemetry.histograms(of_three_runs()), several("report: this state")),
    "health of three runs": (lambda: health_of(of_three_runs()), several("health: this state")),
    "sharing for three runs": (lambda: suggest(of_three_runs()), several("suggest_sharing: this state")),
    "from_optax of three runs": (lambda: snr_adam.from_optax(of_three_runs()), several("from_optax: this state")),
    "to_optax of three runs": (lambda: snr_adam.to_optax(of_three_runs()), several("to_optax: this state")),
    "report of replicas of replicas": (
        lambda: snr_adam.report(jax.tree.map(lambda x: x[None], of_three_runs())),
        number("report", "(1, 3)", "lambda x: x[0, 0], state)"),
    ),
    "report of one of three": (one_of_three, lambda names: names == ("layer/0", "layer/1", "w")),
    "report of dicts": (lambda: snr_adam.report(as_dicts()), untyped("report: there is no ObserveState")),
    "metrics of dicts": (lambda: snr_adam.metrics(as_dicts()), untyped("report: there is no ObserveState")),
    "health of dicts": (lambda: health_of(as_dicts()), untyped("health: there is no GuardState")),
    "sharing for dicts": (lambda: suggest(as_dicts()), untyped("suggest_sharing: there is no ScaleBySnrState")),
    "share of dicts": (lambda: share(as_dicts(), W, 0), untyped("share: there is no ScaleBySnrState")),
    "from_optax of dicts": (
        lambda: snr_adam.from_optax(as_dicts()),
        untyped("from_optax: there is no ScaleBySnrState"),
    ),
    "to_optax of dicts": (lambda: snr_adam.to_optax(as_dicts()), untyped("to_optax: there is no ScaleBySnrState")),
    "report of a list": (
        lambda: snr_adam.report([as_dicts(), None]),
        number("report: there is no ObserveState", "in this list", "restored again"),
    ),
    "report of dicts in a tuple": (
        lambda: snr_adam.report((as_dicts(), None)),
        number("report: there is no ObserveState", "in this tuple", "restored again"),
    ),
    "report in jit": (lambda: inside(snr_adam.report), traced("report: ")),
    "metrics in jit": (lambda: inside(snr_adam.metrics), traced("report: ")),
    "health in jit": (lambda: inside(health_of), traced("health: ")),
    "sharing in jit": (lambda: inside(suggest), traced("suggest_sharing: ")),
    "manifest in jit": (lambda: inside(manifest), kind("leaf", "no bits inside of jit", "give what the compiled")),
    "from_optax in jit": (
        lambda: jax.jit(snr_adam.from_optax)(optax.adam(0.1).init(W))[0],
        lambda state: isinstance(state, ScaleBySnrState),
    ),
    "a state for a report": (
        lambda: snr_adam.History().append(A.init(W)),
        kind("History.append takes a report", "tuple", "history.append(snr_adam.report(opt_state))"),
    ),
    "a picture of one report": (
        lambda: plots.heat_map(snr_adam.report(observed_and_guarded().init(W))),
        kind("History", "got a Report", "give a list of reports: of one alone, [report]"),
    ),
    "a picture of a state": (
        lambda: plots.overview(A.init(W)),
        kind("History", "ScaleBySnrState", "snr_adam.report(opt"),
    ),
    "a history of a number": (lambda: snr_adam.History(3), kind("History", "got a int", "give a list of reports")),
    "groups by a bad pattern": (
        lambda: group(["("]),
        number("group: the pattern '('", "no regular", "re.escape(name)"),
    ),
    "groups by one pattern": (lambda: group("w"), kind("group", "'w'", "give a list of patterns, ['w']")),
}


def group(patterns):
    return snr_adam.report(observed_and_guarded().init(W)).group(patterns)


def export_of(tx, shape="a, 4"):
    """What `jax.export` says of a step for arrays of sizes that are not known."""
    params = {"w": jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)}
    return jax.export.export(jax.jit(tx.update))(params, jax.eval_shape(tx.init, params), params)


MODEL = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
ARRAYS = eqx.filter(MODEL, eqx.is_inexact_array)
no_array = functools.partial(kind, got="custom_jvp", do="eqx.filter(model, eqx.is_inexact_array)")
no_optimizer = functools.partial(kind, got="no optimizer")
AXES, PATTERN = "an int or a tuple of ints, a dict from patterns", "to find a name as it is, write re.escape(name)"
LAYERS = "an int, a dict from patterns to ints, or None"
GIVEN = {
    "observe of a function": (lambda: snr_adam.observe(optax.adam), no_optimizer("observe", do="observe(adam(1e-3))")),
    "observe of a number": (
        lambda: snr_adam.observe(1e-3),
        no_optimizer("observe: tx=0.001", do="observe(snr_adam.adam"),
    ),
    "carry_remainder of a number": (
        lambda: snr_adam.carry_remainder(1),
        no_optimizer("tx=1", do="carry_remainder(snr_a"),
    ),
    "accumulate of a preset": (lambda: snr_adam.accumulate(adam, 2), no_optimizer("accumulate", do="call it first")),
    "accumulate of nothing": (lambda: snr_adam.accumulate(None, 2), no_optimizer("tx=None", do="write accumulate(")),
    "guard of a preset": (lambda: guard(adamw), no_optimizer("guard", do="call it first, guard(adamw(1e-3))")),
    "guard of MultiSteps itself": (
        lambda: guard(optax.MultiSteps(A, 2)),
        no_optimizer("MultiSteps", do="guard(tx.gradient_transformation())"),
    ),
    "max_consecutive True": (
        lambda: guard(A, max_consecutive=True),
        number("max_consecutive=True", "True", "an int >= 1"),
    ),
    "max_consecutive a fraction": (
        lambda: guard(A, max_consecutive=2.5),
        number("max_consec", "2.5", "or None to never"),
    ),
    "max_consecutive of NumPy": (
        lambda: guard(A, max_consecutive=np.int64(3)),
        lambda tx: tx == guard(A, None, np.int64(3)),
    ),
    "every a string": (lambda: snr_adam.observe(A, every="4"), number("observe: every", "'4'", "an int >= 1")),
    "every of NumPy": (lambda: snr_adam.observe(A, every=np.int32(4)), lambda tx: tx is not None),
    "shared axes None": (lambda: Shared(RMS(), None), kind("Shared: axes", "None", AXES)),
    "shared axes a name": (lambda: Shared(RMS(), "w"), kind("Shared: axes", "'w'", AXES)),
    "shared axes True": (lambda: Shared(RMS(), True), kind("Shared: axes", "True", AXES)),
    "shared axes a fraction": (lambda: Shared(RMS(), {"w": 0.5}), kind("Shared: axes", "0.5 for 'w'", AXES)),
    "shared axes of a function": (
        lambda: scale_by_snr(noise=Shared(RMS(), lambda path, shape: None)).init(W),
        kind("Shared: axes", "None for parameter 'layer/0'", AXES),
    ),
    "shared axes by a bad pattern": (lambda: Shared(RMS(), {"(": 0}), number("Shared: axes", "'('", PATTERN)),
    "shared axes of NumPy": (lambda: Shared(RMS(), np.int64(0)).axes_of("w", (2, 3)), lambda axes: axes == (0,)),
    "share over None": (lambda: share(A.init(W), W, None), kind("Shared: axes", "None", AXES)),
    "layers by a bad pattern": (
        lambda: snr_adam.observe(A, layer_axis={"[": 0}),
        number("observe: layer", "'['", PATTERN),
    ),
    "layers by a name": (lambda: snr_adam.observe(A, layer_axis="w"), kind("observe: layer_axis", "'w'", LAYERS)),
    "layers by a fraction": (lambda: snr_adam.observe(A, layer_axis=0.5), kind("observe: layer_axis", "0.5", LAYERS)),
    "layers True": (lambda: snr_adam.observe(A, layer_axis=True), kind("observe: layer_axis", "True", LAYERS)),
    "layers to share by a name": (
        lambda: suggest_sharing(A.init(W), W, layer_axis="w"),
        kind("suggest_sharing: layer_axis", "'w'", LAYERS),
    ),
    "a mask by name": (lambda: adamw(0.1, mask="w"), kind("adamw: mask", "'w'", "a tree of True and False")),
    "a mask of names": (lambda: adamw(0.1, mask={"w": "yes"}), kind("mask at w", "'yes'", "a tree of True and False")),
    "a mask of fractions": (lambda: adamw(0.1, mask={"w": 0.5}), kind("mask at w", "0.5", "a tree of True and False")),
    "a mask by name, of descend": (lambda: snr_adam.descend(0.1, mask="w"), kind("descend: mask", "'w'", "a tree of")),
    "a mask of arrays": (
        lambda: step(adamw(0.1, mask={"w": jnp.array(True), "layer": np.bool_(False)})),
        lambda u: u["w"].shape == (3,),
    ),
    "an unfiltered model, accumulated": (
        lambda: snr_adam.accumulate(A, 2).init(MODEL),
        no_moments("activation", "custom"),
    ),
    "an unfiltered model's gradients": (
        lambda: snr_adam.accumulate(A, 2).update(MODEL, snr_adam.accumulate(A, 2).init(ARRAYS), ARRAYS),
        no_array("accumulate: gradient activation"),
    ),
    "an unfiltered model as parameters": (
        lambda: snr_adam.accumulate(A, 2).update(ARRAYS, snr_adam.accumulate(A, 2).init(ARRAYS), MODEL),
        no_array("accumulate: parameter activation"),
    ),
    "an unfiltered model, guarded": (
        lambda: guard(optax.sgd(0.1)).init(MODEL),
        no_array("guard: parameter activation"),
    ),
    "an unfiltered model's gradients, guarded": (
        lambda: guard(optax.sgd(0.1)).update(MODEL, guard(optax.sgd(0.1)).init(ARRAYS)),
        no_array("guard: gradient activation"),
    ),
    "an unfiltered model, carried": (
        lambda: snr_adam.carry_remainder(optax.adam(0.1)).init(MODEL),
        no_array("carry_remainder: parameter activation"),
    ),
    "unknown sizes, packed": (
        lambda: export_of(adam(0.1, storage="packed"), "4, a"),
        number("stochastic rounding", "(4, a)", "export the step for the shapes of the model"),
    ),
    "unknown sizes, bfloat16": (
        lambda: export_of(adam(0.1, storage="bfloat16"), "4, a"),
        number("stochastic rounding", "(4, a)", "without symbolic ones"),
    ),
    "unknown sizes, observed": (
        lambda: export_of(snr_adam.observe(A)),
        number("observe: a look sums in blocks", "(a, 4)", "export the step for the shapes"),
    ),
    "unknown sizes, in the first axis": (lambda: export_of(adam(0.1, storage="packed")), lambda done: done.in_avals),
    "unknown sizes, float32": (lambda: export_of(A, "a, b"), lambda done: done.in_avals),
    "complex moments": (
        lambda: step(adam(0.1, mu_dtype=jnp.complex64), jnp.full(2, 1j), jnp.ones(2, complex)),
        lambda u: np.allclose(u, -0.1j),
    ),
    "complex moments of real parameters": (
        lambda: {x.dtype.name for x in jax.tree.leaves(adam(0.1, mu_dtype="complex64").init(W)[0].mu)},
        lambda dtypes: dtypes == {"float32"},
    ),
    "complex moments of 128 bits in 64": (
        lambda: wide(lambda: out(adam(0.1, mu_dtype="complex64"), "complex128")),
        lambda r: r == ("complex128", {"complex64", "float64"}),
    ),
    "v as complex64": (lambda: Cast(nu="complex64"), number("nu", "'complex64'", "a floating dtype")),
    "Adam's numbers by name": (
        lambda: step(snr_adam.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, mu_dtype=None, nesterov=False)),
        lambda u: np.allclose(u["w"], np.sign(G["w"])),
    ),
    "Adam's numbers, injected": (
        lambda: step(optax.inject_hyperparams(snr_adam.scale_by_adam)(b1=0.5)),
        lambda u: np.allclose(u["w"], np.sign(G["w"])),
    ),
    "Adam's numbers, wrong": (lambda: snr_adam.scale_by_adam(b1=1.5), number("scale_by_adam: b1", "1.5", DECAY)),
}

AREAS: dict[str, dict[str, tuple[Any, Any]]] = {
    "hyper-parameters": HYPERPARAMETERS,
    "parts": PARTS,
    "trees": TREES,
    "gradient values": VALUES,
    "dtypes": DTYPES,
    "recompilation": RECOMPILATION,
    "sharding": SHARDING,
    "composition": COMPOSITION,
    "names of leaves": NAMES_OF_LEAVES,
    "mistakes": MISTAKES,
    "states that are read": READ,
    "what is given": GIVEN,
}
ROWS = {f"{area}: {name}": row for area, rows in AREAS.items() for name, row in rows.items()}


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    run, expected = ROWS[name]
    if not isinstance(expected, Refused):
        result = run()
        assert expected(result), result
        return
    with pytest.raises(expected.error) as caught:
        run()
    for text in (expected.where, expected.got, expected.do):
        assert text in str(caught.value)
    if name.startswith("parts: "):
        assert ". " not in str(caught.value), "one sentence"


def test_the_table_is_long():
    assert len(ROWS) >= 90
    assert sum(isinstance(expected, Refused) for _, expected in ROWS.values()) >= 60


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "lamb", "adopt"])
def test_checks_of_trees_are_not_in_the_program(name):
    """Checking costs nothing at run time: no callback, no assertion, and no branch in the compiled step."""
    tx = getattr(snr_adam, name)(0.1)
    text = jax.jit(tx.update).lower(G, tx.init(W), W).as_text()
    assert not any(word in text for word in ("callback", "custom_call", "assert", "stablehlo.case", "stablehlo.if"))
