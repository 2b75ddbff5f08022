"""Temporary files of one process, swept by the next one if this one is killed."""

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
    """A directory below the store's `tmp/`, for as long as its lock is held.

    The lock belongs to an open file description: forked children share it, it ends with the last.

    Raises:
        StoreFullError: the disk is full.
        StoreError: it cannot be created.
    """

    def __init__(self, store_path: Path) -> None:
        parent = store_path / TEMP_DIRECTORY
        try:
            store_path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            parent.mkdir(mode=0o755, exist_ok=True)
            with _locked(parent):  # no sweep between mkdir and flock
                self.path = _make_unique(parent)
                self._fd = os.open(self.path, _OPEN_FLAGS)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as exc:
            raise disk_error(exc, parent) from exc

    def close(self) -> None:
        """Remove the directory and all in it."""
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
    """Remove the temporary directories of processes that are gone."""
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
    # By hand, as shutil loads four compressors. Nobody else has a hand in these directories.
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
        return True  # just removed by its owner; or not ours at all
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
