"""Wrong Adams, each with the test of this suite that catches it.

A mutant replaces one part of the package by a wrong one of a few lines; the test named beside it must then fail, by an
assertion and not by a crash. So the suite cannot lose the test that stands between a user and that mistake.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_accuracy
import test_advice
import test_bits
import test_checkpoint
import test_decays
import test_family
import test_history
import test_lags
import test_laws
import test_leaves
import test_migration
import test_plots
import test_precision
import test_random_bits
import test_sharding
import test_storage
import test_tables
import test_telemetry_report
import test_twins
from fake_reports import fake_reports

import snr_adam
from snr_adam import (
    _bits,
    _numerics,
    _tree,
    descent,
    deviation,
    noise,
    precision,
    quotient,
    signal,
    storage,
    transform,
    twofold,
)
from snr_adam import step as heart
from snr_adam.state import sharding
from snr_adam.telemetry import _frame as frame
from snr_adam.telemetry import _lags as lags
from snr_adam.telemetry import _writing as writing
from snr_adam.telemetry import columns, history, plots, text, trackers

checkpoint, migration = (sys.modules[f"snr_adam.state.{name}"] for name in ("digest", "migration"))
advice, report = (sys.modules[f"snr_adam.telemetry.{name}"] for name in ("advice", "report"))


@dataclasses.dataclass(frozen=True)
class Caught:
    """A test of the suite and the arguments with which the suite calls it; `wide` if it asks for the fixture x64.

    fixtures: the names of others that it asks for, after those arguments.
    """

    test: Callable
    args: tuple = ()
    wide: bool = False
    fixtures: tuple[str, ...] = ()

    def __call__(self, request):
        given = [request.getfixturevalue(name) for name in self.fixtures]
        with jax.enable_x64(self.wide):
            self.test(*self.args, *([None] if self.wide else []), *given)


def definition(options=None):
    """Adam's definition in 60 digits."""
    return Caught(test_twins.test_adam_is_its_definition_in_60_digits, (options or {},), True)


OTHER = definition({"b1": 0.95, "b2": 0.999999, "eps": 1e-4, "eps_root": 1e-6})


def twin(name):
    """The preset is its Optax namesake."""
    return Caught(test_twins.test_updates_are_optaxs_by_default, (name,), True)


def accurate(b2):
    """The error of the update in units of the last place."""
    return Caught(test_accuracy.test_worst_error_over_a_thousand_steps, (b2,))


def replaced(owner, name, wrong) -> tuple:
    """`owner.name` becomes wrong(the right one)."""
    return owner, name, wrong


PACKAGE = [module for name, module in sys.modules.items() if name.startswith("snr_adam")]


def everywhere(name, wrong) -> list[tuple]:
    """The same in every module of the package that knows the name."""
    return [replaced(module, name, wrong) for module in PACKAGE if name in vars(module)]


def named(name) -> Any:
    """The part of that name, wherever it lives."""
    return next(vars(module)[name] for module in PACKAGE if name in vars(module))


def preset(name, make) -> tuple:
    """The preset of that name becomes make(the right one)."""
    return cases.PRESETS, name, lambda right: (make(right[0]), right[1])


def root(formula):
    """RMS, Maximum and the rest with another root: formula(v, numbers)."""
    return replaced(noise, "_root", lambda right: lambda v, k, debias=True: formula(v, k))


def step(change):
    """The end of a step: change(the right update, signal, noise, p, alpha, decay)."""

    def wrong(right):
        def mutant(self, ratio, p, alpha, decay):
            def end(x, n, p, a, d):
                return right(self, ratio._replace(signal=x[0], scale=x[1], noise=n), p, a, d)

            return change(end, (ratio.signal, ratio.scale), ratio.noise, p, alpha, decay)

        return mutant

    return replaced(descent.Decoupled, "update", wrong)


def variant(name, of=test_family.test_a_variant_is_its_papers_equation):
    """The float64 twin of a variant."""
    return Caught(of, (name,), True)


def masked(ratio, p, alpha, decay):
    """A cautious update whose elements go no further than before."""
    agree = ratio.signal * ratio.gradient > 0
    return descent.Decoupled().update(ratio._replace(signal=jnp.where(agree, ratio.signal, 0.0)), p, alpha, decay)


def noise_of_the_raw(right):
    def moments(self, x, stored, k, dtype, dither, gate):
        m, _ = right(self, x, stored, k, dtype, dither, gate)
        return heart.Stored(m, self.noise.update(stored.nu, x, k.noise, None))

    return moments


def not_stored(right):
    return lambda self, x, stored, *rest: stored


def stale_noise(right):
    def ratio(self, x, old, new, k, dtype):
        _, nu = self.storage.decode(*old, dtype)
        return right(self, x, old, new, k, dtype)._replace(noise=self.noise.estimate(nu, x, k.noise, None))

    return ratio


def _power(b, t, dtype):
    """The bias correction as it is usually written."""
    b = jnp.asarray(_numerics.value_at(b, t, dtype), jnp.float32)
    return _numerics.Decay(1 - b, 1 / (1 - b ** t.astype(jnp.float32)), jnp.log(b))


def _biased(self, mu, nu, dither):
    bits = dither(mu.shape, 0)
    m = (_bits.word_of(mu) + jnp.minimum((bits >> 16) + 0x1000, 0xFFFF)) & storage._HIGH
    return m | (_bits.word_of(nu) + (bits & 0x7FFF)) >> 15, ()


def numpy_of(module, name, wrong) -> tuple:
    """The module's own `np.name` becomes wrong(the right one); numpy itself, and so the test's, stays right."""
    return replaced(module, "np", lambda right: SimpleNamespace(**vars(right) | {name: wrong(vars(right)[name])}))


def printed(change):
    """A number as text: change(the right text, key, row)."""
    return replaced(text, "_text", lambda right: lambda key, row: change(right, key, row))


def grouped(key, formula):
    """That quantity of a group of all layers is formula(their columns)."""

    def wrong(right):
        def group(self, patterns):
            got = right(self, patterns)
            number = np.full(len(got.names), formula(self.columns))
            return dataclasses.replace(got, columns=got.columns | {key: number})

        return group

    return replaced(snr_adam.telemetry.Report, "group", wrong)


def weighed(batch_size=None, groups="all"):
    """A group of all layers is what its definitions say."""
    layers = test_telemetry_report.LAYERS
    return Caught(test_telemetry_report.test_a_group_weighs_its_layers, (groups, batch_size, None, layers))


def column(key, wrong) -> tuple:
    """That column of a report is made by wrong(the right way)."""
    return columns.COLUMNS, key, lambda right: right._replace(of=wrong(right.of))


def _zeros(right):
    """Columns with 0 where nothing is known."""
    return lambda *args: {key: np.nan_to_num(x) for key, x in right(*args).items()}


def _mean_of_ratios(right):
    """The mean over the reports of a run of their noise scales."""

    def over_run(history, batch_size, since=0):
        snr = history.total["snr"][np.asarray(history.steps) > since]
        return right(history, batch_size, since)._replace(value=np.mean(batch_size / snr))

    return over_run


def _reads_all(right):
    """Percentiles that are the extremes."""
    return lambda x, at: right(x, np.where(np.asarray(at) < 50, 0, 100))


def _first_total(right):
    """A history that keeps the first number of a total of several."""

    def append(self, report):
        total = {key: np.ravel(x)[0] for key, x in report.total.items()}
        right(self, SimpleNamespace(step=report.step, names=report.names, columns=report.columns, total=total))

    return append


# name -> the wrong parts, and the test that catches them
MUTANTS: dict[str, tuple[list[tuple[Any, str, Callable]], Caught]] = {
    # eps
    "eps inside the root": ([root(lambda v, k: jnp.sqrt(v * k.v.debias + k.eps))], definition()),
    "eps 100 times too large": ([root(lambda v, k: jnp.sqrt(v * k.v.debias) + 100 * k.eps)], definition()),
    "eps forgotten": ([root(lambda v, k: jnp.sqrt(v * k.v.debias))], OTHER),
    "eps where TensorFlow has it": ([root(lambda v, k: (jnp.sqrt(v) + k.eps) * jnp.sqrt(k.v.debias))], definition()),
    "eps_root ignored": ([root(lambda v, k: jnp.sqrt(v * k.v.debias) + k.eps)], OTHER),
    "eps_root outside of the correction": (
        [root(lambda v, k: jnp.sqrt((v + k.eps_root) * k.v.debias) + k.eps)],
        OTHER,
    ),
    "a maximum with eps for the sum": ([root(lambda v, k: jnp.maximum(jnp.sqrt(v * k.v.debias), k.eps))], OTHER),
    # bias corrections and counts
    "signal not corrected": (
        [replaced(signal.EMA, "estimate", lambda right: lambda self, m, g, k: (m, 1.0))],
        definition(),
    ),
    "noise not corrected": ([root(lambda v, k: jnp.sqrt(v) + k.eps)], definition()),
    "corrections one step late": (
        everywhere("decay_at", lambda right: lambda b, t, dtype: right(b, t + 1, dtype)),
        definition(),
    ),
    "a decay in time corrected by its own 1 - b(t)^t": (
        everywhere("may_change", lambda right: lambda b: False),
        Caught(test_decays.test_numbers_set_by_hand_take_effect_and_nothing_else_does),
    ),
    "1 - b**t in float32": (
        everywhere("decay_at", lambda right: _power),
        accurate(0.9999),
    ),
    "b m + (1-b) g in float32": (
        everywhere("lerp", lambda right: lambda old, new, gain: (1 - gain) * old + gain * new),
        accurate(0.9999),
    ),
    "the count wraps around": (
        [replaced(transform.optax, "safe_increment", lambda right: lambda count: count + 1)],
        Caught(test_leaves.test_the_count_stops_at_its_last_value, ("adam",)),
    ),
    "schedules one step ahead": (
        everywhere("value_at", lambda right: lambda hyper, t, dtype=None: right(hyper, t + 1, dtype)),
        Caught(test_twins.test_schedules_are_those_of_inject_hyperparams, ("adam",), True),
    ),
    # variants, by their papers
    "decay where the step pulls the other way": (
        everywhere("_agreement", lambda right: lambda x, y: -right(x, y)),
        variant("cautious decay", of=test_family.test_descents_are_their_equations_alone_and_nested),
    ),
    "a cautious update no longer for it": (
        [replaced(descent.CautiousUpdate, "update", lambda right: lambda self, ratio, *rest: masked(ratio, *rest))],
        variant("cautious_adamw"),
    ),
    "clipped by the noise before this gradient": (
        everywhere("squared", lambda right: lambda n, v, k, c, e: right(n, v, k, c, e) * 0.99),
        variant("stable_adamw"),
    ),
    "a ball of another radius": (
        everywhere("_norm", lambda right: lambda x: right(x) + 1e-6),
        variant("adamh"),
    ),
    "decay corrected by the rate alone": (
        [replaced(descent.CorrectedDecay, "update", lambda right: descent.IndependentDecay.update)],
        variant("adamc"),
    ),
    "a noise from the mean with this gradient in it": (
        [replaced(deviation.FromMean, "at", lambda right: lambda *args: right(*args)._replace(back=0.0))],
        variant("adams"),
    ),
    "LaProp by the noise before": (
        [replaced(quotient.Normalized, "divides_by_new", lambda right: False)],
        variant("laprop"),
    ),
    "MARS without its norm": (
        [
            replaced(
                twofold.VarianceReduced, "sees", lambda right: lambda self, state, g, k: g + k.scale * (g - state.g)
            )
        ],
        variant("mars"),
    ),
    "MARS whose noise sees the raw gradient": (
        [replaced(heart.Rule, "moments", noise_of_the_raw)],
        variant("mars"),
    ),
    # moments
    "moments not stored": ([replaced(heart.Rule, "moments", not_stored)], definition()),
    "swapped betas": ([preset("adam", lambda adam: lambda lr, b1=0.9, b2=0.999: adam(lr, b2, b1))], definition()),
    "stale noise": (
        [replaced(heart.Rule, "ratio", stale_noise)],
        Caught(test_twins.test_updates_are_optaxs_with_every_option, ("adam", {"eps_root": 1e-2}), True),
    ),
    "stale signal": (
        [
            replaced(
                signal.EMA, "estimate", lambda right: lambda self, m, g, k: ((m - k.gain * g) / (1 - k.gain), k.debias)
            )
        ],
        definition(),
    ),
    "noise of the signal": (
        [replaced(noise.RMS, "update", lambda right: lambda self, v, g, k, center: right(self, v, center, k, center))],
        definition(),
    ),
    "mean absolute gradient": (
        everywhere("abs_sq", lambda right: abs),
        definition(),
    ),
    "complex squares": (
        [replaced(_numerics, "abs_sq", lambda right: lambda x: (x * x).real)],
        Caught(test_leaves.test_complex_moments_are_those_of_the_pair_of_reals, ("adam",)),
    ),
    "moments as narrow as parameters": (
        everywhere("compute_dtype", lambda right: lambda *xs: xs[0].real.dtype),
        Caught(test_leaves.test_mixed_precision, ("adam", "float16", "float16")),
    ),
    "a count of weak type": (
        [replaced(_tree, "new_count", lambda right: lambda leaves: jnp.asarray(0))],
        Caught(test_laws.test_types_are_a_fixed_point, ("adam", None)),
    ),
    # the step
    "up instead of down": ([step(lambda right, x, n, p, a, d: right(x, n, p, -a, d))], definition()),
    "no step at all": ([step(lambda right, x, n, p, a, d: 0.0 * right(x, n, p, a, d))], definition()),
    "the sign alone": ([step(lambda right, x, n, p, a, d: jnp.sign(right(x, n, p, a, d)) * a)], definition()),
    "steps of an element depend on its leaf": (
        [step(lambda right, x, n, p, a, d: right(x, jnp.mean(n, keepdims=True) + 0.0 * n, p, a, d))],
        definition(),
    ),
    # weight decay
    "decay coupled to the gradient": (
        [
            preset(
                "adamw",
                lambda adamw: lambda lr: optax.chain(optax.add_decayed_weights(1e-4), adamw(lr, weight_decay=0.0)),
            )
        ],
        twin("adamw"),
    ),
    "decay without the learning rate": (
        [step(lambda right, x, n, p, a, d: right(x, n, p, a, d / a if isinstance(d, float) else d))],
        twin("adamw"),
    ),
    "decay of what is masked": (
        everywhere("_select", lambda right: lambda on, decay: decay),
        Caught(test_twins.test_masks_are_optaxs, ("adamw", test_twins.big), True),
    ),
    "decay forgotten": ([step(lambda right, x, n, p, a, d: right(x, n, p, a, 0.0))], twin("adamw")),
    # the family
    "nadam without its look ahead": (
        [replaced(signal.Nesterov, "estimate", lambda right: lambda self, m, g, k: (m, k.scale))],
        twin("nadam"),
    ),
    "amsgrad's maximum before the correction": (
        [
            replaced(
                noise.Maximum,
                "update",
                lambda right: lambda self, s, g, k, c: right(dataclasses.replace(self, debias=False), s, g, k, c),
            )
        ],
        twin("amsgrad"),
    ),
    "adabelief around zero": (
        [replaced(deviation.Belief, "update", lambda right: lambda self, v, g, k, center: right(self, v, g, k, 0.0))],
        twin("adabelief"),
    ),
    "radam without rectification": (
        [replaced(noise.Rectified, "estimate", lambda right: lambda self, v, g, k, c: noise._root(v, k.root))],
        twin("radam"),
    ),
    "adopt with the current noise": (
        [
            replaced(
                quotient.Previous,
                "estimate",
                lambda right: lambda self, v, g, k, c: right(self, self.update(v, g, k, c), g, k, c),
            )
        ],
        twin("adopt"),
    ),
    "adopt without its floor": (
        [
            replaced(
                quotient.Previous,
                "estimate",
                lambda right: (
                    lambda self, v, g, k, c: jnp.where(
                        k.first, jnp.inf, jnp.maximum(jnp.sqrt(v), abs(g) * k.inverse_clip)
                    )
                ),
            )
        ],
        Caught(test_leaves.test_float16_with_zero_gradients_stands_still, ("adopt",)),
    ),
    "lion with one decay": (
        [
            replaced(
                signal.Sign,
                "at",
                lambda right: lambda self, t, dtype: right(dataclasses.replace(self, b2=self.b1), t, dtype),
            )
        ],
        twin("lion"),
    ),
    "lamb without trust": (everywhere("_trust_ratio", lambda right: lambda p, u: 1.0), twin("lamb")),
    "a floor of none": (
        [replaced(signal.EMA, "floor", lambda right: lambda self, t: 0.0)],
        Caught(test_laws.test_the_floor_is_the_sum_of_squared_weights, ("ema",), True),
    ),
    # bits
    "a product that may be fused": (
        everywhere("unseen_zero", lambda right: lambda t, dtype: jnp.zeros((), dtype) * -1.0),
        Caught(test_bits.test_a_form_does_not_change_bits, ("lamb", "update and apply apart")),
    ),
    "biased rounding": (
        [replaced(storage.Packed, "encode", lambda right: _biased)],
        Caught(test_random_bits.test_the_mean_of_rounding_is_exact, (test_random_bits._packed(0), 16, 1, 254)),
    ),
    "a stuck random bit": (
        [replaced(test_random_bits, "random_bits", lambda right: lambda *args: right(*args) | (1 << 20))],
        Caught(test_random_bits.test_every_bit_is_fair, (1, 0, 0)),
    ),
    "rounding to nearest": (
        [replaced(storage, "round_to", lambda right: lambda dtype, x, bits=None: right(dtype, x))],
        Caught(test_storage.test_no_stall_on_the_way_up),
    ),
    "the same random bits in every step": (
        everywhere("seeds_at", lambda right: lambda count, arrays: right(jnp.int32(7) + 0 * count, arrays)),
        Caught(test_storage.test_no_stall_on_the_way_up),
    ),
    "the same random bits in every leaf": (
        everywhere("seeds_at", lambda right: lambda count, arrays: right(count, 1) * arrays),
        Caught(test_random_bits.test_equal_leaves_are_rounded_by_different_bits, ("packed",)),
    ),
    "a packed noise of one bit less": (
        [
            replaced(
                storage.Packed,
                "decode",
                lambda right: lambda self, mu, nu, dtype: right(self, mu & ~jnp.uint32(1), nu, dtype),
            )
        ],
        Caught(test_random_bits.test_every_code_encodes_to_itself, ("noise", 0)),
    ),
    "a remainder that is dropped": (
        [replaced(precision, "_split", lambda right: lambda *args: (right(*args)[0], jnp.zeros_like(right(*args)[1])))],
        Caught(test_precision.test_16_bits_are_float32, ("adamw",)),
    ),
    # what was away
    "a digest without places": (
        [replaced(checkpoint, "element_index", lambda right: lambda shape: jnp.zeros(shape, jnp.uint32))],
        Caught(test_checkpoint.test_whatever_is_another_tree, ("two elements exchanged",)),
    ),
    "a digest without names": (
        [replaced(checkpoint, "_token", lambda right: lambda place, row: b"8 bytes.")],
        Caught(test_checkpoint.test_whatever_is_another_tree, ("another name",)),
    ),
    "a digest of rounded numbers": (
        [
            replaced(
                checkpoint, "_words", lambda right: lambda x: right(x.astype("bfloat16") if x.dtype == "float32" else x)
            )
        ],
        Caught(test_checkpoint.test_every_bit_of_every_dtype, ("float32",)),
    ),
    "a move that forgets the count": (
        [replaced(migration, "move_moments", lambda right: lambda *args: right(*args)._replace(count=jnp.int32(0)))],
        Caught(test_migration.test_there_and_back, ("constant", "float32", "adam")),
    ),
    "a move that rounds to nearest": (
        [
            replaced(
                migration,
                "random_bits",
                lambda right: lambda shape, *args, **kwargs: jnp.full(shape, 0x80004000, jnp.uint32),
            )
        ],
        Caught(test_migration.test_rounding_on_the_way_is_unbiased, ("packed",)),
    ),
    # what is printed
    "half of an SNR's error": (
        [printed(lambda right, key, row: right(key, row | {"snr_error": row["snr_error"] / 2}))],
        Caught(test_tables.test_every_number_is_printed_under_its_name_with_all_its_digits),
    ),
    "half of an SNR's error over time alone": (
        [printed(lambda right, key, x: right(key, x if "name" in x else x | {"snr_error": x["snr_error"] / 2}))],
        Caught(test_tables.test_over_time_a_number_is_printed_as_in_the_table_of_its_step),
    ),
    "a share without its tenths": (
        [
            printed(
                lambda right, key, row: f"{row[key]:.0%}" if key == "significant" and row[key] > 0 else right(key, row)
            )
        ],
        Caught(test_tables.test_every_number_is_printed_under_its_name_with_all_its_digits),
    ),
    "two digits for three": (
        [printed(lambda right, key, row: f"{row[key]:.2g}" if key == "noise" else right(key, row))],
        Caught(test_tables.test_every_number_is_printed_under_its_name_with_all_its_digits),
    ),
    "half of a noise scale's interval": (
        [
            replaced(
                text, "NoiseScale", lambda right: lambda x, error, low, *rest: right(x, error, (x + low) / 2, *rest)
            )
        ],
        Caught(test_tables.test_every_number_is_printed_under_its_name_with_all_its_digits),
    ),
    "a noise scale without its bound": (
        [replaced(text, "NoiseScale", lambda right: lambda x, error, low, *rest: right(x, error, 0 * low, *rest))],
        Caught(test_tables.test_every_number_is_printed_under_its_name_with_all_its_digits),
    ),
    "a title that is silent about averages": (
        [replaced(text, "numbers", lambda right: lambda seen: right(dataclasses.replace(seen, window=0)))],
        Caught(test_tables.test_the_title_says_over_how_many_steps_an_average_reaches),
    ),
    "colours by the SNR alone": (
        [replaced(text, "_styles", lambda right: lambda least: right(least + 0.5))],
        Caught(test_tables.test_where_no_signal_was_found_it_is_red),
    ),
    # what is logged
    "the 95th percentile as p90": (
        [numpy_of(trackers, "percentile", lambda right: lambda x, at: right(x, [95 if p == 90 else p for p in at]))],
        Caught(test_telemetry_report.test_a_metric_is_what_its_name_says),
    ),
    "the mean as p50": (
        [
            numpy_of(
                trackers,
                "percentile",
                lambda right: lambda x, at: [np.mean(x) if p == 50 else right(x, p) for p in at],
            )
        ],
        Caught(test_telemetry_report.test_a_metric_is_what_its_name_says),
    ),
    "a total left out": (
        [replaced(trackers, "_NOT_GLOBAL", lambda right: (*right, "update_rms"))],
        Caught(test_telemetry_report.test_a_metric_is_what_its_name_says),
    ),
    "metrics that ignore the batch size": (
        [replaced(trackers, "metrics", lambda right: lambda *args, batch_size=None, **rest: right(*args, **rest))],
        Caught(test_telemetry_report.test_metrics_count_in_examples_where_a_batch_size_is_given),
    ),
    "metrics that know of no epochs": (
        [replaced(trackers, "metrics", lambda right: lambda *args, examples=None, **rest: right(*args, **rest))],
        Caught(test_telemetry_report.test_metrics_know_of_epochs),
    ),
    # what a column is
    "half of a standard error": (
        [column("snr_error", lambda right: lambda row: right(row) / 2)],
        Caught(test_telemetry_report.test_an_interval_holds_its_number_and_the_relative_errors_are_equal, (None,)),
    ),
    "a noise scale where no signal was found": (
        [column("noise_scale", lambda right: lambda row: row.batch_size / row.ratio(row.share))],
        Caught(test_telemetry_report.test_an_interval_holds_its_number_and_the_relative_errors_are_equal, (None,)),
    ),
    "epochs that count for the number alone": (
        [column("snr_high", lambda right: lambda row: right(row) - row.added)],
        Caught(test_telemetry_report.test_batches_without_replacement_add_their_share_of_an_epoch_to_the_snr),
    ),
    "persistence by errors in squares": (
        [
            column(
                "persistence_low", lambda right: lambda row: (row.lasting - row.lasting_half) / (row.share + row.half)
            )
        ],
        weighed(),
    ),
    "a norm of the noise with the signal": (
        [column("gradient_noise", lambda right: lambda row: np.sqrt(row.sums.gradient_sq))],
        weighed(),
    ),
    "a quantity without a sentence": (
        [(columns.COLUMNS, "floor", lambda right: right._replace(says="Noise."))],
        Caught(test_telemetry_report.test_every_quantity_is_explained_in_a_sentence),
    ),
    "a signal from momentum alone": (
        [replaced(columns, "_SURE", lambda right: 0.0)],
        weighed(groups="each layer"),
    ),
    "zeros before the first step": (
        [replaced(report, "columns", _zeros)],
        Caught(test_telemetry_report.test_before_the_first_step_nothing_is_known),
    ),
    "any batch size": (
        [replaced(report, "_check_batches", lambda right: lambda *args: None)],
        Caught(test_telemetry_report.test_batches_that_cannot_be_are_refused, (snr_adam.report, "batch_size=-1:")),
    ),
    # what lags say
    "a mean of products for a line": (
        [replaced(lags, "_LINE", lambda right: lags._MEAN)],
        Caught(test_lags.test_the_estimate_is_its_formula, (2, 0.97)),
    ),
    "an interval for many bursts after one": (
        [replaced(lags, "student", lambda right: lambda bursts, level=0.975: 1.96)],
        Caught(test_lags.test_a_known_signal_is_in_the_interval, (1,)),
    ),
    "the same signs for ever": (
        [replaced(test_lags, "seeds_at", lambda right: lambda count, leaves: right(0 * count, leaves))],
        Caught(test_lags.test_a_sketch_keeps_inner_products_on_average, ((2000,), "float32")),
    ),
    "a sketch without an error": (
        [replaced(lags, "WIDTH", lambda right: 10**9)],
        Caught(test_lags.test_what_a_sketch_adds_to_the_error_is_known),
    ),
    "bursts that are not whole": (
        [replaced(lags, "put", lambda right: lambda old, new, place, ok: right(old, new, place, True))],
        Caught(test_lags.test_a_burst_with_a_step_that_was_not_finite_does_not_count),
    ),
    # what is advised
    "a run's mean noise scale": (
        [replaced(test_advice, "over_run", _mean_of_ratios)],
        Caught(test_advice.test_the_noise_scale_of_a_run_is_that_of_its_mean_share_of_signal),
    ),
    "a sentence about the rate whatever is known": (
        [replaced(advice.Advice, "learning_rate", lambda right: advice._IN_BALANCE)],
        Caught(test_advice.test_of_the_learning_rate_only_what_experiments_bear_out_is_said, ((0.09, 0.11), None, 32)),
    ),
    # what groups are
    "floors averaged without weights": (
        [grouped("floor", lambda x: np.sqrt(np.mean(x["floor"] ** 2)))],
        weighed(),
    ),
    "an SNR's errors averaged without weights": (
        [grouped("snr_error", lambda x: np.sqrt(np.mean(x["snr_error"] ** 2)))],
        weighed(),
    ),
    "a noise scale's errors averaged": (
        [grouped("noise_scale_error", lambda x: np.mean(x["noise_scale_error"]))],
        weighed(),
    ),
    "shares averaged by size": (
        [grouped("significant", lambda x: np.average(x["significant"], weights=x["size"]))],
        weighed(),
    ),
    "updates averaged by leaf": (
        [grouped("update_rms", lambda x: np.sqrt(np.mean(x["update_rms"] ** 2)))],
        weighed(),
    ),
    "groups that ignore the batch size": (
        [
            replaced(
                snr_adam.telemetry.Report,
                "group",
                lambda right: lambda self, *args: right(dataclasses.replace(self, batch_size=None), *args),
            )
        ],
        weighed(32),
    ),
    # what is drawn
    "colours from the extremes": (
        [numpy_of(frame, "percentile", _reads_all)],
        Caught(test_plots.test_colours_are_logarithmic_over_more_than_a_factor_of_ten, (1.0, 10.1)),
    ),
    "colours of an SNR to the extreme": (
        [numpy_of(frame, "percentile", _reads_all)],
        Caught(test_plots.test_colours_of_an_snr_begin_at_its_floor),
    ),
    "linear colours": (
        [replaced(frame, "LogNorm", lambda right: frame.Normalize)],
        Caught(test_plots.test_colours_are_logarithmic_over_more_than_a_factor_of_ten, (1.0, 10.1)),
    ),
    "linear colours of an SNR": (
        [replaced(frame, "LogNorm", lambda right: frame.Normalize)],
        Caught(test_plots.test_colours_of_an_snr_begin_at_its_floor),
    ),
    "logarithmic colours": (
        [replaced(frame, "Normalize", lambda right: frame.LogNorm)],
        Caught(test_plots.test_colours_are_linear_over_less_and_where_numbers_are_not_positive, (1.0, 10.0)),
    ),
    "half of a band": (
        [numpy_of(plots, "minimum", lambda right: lambda x, most: right(x, most / 5))],
        Caught(test_plots.test_the_band_of_a_noise_scale_ends_at_a_tenth_of_it),
    ),
    "a band below a tenth of its value": (
        [numpy_of(plots, "maximum", lambda right: lambda x, least: x)],
        Caught(test_plots.test_the_band_of_a_noise_scale_ends_at_a_tenth_of_it),
    ),
    "400 names on one axis": (
        [replaced(frame, "NAMED_LAYERS", lambda right: 400)],
        Caught(test_plots.test_no_axis_has_more_names_than_can_be_read, ("heat_map", 400)),
    ),
    "an overview that ignores the batch size": (
        [replaced(plots, "noise_scale", lambda right: lambda reports, batch_size=None, **rest: right(reports, **rest))],
        Caught(test_plots.test_overview_hands_on_what_it_is_given, (snr_adam.History(fake_reports(3, 2)),)),
    ),
    # what is kept, and where
    "an unfinished file that two share": (
        [replaced(writing, "token_hex", lambda right: lambda size: f"{os.getpid()}")],
        Caught(
            test_history.test_two_that_save_under_one_name_do_not_share_what_is_unfinished,
            ("run.npz",),
            fixtures=("tmp_path",),
        ),
    ),
    "a matrix for a row": (
        [numpy_of(history, "shape", lambda right: lambda x: right(x)[:1])],
        Caught(test_history.test_a_quantity_is_one_number_for_each_layer, (np.ones((2, 3)), 0)),
    ),
    "a total of several numbers": (
        [replaced(snr_adam.History, "append", _first_total)],
        Caught(test_history.test_a_total_is_one_number, ([1.0, 2.0],)),
    ),
    "Zero-1 that leaves its smallest whole": (
        [
            replaced(
                sharding.Zero1,
                "spec",
                lambda right: lambda self, *args: right(dataclasses.replace(self, smallest=self.smallest + 1), *args),
            )
        ],
        Caught(test_sharding.test_zero1_splits_an_array_of_exactly_the_smallest_size, (None,)),
    ),
}


def _forget(test):
    """What the test's module and the package have compiled, and what the module remembers of earlier runs."""
    for x in [*vars(sys.modules[test.__module__]).values(), *vars(checkpoint).values()]:
        for clear in ("cache_clear", "clear_cache"):
            getattr(x, clear, lambda: None)()


@contextlib.contextmanager
def mutated(parts, test):
    """The package with wrong parts."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, wrong in parts:
            if isinstance(owner, dict):
                patch.setitem(owner, name, wrong(owner[name]))
            else:
                patch.setattr(owner, name, wrong(getattr(owner, name)))
        _forget(test)
        yield
    _forget(test)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, request):
    """By an assertion, also one that an error is raised."""
    parts, caught = MUTANTS[name]
    jax.clear_caches()  # optimizers that are made alike share what was traced, with the mutant and without
    with mutated(parts, caught.test), pytest.raises((AssertionError, pytest.fail.Exception)):
        caught(request)
    jax.clear_caches()
    print(f"{name}: caught by {caught.test.__module__}.py::{caught.test.__name__}{caught.args}")


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_what_catches_passes_without_the_mutant(name, request):
    MUTANTS[name][1](request)


def test_there_are_enough():
    assert len(MUTANTS) >= 25
    assert snr_adam.adam in {make for make, _ in cases.PRESETS.values()}  # no mutant stays behind
