"""From gradient descent to Adam, one idea and one figure at a time, on real gradients.

The lesson is `docs/tutorials/adam_by_hand.md`, a notebook that calls the functions of this file; the arithmetic is in
`by_hand.py`. As a script this says what each figure shows, in numbers, and writes it to build/adam_by_hand/:

    python3 -m uv run examples/adam_by_hand.py
    python3 -m uv run examples/adam_by_hand.py random_walk sweep      only these two

Each figure is a function that draws once; what several of them need is computed once.
"""

import argparse
import functools
import io
import textwrap
from pathlib import Path
from typing import NamedTuple

import by_hand as by
import numpy as np
from by_hand import (
    DESCENT_RATE,
    LAST,
    RATE,
    TENTHS,
    UPDATES,
    adam,
    change,
    descend,
    each_gradient,
    recording,
    size,
    times,
)
from matplotlib.figure import Figure

FOLDER = Path("build", "adam_by_hand")
BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#666666"  # told apart also by colour-blind eyes
FIGURES = {}  # by name, in the order of the lesson
FLOOR = by.floor()
LOSS = "loss on all digits (nats per digit)"


class Shown(NamedTuple):
    """A figure, what it shows in a few sentences, and the numbers in them. Notebooks display it."""

    figure: Figure
    says: str
    numbers: dict

    def __repr__(self):
        return self.says

    def _repr_png_(self):
        file = io.BytesIO()
        self.figure.savefig(file, dpi=150)
        return file.getvalue()


def draws(function):
    """Makes a function that returns a figure, sentences and numbers one of the lesson's figures, drawn only once."""
    number = len(FIGURES) + 1

    @functools.cache
    @functools.wraps(function)
    def draw():
        figure, says, numbers = function()
        for panel in figure.axes:
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=8.5, edgecolor="none", framealpha=0.8)
        return Shown(figure, f"Figure {number}. {says}", numbers)

    FIGURES[function.__name__] = draw
    return draw


def panels(*titles):
    """A figure with one panel for each title, side by side."""
    figure = Figure(figsize=(8.2, 3.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, weight="bold", size=9.5)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, *axes


def ticks(panel, places):
    """Only these numbers on a logarithmic axis."""
    panel.set_xticks(places, [f"{place:,}" for place in places], minor=False, size=8.5)
    panel.minorticks_off()


# --- What several figures need -------------------------------------------------------------------------------------


@functools.cache
def averages():
    """Adam's two averages of the recorded gradients, corrected, and the SNR."""
    gs = recording().gs
    return by.corrected(gs, by.B1), by.corrected(gs * gs, by.B2), by.snr_of(gs)


@functools.cache
def clear_weight():
    """Of the weights with the strongest true gradients, the one that stands out from its noise."""
    seen = recording()
    strong = np.argsort(np.abs(seen.truth[0]))[-200:]
    return strong[np.argmax(np.abs(seen.truth[0, strong]) / seen.noise[0, strong])]


def used(gs):
    """Which weights have had a gradient at all."""
    return (gs != 0).any(axis=0)


def fifties(x):
    """The mean over each 50 updates."""
    return x.reshape(-1, 50, *x.shape[1:]).mean(axis=1)


def typical(snr):
    """The root mean square over all weights that have had a gradient, and 50 updates."""
    return np.sqrt(fifties(np.square(snr[:, used(recording().gs)]).mean(axis=1)))


@functools.cache
def losses(method, rate, looks="last", **settings):
    """The losses of a run."""
    return by.run(method, rate, {"last": LAST, "tenths": TENTHS, "always": by.ALWAYS}[looks], **settings)[1]


@functools.cache
def swept(method):
    """Learning rates, and the last 200 losses with each."""
    rates = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    rates = np.array(rates if method is descend else [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1])
    return rates, np.stack([losses(method, float(rate)) for rate in rates])


# --- The figures ---------------------------------------------------------------------------------------------------


@draws
def descent_shakes():
    """Gradients of mini-batches at the same weights, and descent with them."""
    each = np.asarray(each_gradient(by.start, by.labels))
    truth, many = each.mean(axis=0), each[by.batches[:300]].mean(axis=1)
    i, j = np.argsort(np.abs(truth))[-2:]  # the two weights that the true gradient moves most
    shaking, fair = (losses(descend, rate, "always")[:300] for rate in (0.5, DESCENT_RATE))
    whole = np.broadcast_to(by.everyone, (300, len(by.everyone)))
    smooth = np.asarray(descend(by.labels, whole, by.ALWAYS[:300], 0.5)[1])

    figure, left, right = panels("Mini-batches disagree about the direction", "Descent with them shakes")
    left.plot(many[:, i], many[:, j], ".", color=ORANGE, alpha=0.5, label="gradient of a mini-batch of 32 digits")
    left.plot(truth[i], truth[j], "*", color=BLUE, ms=13, label="true gradient: all 1,797 digits")
    left.set(xlabel=f"gradient of weight {i} (nats per unit)", ylabel=f"gradient of weight {j} (nats per unit)")
    left.set_ylim(1.6 * many[:, j].min(), None)
    left.axhline(0, color=GRAY, lw=0.5)
    left.axvline(0, color=GRAY, lw=0.5)
    right.plot(shaking, color=ORANGE, lw=1, label="mini-batches, rate 0.5: about the best")
    right.plot(fair, "--", color=GREEN, label=f"mini-batches, rate {DESCENT_RATE}: calmer, slower")
    right.plot(smooth, color=BLUE, label="true gradients, rate 0.5")
    right.set(xlabel="updates", ylabel=LOSS, ylim=(0.9, 2.6))
    numbers = {"shaking": change(shaking[200:]), "fair": change(fair[200:]), "smooth": change(smooth[200:])}
    says = (
        f"With mini-batches the loss changes by {numbers['shaking']:.4f} an update at rate 0.5, by "
        f"{numbers['fair']:.4f} at rate {DESCENT_RATE}. With true gradients it changes by {numbers['smooth']:.4f}, "
        "and always downwards."
    )
    return figure, says, numbers


@draws
def signal_and_noise():
    """One weight's gradient over time, and the noise of a mini-batch against its size."""
    seen, one = recording(), clear_weight()
    each = np.asarray(each_gradient(by.start, by.labels))
    sizes, draw, alike = 2 ** np.arange(2, 10), np.random.default_rng(1), np.full(len(each), 1 / len(each))
    samples = [draw.multinomial(n, alike, 100) @ each / n for n in sizes]  # 100 mini-batches of each size
    measured = np.array([np.sqrt(np.square(size(sample - each.mean(axis=0))).mean()) for sample in samples])
    predicted = size(each.std(axis=0)) / np.sqrt(sizes)

    figure, left, right = panels(f"Weight {one} while the network learns", "Four times the samples, half the noise")
    left.plot(times, seen.gs[:, one], ".", color=ORANGE, ms=2.5, alpha=0.6, label="gradient g of a mini-batch")
    middle, spread = seen.truth[seen.looks, one], seen.noise[:, one]
    band = middle - spread, middle + spread
    left.fill_between(times[seen.looks], *band, color=ORANGE, alpha=0.25, lw=0, label="true gradient ± gradient noise")
    left.plot(times, seen.truth[:, one], color=BLUE, label="true gradient")
    left.set(xlabel="updates", ylabel="gradient (nats per unit of weight)")
    right.loglog(sizes, measured, "o", color=ORANGE, label="gradient noise, measured")
    right.loglog(sizes, predicted, "--", color=ORANGE, label="that of one digit / √samples")
    right.axhline(size(each.mean(axis=0)), color=BLUE, label="true gradient")
    right.set(xlabel="samples in a mini-batch", ylabel="length of the vector (nats per unit)")
    right.set_yticks([0.2, 0.5, 1, 2], [0.2, 0.5, 1, 2], minor=False)
    ticks(right, sizes)
    numbers = {"true": size(each.mean(axis=0)), "noise": predicted[3], "off": np.abs(measured / predicted - 1).max()}
    says = (
        f"At first the true gradient is {numbers['true']:.2f} long, the noise of a mini-batch of 32 "
        f"{numbers['noise']:.2f}. That noise falls as the root of the number of samples, within {numbers['off']:.0%}."
    )
    return figure, says, numbers


@draws
def noise_grows():
    """How long true gradient and gradient noise are over time, and which digits make the noise."""
    seen, at = recording(), times[recording().looks]
    noise, lasting = size(seen.noise), size(fifties(seen.truth))
    right_ws = by.run(descend, 0.05, y=by.right_labels)[0][seen.looks]
    without = np.array([size(by.gradient_noise(w, by.right_labels)) for w in right_ws])
    share = []
    for w in seen.ws:
        each = np.asarray(each_gradient(w, by.labels))
        power = np.square(each - each.mean(axis=0)).sum(axis=1)
        share.append(power[by.wrong].sum() / power.sum())

    figure, left, right = panels(
        "The true gradient falls, its noise grows by half", "Why: the noise of the wrong labels"
    )
    left.plot(at, noise, "o-", color=ORANGE, ms=3, label="gradient noise of a mini-batch")
    left.plot(at, without, "s--", color=GRAY, ms=3, label="the same if all labels are right")
    left.plot(fifties(times), lasting, color=BLUE, label="true gradient, mean of 50 updates")
    left.set(xlabel="updates", ylabel="length of the vector (nats per unit)", ylim=(0, 1.4))
    right.plot(at, share, "o-", color=ORANGE, ms=3, label="of the noise's power")
    right.axhline(by.wrong.mean(), ls="--", color=GRAY, label="of the digits")
    right.set(xlabel="updates", ylabel="share that digits with wrong labels have", ylim=(0, 1))
    early, late = lasting[0], lasting[-4:].mean()
    numbers = {"true": (early, late), "share": (share[0], share[-1])}
    numbers |= {"noise": (noise[0], noise[-4:].mean()), "right": (without[0], without[-4:].mean())}
    says = (
        f"The true gradient falls from {early:.2f} to {late:.2f}. Its noise grows from {noise[0]:.2f} to "
        f"{numbers['noise'][1]:.2f}: the more certain the network is, the harder the wrong labels pull; their share "
        f"of the noise's power rises from {share[0]:.0%} to {share[-1]:.0%}. With right labels only, the noise ends "
        f"at {numbers['right'][1]:.2f}."
    )
    return figure, says, numbers


@draws
def moving_averages():
    """Averages of one weight's gradient, with three memories."""
    seen, one, shown = recording(), clear_weight(), slice(0, 400)
    figure, panel = panels(f"Averages of weight {one}'s gradient: a short memory shakes, a long one is late")
    panel.plot(times[shown], seen.gs[shown, one], ".", color=GRAY, ms=3, alpha=0.4, label="gradient g of a mini-batch")
    for b, color, style in ((0.5, ORANGE, ":"), (by.B1, GREEN, "-"), (0.99, BLUE, "--")):
        average = by.moving_average(seen.gs[shown, one], b)
        panel.plot(times[shown], average, style, color=color, label=f"average with b1 = {b}")
    panel.plot(times[shown], seen.truth[shown, one], color="black", lw=1, label="true gradient: what they should find")
    panel.set(xlabel="updates", ylabel="gradient (nats per unit of weight)")
    raw, average = (size(by.moving_average(seen.gs, b)[20:] - seen.truth[20:]).mean() for b in (0.0, by.B1))
    says = f"A gradient is {raw:.2f} away from the true one, the average with b1 = {by.B1} only {average:.2f}."
    return figure, says, {"raw": raw, "average": average}


@draws
def bias_correction():
    """Both averages with and without the correction of their start at 0."""
    seen, one, first = recording(), clear_weight(), slice(0, 50)
    m, v = by.moving_average(seen.gs, by.B1), by.moving_average(seen.gs**2, by.B2)
    m_hat, v_hat, _ = averages()
    wanted = np.sqrt(size(seen.noise) ** 2 + size(seen.truth[seen.looks]) ** 2)
    found = np.sqrt(v_hat.sum(axis=1))

    figure, left, right = panels(f"m of weight {one}, b1 = {by.B1}", f"√v of all weights, b2 = {by.B2}")
    left.plot(times[first], m[first, one], "--", color=ORANGE, label="m: starts at 0")
    left.plot(times[first], m_hat[first, one], color=BLUE, label="signal: m / (1 - b1^t)")
    left.plot(times[first], seen.truth[first, one], color="black", lw=1, label="true gradient")
    left.set(xlabel="updates", ylabel="gradient (nats per unit of weight)", ylim=(0, None))
    right.plot(times, np.sqrt(v.sum(axis=1)), "--", color=ORANGE, label="√v: starts at 0")
    right.plot(times, found, color=BLUE, label="noise: √(v / (1 - b2^t))")
    right.plot(times[seen.looks], wanted, ".", color="black", label="√(true gradient² + gradient noise²)")
    right.set(xlabel="updates", ylabel="length of the vector (nats per unit)", ylim=(0, 1.15))
    shares = size(seen.truth[seen.looks]) ** 2 / wanted**2
    numbers = {"first": np.abs(m[0, one]) / np.sqrt(v[0, one]), "shares": (shares[0], shares[-4:].mean())}
    numbers["off"] = np.abs(found[seen.looks] / wanted - 1)[1:].max()
    says = (
        f"Without correction the first step would be {numbers['first']:.2f} learning rates long; with it, 1. The root "
        f"of v follows that of the raw second moment within {numbers['off']:.0%}, late because its memory is 1,000 "
        f"updates long. Of that moment {shares[0]:.0%} are true gradient at first, {numbers['shares'][1]:.0%} in the "
        "end."
    )
    return figure, says, numbers


@draws
def first_steps():
    """The SNR of every weight in the first updates."""
    gs, (_, _, snr) = recording().gs, averages()
    figure, left, right = panels("SNR of every weight: at update 1 it is ±1", "Before update 20 the floor is high")
    for t, color, style in ((1, ORANGE, "-"), (2, GREEN, "--"), (20, BLUE, "-")):
        known = snr[t - 1, used(gs[:t])]
        share = np.full(len(known), 1 / len(known))
        bins = np.linspace(-1.05, 1.05, 43)
        left.hist(known, bins, weights=share, histtype="step", color=color, ls=style, lw=1.6, label=f"update {t}")
    left.set(xlabel="SNR (a ratio)", ylabel="share of the weights")
    shown = times[:50]
    rms = [np.sqrt(np.square(snr[t - 1, used(gs[:t])]).mean()) for t in shown]
    right.plot(shown, rms, "o-", color=GREEN, ms=3, label="SNR of a typical weight")
    right.plot(shown, by.floor(shown), "--", color=GRAY, label="floor: what pure noise shows")
    right.set(xlabel="updates", ylabel="SNR (a ratio)", ylim=(0, 1.1))
    first, floors = np.abs(snr[0, gs[0] != 0]), [by.floor(t) for t in (1, 2, 20)]
    says = (
        f"At update 1 signal and noise are the same number, |g|, and every SNR is ±1: between {first.min():.4f} and "
        f"{first.max():.4f} in size, what is missing is eps. That is no evidence of a signal, for the floor is "
        f"{floors[0]:.0f} as well. It falls to {floors[1]:.2f} at update 2 and {floors[2]:.2f} at update 20."
    )
    return figure, says, {"first": (first.min(), first.max()), "floors": floors, "rms": rms}


@draws
def snr_and_floor():
    """The SNR over time and of every weight, beside that of pure noise."""
    seen, (_, _, snr) = recording(), averages()
    whole, noise = typical(snr), typical(by.snr_of(seen.gs - seen.truth))
    figure, left, right = panels("The SNR falls to its floor", "In the end it is spread as pure noise is")
    left.plot(fifties(times)[1:], whole[1:], color=GREEN, label="SNR of the gradients")
    left.plot(fifties(times)[1:], noise[1:], "o", color=ORANGE, ms=4, label="SNR of their noise alone")
    left.plot(times, by.floor(times), "--", color=GRAY, label=f"floor: √((1-b1)/(1+b1)) = {FLOOR:.2f}")
    left.set(xlabel="updates", ylabel="SNR of a typical weight (a ratio)", ylim=(0, 0.8))
    bins, some = np.linspace(-1.2, 1.2, 49), used(seen.gs)
    early = {"histtype": "step", "color": BLUE, "lw": 1.8, "label": "updates 51-150"}
    late = {"color": GREEN, "alpha": 0.35, "label": f"the last 100 of {UPDATES}"}
    right.hist(snr[50:150, some].ravel(), bins, density=True, **early)
    right.hist(snr[-100:, some].ravel(), bins, density=True, **late)
    normal = np.exp(-0.5 * (bins / FLOOR) ** 2) / (FLOOR * np.sqrt(2 * np.pi))
    right.plot(bins, normal, "--", color=GRAY, label="pure noise: as wide as the floor")
    right.set(xlabel="SNR (a ratio)", ylabel="share of the weights (per unit of SNR)", ylim=(0, 4))
    numbers = {"early": whole[1], "late": whole[-6:].mean(), "noise": noise[1:].mean(), "all": whole}
    says = (
        f"The SNR of a typical weight falls from {numbers['early']:.2f} to {numbers['late']:.2f}. The gradients' noise "
        f"alone shows {numbers['noise']:.2f}, by the formula {FLOOR:.2f}: in the end there is nothing else to be seen."
    )
    return figure, says, numbers


@draws
def spike_at_zero():
    """Why so many weights have an SNR of 0: they hardly ever have a gradient."""
    snr, w = averages()[2][-100:], recording().ws[-1]
    moving = (np.asarray(each_gradient(w, by.labels)) != 0).mean(axis=0)  # share of the digits that move a weight
    never = ~used(recording().gs)
    rarely = (moving < 0.1) & ~never
    groups = {
        "never moved": (never, ORANGE, "-"),
        "moved by < 10 % of digits": (rarely, BLUE, "--"),
        "moved by more": (~never & ~rarely, GREEN, "-"),
    }
    figure, left, right = panels("The spike at 0: weights that hardly move", "Share of the digits that light a pixel")
    bins, near = np.linspace(-1.025, 1.025, 42), []
    for name, (which, color, style) in groups.items():
        x = snr[:, which].ravel()
        line = {"histtype": "step", "color": color, "ls": style, "lw": 1.6, "label": f"{name}: {which.sum():,}"}
        left.hist(x, bins, weights=np.full(len(x), 1 / len(x)), **line)
        near.append((np.abs(x) < 0.025).mean())
    left.set(xlabel="SNR in the last 100 updates (a ratio)", ylabel="share of the weights in the group", ylim=(0, 1.4))
    lit = np.asarray((by.images > 0).mean(axis=0)).reshape(8, 8)
    image = right.imshow(lit, cmap="gray", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(lit):
        text = "" if share > 0.1 else f"{share:.1%}" if share else "never"
        right.text(column, row, text, ha="center", va="center", size=7, color="white")
    right.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=right, label="share of the digits")
    counts = [int(which.sum()) for which, _, _ in groups.values()]
    says = (
        f"{counts[0]} weights never had a gradient: their pixel is not lit or their hidden unit does not fire; eps "
        f"makes their 0 / 0 a 0. {counts[1]} have one rarely: m forgets it within tens of updates, v keeps it for a "
        f"thousand, and {near[1]:.0%} of their SNRs lie within 0.025 of 0. Of the rest {near[2]:.0%} do, as in a "
        "normal distribution."
    )
    return figure, says, {"near": near, "counts": counts}


@draws
def below_the_floor():
    """Why the SNR may end below its floor, in two runs of Adam."""
    rate, late = 0.005, slice(-400, None)
    numbers, lengths, snr = {}, {}, {}
    for name, y in {"right": by.right_labels, "given": by.labels}.items():
        gs = np.asarray(by.along(by.run(adam, rate, y=y)[0], by.batches, y))
        m_hat, v_hat = by.corrected(gs, by.B1), by.corrected(gs * gs, by.B2).sum(axis=1)
        power = np.square(gs).sum(axis=1)
        lengths[name] = np.sqrt(v_hat), np.sqrt(fifties(power))
        snr[name] = np.sqrt(fifties(np.square(size(m_hat)) / v_hat))
        turn = (m_hat[:-1] * gs[1:]).sum(axis=1)[late].sum() / power[late].sum()
        longer = np.sqrt(v_hat[late].mean() / power[late].mean())
        expected = np.sqrt(FLOOR**2 + 2 * by.B1 / (1 + by.B1) * turn) / longer
        numbers[name] = {"snr": snr[name][-8:].mean(), "turn": turn, "longer": longer, "expected": expected}

    figure, left, right = panels("Right labels: v remembers noise that is gone", "The SNR ends below its floor")
    left.plot(times, lengths["right"][0], color=BLUE, label="noise that Adam divides by, b2 = 0.999")
    left.plot(fifties(times), lengths["right"][1], ".-", color="black", lw=0.8, label="√(mean of 50 g²)")
    left.set(xlabel="updates", ylabel="length of the vector (nats per unit)", ylim=(0, 1.2))
    right.plot(fifties(times), snr["given"], color=GREEN, label="Adam, one label in five is wrong")
    right.plot(fifties(times), snr["right"], "s--", color=BLUE, ms=3, label="Adam, all labels are right")
    right.plot(times, by.floor(times), "--", color=GRAY, label=f"floor: pure noise, {FLOOR:.2f}")
    right.set(xlabel="updates", ylabel="SNR, length of signal over noise (a ratio)", ylim=(0, 0.8))
    given, honest = numbers["given"], numbers["right"]
    says = (
        f"Here Adam itself trains, at rate {rate}. With wrong labels the SNR ends at {given['snr']:.2f}, below its "
        f"floor of {FLOOR:.2f}: the product of m and the next gradient is {given['turn']:.3f} of |g|², which predicts "
        f"{given['expected']:.2f}. With right labels it ends at {honest['snr']:.2f}: besides, v still remembers a "
        f"noise {honest['longer']:.2f} times as large as now, and the two predict {honest['expected']:.2f}."
    )
    return figure, says, numbers


@draws
def effective_step():
    """The steps of all weights, and over time."""
    gs, (_, _, snr) = recording().gs, averages()
    some = used(gs)
    typical_g, typical_snr = (np.sqrt(np.square(x).mean(axis=0))[some] for x in (gs, snr))
    figure, left, right = panels("One rate serves all weights", "The rate is constant, the steps shrink")
    plain = {"color": ORANGE, "ms": 3, "label": f"plain descent, rate {DESCENT_RATE}"}
    left.loglog(typical_g, DESCENT_RATE * typical_g, ".", **plain)
    left.loglog(typical_g, RATE * typical_snr, ".", color=BLUE, ms=3, label=f"Adam, rate {RATE}")
    left.axhline(RATE * FLOOR, ls="--", color=GRAY, label="rate x floor: pure noise")
    left.set(xlabel="typical gradient of the weight (nats per unit)", ylabel="typical step (units of weight)")
    right.axhline(RATE, color="black", lw=1, label="rate")
    right.plot(fifties(times)[1:], RATE * typical(snr)[1:], color=BLUE, label="effective step: rate x SNR")
    right.plot(times, RATE * by.floor(times), "--", color=GRAY, label="rate x floor: pure noise")
    right.set(xlabel="updates", ylabel="typical step (units of weight)", ylim=(0, 1.5 * RATE))
    spans = [np.percentile(x, 95) / np.percentile(x, 5) for x in (typical_g, typical_snr)]
    says = f"The gradients of different weights span a factor of {spans[0]:.0f}, Adam's steps one of {spans[1]:.1f}."
    return figure, says, {"gradients": spans[0], "steps": spans[1]}


@draws
def random_walk():
    """How far the weights get in so many updates, early and late, beside a random walk."""
    one, spans = clear_weight(), np.array([1, 2, 5, 10, 20, 50, 100])
    ws = by.run(adam, RATE)[0]
    moved = ws[:, used(recording().gs)]

    def distances(ws):
        return np.array([np.sqrt(np.square(ws[k:] - ws[:-k]).mean()) for k in spans])

    early, late, walk = distances(moved[:150]), distances(moved[400:]), RATE * np.sqrt(spans)
    figure, left, right = panels("First a march, in the end a random walk", f"The path of weight {one}")
    left.loglog(spans, early, "o-", color=BLUE, ms=4, label="updates 1-150")
    left.loglog(spans, late, "s-", color=ORANGE, ms=4, label="updates 401-800")
    left.loglog(spans, walk, "--", color=GRAY, label="random walk: rate x √updates")
    left.set(xlabel="number of updates", ylabel="how far a typical weight gets in them")
    ticks(left, spans)
    right.plot(times, ws[:, one], color=BLUE, label=f"Adam, rate {RATE}")
    right.set(xlabel="updates", ylabel="weight")
    numbers = {"early": early[-1] / walk[-1], "late": late[-1] / walk[-1], "step": late[0] / RATE}
    says = (
        f"In 100 updates a typical weight gets {numbers['early']:.1f} times as far as a random walk early in "
        f"training, and {numbers['late']:.2f} times as far late. The steps do not cease: late ones are "
        f"{numbers['step']:.2f} learning rates long, as long as the floor of {FLOOR:.2f}."
    )
    return figure, says, numbers


@draws
def beta_is_a_time():
    """How much old gradients count, and the error of the average, by its memory."""
    seen, memories = recording(), np.array([2, 5, 10, 20, 50, 100, 200, 500])
    means = [by.corrected(seen.gs, 1 - 1 / memory) for memory in memories]
    figure, left, right = panels("How much an old gradient counts", "A longer memory estimates better, late")
    ages = np.logspace(0, 3.5, 200)
    for b, color, style in ((0.9, ORANGE, "-"), (0.99, GREEN, "--"), (0.999, BLUE, ":")):
        half = np.log(0.5) / np.log(b)
        left.semilogx(ages, b**ages, style, color=color, label=f"b = {b}: half-life {half:.3g} updates")
        left.plot(half, 0.5, "o", color=color)
    left.set(xlabel="age of the gradient (updates)", ylabel="its weight (share of the newest's)", ylim=(0, 1.5))
    best = {}
    for a, z, color, style in ((0, 100, ORANGE, "o-"), (100, 300, GREEN, "s-"), (300, 800, BLUE, "^-")):
        length, phase = np.square(size(seen.truth[a:z])).mean(), f"updates {a + 1}-{z}"
        errors = [np.sqrt(np.square(size(mean[a:z] - seen.truth[a:z])).mean() / length) for mean in means]
        best[phase] = int(memories[np.argmin(errors)])
        right.semilogx(memories, errors, style, color=color, ms=4, label=f"{phase}: best near {best[phase]}")
    right.set(xlabel="memory 1 / (1 - b1) (updates)", ylabel="error (1: as long as the true gradient)", ylim=(0, None))
    ticks(right, memories)
    says = (
        f"The true gradient is best found with a memory of {', '.join(f'{n} in {phase}' for phase, n in best.items())}."
    )
    return figure, says, {"best": best}


@draws
def why_these_betas():
    """The loss by the memory of m where weights move, and the error of the noise by the memory of v."""
    seen, short, long = (
        recording(),
        np.array([1, 2, 5, 10, 20, 50, 100, 200]),
        np.array([1, 2, 5, 10, 50, 100, 500, 1000]),
    )
    figure, left, right = panels("Where weights move, long memory trains slower", "The noise can be remembered longer")
    near = (times > 150) & (times <= 250)
    fast, slow = ([by.run(adam, rate, near, b1=1 - 1 / n)[1] for n in short] for rate in (0.01, RATE))
    for rate, curves, color, style in ((0.01, fast, ORANGE, "o-"), (RATE, slow, BLUE, "s--")):
        left.semilogx(short, [x.mean() for x in curves], style, color=color, ms=4, label=f"learning rate {rate}")
    left.axvline(10, color=GRAY, lw=0.8, ls=":", label="b1 = 0.9")
    left.set(xlabel="memory of m, 1 / (1 - b1) (updates)", ylabel="loss after 200 updates (nats per digit)")
    other = {b2: by.run(adam, 0.01, near, b2=b2)[1].mean() for b2 in (0.9, 0.999)}
    wanted = np.sqrt(seen.noise**2 + seen.truth[seen.looks] ** 2)[4:]
    found = [np.sqrt(by.corrected(seen.gs**2, 1 - 1 / n))[seen.looks[4:]] for n in long]
    errors = np.array([np.sqrt(np.square(x - wanted).sum() / np.square(wanted).sum()) for x in found])
    right.semilogx(long, errors, "o-", color=GREEN, ms=4, label="of the noise √v in updates 201-800")
    right.axvline(1000, color=GRAY, lw=0.8, ls=":", label="b2 = 0.999")
    right.set(xlabel="memory of v, 1 / (1 - b2) (updates)", ylabel="error (share of the noise)", ylim=(0, None))
    ticks(left, short)
    ticks(right, long)
    loss, shake = {n: x.mean() for n, x in zip(short, fast, strict=True)}, [change(fast[0]), change(fast[3])]
    noise = dict(zip(long, errors, strict=True))
    says = (
        f"At rate 0.01 the loss after 200 updates is {loss[10]:.2f} with a memory of 10 and {loss[100]:.2f} with 100: "
        f"old gradients belong to weights that are left. With a memory of 1 it is {loss[1]:.2f}, but it changes by "
        f"{shake[0]:.4f} an update, with 10 by {shake[1]:.4f}. The noise changes slowly: √v is {noise[1]:.0%} off "
        f"with a memory of 1, {noise[10]:.0%} with 10, {noise[100]:.0%} with 100, {noise[1000]:.0%} with 1,000. The "
        f"loss hardly notices: {other[0.9]:.3f} with b2 = 0.9, {other[0.999]:.3f} with 0.999."
    )
    return figure, says, {"loss": loss, "shake": shake, "noise": noise, "b2": other}


@draws
def units():
    """Both optimizers when all gradients are multiplied by 32, or divided by it."""
    difference, allowed = by.disagreement(recording().gs), 12 * 2.0**-23  # 2^-23: the last bit of a float32 near 1
    assert difference < allowed, f"{difference:.1e} of the learning rate apart"
    figure, left, right = panels(
        f"Plain descent, rate {DESCENT_RATE}: the unit counts", f"Adam, rate {RATE}: it cancels"
    )
    ends = {"descent": [], "adam": []}
    for factor, name, color, width in (
        (32.0, "x 32", ORANGE, 4),
        (1.0, "x 1", BLUE, 2),
        (1 / 32, "/ 32", "black", 0.8),
    ):
        line = {"color": color, "lw": width, "label": f"gradients {name}"}
        plain, ratio = losses(descend, DESCENT_RATE * factor, "tenths"), losses(adam, RATE, "tenths", factor=factor)
        left.plot(times[TENTHS], plain, **line)
        right.plot(times[TENTHS], ratio, **line)
        ends["descent"].append(plain[-1])
        ends["adam"].append(ratio[-1])
    for panel in (left, right):
        panel.set(xlabel="updates", ylabel=LOSS, ylim=(0.8, 3.2))
    plain, ratio = (", ".join(f"{x:.2f}" for x in each) for each in ends.values())
    says = (
        f"Adam by hand and snr_adam.adam agree: over {UPDATES} updates of {len(by.start):,} weights their steps "
        f"differ by at most {difference:.1e} learning rates, and rounding may be {allowed:.1e}. With gradients x 32, "
        f"x 1 and / 32 plain descent ends at a loss of {plain}; Adam at {ratio}."
    )
    return figure, says, ends | {"difference": difference, "allowed": allowed}


@draws
def sweep():
    """The loss that each optimizer ends with, at many learning rates."""
    figure, panel = panels("Each has a valley of good rates; that of descent moves with the unit of the loss")
    numbers = {}
    for name, method, color, style in (("plain descent", descend, ORANGE, "o-"), ("Adam", adam, BLUE, "s-")):
        rates, ends = swept(method)[0], swept(method)[1][:, -100:].mean(axis=1)
        label = name if method is descend else f"{name}, whatever the unit"
        panel.semilogx(rates, ends, style, color=color, ms=4, label=label)
        if method is descend:  # 32 times the gradient is 32 times the rate
            panel.semilogx(rates / 32, ends, "o--", color=ORANGE, ms=3, lw=0.8, label=f"{name}, gradients x 32")
        good = rates[ends < 1.05 * ends.min()]
        numbers[name] = {"best": rates[ends.argmin()], "loss": ends.min(), "good": (good[0], good[-1]), "ends": ends}
    panel.set(xlabel="learning rate", ylabel=f"loss after {UPDATES} updates (nats per digit)", ylim=(0.9, 2.6))
    plain, ratio = numbers.values()
    says = (
        f"Plain descent does best at a rate of {plain['best']:g} (loss {plain['loss']:.2f}), Adam at "
        f"{ratio['best']:g} ({ratio['loss']:.2f}). Within 5 % of that end plain descent at {plain['good'][0]:g} to "
        f"{plain['good'][1]:g}, Adam at {ratio['good'][0]:g} to {ratio['good'][1]:g}."
    )
    return figure, says, numbers


@draws
def adam_shakes_less():
    """How much the loss changes from update to update, at equal loss, and which half of Adam calms it."""
    figure, left, right = panels("At equal loss, Adam shakes less", "The average calms more than the division")
    for name, method, color, style in (("plain descent", descend, ORANGE, "o-"), ("Adam", adam, BLUE, "s-")):
        ends = np.array([(curve[-100:].mean(), change(curve[-100:])) for curve in swept(method)[1]])
        ends = ends[: ends[:, 0].argmin() + 1]  # up to the best rate
        left.semilogy(*ends[ends[:, 0] < 1.25].T, style, color=color, ms=4, label=f"{name}, one point per rate")
    left.set(xlabel=f"{LOSS}, last 100 updates", ylabel="its change from one update to the next")
    # What is left of Adam without a memory of m is the division; with an eps that swallows the noise, the average.
    halves = {
        "plain descent": (losses(descend, DESCENT_RATE), ORANGE, "o-"),
        "division only": (losses(adam, RATE, b1=0.0), GRAY, "v--"),
        "average only": (losses(adam, DESCENT_RATE * 1e3, eps=1e3), GREEN, "^--"),
        "Adam": (losses(adam, RATE), BLUE, "s-"),
    }
    spans, numbers = np.array([1, 2, 5, 10, 20, 50]), {}
    for name, (curve, color, style) in halves.items():
        right.loglog(spans, [change(curve, n) for n in spans], style, color=color, ms=4, label=name)
        numbers[name] = {"loss": curve.mean(), 1: change(curve), 20: change(curve, 20)}
    right.set(xlabel="number of updates", ylabel="change of the loss within them")
    ticks(right, spans)
    plain, ratio = numbers["plain descent"], numbers["Adam"]
    says = (
        f"At equal loss ({plain['loss']:.2f} and {ratio['loss']:.2f}) it changes by {plain[1]:.4f} an update with "
        f"plain descent and by {ratio[1]:.4f} with Adam, {plain[1] / ratio[1]:.0f} times less; with the division "
        f"alone by {numbers['division only'][1]:.4f}, with the average alone by {numbers['average only'][1]:.4f}. "
        f"Within 20 updates it is {plain[20]:.4f} against {ratio[20]:.4f}: the average spreads the push of a "
        "mini-batch over some 10 updates, it does not undo it."
    )
    return figure, says, numbers


@draws
def what_eps_does():
    """Steps by gradient for three eps, and training with gradients that come near it."""
    gs, (m_hat, v_hat, _) = recording().gs, averages()
    some = used(gs)
    typical_g = np.sqrt(np.square(gs).mean(axis=0))[some]
    figure, left, right = panels("eps above the gradient: descent again", "Gradients near eps = 1e-8: steps shrink")
    for eps, color in ((1e-8, BLUE), (1e-3, GREEN), (1e-1, ORANGE)):
        steps = np.sqrt(np.square(m_hat / (np.sqrt(v_hat) + eps)).mean(axis=0))[some]
        left.loglog(typical_g, steps, ".", color=color, ms=3, label=f"eps = {eps:g}")
    left.set(xlabel="typical gradient of the weight (nats per unit)", ylabel="typical step (learning rates)")
    left.set_ylim(None, 20)
    median, ends = np.median(typical_g), {}
    lines = {1.0: (BLUE, "-"), 1e-5: (GREEN, "--"), 1e-6: (GRAY, "-."), 1e-7: (ORANGE, "-"), 1e-8: ("black", ":")}
    for factor, (color, style) in lines.items():
        curve = losses(adam, RATE, "tenths", factor=factor)
        right.plot(
            times[TENTHS], curve, style, color=color, label=f"gradients x {factor:g}: about {factor * median:.0e}"
        )
        ends[factor] = curve[-1]
    right.set(xlabel="updates", ylabel=LOSS, ylim=(0.9, 3.4))
    says = (
        f"eps makes 0 / 0 a 0, here for {(~some).sum()} weights. A typical gradient is {median:.3f}, far above 1e-8. "
        f"Multiplied by 1e-6 it is about eps, and the loss ends at {ends[1e-6]:.2f} instead of {ends[1.0]:.2f}; by "
        f"1e-7, at {ends[1e-7]:.2f}; by 1e-8, at {ends[1e-8]:.2f}."
    )
    return figure, says, {"ends": ends, "median": median, "idle": int((~some).sum())}


@draws
def hundred_thousand():
    """100,000 updates of a network without a hidden layer, and 10,000 more with a falling rate."""
    rows, rate = 1000, 0.01  # rows of 100 updates
    rates = np.full((rows + 100, 100), rate, np.float32)
    rates[rows:] = np.linspace(rate, 0, 10_000).reshape(100, 100)
    chosen = np.random.default_rng(2).integers(0, len(by.images), (rows + 100, 100, by.BATCH))
    curve = np.asarray(by.long_run(rates, chosen))
    ends = {100 * n: curve[min(n - 1, int(0.9 * n)) : n].mean() for n in (1, 10, 100, 1000)}  # means of the last tenth
    gains = -np.diff([*ends.values(), curve[-1]])

    figure, left, right = panels("100,000 updates: ever less, then only shaking", "What each part of them adds")
    left.semilogx(100 * np.arange(1, rows + 1), curve[:rows], color=BLUE, label=f"Adam, rate {rate}")
    left.axhline(curve[-1], color=ORANGE, ls="--", label="after 10,000 more, rate falling to 0")
    left.set(xlabel="updates", ylabel=LOSS)
    right.bar(range(4), gains, color=[BLUE] * 3 + [ORANGE])
    for place, gain in enumerate(gains):
        right.text(place, gain, f"{gain:.3f}", ha="center", va="bottom", size=9)
    right.set(ylabel="the loss falls by (nats per digit)")
    parts = "101 to\n1,000", "1,001 to\n10,000", "10,001 to\n100,000", "10,000 more,\nrate falling"
    right.set_xticks(range(4), parts, size=8.5)
    says = (
        f"Updates 101 to 1,000 lower the loss by {gains[0]:.3f}, the next 9,000 by {gains[1]:.3f}, the next 90,000 by "
        f"{gains[2]:.3f}. Then the rate falls to 0, and 10,000 updates gain {gains[3]:.3f}."
    )
    return figure, says, {"ends": ends, "gains": gains}


# --- The note ------------------------------------------------------------------------------------------------------


def note():
    """Every sentence of the introductory note, the number of the figure that shows it, and what it shows."""
    of = {name: draw().numbers for name, draw in FIGURES.items()}
    bias, grows, walk, gains = (of[x] for x in ("bias_correction", "noise_grows", "random_walk", "hundred_thousand"))
    shakes, betas, eps, snr = (of[x] for x in ("adam_shakes_less", "why_these_betas", "what_eps_does", "snr_and_floor"))
    true, noise, right = grows["true"], grows["noise"], grows["right"]
    rows = {
        "Descent with mini-batches shakes.": (
            "descent_shakes",
            f"{of['descent_shakes']['shaking']:.4f} an update; true gradients {of['descent_shakes']['smooth']:.4f}",
        ),
        "Adam's update is a ratio: `w := w - alpha SNR`, `SNR = m_hat / (sqrt(v_hat) + eps)`.": (
            "units",
            f"these lines and `snr_adam.adam` are within {of['units']['difference']:.1e} learning rates",
        ),
        "The signal is the moving average of the gradients,": (
            "moving_averages",
            "{average:.2f} away from the true gradient; a single gradient {raw:.2f}".format(**of["moving_averages"]),
        ),
        "corrected for its bias.": (
            "bias_correction",
            f"first step: 1 learning rate; without, {bias['first']:.2f}",
        ),
        "The noise is the root of the moving average of the squared gradients:": (
            "bias_correction",
            f"within {bias['off']:.0%} of the root of their mean",
        ),
        "a pseudo-noise, for that is a raw second moment.": (
            "bias_correction",
            f"{bias['shares'][0]:.0%} of it is true gradient at first, {bias['shares'][1]:.0%} in the end",
        ),
        "The SNR has no unit, so one rate serves all weights.": (
            "effective_step",
            "gradients span a factor of {gradients:.0f}, steps {steps:.1f}".format(**of["effective_step"]),
        ),
        "Adam shakes the model less than descent.": (
            "adam_shakes_less",
            f"{shakes['Adam'][1]:.4f} an update against {shakes['plain descent'][1]:.4f} at equal loss",
        ),
        "While training goes on, the signal falls,": (
            "noise_grows",
            f"true gradient: {true[0]:.2f}, then {true[1]:.2f}",
        ),
        "the noise stays,": (
            "noise_grows",
            f"half right: {noise[0]:.2f}, then {noise[1]:.2f}; with right labels {right[1]:.2f}",
        ),
        "so the SNR falls": (
            "snr_and_floor",
            f"{snr['early']:.2f}, then {snr['late']:.2f}; pure noise shows {FLOOR:.2f}",
        ),
        "and the steps turn into a random walk.": (
            "random_walk",
            f"{walk['early']:.1f}, then {walk['late']:.2f} times as far as one; they do not cease: {walk['step']:.2f} "
            f"learning rates each",
        ),
        "eps keeps 0 / 0 away.": (
            "what_eps_does",
            f"{eps['idle']} weights; where gradients are near eps the loss ends at {eps['ends'][1e-6]:.2f}, not "
            f"{eps['ends'][1.0]:.2f}",
        ),
        "Usual are b1 = .9 and b2 = .999.": (
            "why_these_betas",
            f"loss {betas['loss'][10]:.2f} with .9, {betas['loss'][100]:.2f} with .99; noise "
            f"{betas['noise'][1000]:.0%} off with .999, {betas['noise'][10]:.0%} with .9",
        ),
        "Of 100,000 updates the later ones add little.": (
            "hundred_thousand",
            f"the last 90,000 lower the loss by {gains['gains'][2]:.3f}, the 9,900 before by "
            f"{gains['gains'][:2].sum():.3f}",
        ),
    }
    number = {name: place for place, name in enumerate(FIGURES, start=1)}
    return [(sentence, number[name], shown) for sentence, (name, shown) in rows.items()]


def main(args=None):
    """Draws the figures, says what they show, and, if they are all drawn, goes through the note."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figures", nargs="*", metavar="figure", help=f"one of {', '.join(FIGURES)}; default: all")
    chosen = parser.parse_args(args).figures or list(FIGURES)
    if unknown := set(chosen) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (name, draw) in enumerate(FIGURES.items(), start=1):
        if name in chosen:
            shown, path = draw(), FOLDER / f"{number:02}-{name}.png"
            path.write_bytes(shown._repr_png_())
            print(f"{textwrap.fill(shown.says, 100)}\n    {path}\n", flush=True)
    if set(chosen) == set(FIGURES):
        print("The note, sentence by sentence:\n")
        for sentence, number, shown in note():
            line = f"    figure {number}: {shown}"
            print(f"{sentence}\n{textwrap.fill(line, 100, subsequent_indent='        ')}")


if __name__ == "__main__":
    main()
