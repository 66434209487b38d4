"""The runs that `test_resume.py` interrupts, and what a fresh process does with what it finds of them:

    python tests/runs.py FOLDER      goes on from every checkpoint there and prints, as JSON, which end in other bits

A new kind of state is one row of RUNS.
"""

import functools
import gc
import json
import pathlib
import pickle
import shutil
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import optax
from cases import gradients, quick_jit, tree

import snr_adam
from snr_adam.parts import RMS, Cast, Shared
from snr_adam.state.files import restore_state, save_state

STEPS = 20
KEPT = 10  # of the checkpoints that are saved for ever
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, STEPS)
SCHEDULE_OF_CLIPS = optax.linear_schedule(3.0, 0.3, 20)
DECAY = optax.linear_schedule(0.5, 0.99, STEPS)
# name -> the parameters' dtype, the optimizer
RUNS = {
    "float32": ("float32", lambda: snr_adam.adamw(0.1)),
    "bfloat16": ("float32", lambda: snr_adam.adamw(0.1, storage="bfloat16")),
    "packed": ("float32", lambda: snr_adam.adamw(0.1, storage="packed")),
    "one moment narrow": ("float32", lambda: snr_adam.nadam(0.1, storage=Cast(nu="bfloat16"))),
    "shared": (
        "float32",
        lambda: snr_adam.descend(0.1, noise=Shared(RMS(), {"block/1": 0})),
    ),
    "two in nu": ("float32", lambda: snr_adam.amsgrad(0.1, storage="bfloat16")),
    "two in mu": ("float32", lambda: snr_adam.ademamix(0.1, storage="bfloat16")),
    "none in nu": ("bfloat16", lambda: snr_adam.lion(0.01, storage="bfloat16")),
    "a gradient in mu": ("float32", lambda: snr_adam.mars(0.1, storage="bfloat16")),
    "decays in time": ("float32", lambda: snr_adam.adamw(0.1, b1=DECAY, b2=DECAY, storage="packed")),
    "schedules": ("float32", lambda: snr_adam.adamw(SCHEDULE, weight_decay=SCHEDULE, storage="packed")),
    "carry 16": ("bfloat16", lambda: snr_adam.carry_remainder(snr_adam.adamw(0.1, storage="packed"))),
    "carry 8": ("bfloat16", lambda: snr_adam.carry_remainder(snr_adam.adamw(SCHEDULE, storage="bfloat16"), "8")),
    "rounded": ("float16", lambda: optax.chain(snr_adam.adamw(0.01), snr_adam.precision.round_stochastically())),
    "multi steps": (
        "float32",
        lambda: optax.MultiSteps(snr_adam.adamw(SCHEDULE, storage="packed"), 3).gradient_transformation(),
    ),
    "guarded": ("float32", lambda: snr_adam.guard(snr_adam.adamw(SCHEDULE, storage="packed"), clip_norm=1.0)),
    "guarded, of Optax": ("float32", lambda: snr_adam.guard(optax.adamw(SCHEDULE), max_consecutive=3)),
    "guarded, spikes": (
        "float32",
        lambda: snr_adam.guard(snr_adam.adamw(0.1), SCHEDULE_OF_CLIPS, spikes=snr_adam.Spikes(2.0, 4, then="clip")),
    ),
    "observed": ("float32", lambda: snr_adam.observe(snr_adam.adamw(SCHEDULE, storage="packed"))),
    "observed, of Optax": ("float32", lambda: snr_adam.observe(optax.adamw(SCHEDULE), every=3)),
    "injected": ("float32", lambda: optax.inject_hyperparams(snr_adam.adamw)(SCHEDULE, storage="packed")),
    "clipped": ("float32", lambda: optax.chain(optax.clip_by_global_norm(1.0), snr_adam.adamw(0.1, storage="packed"))),
}


@functools.cache
def data(dtype):
    """The gradients of every step."""
    return list(gradients(STEPS, dtype=dtype))


@functools.cache
def _stepper(name):
    tx = RUNS[name][1]()

    @quick_jit
    def step(run, grads):
        params, state = run
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(name):
    """Parameters and state before the first step."""
    dtype, make = RUNS[name]
    params = tree(dtype=dtype)
    return params, make().init(params)


def go_on(name, run, k):
    """`run` after each of steps k + 1 to 20."""
    for grads in data(RUNS[name][0])[k:]:
        run = _stepper(name)(run, grads)
        yield run


def write(folder: pathlib.Path, k: int, runs):
    """One checkpoint in each of three formats."""
    save_state(folder / "orbax", k, runs)
    runs = jax.device_get(runs)
    (folder / f"{k}.pickle").write_bytes(pickle.dumps(runs))
    (folder / f"{k}.msgpack").write_bytes(flax.serialization.to_bytes(runs))


READ = {
    "orbax": lambda folder, k, like: restore_state(folder / "orbax", like, k),
    "pickle": lambda folder, k, like: pickle.loads((folder / f"{k}.pickle").read_bytes()),
    "msgpack": lambda folder, k, like: flax.serialization.from_bytes(like, (folder / f"{k}.msgpack").read_bytes()),
}


def raw(run):
    """Types and bits of every leaf."""
    return [(str(x.dtype), x.shape, x.tobytes()) for x in jax.tree.leaves(jax.device_get(run))]


def resume(folder: pathlib.Path):
    """Goes on from every checkpoint: how many runs did, and which ended otherwise than the uninterrupted one."""
    at = sorted(int(file.stem) for file in folder.glob("*.pickle"))
    ends = pickle.loads((folder / "ends").read_bytes())
    like = {name: jax.eval_shape(functools.partial(start, name)) for name in RUNS}
    resumed, wrong, gone = 0, [], {}
    for form, read in READ.items():
        for k in at:
            for name, run in read(folder, k, like).items():
                same = k, name, str(raw(run))  # what has the same bits goes on in the same way, and need not twice
                if same not in gone:
                    *_, end = go_on(name, run, k)
                    gone[same] = raw(end) == ends[name]
                resumed += 1
                if not gone[same]:
                    wrong.append([form, k, name])
    return {"resumed": resumed, "wrong": wrong}


def save_for_ever(directory, who: int, done):
    """Saves one state after the other, each recognisable, and tells the steps that it has saved.

    Another process does the same in this directory, and takes some of the steps. The last KEPT of them are kept.
    """
    while True:
        there = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
        for old in there[:-KEPT]:
            shutil.rmtree(directory / str(old), ignore_errors=True)
        step = max(there, default=0) + 1
        try:
            save_state(directory, step, recognisable(step, who))
        except ValueError as error:
            if "has a checkpoint" not in str(error):
                raise
        else:
            done.send(step)


def recognisable(step: int, who: int):
    """A state that says in every element which step it is of, and who has saved it."""
    return {
        "w": jnp.full((128, 128), step, jnp.float32),
        **{"count": jnp.int32(step), "who": jnp.int32(who), "m": [jnp.full(1000, -step), jnp.full(1000, who)]},
    }


if __name__ == "__main__":
    gc.disable()  # a process of half a minute that traces a lot
    print(json.dumps(resume(pathlib.Path(sys.argv[1]))))
