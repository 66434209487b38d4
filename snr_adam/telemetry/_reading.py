"""A history's file, read: its reports, or one sentence that says what is wrong with the file and what to do.

Files come back from disks, copies and editors in every state. Whatever is not what `History.save` has written is an
error with the file's name: never fewer reports than there were, and none out of order.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FORMAT = "snr_adam history, version 1"
GROUPS, PARTS, BATCH = ("columns/", "total/"), "parts", "batch_size"
_OTHERS = ("format", "steps", "names", PARTS, BATCH)


class Foreign(ValueError):
    """A file that is whole, and no history."""


def reports(path: Path, each: Callable[[Path], Iterator[Any]]) -> Iterator[Any]:
    """The reports of a file in their order.

    Raises:
      OSError: if there is no such file, or it may not be read.
      ValueError: if it is damaged or cut short, if its steps do not grow, or if it is no history at all.
    """
    with path.open("rb"):
        pass
    last = None
    try:
        for report in each(path):
            if last is not None and report.step <= last:
                raise ValueError(f"step {report.step} comes after step {last}")
            last = report.step
            yield report
    except Foreign:
        raise
    except Exception as error:  # zipfile, zlib, json and NumPy have a dozen of them for a file in pieces
        raise ValueError(
            f"{path} is damaged or was cut short ({str(error)[:200] or type(error).__name__}): take another copy of "
            "it, or undo what was changed in it since `History.save`"
        ) from error


def _check(path: Path, found: str | None) -> None:
    if found != FORMAT:
        raise Foreign(f"{path} is not a {FORMAT}" + (f", but a {found}" if found else ""))


def of_npz(path: Path) -> Iterator[Any]:
    """The reports of a .npz file."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip file")
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        _check(path, str(file["format"]) if "format" in file else None)
        strange = [key for key in file if key not in _OTHERS and not key.startswith(GROUPS)]
        if strange:
            raise ValueError(f"it has {strange[0]!r}, which is no part of a history")
        there = [key for key in file if key.startswith(GROUPS)]
        if PARTS in file and sorted(there) != sorted(map(str, file[PARTS])):  # older files do not say
            raise ValueError(f"it has {there} and should have {file[PARTS].tolist()}")
        names = tuple(str(name) for name in file["names"])
        steps = [_step(step) for step in file["steps"].tolist()]
        batches = file[BATCH] if BATCH in file else np.full(len(steps), np.nan)  # older files do not say
        if batches.dtype != np.float64 or batches.shape != (len(steps),):
            raise ValueError(f"{BATCH} is of {batches.dtype}, {batches.shape} for {len(steps)} steps")
        groups = {group: {k.partition("/")[2]: file[k] for k in file if k.startswith(group)} for group in GROUPS}
    for group, shape in zip(GROUPS, ((len(steps), len(names)), (len(steps),)), strict=True):
        for key, values in groups[group].items():
            if values.dtype != np.float64:
                raise ValueError(f"{group}{key} is of {values.dtype}")
            if values.shape != shape:
                raise ValueError(f"{group}{key} has shape {values.shape} for {len(steps)} steps of {len(names)} layers")
    for i, step in enumerate(steps):
        columns, total = ({key: values[i] for key, values in groups[group].items()} for group in GROUPS)
        batch = None if np.isnan(batches[i]) else float(batches[i])
        yield SimpleNamespace(step=step, names=names, columns=columns, total=total, batch_size=batch)


def checksum(lines: list[str]) -> dict[str, Any]:
    """What the first line of a .jsonl file says of the others, so that none is lost or changed unseen."""
    return {"reports": len(lines), "crc32": f"{zlib.crc32(''.join(lines).encode()):08x}"}


def of_jsonl(path: Path) -> Iterator[Any]:
    """The reports of a .jsonl file."""
    with path.open(encoding="utf-8", newline="\n") as file:
        head, *lines = file.readlines() or [""]
    first = json.loads(head or "null")
    _check(path, first.get("format") if isinstance(first, dict) else None)
    said = {key: first[key] for key in ("reports", "crc32") if key in first}  # older files say nothing
    here = checksum(lines)
    wrong = [f"{key} {here[key]} where its first line says {x}" for key, x in said.items() if here[key] != x]
    if not all(isinstance(name, str) for name in first["names"]) or isinstance(first["names"], str):
        raise ValueError(f"its names are {first['names']!r:.80}")
    if wrong:
        raise ValueError("it has " + " and ".join(wrong))
    for line in map(json.loads, lines):
        columns = {key: [_from_json(x) for x in values] for key, values in line["columns"].items()}
        total = {key: _from_json(x) for key, x in line["total"].items()}
        step, names = _step(line["step"]), tuple(first["names"])
        yield SimpleNamespace(step=step, names=names, columns=columns, total=total, batch_size=line.get(BATCH))


def _step(x) -> int:
    if type(x) is not int:
        raise ValueError(f"{x!r} is no step")
    return x


def _from_json(x: float | str | None) -> float:
    return math.nan if x is None else float(x)
