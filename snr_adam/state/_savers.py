"""Several who save into one directory at once, and some who are killed while they do.

    with unfinished(directory) as folder:      a folder of one's own in it, which nobody else writes to or clears away
        ...                                    write there
        publish(made, name)                    what is complete appears under its name, or somebody else's did

A rename is the only way into the directory, so under a name there is all of a thing or nothing, and of two that save
under one name one wins. Whoever writes holds a lock on a file in his folder, which the system lets go of when he dies:
the next one who saves clears away the folders that nobody holds, and no other. Where a file system has no locks nothing
is cleared away.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from secrets import token_hex

_PREFIX, _OWNER = ".unfinished-", "owner"
_held_here: set[str] = (
    set()
)  # the system's lock keeps other processes out, and is lost if this one opens its file again


@contextlib.contextmanager
def unfinished(directory: str) -> Iterator[str]:
    """A new folder in `directory`, which is made if missing; gone afterwards, with whatever is still in it."""
    os.makedirs(directory, exist_ok=True)
    _clear(directory)
    folder = os.path.join(directory, f"{_PREFIX}{token_hex(8)}")
    _held_here.add(folder)
    try:
        os.mkdir(folder)
        owner = os.open(os.path.join(folder, _OWNER), os.O_RDWR | os.O_CREAT)
        try:
            if _lock(owner):
                os.write(owner, b"held")  # what is empty is not held yet, or cannot be
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(owner)
    finally:
        _held_here.discard(folder)


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


def _clear(directory: str) -> None:
    """Removes the folders whose owners are dead."""
    for folder in (entry.path for entry in os.scandir(directory) if entry.name.startswith(_PREFIX)):
        if folder in _held_here:
            continue
        try:
            owner = os.open(os.path.join(folder, _OWNER), os.O_RDWR)
        except OSError:  # just made, or just cleared away by another
            continue
        try:
            if _lock(owner) and os.fstat(owner).st_size:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(owner)


def _lock(file: int) -> bool:
    """Whether this process holds the file now."""
    try:
        os.lockf(file, os.F_TLOCK, 0)
    except (OSError, AttributeError):  # somebody else's, or a system without such locks
        return False
    return True
