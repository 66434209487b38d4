"""What a compiled program does to a device's memory, read from the text that XLA prints of it.

`Program(compiled.as_text())` counts, in the scheduled program:

    moved         bytes that operations read from and write to the device's memory
    kernels       operations that a device is asked to run: fusions, custom calls, conditionals, loops
    conditionals  wherever they are, branches and loops included
    copied        copies of arrays of 64 KiB or more from the device's memory to itself
    collectives   operations that talk to other devices, by name
    held(space)   about the most bytes of intermediate arrays in a memory space at a time, beside what a kernel uses;
                  XLA's own count of temporaries on TPU is 16 KiB for every scalar and every tuple besides

An array is in the device's memory unless its layout names another space: on TPU `S(1)` is on-chip vector memory and
`S(6)` scalar memory. A copy into on-chip memory therefore counts once, as a read; the compiler's own "bytes accessed"
counts it again when it is used. Padding to tiles is not counted. Of a conditional the branch that moves most counts;
the body of a loop counts as often as XLA knows it to run, or once.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

DEVICE, VECTOR = 0, 1  # memory spaces
_RENAMES = ("get-tuple-element", "tuple", "bitcast", "optimization-barrier")  # no bytes move
_ELSEWHERE = ("parameter", "constant", "partition-id", "replica-id", "after-all", "iota")
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$")
_LAUNCHED = ("fusion", "custom-call", "conditional", "while")
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,<=]*)\](\{[^}]*\})?")
_DEFINITION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")


class Array(NamedTuple):
    """One array of a program: its bytes, and the memory that they are in."""

    bytes: int
    space: int

    def in_space(self, space: int) -> int:
        return self.bytes if self.space == space else 0


@dataclass(frozen=True)
class Operation:
    """One line of a program. `result` is an `Array` or a tuple of results."""

    name: str
    code: str
    result: "Array | tuple"
    operands: tuple[str, ...]
    attributes: str

    def called(self) -> list[str]:
        """The computations that this operation runs (of a fusion, the one it consists of)."""
        lists = re.findall(
            r"(?:calls|to_apply|body|branch_computations|\w+_computation)=(\{[^}]*\}|%[\w.\-]+)", self.attributes
        )
        return [name for each in lists for name in re.findall(r"%([\w.\-]+)", each)]


def _width(dtype: str) -> float:
    """Bytes of one element."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits else 1  # pred, token


def _closing(text: str, start: int = 0) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    raise ValueError(f"no closing bracket in {text[start : start + 80]!r}")


def _pieces(text: str) -> Iterator[str]:
    """The parts between commas that are in no bracket."""
    depth, start = 0, 0
    for at, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and not depth:
            yield text[start:at]
            start = at + 1
    if text[start:].strip():
        yield text[start:]


def _result(text: str) -> "Array | tuple":
    """A type as it is printed: an array, or a tuple of types in brackets."""
    text = re.sub(r"/\*.*?\*/", "", text).strip()
    if text.startswith("("):
        return tuple(_result(piece) for piece in _pieces(text[1:-1]))
    found = _ARRAY.match(text)
    if not found:
        return Array(0, DEVICE)
    dtype, sizes, layout = found.groups()
    space = re.search(r"S\((\d+)\)", layout or "")
    elements = math.prod(int(size.strip("<=")) for size in sizes.split(",") if size)
    return Array(math.ceil(_width(dtype) * elements), int(space[1]) if space else DEVICE)


def _arrays(result) -> Iterator[Array]:
    if isinstance(result, Array):
        yield result
        return
    for part in result:
        yield from _arrays(part)


def _operation(line: str, name: str, start: int) -> Operation:
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opening:closing]))
    return Operation(name, line[end:opening].strip(), _result(line[start:end]), operands, line[closing:])


class Program:
    """A compiled program, by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Operation]] = {}
        inside: dict[str, Operation] = {}
        for line in text.splitlines():
            if definition := _DEFINITION.match(line):
                inside[definition[1]] = _operation(line, definition[1], definition.end())
            elif head := _HEAD.match(line):
                inside = self.computations[head[2]] = {}
                self.main = head[2] if head[1] else getattr(self, "main", head[2])

    @property
    def entry(self) -> list[Operation]:
        return list(self.computations[self.main].values())

    def everywhere(self) -> Iterator[Operation]:
        """Operations of all computations, those inside of fusions included."""
        for each in self.computations.values():
            yield from each.values()

    @property
    def kernels(self) -> int:
        return sum(op.code in _LAUNCHED and not self._is_rename(op) for op in self.entry)

    @property
    def conditionals(self) -> int:
        return sum(op.code == "conditional" for op in self.everywhere())

    @property
    def copied(self) -> int:
        copies = [op for op in self.entry if op.code == "copy" and isinstance(op.result, Array)]
        return sum(op.result.in_space(DEVICE) >= 2**16 for op in copies)

    @property
    def collectives(self) -> dict[str, int]:
        found = (_COLLECTIVE.match(op.code) for op in self.everywhere())
        return dict(collections.Counter(match[1] for match in found if match))

    @property
    def moved(self) -> int:
        return self._moved(self.main)

    @functools.cache  # noqa: B019  a program lives as long as its numbers are asked for
    def _moved(self, computation: str) -> int:
        operations = self.computations.get(computation, {})
        return sum(self._moves(op, operations) for op in operations.values())

    def _moves(self, op: Operation, around: dict[str, Operation]) -> int:
        """Bytes that one operation reads from and writes to the device's memory."""
        if op.code in _ELSEWHERE or op.code.endswith("-done") or self._is_rename(op):
            return 0
        if op.code == "conditional":
            return max(map(self._moved, op.called()))
        if op.code in ("call", "async-start"):
            return sum(map(self._moved, op.called()))
        if op.code == "while":
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.attributes)
            return (int(turns[1]) if turns else 1) * sum(map(self._moved, op.called()))
        read = [array for name in op.operands for array in _arrays(around[name].result)]
        if op.code == "copy-start":  # to, from, a flag
            return sum(array.in_space(DEVICE) for array in _arrays(op.result[:2]))
        if op.code == "slice-start":  # (from, ...), to, a flag; no more is read than is written
            wanted = op.result[1]
            return wanted.in_space(DEVICE) + Array(wanted.bytes, read[0].space).in_space(DEVICE)
        if _COLLECTIVE.match(op.code) and op.code.endswith("-start"):  # the result may hold its operands again
            return 2 * sum(array.in_space(DEVICE) for array in read)
        return sum(array.in_space(DEVICE) for array in (*read, *_arrays(op.result)))

    @staticmethod
    def _is_rename(op: Operation) -> bool:
        return op.code in _RENAMES or (op.code == "custom-call" and "Bitcast" in op.attributes)

    def held(self, space: int) -> int:
        """About the most bytes of intermediate arrays in a memory space at a time; results take operands' places."""
        holds: dict[str, list[set]] = {}  # the arrays that each part of a result stands for
        size: dict = {}
        last: dict = {}
        for at, op in enumerate(self.entry):
            given = [set().union(*holds.get(name, ())) for name in op.operands]
            last.update(dict.fromkeys(set().union(*given), at))
            if op.code == "get-tuple-element":
                parts = holds.get(op.operands[0], [])
                index = int(re.search(r"index=(\d+)", op.attributes)[1])
                holds[op.name] = [parts[index]] if index < len(parts) else given
            elif op.code == "tuple":
                holds[op.name] = given
            elif self._is_rename(op) or op.code.endswith("-done"):
                holds[op.name] = [set().union(*given)]
            elif op.code not in _ELSEWHERE:
                made = (op.result,) if isinstance(op.result, Array) else op.result
                made = {"copy-start": made[:1], "slice-start": made[1:2]}.get(op.code, made)
                holds[op.name] = [{(op.name, i)} for i, _ in enumerate(made)]
                for i, part in enumerate(made):
                    size[op.name, i] = sum(array.in_space(space) for array in _arrays(part))
                    last[op.name, i] = at
        for array in set().union(*holds[self.entry[-1].name]):  # the program's results are not its own
            size[array] = 0
        begins, ends = collections.Counter(), collections.Counter()
        place = {op.name: at for at, op in enumerate(self.entry)}
        for array, bytes_ in size.items():
            begins[place[array[0]]] += bytes_
            ends[last[array]] += bytes_
        most = now = 0
        for at in range(len(self.entry)):
            most = max(most, now + max(0, begins[at] - ends[at]))
            now += begins[at] - ends[at]
        return most
