"""A process's temporary files below a store; if it is killed, a later process sweeps them.

Each process has its own directory, and holds a flock on it for as long as it lives. So a directory
that another process can lock is abandoned.
"""

import fcntl
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from appliance.db.environment import DIRECTORY_MODE
from appliance.errors import disk_error
from appliance.store.schema import TEMP_DIRECTORY

_OPEN_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


class TempDirectory:
    """A directory of this process below the store's `tmp/`.

    The lock belongs to an open file description, which forked children share: it is released when
    the last of them has closed it or ended.

    Raises:
        StoreFullError: the disk is full.
        StoreError: it cannot be created.
    """

    def __init__(self, store_path: Path) -> None:
        parent = store_path / TEMP_DIRECTORY
        try:
            store_path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            parent.mkdir(mode=0o755, exist_ok=True)
            with _locked(parent):  # so that no sweep comes between mkdir and flock
                self.path = _make_unique(parent)
                self._fd = os.open(self.path, _OPEN_FLAGS)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as exc:
            raise disk_error(exc, parent) from exc

    def close(self) -> None:
        """Remove the directory with everything in it, and release the lock."""
        _remove(self.path)
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def sweep(store_path: Path) -> None:
    """Remove the temporary directories of processes that have ended."""
    parent = store_path / TEMP_DIRECTORY
    if not parent.is_dir():
        return
    with _locked(parent):
        for path in parent.iterdir():
            if not _is_held(path):
                _remove(path)


def _make_unique(parent: Path) -> Path:
    for number in itertools.count():
        path = parent / f"{os.getpid()}-{number}"
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
            return path
    raise AssertionError("an endless count ended")


def _remove(path: Path) -> None:
    # Not by shutil, whose import loads four compressors. No other process changes this directory.
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            with suppress(OSError):
                os.unlink(f"{directory}/{name}")  # noqa: PTH108 -- os.walk gives no Path
        with suppress(OSError):
            os.rmdir(directory)  # noqa: PTH106 -- as above


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return True  # its owner has just removed it, or it is no directory
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, _OPEN_FLAGS)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
