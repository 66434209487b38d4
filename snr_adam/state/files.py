"""States on disk: saved with Orbax, beside a manifest of their bits, and verified when they come back.

    save_state(directory, step, state)      writes directory/step/state and directory/step/manifest, or nothing
    restore_state(directory, like)          the newest complete one, bit for bit, or an error that says what is wrong

A checkpoint appears under its name when all of it is written; a save that was killed leaves a hidden folder, which
nobody takes for a checkpoint and the next save clears away. Several may save into one directory at once: each step is
that of one of them, whole. Orbax keeps no checksum of what it writes, so the manifest (`digest.manifest`) is what tells
a damaged checkpoint from a good one.

Loops with a `CheckpointManager` of their own get the same by saving `digest.manifest(state)` as one more item and
calling `digest.verify` on what they restore. Needs the package orbax-checkpoint, which `import snr_adam` does not.
"""

import contextlib
import operator
import os
import re
import shutil
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from snr_adam import _tree
from snr_adam._state import fits, marks
from snr_adam.state._savers import publish, unfinished
from snr_adam.state.digest import compare, manifest, rows_of, verify
from snr_adam.state.forms import FORM, earlier, renewed

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as error:
    if error.name not in ("orbax", "orbax.checkpoint"):
        raise
    raise ModuleNotFoundError(
        "snr_adam.state.files saves with orbax-checkpoint, which is not installed: pip install 'snr_adam[files]'",
        name=error.name,
    ) from error

_one_at_a_time = threading.Lock()  # threads that save at once write into each other's files in Orbax


def save_state(directory: str | os.PathLike, step: int, state: Any) -> None:
    """Writes `state` and the manifest of its bits as checkpoint `step` of a directory; returns when they are written.

    Args:
      directory: where this run's checkpoints lie; made if missing. A "~" is the user's home.
      step: the number of the checkpoint, a whole number >= 0, larger than that of any before. An int of NumPy or JAX
        will do, such as a state's `count`.
      state: parameters, optimizer state, whatever a run needs: any tree of arrays and numbers, or one array.

    Raises:
      ValueError: if the directory has that step already, if the step is negative, or if two leaves would have one name
        in the checkpoint.
      TypeError: for a step that is no whole number, and for a leaf that is no array, by its name. Nothing is written.
    """
    step, directory = _whole(step), _path(directory)
    leaves = manifest(state)
    _check_names(state)
    name = os.path.join(directory, str(step))
    if os.path.exists(name):
        raise _taken(directory, step)
    item = ocp.args.Composite(
        state=ocp.args.StandardSave(_on_disk(state)),
        manifest=ocp.args.JsonSave({"step": step, "form": FORM, "made": marks(state), "leaves": leaves}),
    )
    with _unfinished(directory) as folder:
        with _one_at_a_time, _checkpointer() as checkpointer:
            checkpointer.save(os.path.join(folder, str(step)), args=item)
        _publish(directory, folder, step)


def restore_state(directory: str | os.PathLike, like: Any, step: int | None = None) -> Any:
    """The state of the newest complete checkpoint, or of `step`, verified bit by bit.

    Args:
      directory: what `save_state` was given.
      like: a tree of arrays or ShapeDtypeStructs with the names, shapes and dtypes that were saved, such as the fresh
        parameters and `init`'s state. Its shardings are those of the result.
      step: which checkpoint; by default the one with the largest number.

    Raises:
      FileNotFoundError: if there is no complete checkpoint, or not that one.
      ValueError: if the checkpoint has other leaves, shapes or dtypes than `like`, if it cannot be read, or if a bit of
        it has changed; the message names the leaf.
    """
    step, directory = None if step is None else _whole(step), _path(directory)
    step = _chosen(directory, step)
    name = os.path.join(directory, str(step))
    with _about(f"checkpoint {name}"), _checkpointer() as checkpointer:
        form, leaves, made = _read_manifest(checkpointer, name, step)
        _check_marks(made, marks(like))
        target = earlier(like, form)
        compare(target, leaves)
        state = _read_state(checkpointer, name, target)
        verify(state, leaves)
    return state if form == FORM else renewed(state, like)


def _path(directory: str | os.PathLike) -> str:
    return os.path.abspath(os.path.expanduser(directory))


def _whole(step) -> int:
    """The number of a checkpoint as an int."""
    try:
        number = None if _tree.is_bool(step) else operator.index(step)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(
            f"step={step!r} is of type {type(step).__name__}: must be a whole number >= 0, such as 1000 or a state's "
            "count, outside of jit"
        )
    if number < 0:
        raise ValueError(f"step={number}: must be a whole number >= 0")
    return number


def _check_names(state) -> None:
    """Orbax joins keys with dots: two leaves of one name would be written over each other."""
    names: dict[str, str] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state, is_leaf=_tree.is_none):
        name, dotted = _tree.name(path), jax.tree_util.keystr(path, simple=True, separator=".")
        if dotted in names:
            raise ValueError(
                f"leaves {names[dotted]} and {name} would both be called {dotted!r} in the checkpoint, where keys are "
                "joined with dots: rename a key"
            )
        names[dotted] = name


def _taken(directory: str, step: int) -> ValueError:
    return ValueError(f"{directory} has a checkpoint {step} already: delete it, or save under a later step")


@contextlib.contextmanager
def _unfinished(directory: str):
    """A folder to write in, one for all processes that save one state together; the first of them keeps it."""
    if jax.process_count() == 1:
        with unfinished(directory) as folder:
            yield folder
        return
    first = jax.process_index() == 0
    with unfinished(directory) if first else contextlib.nullcontext("") as folder:
        code = np.frombuffer(os.path.basename(folder).encode().ljust(64, b"\0"), np.uint8)
        code = np.asarray(multihost_utils.broadcast_one_to_all(code))
        yield os.path.join(directory, code.tobytes().rstrip(b"\0").decode())


def _publish(directory: str, folder: str, step: int) -> None:
    """Gives the checkpoint its name; of several processes the first does, and all hear of it."""
    won = True
    if jax.process_index() == 0:
        try:
            publish(os.path.join(folder, str(step)), os.path.join(directory, str(step)))
            # what a killed save of this step has left behind, of a version that wrote as Orbax does
            shutil.rmtree(os.path.join(directory, f"{step}.orbax-checkpoint-tmp"), ignore_errors=True)
        except FileExistsError:
            won = False
    if jax.process_count() > 1:
        won = bool(multihost_utils.broadcast_one_to_all(np.array(won)))
    if not won:
        raise _taken(directory, step)


def _checkpointer() -> ocp.Checkpointer:
    """No `CheckpointManager`: that one looks at all checkpoints, of which others may just be deleting some."""
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


@contextlib.contextmanager
def _about(what: str):
    """Puts what an error is about before its text."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _chosen(directory: str, step: int | None) -> int:
    steps = _steps(directory)
    if steps and (step is None or step in steps):
        return steps[-1] if step is None else step
    found = f"it has {steps}, ask for one of them" if steps else "give the directory of a run that has finished a save"
    raise FileNotFoundError(f"no complete checkpoint{'' if step is None else f' {step}'} in {directory}: {found}")


def _steps(directory: str) -> list[int]:
    """The complete checkpoints: what has its name has all of it."""
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _read_manifest(checkpointer, name: str, step: int):
    try:
        saved = checkpointer.restore(name, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
        named, form, leaves = saved["step"], saved.get("form", 1), rows_of(saved["leaves"])
        made = saved.get("made", [])
        if not (isinstance(made, list) and all(x is None or isinstance(x, str) for x in made)):
            raise ValueError(f"{made!r:.80} are no marks of what made the states")
        if not (type(named) is int and type(form) is int and form >= 1):
            raise ValueError(f"step {named!r} and form {form!r} are no numbers of a step and a form")
    except Exception as error:
        raise ValueError(
            "its manifest is missing or damaged, so nothing says whether the rest is whole: take an older checkpoint; "
            "if save_state did not write it, read it with Orbax"
        ) from error
    if named != step:
        raise ValueError(f"it was saved as step {named} and renamed since: give the directory its old name")
    if form > FORM:
        raise ValueError(
            f"it is of form {form}, and this version of snr_adam reads forms 1 to {FORM}: take a newer one"
        )
    return form, leaves, made


def _check_marks(saved: list, wanted: list) -> None:
    """Raises where a state was made by other parts; older manifests do not say by which."""
    for here, there in zip(saved, wanted, strict=False):
        if not fits(here, there):
            raise ValueError(
                f"it holds moments of {here} (signal/noise) and `like` is of {there}: restore it with the optimizer "
                "that was saved; `from_optax(state, like)` moves between those that keep Adam's averages"
            )


def _read_state(checkpointer, name: str, like):
    target = _on_disk(like)
    try:
        item = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, target)))
        state = checkpointer.restore(name, args=item)["state"]
    except Exception as error:
        text = str(error)
        quoted = {name: name.replace("/", ".") for name, _ in _tree.named_leaves(like)}
        where = next(
            (f" (at leaf {name})" for name, key in quoted.items() if re.search(rf"[\"']{re.escape(key)}/", text)), ""
        )
        raise ValueError(
            f"its arrays cannot be read{where}, a file is damaged or missing: take an older checkpoint. Orbax says: "
            f"{text[:200]}"
        ) from error
    state = state[_ALONE] if _is_alone(like) else state
    return jax.tree.map(lambda x, got: jnp.zeros(x.shape, x.dtype) if got is None else got, like, state)


_ALONE = "the tree itself"


def _is_alone(tree) -> bool:
    """Whether a tree is one array, or nothing at all: Orbax takes dicts and the like, with something in them."""
    return not jax.tree_util.tree_leaves_with_path(tree, is_leaf=_tree.is_none) or _tree.flatten(tree)[0][0] is tree


def _on_disk(tree):
    """What Orbax is given: arrays of no elements, which it refuses to write, as None; numbers as arrays."""

    def written(x):
        x = np.asarray(x) if isinstance(x, np.generic) else _tree.as_array(x)
        return None if 0 in x.shape else x

    arrays = jax.tree.map(written, tree)
    return {_ALONE: arrays} if _is_alone(tree) else arrays
