"""Signal and noise of a running optimizer, per layer: what is measured on the device, while it trains.

A gradient is g_t = G + x_t: the true gradient and noise of covariance Sigma, independent from step to step. A look
takes sums over each leaf, with g as the moment sees it (clipped, scaled):

    A_t = |g_t|^2              E A = |G|^2 + tr(Sigma)       the power of one gradient
    L_t = <m^_{t-1}, g_t>      what gradients agree on over the memory of m: the persistent part of |G|^2
    s_t                        128 sums with random signs, a sketch of g, whose products over successive steps
                               give |G|^2 at any learning rate (`_lags`)

*This step's numbers.* Signal |m^|, noise sqrt(sum v^), their ratio and its floor are those of the step looked at, with
that step's own weights. On accelerators the sums are taken at every step, in the update's own kernel, and the rest
follows from m_t = (1-k) m_{t-1} + c g_t (c the gain, k the leak of the moment, one number for an average):

    |m_t|^2 = (1-k)^2 |m_{t-1}|^2 + 2 (1-k) c <m_{t-1}, g_t> + c^2 A_t        sum v_t = (1-k) sum v_{t-1} + c A_t

On CPU nothing fuses with a sum. There a look is a second pass, over g and the new moments, after the step, under a
`lax.cond`; <m_{t-1}, g> is (<m_t, g> - c A) / (1-k). Looks come in bursts of six successive steps, as the lags need
them, one burst in 6 N steps for `every` = N.

*Floor.* Noise passes m^ too: E |m^|^2 = |G|^2 + rho tr(Sigma) with rho = sum a_s^2 / (sum a_s)^2 for the weights a_s of
past gradients in m, for an EMA (1-b)(1+b^t) / ((1+b)(1-b^t)). Pure noise shows a pseudo-SNR |m^| / |v^|^(1/2) of
sqrt(rho): 0.23 for b1 = .9.

*Decays* are known: this package's steps say theirs, those of other optimizers are found before the run (`_outside.py`).
A moment that is no linear average of the gradients has no L, no signal and no floor: they are nan.

*Spikes* (`_spikes`), the cosine of m and g, the learning rate and what a guard has clipped follow from these sums and
from what the step was given.

*Details* (`_details`), the share of significant elements, the norms of update and parameters, the largest elements and
what is lost to rounding, are no linear sums. On CPU they take one more pass, at the first 16 looks and then ever more
rarely, down to one in 64. On accelerators, where they would cost a branch and 8 bytes per parameter, they are not made.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from snr_adam import _checks, _compiler, _tree
from snr_adam._bits import seeds_at
from snr_adam._look import Look
from snr_adam._moments import find, kinds_in
from snr_adam._recipe import with_recipe
from snr_adam.telemetry import _averages as averages
from snr_adam.telemetry import _lags as lags
from snr_adam.telemetry import _spikes as spikes
from snr_adam.telemetry import _sums as sums
from snr_adam.telemetry._averages import Last, Memory
from snr_adam.telemetry._details import details
from snr_adam.telemetry._outside import Clipped, Outside, as_computed, averages_of, injected_rate
from snr_adam.telemetry._seen import Leaf, Shown, Taken, observed_in
from snr_adam.telemetry._state import Watched, blank, means_in, spikes_in
from snr_adam.transform import ScaleBySnrState

_RAREST = 64
_WINDOWS = {
    "MultiStepsState": "optax.MultiSteps(snr_adam.observe(tx), k)",
    "AccumulateState": "snr_adam.accumulate(snr_adam.observe(tx), n)",
    "ApplyEvery": "optax.chain(optax.apply_every(k), snr_adam.observe(tx))",
}


@with_recipe
def observe(
    tx: optax.GradientTransformation, every: int = 1, layer_axis: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Watches an optimizer: its updates and its state are the same bits with and without.

    SNR = |G|^2 / tr(Sigma), per leaf, from products of successive gradients, beside Adam's own signal / noise. Read it
    with `report(opt_state)` or `metrics(opt_state)`, at any time.

    Args:
      tx: any optimizer with a first moment: one of this package, `optax.adamw`, `optax.lion`, `optax.sgd` with
        momentum, a chain, ... What is measured is what the moment sees: behind a `guard` that clips, the clipped
        gradients, whether it is around `observe` or inside of it.
      every: look at one step in so many, in bursts of six successive steps: with 10 at steps 1 to 6, 61 to 66, ... On
        CPU, where a look is a pass of its own, 10 looks a tenth as often; the averages then reach ten times as far
        back. On accelerators 1 costs nothing.
      layer_axis: the axis along which leaves stack layers (as scanned layers do), to report each layer by itself: an
        int for all leaves, a dict from patterns (regular expressions, searched in "layers/kernel") to ints, or None.

    Returns:
      A transformation whose state is an `ObserveState`; arguments pass through.

    Raises:
      ValueError: if `every` is less than 1, if `tx` keeps no first moment, or if the moments in it see other gradients
        than those it is given (`optax.MultiSteps`, `accumulate`, a clip before another package's optimizer).

    >>> tx = observe(optax.adamw(1e-3))
    >>> w = jnp.ones(4)
    >>> state = tx.init(w)
    >>> for step in range(6):
    ...     updates, state = jax.jit(tx.update)(jnp.ones(4), state, w)  # one gradient for ever: no noise at all
    >>> from snr_adam.telemetry.report import report
    >>> print(round(report(state).total["pseudo_snr"], 4), report(state).total["snr"])
    1.0 inf

    Reference: Balles & Hennig 2018 (arXiv 1705.07774) for rho; McCandlish et al. 2018 (arXiv 1812.06162) for A.
    """
    _checks.check_layer_axis("observe", layer_axis)
    every, tx = _checks.check_whole("observe: every", every), _checks.check_optimizer("observe", tx)
    known: dict = {}

    def from_outside(leaves, outer):
        """What the moments of an optimizer that did not say are of the gradients; found once."""
        key = outer, tuple(x is None or (jnp.ndim(x), jnp.iscomplexobj(x)) for x in leaves)
        if key not in known:
            try:
                known[key] = averages_of(tx, leaves, outer)
            except Clipped:
                raise ValueError(
                    "observe: something between it and the moments changes the gradients, such as a clip, so that what "
                    "it sees is not what they average: put observe behind it, optax.chain(clip, observe(tx)), or clip "
                    "with guard(observe(tx), clip_norm=...)"
                ) from None
        return known[key]

    def init(params):
        inner = tx.init(params)
        for kind, instead in _WINDOWS.items():
            if kind in kinds_in(inner):
                raise ValueError(
                    f"observe: most gradients that it would be given do not reach the moment, because of the {kind} "
                    f"inside; observe what sees whole batches instead: {instead}"
                )
        leaves, outer = _tree.flatten(params)
        found = find(inner, outer, leaves)
        observed = observed_in(params, found, layer_axis)
        if not observed and any(x is not None for x in leaves):
            raise ValueError(
                f"observe: {kinds_in(inner)} keep no first moment of the gradients, so nothing tells signal from "
                "noise: wrap an optimizer with momentum, such as snr_adam.adamw or optax.sgd(0.1, momentum=0.9)"
            )
        if not all(x is None or isinstance(x.owner, ScaleBySnrState) for x in found):
            from_outside(leaves, outer)
        return blank(inner, observed, leaves)

    def shown(leaves, outer, updates, state, inner, out, look, gate, params) -> Shown:
        """What there is to ask of each observed leaf."""
        before: list[Any] = find(state.inner, outer, leaves)
        after: list[Any] = find(inner, outer, leaves)
        observed = observed_in(updates, after, layer_axis, state.axis.shape[0])
        here = {id(x) for x in jax.tree.leaves(inner)}
        us = outer.flatten_up_to(out)
        ps = [None] * len(leaves) if params is None else outer.flatten_up_to(params)
        rate = injected_rate(inner)

        def seen(leaf: Leaf):
            found = look.seen.get(leaf.key)
            # what was noted in a branch or a loop cannot be used outside of it, and is not in the state that came out
            if found and all(id(x) in here for x in jax.tree.leaves(found.new)):
                return found
            i = leaf.number
            old, new = before[i], after[i]
            kinds = found.constants if found else as_computed(from_outside(leaves, outer)[i], old)
            counts = [getattr(moments.owner, "count", None) for moments in (old, new)]
            counted = all(getattr(count, "shape", None) == () for count in counts)
            t, ok = (counts[1], counts[1] != counts[0]) if counted else (state.count + 1, True)
            return Outside(leaves[i], old, new, kinds, us[i], t, ok, rate, getattr(gate, "scale", None))

        those = [leaf.number for leaf in observed]
        return Shown(observed, [seen(leaf) for leaf in observed], [ps[i] for i in those], [us[i] for i in those])

    def update(updates, state, params=None, *, look: Look | None = None, **extra_args):
        own, gate = Look(), extra_args.get("gate")
        out, inner = tx.update(updates, state.inner, params, look=own, **extra_args)
        if look is not None:
            look.seen.update(own.seen)
        leaves, outer = _tree.flatten(updates)
        step = shown(leaves, outer, updates, state, inner, out, own, gate, params)
        t: Any = optax.safe_increment(_tree.checked_count(state.count))
        old = Watched(**{name: getattr(state, name) for name in Watched._fields})
        burst, place = state.count // (lags.BURST * every), state.count % (lags.BURST * every)
        due = place < lags.BURST
        seeds = seeds_at(burst, len(step.observed))

        def keep(new, old, where):
            return jax.tree.map(lambda x, y: jnp.where(where, x, y), new, old)

        def after(taken: Taken, memory, detail) -> Watched:
            """The sums after this step, if it is looked at and was finite."""
            ok = jnp.isfinite(jnp.sum(taken.power))
            last, persistent = step.numbers(taken, Memory(*old.memory), memory)
            means = averages.stack(means_in(old.means))
            new = averages.mean_of(means, old.square, old.seen, taken.power, persistent, last.scale)
            means, square, seen = keep(new, (means, old.square, old.seen), ok & (state.count > 0))
            heights = spikes.after(spikes_in(old.means), taken.power, last.scale, t)
            means = jnp.concatenate([means, keep(heights, averages.stack(spikes_in(old.means)), ok)])
            last, detailed = detail(last, seen, memory)
            last = keep(averages.stack(last), old.last, ok)
            sketches = lags.put(old.sketches, taken.sketches, place, ok)
            looked = jnp.where(ok, t, old.looked)
            return Watched(seen, looked, detailed, old.bursts, square, means, old.lags, old.memory, last, sketches)

        def burst_after(new: Watched, choose) -> Watched:
            """The same with what the burst has shown, if it has come to its end."""

            def ended():
                return lags.after_a_burst(old.lags, old.bursts, new.sketches, step.is_whole)

            found, bursts = choose(place == lags.BURST - 1, ended, lambda: (old.lags, old.bursts))
            return new._replace(lags=found, bursts=bursts)

        def afterwards():
            """On CPU: a second pass, over the gradient and the new moments."""

            def detail(last, seen, memory):
                stride = jnp.clip(2 ** (28 - jax.lax.clz(jnp.maximum(seen, 8))), 1, _RAREST)
                kept = last.with_details(Last(*old.last))
                rare = seen & (stride - 1) == 0
                made = jax.lax.cond(rare, lambda: details(step, last, memory), lambda: kept)
                return made, jnp.where(rare, t, old.detailed)

            def look():
                memory = step.remember(Memory(*old.memory))
                return burst_after(after(step.after_the_step(seeds), memory, detail), jax.lax.cond)

            new, zero = jax.lax.cond(
                due & step.ok, lambda: (look(), _compiler.not_yet(t)), lambda: (old, jnp.uint32(0))
            )
            return new if step.is_constant else new._replace(memory=remembered()), zero

        def remembered():
            """The weights of this step, where decays change in time."""
            new = averages.stack(step.remember(Memory(*old.memory)))
            return keep(new, old.memory, step.ok)

        def new_parameter(p, u):
            """On TPU what waits for it is made in the kernel that makes it."""
            if p is None or u is None:
                return None
            if gate is not None:  # a guard around this observe will do so
                u = jnp.where(gate.ok, u, -jnp.zeros_like(u))
            return jnp.asarray(optax.apply_updates(p, u)), t

        def inside(take=sums.one_each, beside=new_parameter):
            """On accelerators: sums in the update's own kernel, at every step."""
            power, product, direct, sketches = step.in_the_step(seeds, take, beside)
            begun = Memory(*old.memory).begun((state.count == 0) & (step.t > 1))
            memory = step.advance(step.remember(begun), power, product)
            second = jnp.where(step.of_kind("direct"), direct, memory.second)
            unknown = jnp.full_like(power, jnp.nan)  # zeros: one more row of sums would be more than a look may keep
            taken = Taken(power, product, unknown, begun.first, memory.first, second, sketches)
            new = after(taken, memory, lambda last, *_: (last, old.detailed))
            new = burst_after(new, lambda due, new, old: keep(new(), old(), due))
            new = keep(new, old, due & step.ok)
            return new._replace(memory=keep(averages.stack(memory), old.memory, step.ok)), jnp.uint32(0)

        if not step.observed:
            return out, state._replace(inner=inner, count=t)
        on_gpu = functools.partial(inside, sums.at_once, lambda p, u: None)
        new, zero = jax.lax.platform_dependent(cpu=afterwards, cuda=on_gpu, default=inside)
        count = jnp.where(step.ok, t, state.count)
        if step.is_own:  # the updates of others end in a product: what it rounds like depends on what comes after it
            out = jax.tree.map(lambda u: _compiler.after(_tree.jax_array(u), zero), out)
        return out, state._replace(inner=inner, count=count, **jax.lax.stop_gradient(new)._asdict())

    return optax.GradientTransformationExtraArgs(init, update)
