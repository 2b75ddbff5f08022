"""Lists of store paths that garbage collection keeps, and the lock that guards all roots.

A list is a text file that a person can read, `roots/NAME` in the directory of its store: the base
name of one store path a line. Empty lines and lines that begin with `#` are no paths. Views
(`views/NAME`) and leases (`leases/ID`) have the same form.

The lock (`roots.lock`, flock(2)) orders those who add roots and the collector, which removes paths
that no root reaches. Whoever adds a root writes it down with the lock shared, and only then looks
whether the path is there: if it is, it stays. The collector holds the lock exclusively from reading
the roots until it has committed the removal of paths. So either it has seen the new root, or who
added it sees that the path is gone.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.errors import ConfigError, DirectoryError, StoreError, disk_error
from appliance.nix.store_path import StorePath, StorePathError
from appliance.store.schema import ROOTS_DIRECTORY

_LOCK: Final = "roots.lock"
_EDIT_LOCK: Final = ".lock"
_LOCK_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_HEAD: Final = "# Store paths that garbage collection keeps, changed by `appliance root`.\n"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", re.ASCII)


class RootText(NamedTuple):
    """What a text has: store paths, and blobs that it names beside them."""

    paths: list[StorePath]
    blobs: list[Digest]


@contextmanager
def roots_locked(store_path: Path, *, is_exclusive: bool) -> Iterator[None]:
    """Hold the lock of a store's roots for a block.

    Raises:
        StoreError: this user may not write to the store, or the disk failed.
    """
    fd = open_roots_lock(store_path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def open_roots_lock(store_path: Path) -> int:
    """Return a descriptor, which the caller owns, for flock(2) on the lock of a store's roots.

    Raises:
        StoreError: this user may not write to the store, or the disk failed.
    """
    try:
        return os.open(store_path / _LOCK, _LOCK_FLAGS, 0o644)
    except OSError as exc:
        raise disk_error(exc, store_path) from exc


def read_listed(path: Path) -> RootText:
    """Return what the text in the file `path` lists; nothing if the file is gone.

    Raises:
        StoreError: a line breaks a rule (the text has its number), or the disk failed.
    """
    try:
        lines = path.read_bytes().decode("utf-8", "backslashreplace").splitlines()
    except FileNotFoundError:
        return RootText([], [])
    except OSError as exc:
        raise disk_error(exc, path) from exc
    paths: list[StorePath] = []
    blobs: list[Digest] = []
    for number, raw_line in enumerate(lines, 1):
        line = raw_line.strip()
        try:
            if line.startswith("#: ."):
                # A view names its further files so: `#: .NAME DIGEST SIZE`.
                blobs += [Digest.parse(word) for word in line.split()[2:3]]
            elif line and not line.startswith("#"):
                paths.append(StorePath.parse(line))
        except (StorePathError, DirectoryError) as exc:
            raise StoreError(f"{path}: line {number}: {exc}") from exc
    return RootText(paths, blobs)


class RootLists:
    """The lists of a store's roots, by name.

    Args:
        store_path: directory of the store.
    """

    def __init__(self, store_path: Path) -> None:
        self._store_path = store_path
        self._directory = store_path / ROOTS_DIRECTORY

    def names(self) -> list[str]:
        """Return the names of all lists, in order."""
        try:
            found = os.listdir(self._directory)  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return []
        return sorted(name for name in found if _NAME.fullmatch(name))

    def read(self, name: str) -> list[StorePath]:
        """Return the store paths of a list; none if there is no such list.

        Raises:
            ConfigError: no list may have that name.
            StoreError: the text breaks a rule, or the disk failed.
        """
        return read_listed(self._path(name)).paths

    def add(self, name: str, paths: Iterable[StorePath]) -> None:
        """Add store paths to a list, which is made if it is missing.

        The caller looks afterwards whether the store has the paths.

        Raises:
            ConfigError: no list may have that name.
            StoreError: the disk failed.
        """
        with self._editing():
            self._write(name, {*self.read(name), *paths})

    def remove(self, name: str, paths: Iterable[StorePath] | None = None) -> None:
        """Remove store paths from a list, or the whole list.

        Raises:
            ConfigError: no list may have that name.
            StoreError: there is no such list or path in it, or the disk failed.
        """
        with self._editing():
            if name not in self.names():
                raise StoreError(f"root {name}: there is none in {self._directory}")
            there = set(self.read(name))
            gone = there if paths is None else set(paths)
            for path in gone - there:
                raise StoreError(f"path {path.absolute()} is not in the root {name}")
            if there - gone:
                self._write(name, there - gone)
            else:
                self._path(name).unlink()

    @contextmanager
    def _editing(self) -> Iterator[None]:
        # One writer at a time, and the collector sees all of a change or nothing.
        try:
            self._directory.mkdir(exist_ok=True)
            fd = os.open(self._directory / _EDIT_LOCK, _LOCK_FLAGS, 0o644)
        except OSError as exc:
            raise disk_error(exc, self._directory) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with roots_locked(self._store_path, is_exclusive=False):
                yield
        except OSError as exc:
            raise disk_error(exc, self._directory) from exc
        finally:
            os.close(fd)

    def _write(self, name: str, paths: Iterable[StorePath]) -> None:
        path = self._path(name)
        new = path.with_name(f".{name}.new")
        try:
            with new.open("w") as file:
                file.write(_HEAD + "".join(sorted(f"{path.basename()}\n" for path in paths)))
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"root {name!r}: expected 1 to 128 letters, digits, dots, dashes, plus signs and "
                "underscores, of which the first is a letter or digit"
            )
        return self._directory / name
