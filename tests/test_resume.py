"""A run that was stopped and resumed in another process is the run that was not, bit for bit; a save that was killed
leaves nothing that could be taken for a checkpoint.
"""

import json
import multiprocessing
import pathlib
import pickle
import random
import subprocess
import sys
import time

import pytest
import runs

from snr_adam.state.digest import manifest, verify
from snr_adam.state.files import restore_state

HERE = pathlib.Path(__file__).parent


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


def _kill_saves(directory, times):
    """Kills a process in the middle of its saves, `times` times over, and restores after each."""
    fresh = multiprocessing.get_context("spawn")
    rng, newest, found = random.Random(0), 0, []
    for _ in range(times):
        parent, child = fresh.Pipe()
        saver = fresh.Process(target=runs.save_for_ever, args=(directory, newest + 1, child))
        saver.start()
        assert parent.poll(600), "the saving process does not save"
        time.sleep(rng.uniform(0.0, 0.3))
        saver.kill()
        saver.join()
        child.close()
        done = newest
        while parent.poll():
            try:
                done = parent.recv()
            except EOFError:
                break
        left = {path.name for path in directory.iterdir()}
        state = restore_state(directory, runs.recognisable(0))
        newest = int(state["count"])
        assert newest in (done, done + 1)  # it may have been on disk and not yet reported
        verify(state, manifest(runs.recognisable(newest)))
        found.append(len([name for name in left if not name.isdigit()]))
    return found


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_while_it_saves(times, tmp_path):
    """kill -9 at random moments: the newest complete checkpoint comes back, and the next process goes on behind it."""
    unfinished = _kill_saves(tmp_path, times)
    print(f"{times} kills, {sum(map(bool, unfinished))} of them in the middle of a save")
    assert times < 50 or sum(map(bool, unfinished)) >= 10
