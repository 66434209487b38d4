"""Several processes train one model; one of them is killed, the run is resumed, and moved to another number of them.

Real processes on localhost, as a user starts them. They share a compile cache, or the suite would wait for XLA.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed.py"
TINY = ("--width", "16", "--context", "16", "--batch", "8", "--save-every", "4", "--report-every", "2")


class Started:
    """A run of the example: what it has said so far, and how it ended."""

    def __init__(self, folder, cache, *options):
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, EXAMPLE, *TINY, "--folder", folder, *options],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.said = ""

    def until(self, text: str) -> None:
        """Reads on until a line with this text."""
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        raise AssertionError(f"{text!r} was never said:\n{self.said}")

    def end(self) -> int:
        with self.process.stdout:
            self.said += self.process.stdout.read()
        return self.process.wait(120)

    @property
    def starts(self):
        """(step, hash of all values) wherever it began."""
        return re.findall(r"from step (\d+), weights and state (\w+)", self.said)

    @property
    def finish(self):
        """(step, loss, hash of all values) at the end."""
        step, loss, value = re.search(r"after step (\d+): loss (\S+), weights and state (\w+)", self.said).groups()
        return int(step), float(loss), value


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """Twelve steps by two processes with two devices each, and their folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Started(folder, cache, "--steps", "12")
    assert run.end() == 0, run.said
    assert run.finish[0] == 12
    return folder, run


@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_time(tmp_path, cache, undisturbed):
    """Killed at step 6, resumed by itself from the checkpoint of step 4, the same bits at the end."""
    run = Started(tmp_path, cache, "--steps", "12", "--kill-at", "6")
    assert run.end() == 0, run.said
    assert "a process died" in run.said
    assert [step for step, _ in run.starts] == ["0", "4"]
    assert run.finish == undisturbed[1].finish


@pytest.mark.slow
def test_one_process_takes_over_the_same_values(tmp_path, cache, undisturbed):
    """The last checkpoint, restored by one process with one device, is the same bits; and training goes on."""
    shutil.copytree(undisturbed[0] / "12", tmp_path / "12")
    run = Started(tmp_path, cache, "--steps", "14", "--processes", "1", "--devices", "1")
    assert run.end() == 0, run.said
    assert run.starts == [("12", undisturbed[1].finish[2])]
    assert "1 processes, 1 devices" in run.said
    assert run.finish[0] == 14
    assert run.finish[1] < 6


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero1", "fsdp"])
def test_ctrl_c_saves_and_another_layout_goes_on(tmp_path, cache, layout):
    """Stopped from the keyboard; killed with all its processes; resumed on 2, 1 and 4 processes."""
    run = Started(tmp_path / "a", cache, "--steps", "16", "--layout", layout)
    assert run.end() == 0, run.said
    want = run.finish

    stopped = Started(tmp_path / "b", cache, "--steps", "100000", "--layout", layout)
    stopped.until("step      6 ")
    os.killpg(stopped.process.pid, signal.SIGINT)
    assert stopped.end() == 130, stopped.said
    assert "the same command continues" in stopped.said
    at = stopped.finish[0]
    again = Started(tmp_path / "b", cache, "--steps", f"{at + 1}", "--layout", layout)
    assert again.end() == 0
    assert again.starts == [(str(at), stopped.finish[2])]

    killed = Started(tmp_path / "c", cache, "--steps", "100000", "--layout", layout)
    killed.until("step     10 ")
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.end()
    resumed = Started(tmp_path / "c", cache, "--steps", "1", "--layout", layout)
    assert resumed.end() == 0
    assert int(resumed.starts[0][0]) >= 8

    for processes, devices in ((2, 2), (1, 4), (4, 1), (1, 1)):
        folder = tmp_path / f"{processes}x{devices}"
        shutil.copytree(tmp_path / "a" / "12", folder / "12")
        resumed = Started(
            folder, cache, "--steps", "16", "--layout", layout, "--processes", f"{processes}", "--devices", f"{devices}"
        )
        assert resumed.end() == 0, resumed.said
        assert resumed.finish[1] == pytest.approx(want[1], rel=1e-4)
        if (processes, devices) == (2, 2):
            assert resumed.finish == want
