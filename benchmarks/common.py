"""What the benchmarks share: where results go, which machine made them, and contenders that take turns.

A contender is a process of its own, which sets up and waits. The parent asks one after the other, round by round, so
that all see the same machine in the same minute: a number counts only against the others of its run. A question is a
line, an answer a line of JSON.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = [
    *("adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad", "adabelief", "yogi", "radam"),
    *("rmsprop", "lion", "adopt", "ademamix", "lamb", "centered_adam"),
    *("stable_adamw", "cautious_adamw", "adamc", "adam_atan2", "laprop", "adams", "bcos", "mars", "adamh", "msvag"),
]


def machine() -> dict:
    """Where and with what a result was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = {line.split(":")[1].strip() for line in lines if "model name" in line}
    installed = {d.name: d.version for d in distributions() if d.name in ("jax", "jaxlib", "optax", "torch")}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **dict(sorted(installed.items())),
    }


def save(path: Path, rows: list[dict], **more) -> None:
    """Writes a result with its machine and date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine() | more, "rows": rows}, indent=1) + "\n")


def markdown(rows: Iterable[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table: {key: format}. Left out are columns that no row has; "-" is what one row has not."""
    rows = list(rows)
    columns = {key: form for key, form in columns.items() if any(key in row for row in rows)}
    lines = ["| " + " | ".join(columns) + " |", "|" + "".join("--:|" if form else "---|" for form in columns.values())]
    for row in rows:
        lines.append(
            "| " + " | ".join(f"{row[key]:{form}}" if key in row else "-" for key, form in columns.items()) + " |"
        )
    return "\n".join(lines)


class Worker:
    """A contender's process, seen from the parent. Its first answer is {}, or {"error": why} if it cannot run."""

    def __init__(self, arguments: Sequence[str], python: str | Path = sys.executable, **how):
        self._process = subprocess.Popen(
            [python, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **how
        )

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline() or '{"error": "not measured: the process ended"}')

    def ask(self, question: str) -> Any:
        print(question, file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self._process.communicate()


def serve(set_up: Callable[[], Callable[[str], Any]]) -> None:
    """The contender's side: `set_up` gives a function from questions to answers."""

    def answer(do: Callable, *arguments):
        try:
            return do(*arguments)
        except Exception as error:  # the table says so and goes on without
            traceback.print_exc()
            return {"error": f"not measured: {(str(error) or type(error).__name__).splitlines()[0]}"}

    ready = answer(set_up)
    if isinstance(ready, dict):
        print(json.dumps(ready), flush=True)
        return
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(ready, line.strip())), flush=True)


def take_turns(workers: dict[str, Worker], question: str, rounds: int) -> dict[str, list]:
    """Everyone's answers to one question, asked `rounds` times in turn."""
    answers: dict[str, list] = {name: [] for name in workers}
    for done in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker.ask(question))
        if sys.stderr.isatty():
            print(f"\rround {done + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
    return answers
