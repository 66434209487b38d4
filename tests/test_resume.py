"""A run that was stopped and resumed in another process is the run that was not, bit for bit; a save that was killed
leaves nothing that could be taken for a checkpoint.
"""

import json
import multiprocessing
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import runs

from snr_adam.state.digest import manifest, verify
from snr_adam.state.files import restore_state, save_state

HERE = pathlib.Path(__file__).parent
multiprocessing.set_forkserver_preload(["snr_adam.state.files", "flax.serialization", "chex"])  # once for all savers


EVERY = [pytest.param((0, 3, 10, 19), id="some"), pytest.param(range(runs.STEPS), id="every", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=EVERY)
def resumed(request, tmp_path_factory):
    """Number of steps, and what a fresh process made of the checkpoints of every run after those numbers of steps."""
    folder = tmp_path_factory.mktemp("runs")
    now = {name: runs.start(name) for name in runs.RUNS}
    for k in range(runs.STEPS):
        if k in request.param:
            runs.write(folder, k, now)
        now = {name: next(runs.go_on(name, run, k)) for name, run in now.items()}
    (folder / "ends").write_bytes(pickle.dumps({name: runs.raw(run) for name, run in now.items()}))
    child = subprocess.run([sys.executable, HERE / "runs.py", folder], check=True, capture_output=True, text=True)
    return len(request.param), json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", runs.RUNS)
def test_resumed_in_a_fresh_process(name, resumed):
    """After 0, 3, 10 and 19 of 20 steps (nightly after each), through Orbax, pickle and Flax's msgpack."""
    times, found = resumed
    assert found["resumed"] == 3 * times * len(runs.RUNS)
    assert [where for where in found["wrong"] if where[2] == name] == []


@pytest.mark.parametrize("name", runs.RUNS)
def test_a_lost_state_would_show(name):
    """The comparison bites: from the same parameters with a fresh state every run ends elsewhere."""
    *_, end = runs.go_on(name, runs.start(name), 0)
    params, _ = next(runs.go_on(name, runs.start(name), 0))
    *_, other = runs.go_on(name, (params, runs.start(name)[1]), 1)
    assert runs.raw(other[0]) != runs.raw(end[0])


class Saver:
    """A process that saves one state after the other, and what it has said of it."""

    processes = multiprocessing.get_context("forkserver")

    def __init__(self, directory, who: int):
        self.said, child = self.processes.Pipe(duplex=False)
        self.process = self.processes.Process(target=runs.save_for_ever, args=(directory, who, child), daemon=True)
        self.process.start()
        child.close()
        assert self.said.poll(600), "the saving process does not save"

    def __enter__(self):
        """It stands still."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def __exit__(self, *_):
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.join()

    def heard(self):
        """The steps that it has saved and not yet told of."""
        while self.said.poll():
            try:
                yield self.said.recv()
            except EOFError:
                return


def check(directory, step: int) -> int:
    """Restores a step whole, and says whose it is."""
    state = restore_state(directory, runs.recognisable(0, 0), step)
    verify(state, manifest(runs.recognisable(step, int(state["who"]))))
    return int(state["who"])


def kill_saves(directory, times: int):
    """Two processes save into one directory at once; one of them is killed, `times` times over, and another begins.

    Every step that is said to be saved is there, unless it is old, and the last ones are restored.

    Returns how often there was an unfinished save of a killed one, the steps with the processes that saved them, and
    the steps that were on disk in the end.
    """
    rng, savers, saved, unfinished = random.Random(0), [Saver(directory, k) for k in range(2)], {}, 0

    def listen(saver, who):
        steps = list(saver.heard())
        there = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
        assert {step for step in steps if step > max(there) - runs.KEPT // 2} <= set(there)
        assert all(step not in saved for step in steps), "saved twice"
        saved.update(dict.fromkeys(steps, who))
        assert all(check(directory, step) == who for step in steps[-2:] if step in there)

    for k in range(times):
        time.sleep(rng.uniform(0.0, 0.3))
        saver, other = savers
        saver.kill()
        with other:
            listen(saver, k)
            listen(other, k + 1)
            newest = restore_state(directory, runs.recognisable(0, 0))
            assert int(newest["count"]) >= max(saved)
            unfinished += len(list(directory.glob(".*.lock"))) > 1
        savers = [other, Saver(directory, k + 2)]
    for saver in savers:
        saver.kill()
    for who, saver in enumerate(savers, times):
        listen(saver, who)
    found = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    for step in found[-5:]:
        check(directory, step)
    return unfinished, saved, found


@pytest.mark.parametrize("times", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_it_saves(times, tmp_path):
    """kill -9 at random moments, of two processes that save at once: no complete checkpoint is lost or a mixture, the
    other process does not notice, and what was not finished is cleared away."""
    unfinished, saved, found = kill_saves(tmp_path, times)
    print(f"{times} kills, {unfinished} seen in the middle of a save; {len(saved)} saves")
    assert set(sorted(saved)[-3:]) <= set(found)
    assert len(set(found) - set(saved)) <= times + 2  # on disk and not yet told of
    assert len(set(saved.values())) > times // 2
    assert times < 50 or unfinished >= 10
    save_state(tmp_path, max(found) + 1, runs.recognisable(0, 0))
    assert all(path.name.isdigit() for path in tmp_path.iterdir())
