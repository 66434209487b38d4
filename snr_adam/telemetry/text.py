"""Reports as text: aligned tables, bars and sparklines, and the same in colours where `rich` draws them.

    numbers(report)                 one row per layer and one for all
    bars(report)                    and a bar for each SNR
    sparklines(history, key)        a quantity over time, one block of eight heights per report

Apart from the rest because it knows about terminals: characters, widths and colours. What it is given is anything with
the attributes of a `Report` or a `History`. It needs no import of `rich`: a console that draws a table makes the text.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from snr_adam.telemetry.noise_scale import NoiseScale

_SHOWN = ("signal", "noise", "pseudo_snr", "floor", "snr", "persistence", "significant", "effective_step")
_SPARE = ("effective_step", "significant", "signal", "noise", "persistence", "floor", "pseudo_snr")
_HEIGHTS = "▁▂▃▄▅▆▇█"
_LENGTHS = " ▏▎▍▌▋▊▉█"
_BAR = 8  # blocks in the longest bar


class Drawing(NamedTuple):
    """Blocks, and the style of each: green while there is signal, red where none was found."""

    blocks: str
    styles: tuple[str, ...]

    @property
    def last(self) -> str:
        return self.styles[-1] if self.styles else ""


@dataclass(frozen=True)
class Table:
    """Rows of text, the last of them the total: `str()` aligns them, `rich` also colours them.

    drawings: one per row, or none at all. spare: the columns that `rich` leaves out first where a line is too long.
    """

    title: str
    heads: tuple[str, ...]
    rows: list[list[str]]
    legend: str
    drawn: str = ""
    drawings: tuple[Drawing, ...] = ()
    spare: tuple[str, ...] = ()

    def _texts(self) -> list[str]:
        """The head and the rows, without their drawings."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return [
            "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]

    def _blocks(self) -> list[str]:
        """What stands beside the head and the rows."""
        blocks = [drawing.blocks for drawing in self.drawings]
        return [f"  {x}" for x in (self.drawn, *blocks)] if blocks else [""] * (1 + len(self.rows))

    @property
    def width(self) -> int:
        """The characters in the longest line of the table, whose title and legend may be longer."""
        return len(self._texts()[0]) + max(map(len, self._blocks()))

    def __str__(self) -> str:
        head, *rows, total = [(text + x).rstrip() for text, x in zip(self._texts(), self._blocks(), strict=True)]
        return "\n".join([self.title, head, *rows, "-" * self.width, total, self.legend])

    def within(self, width: int) -> "Table":
        """The same without the columns that have no room in so many characters; the legend names them."""
        table, spare = self, list(self.spare)
        while spare and table.width > width:
            gone = table.heads.index(spare.pop(0))
            heads, *rows = [[*line[:gone], *line[gone + 1 :]] for line in (table.heads, *table.rows)]
            table = dataclasses.replace(table, heads=tuple(heads), rows=rows)
        gone = ", ".join(head for head in self.heads if head not in table.heads)
        return dataclasses.replace(table, legend=f"{self.legend}; no room for {gone}") if gone else table

    def __rich_console__(self, console, options):
        """Lines in colour, each in the kind of text that the console makes, without its own ideas about numbers."""

        def line(text: str, style: str):
            made = console.render_str(text, style=style, markup=False, highlight=False, emoji=False)
            made.no_wrap, made.overflow = True, "ellipsis"
            return made

        table = self.within(options.max_width)
        (head, *texts), (drawn, *_) = table._texts(), table._blocks()
        yield line(table.title, "bold")
        yield line(head + drawn, "bold")
        for i, text in enumerate(texts):
            if i == len(texts) - 1:
                yield line("-" * table.width, "dim")
            drawing = table.drawings[i] if table.drawings else Drawing("", ())
            made = line(f"{text}  ", drawing.last)
            for style, run in itertools.groupby(zip(*drawing, strict=True), lambda block: block[1]):
                made.append("".join(block for block, _ in run), style)
            yield made
        colored = any(style for drawing in table.drawings for style in drawing.styles)
        colors = "; green: signal was found, red: it was not" if colored else ""
        yield console.render_str(table.legend + colors, style="dim", markup=False, highlight=False, emoji=False)


def numbers(report) -> Table:
    """The numbers of a report."""
    rows = [*report.rows, {"name": "total", **report.total}]
    cells = [[row["name"], *(_text(key, row) for key in _SHOWN), _scale_text(row)] for row in rows]
    unit = "batches" if report.batch_size is None else "examples"
    legend = (
        "signal = |m^|, noise = |v^|^(1/2), pseudo_snr their ratio, floor what pure noise shows of it\n"
        "snr: power of the true gradient over that of the noise, 95 % within 1.96 errors; persistence: the share of\n"
        "the signal that lasts over m's memory; significant: of elements, 5 % in pure noise; effective_step: rms of\n"
        f"the update over that of the parameters; noise scale in {unit}, with its 95 % interval"
    )
    window = getattr(report, "window", 0)
    title = f"step {report.step:,}" + (
        f"; snr, persistence and noise scale over about {window:,} steps" if window else ""
    )
    return Table(title, ("layer", *_SHOWN, "noise scale"), cells, legend, spare=_SPARE)


def bars(report) -> Table:
    """The numbers of a report, and a bar for each SNR that is above 0, on the scale of `sparklines`."""
    snr, least = (np.append(report.columns[key], report.total[key]) for key in ("snr", "snr_low"))
    shares, styles = _shares(snr, *_range(snr)), _styles(least)
    drawings = tuple(
        Drawing((_bar(share) if x > 0 else "").ljust(_BAR), (style,) * _BAR)
        for x, share, style in zip(snr, shares, styles, strict=True)
    )
    return dataclasses.replace(numbers(report), drawn="SNR".ljust(_BAR), drawings=drawings)


def sparklines(history, key: str, width: int) -> Table:
    """A quantity over time: its first and last numbers, and in between a block per report, or for several one.

    The height of a block is logarithmic, the same for all rows, over at least one decade and at most four. What is
    below it, and so what is not above 0, is the lowest; where there is no number, there is a gap. A block that stands
    for several reports shows the median of their numbers.
    """
    if width < 1:
        raise ValueError(f"width={width}: a sparkline needs at least 1 character")
    tracks = {each: _tracks(history, each) for each in {key, "snr_low", "snr_error"} & {key, *history.total}}
    known = np.array([_medians(track, width) for track in tracks[key]])
    least, errors = (tracks.get(each, np.full_like(tracks[key], np.nan)) for each in ("snr_low", "snr_error"))
    low, high = _range(known)
    drawings = tuple(
        Drawing(_sparkline(values, low, high), _styles(_medians(each, width)))
        for values, each in zip(known, least, strict=True)
    )
    rows = [
        [name, *(_text(key, {key: track[t], "snr_error": error[t]}) for t in (0, -1))]
        for name, track, error in zip((*history.names, "total"), tracks[key], errors, strict=True)
    ]
    first, last, reports = history.steps[0], history.steps[-1], len(history)
    legend = f"▁ is {low:.2g} or less, █ {high:.2g} or more, logarithmic in between; a gap: no number"
    legend += f"; a block: the median of up to {math.ceil(reports / width)} reports" if reports > width else ""
    title = f"{key} in {reports:,} report{'s' if reports > 1 else ''}"
    heads = ("layer", f"step {first:,}", f"step {last:,}")
    return Table(title, heads, rows, legend, "over time", drawings, heads[1:2])


def _tracks(history, key: str) -> np.ndarray:
    """A quantity over time, a row per layer and one for all."""
    layers = [history.columns[key].T] if history.names else []
    return np.concatenate([*layers, history.total[key][None]])


def _medians(values, width: int) -> np.ndarray:
    """At most `width` numbers for all: each the (upper) median of those it stands for, nan if all of them are."""
    parts = [np.sort(part[~np.isnan(part)]) for part in np.array_split(values, min(width, len(values)))]
    return np.array([part[len(part) // 2] if len(part) else np.nan for part in parts])


def _range(values) -> tuple[float, float]:
    """The ends of a logarithmic scale. The few largest and smallest do not count, lest all others look the same."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return 0.1, 1.0
    low, high = (float(np.percentile(positive, p, method=end)) for p, end in ((5, "lower"), (99, "higher")))
    return min(max(low, high / 1e4), high / 10), high


def _shares(values, low: float, high: float) -> np.ndarray:
    """Where numbers are on the scale, from 0 to 1; nan stays nan."""
    return np.log(np.clip(values, low, high) / low) / np.log(high / low)


def _sparkline(values, low: float, high: float) -> str:
    return "".join(" " if np.isnan(x) else _HEIGHTS[round(7 * x)] for x in _shares(values, low, high))


def _bar(share: float) -> str:
    eighths = max(1, round(8 * _BAR * share))
    return "█" * (eighths // 8) + _LENGTHS[eighths % 8].strip()


def _styles(least) -> tuple[str, ...]:
    """By the lower ends of SNRs; no style where there is no number."""
    return tuple("" if np.isnan(x) else "green" if x > 0 else "red" for x in least)


def _text(key: str, row: dict[str, Any]) -> str:
    x = row[key]
    if np.isnan(x):
        return "-"
    if key == "significant":
        return f"{x:.1%}"
    if key == "snr":
        return f"{x:.2g} +- {row['snr_error']:.1g}" if np.isfinite(row["snr_error"]) else f"{x:.2g}"
    return f"{x:.2e}" if key == "effective_step" else f"{x:.3g}"


def _scale_text(row: dict[str, Any]) -> str:
    if np.isnan(row["noise_scale"]):
        return "-"
    value, error, low, high = (row[f"noise_scale{end}"] for end in ("", "_error", "_low", "_high"))
    return str(NoiseScale(value, error, low, high, "lags"))
