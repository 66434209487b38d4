"""Several who save into one directory at once, and some who are killed while they do.

    with unfinished(directory) as folder:      a folder of one's own in it, which nobody else writes to or clears away
        ...                                    write there
        publish(made, name)                    what is complete appears under its name, or somebody else's did

A rename is the only way into the directory, so under a name there is all of a thing or nothing, and of two that save
under one name one wins. Whoever writes holds a lock on a file beside his folder, which the system lets go of when he
dies: the next one who saves clears away the folders that nobody holds, and no other. Where a file system has no locks
there is no such file, and nothing is cleared away.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from secrets import token_hex

_PREFIX, _LOCK = ".unfinished-", ".lock"
# the system's lock keeps other processes out, and is lost if this one opens its file again
_held_here: set[str] = set()


@contextlib.contextmanager
def unfinished(directory: str) -> Iterator[str]:
    """A new folder in `directory`, which is made if missing; gone afterwards, with whatever is still in it."""
    os.makedirs(directory, exist_ok=True)
    _clear(directory)
    folder, file = "", None
    while file is None:
        folder = os.path.join(directory, f"{_PREFIX}{token_hex(8)}")
        _held_here.add(folder + _LOCK)
        file = _hold(folder + _LOCK)
    try:
        os.mkdir(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder + _LOCK)
        os.close(file)
        _held_here.discard(folder + _LOCK)


def publish(made: str, name: str) -> None:
    """Gives what was made its name, at once.

    Raises:
      FileExistsError: if something has that name already, which stays as it is.
    """
    try:
        os.rename(made, name)
    except OSError as error:
        if os.path.isdir(name):
            raise FileExistsError(name) from error
        raise


def _hold(lock: str) -> int | None:
    """Makes and locks a file; None if another took it, who must have thought that its owner was dead."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        if _lock(file) and os.path.samestat(os.fstat(file), os.stat(lock)):
            return file
    except FileNotFoundError:
        pass
    except (OSError, AttributeError):  # no locks here
        os.unlink(lock)
        return file
    os.close(file)
    return None


def _lock(file: int) -> bool:
    """Whether this process holds the file now; raises where there are no locks."""
    try:
        os.lockf(file, os.F_TLOCK, 0)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _clear(directory: str) -> None:
    """Removes the folders whose owners are dead."""
    names = [entry.name for entry in os.scandir(directory) if entry.name.startswith(_PREFIX)]
    for lock in (os.path.join(directory, name) for name in names if name.endswith(_LOCK)):
        if lock in _held_here:
            continue
        with contextlib.suppress(OSError, AttributeError):  # another has cleared it away, or there are no locks here
            file = os.open(lock, os.O_RDWR)
            try:
                if _lock(file):
                    shutil.rmtree(lock.removesuffix(_LOCK), ignore_errors=True)
                    os.unlink(lock)
            finally:
                os.close(file)
