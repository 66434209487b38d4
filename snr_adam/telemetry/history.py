"""Reports over time: what was seen while training, kept, saved and read again.

A report is what an optimizer tells at one step: one number per layer and quantity. A history is T of them:

    steps    (T,)                         when
    columns  quantity -> (T, L)           per layer, in the order of `names`
    total    quantity -> (T,)             over all layers

    history = History()
    history.append(report(opt_state))                   every now and then, while training
    history.save("run.npz")                             or .jsonl, one line per report: any tool reads it
    History.load("run.npz").columns["noise"][:, 3]
    print(history)                                      the SNR of each layer over time, in a line of text
    history.page("run.html")                            all of it in a browser
    pandas.DataFrame(history.rows)                      or polars: a row per report and layer

Apart from the rest because it knows about files: a report is anything with `step`, `names`, `columns` and `total`. Both
formats give back the same bits, also of nan (a quantity that the optimizer does not have) and infinities, for which
strict JSON has no numbers: there they are null, "inf" and "-inf".
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snr_adam.telemetry import page, text
from snr_adam.telemetry._reading import of_jsonl, of_npz, reports
from snr_adam.telemetry._writing import write_jsonl, write_npz, write_whole


class Series(Mapping):
    """Quantities by name, each an array whose first axis is time. It is put together when it is asked for."""

    def __init__(self):
        self._rows: dict[str, list[np.ndarray]] = {}

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._rows:
            raise KeyError(f"no quantity {key!r}; there are {', '.join(self._rows) or 'none yet'}")
        return np.array(self._rows[key])

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _cut(self, length: int) -> None:
        for rows in self._rows.values():
            del rows[length:]

    def _append(self, values: Mapping[str, Any], before: int) -> None:
        """One more of each; what is new was not known at the times before."""
        for key, value in values.items():
            new = np.array(value, np.float64)
            self._rows.setdefault(key, [np.full_like(new, np.nan)] * before).append(new)


class History:
    """Reports of one run, in the order of their steps. `str()` draws the SNR of each layer over time, `rich` in colour.

    Args:
      reports: reports to begin with, if any.

    Attributes:
      names: the layers, L strings; () before the first report.
      columns: a mapping from each quantity to a float64 array (T, L), one row per report and one column per layer.
      total: a mapping from each quantity to a float64 array (T,), over all layers.

    >>> from types import SimpleNamespace
    >>> history = History()
    >>> for step in (10, 20):
    ...     columns = {"noise": np.array([0.5, float(step)])}
    ...     history.append(SimpleNamespace(step=step, names=("in", "out"), columns=columns, total={"noise": 9.0}))
    >>> history.steps, history.columns["noise"][:, 1], history.total["noise"]
    (array([10, 20]), array([10., 20.]), array([9., 9.]))
    """

    def __init__(self, reports: Iterable[Any] = ()):
        self._steps: list[int] = []
        self._batches: list[float] = []
        self.names: tuple[str, ...] = ()
        self.columns, self.total = Series(), Series()
        if hasattr(reports, "columns") or not isinstance(reports, Iterable):
            raise TypeError(f"History: got a {type(reports).__name__}, give a list of reports: of one alone, [report]")
        for report in reports:
            self.append(report)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> np.ndarray:
        """The steps of the reports, an int64 array (T,) that grows strictly."""
        return np.array(self._steps, np.int64)

    @property
    def batch_size(self) -> np.ndarray:
        """The examples in a batch, as each report was told, float64 (T,); nan where it was not told."""
        return np.array(self._batches, np.float64)

    @property
    def examples(self) -> np.ndarray:
        """The examples in all steps up to each report, float64 (T,); nan where a batch size was not told.

        >>> from types import SimpleNamespace
        >>> seen = {"names": (), "columns": {}, "total": {}}
        >>> History([SimpleNamespace(step=t, batch_size=b, **seen) for t, b in ((10, 32), (20, 64))]).examples
        array([320., 960.])
        """
        return np.cumsum(np.diff(self.steps, prepend=0) * self.batch_size)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A flat table, T L rows: step, name and every quantity of a layer. What covers all layers is in `total`.

        >>> from types import SimpleNamespace
        >>> seen = {"noise": [0.5, 2.0]}
        >>> History([SimpleNamespace(step=10, names=("in", "out"), columns=seen, total={})]).rows
        [{'step': 10, 'name': 'in', 'noise': 0.5}, {'step': 10, 'name': 'out', 'noise': 2.0}]

        `pandas.DataFrame(history.rows)` and `polars.DataFrame(history.rows)` take it; for the whole model
        `pandas.DataFrame(dict(history.total), index=history.steps)`.
        """
        keys = ("step", "name", *self.columns)
        steps = [step for step in self._steps for _ in self.names]
        numbers = [values.ravel().tolist() for values in self.columns.values()]
        rows = zip(steps, list(self.names) * len(self), *numbers, strict=True)
        return [dict(zip(keys, row, strict=True)) for row in rows]

    def append(self, report) -> None:
        """Adds a report; it replaces those of its step and of later ones.

        So a run that goes on from an older checkpoint writes over what it repeats, and reading one report twice does
        no harm. A quantity that the reports before did not have, as those of an older version, is nan for them.

        Raises:
          ValueError: if its layers are not those of the reports before, or it lacks a quantity that they have.
          TypeError: if it is no report, but for instance the state that one is made of.
        """
        missing = [key for key in ("step", "names", "columns", "total") if not hasattr(report, key)]
        if missing:
            raise TypeError(
                f"History.append takes a report and got a {type(report).__name__}, which has no {missing[0]}: write "
                "history.append(snr_adam.report(opt_state))"
            )
        step, names = int(report.step), tuple(report.names)
        if self._steps:
            _same("layers", self.names, names, step)
            _same("quantities", tuple(self.columns), tuple(key for key in self.columns if key in report.columns), step)
            _same("totals", tuple(self.total), tuple(key for key in self.total if key in report.total), step)
        for key, values in report.columns.items():
            if np.shape(values) != (len(names),):
                raise ValueError(f"the report of step {step} has {np.shape(values)} of {key!r} for {len(names)} layers")
        for key, value in report.total.items():
            if np.shape(value) != ():
                raise ValueError(
                    f"the report of step {step} has {np.shape(value)} of {key!r} in total: give one number"
                )
        keep = int(np.searchsorted(self._steps, step))
        del self._steps[keep:], self._batches[keep:]
        self.columns._cut(keep)
        self.total._cut(keep)
        self.names = names
        self._steps.append(step)
        batch = getattr(report, "batch_size", None)
        self._batches.append(np.nan if batch is None else float(batch))
        self.columns._append(report.columns, keep)
        self.total._append(report.total, keep)

    def sparklines(self, key: str = "snr", width: int = 40) -> text.Table:
        """A quantity over time as text, to print: per layer its first and its last number, and blocks in between.

        Args:
          key: the quantity. With `rich`, the colours are always those of the SNR.
          width: the most blocks in a line. Of more reports, several share a block: it shows their median.

        Returns:
          A `Table`: all layers on one logarithmic scale, which it names; `str()` is text, `rich` draws it in colour.

        Raises:
          KeyError: if there is no such quantity.
          ValueError: if the width is less than 1.

        >>> from types import SimpleNamespace
        >>> values = {10: 8.0, 20: float("nan"), 30: 0.5, 40: 0.01}
        >>> history = History()
        >>> for step, x in values.items():
        ...     history.append(SimpleNamespace(step=step, names=("w",), columns={"snr": [x]}, total={"snr": x}))
        >>> print(history.sparklines())
        snr in 4 reports
        layer  step 10  step 40  over time
        w            8     0.01  █ ▅▁
        ----------------------------------
        total        8     0.01  █ ▅▁
        ▁ is 0.01 or less, █ 8 or more, logarithmic in between; a gap: no number
        """
        return text.sparklines(self, key, width)

    def _drawn(self) -> text.Table | str:
        """The SNR, or what there is in its place."""
        key = next((key for key in ("snr", *self.total) if key in self.total), None)
        return f"{len(self)} reports" if key is None else self.sparklines(key)

    def __str__(self) -> str:
        return str(self._drawn())

    def _repr_html_(self) -> str:
        """For notebooks: the same as a table."""
        drawn = self._drawn()
        return f"<p>{drawn}</p>" if isinstance(drawn, str) else drawn._repr_html_()

    def __rich_console__(self, console, options):
        """For `rich`: green while there is signal, red where the SNR is within 2 errors of none."""
        yield self._drawn()

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file, as .npz (small, fast) or as .jsonl (text, one line per report) by the end of its name.

        The file appears whole or not at all, so a run that is killed leaves the file of the save before, and of several
        processes, threads or hosts that save under one name the last to finish is read.
        """
        path = Path(path).expanduser()
        write = _of(_WRITERS, path)
        write_whole(path, lambda unfinished: write(self, unfinished))

    def page(
        self,
        path: str | os.PathLike,
        *,
        title: str | None = None,
        batch_size: float | None = None,
        refresh: float | None = None,
    ) -> None:
        """Writes the run as one HTML file, to open in any browser: charts, a heat map of all layers, and alarms.

        The file needs no network, is below 3 MB for 300 layers in 1,000 reports, and appears whole or not at all, as
        with `save`. A training loop may write it again every so often:

            history.page("run.html", refresh=30)        an open page takes up what is new every 30 seconds
            history.page("run.html")                    at the end: it stops

        Args:
          path: the name of the file.
          title: what stands above it; None for the name of the file.
          batch_size: what `report` was told, if this history is of a file that does not say it, for the files of older
            versions do not; None to take it from the reports.
          refresh: seconds after which an open page reads the file again, from a disk or a server; None for never.

        Raises:
          ValueError: if there are no reports, or `refresh` is no number of seconds.
        """
        path = Path(path).expanduser()
        if not len(self):
            raise ValueError("there is nothing to show: the history has no reports")
        made = page.page(self, title=path.stem if title is None else title, batch_size=batch_size, refresh=refresh)
        write_whole(path, lambda unfinished: unfinished.write_bytes(made.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "History":
        """Reads what `save` wrote; the same bits come back.

        Raises:
          ValueError: if the file's name ends in neither .npz nor .jsonl, if it is damaged or was cut short, if its
            steps do not grow, or if it holds something else.
        """
        path = Path(path).expanduser()
        return cls(reports(path, _of(_READERS, path)))


def _same(what: str, before: tuple[str, ...], now: tuple[str, ...], step: int) -> None:
    """Refuses a report that is not like those before it, and says what has changed."""
    if before == now:
        return
    found = [f"new: {', '.join(new)}"] if (new := [x for x in now if x not in before]) else []
    found += [f"gone: {', '.join(gone)}"] if (gone := [x for x in before if x not in now]) else []
    changed = "; ".join(found) or f"another order: {', '.join(now)} was {', '.join(before)}"
    raise ValueError(f"the report of step {step} has other {what} ({changed}): begin a new History for another model")


def _of(formats: Mapping[str, Any], path: Path):
    if path.suffix not in formats:
        raise ValueError(f"{path}: the name of a history's file ends in .npz or .jsonl")
    return formats[path.suffix]


_WRITERS = {".npz": write_npz, ".jsonl": write_jsonl}
_READERS = {".npz": of_npz, ".jsonl": of_jsonl}
