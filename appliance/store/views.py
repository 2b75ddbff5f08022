"""Views: named sets of store paths, of which a session may see one and nothing else.

A view is a text file that a person can read, `views/NAME` in the directory of its store:

    # A view: one store path a line. It is changed by `appliance view`.
    #: .registration b3:AhtTU5zJ1HdGnXjc7WSRQO5Mu6IB1vCXNtxqnCYLcw8= 411
    #: .store-paths b3:0gmzbx1xWB1uEtvYW5hBHFG6HqoO/7nBSWHt8q4rJfg= 118
    5ndavkqr4ai2xn3pkdl1blgmnqmn4wlq-hello-2.12
    r8mm1bsjgvs2r4kf9yh5mp3dmv8hq7xn-glibc-2.40

Lines that are empty or begin with `#` are no paths. Of these, a line that begins with `#:` names a
file that the root of the view has besides its paths, with the digest and the size of its blob.

A file is replaced whole, by rename(2), so readers need no lock. A writer holds the lock of the
directory from reading a view until it has replaced it. Every path of a view is a root for garbage
collection, and so are the blobs of its files.
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
from appliance.store.root_lists import roots_locked

# The files that a view may have besides its paths.
REGISTRATION: Final = ".registration"
STORE_PATHS: Final = ".store-paths"

_DIRECTORY: Final = "views"
_LOCK: Final = ".lock"
_HEAD: Final = "# A view: one store path a line. It is changed by `appliance view`.\n"
_FILE_LINE: Final = re.compile(r"#: (\S+) (\S+) (0|[1-9][0-9]{0,18})")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", re.ASCII)
_NAME_RULE: Final = (
    "expected 1 to 128 letters, digits, dots, dashes, plus signs and underscores, of which the "
    "first is a letter or digit"
)


class ViewFile(NamedTuple):
    """A file in the root of a view: its name there, and the digest and size of its blob."""

    name: str
    digest: Digest
    size: int


class View(NamedTuple):
    """The content of a view.

    Args:
        paths: the store paths.
        files: the files besides them: none, or both of REGISTRATION and STORE_PATHS.
    """

    paths: frozenset[StorePath] = frozenset()
    files: tuple[ViewFile, ...] = ()

    def to_text(self) -> str:
        """Return the text that `parse` reads."""
        files = [f"#: {file.name} {file.digest.tvix()} {file.size}\n" for file in self.files]
        paths = sorted(f"{path.basename()}\n" for path in self.paths)
        return "".join([_HEAD, *files, *paths])

    @classmethod
    def parse(cls, text: str) -> "View":
        """Read the text of a view.

        Raises:
            StoreError: a line breaks a rule; the text has its number.
        """
        paths: set[StorePath] = set()
        files: list[ViewFile] = []
        for number, raw_line in enumerate(text.splitlines(), 1):
            line = raw_line.strip()
            try:
                if line.startswith("#:"):
                    files.append(_file_of(line))
                elif line and not line.startswith("#"):
                    paths.add(StorePath.parse(line))
            except (StorePathError, DirectoryError) as exc:
                raise StoreError(f"line {number}: {exc}") from exc
        return cls(frozenset(paths), tuple(files))


class Views:
    """The views of a store.

    Args:
        directory: the directory of the store, or the state directory where services are remote. It
            need not exist until a view is made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / _DIRECTORY

    def names(self) -> list[str]:
        """Return the names of all views, in order."""
        try:
            found = os.listdir(self.directory)  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return []
        return sorted(name for name in found if _NAME.fullmatch(name))

    def read(self, name: str) -> View:
        """Return a view.

        Raises:
            ConfigError: no view may have that name.
            StoreError: there is no such view, or its text breaks a rule.
        """
        try:
            text = self.path(name).read_bytes()
        except FileNotFoundError as exc:
            raise StoreError(f"view {name}: there is none in {self.directory}") from exc
        except OSError as exc:
            raise disk_error(exc, self.path(name)) from exc
        try:
            return View.parse(text.decode())
        except (StoreError, UnicodeDecodeError) as exc:
            raise StoreError(f"view {name}: {self.path(name)}: {exc}") from exc

    def write(self, name: str, view: View) -> None:
        """Make the view, or replace it as a whole; call it with the lock held.

        Raises:
            ConfigError: no view may have that name.
            StoreError: the disk failed.
        """
        path = self.path(name)
        new = path.with_name(f".{name}.new")
        try:
            with new.open("wb") as file:
                file.write(view.to_text().encode())
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
            self._sync()
        except OSError as exc:
            with suppress(OSError):
                new.unlink()
            raise disk_error(exc, path) from exc

    def delete(self, name: str) -> None:
        """Delete a view; call it with the lock held.

        Raises:
            ConfigError: no view may have that name.
            StoreError: there is no such view, or the disk failed.
        """
        try:
            self.path(name).unlink()
            self._sync()
        except FileNotFoundError as exc:
            raise StoreError(f"view {name}: there is none in {self.directory}") from exc
        except OSError as exc:
            raise disk_error(exc, self.path(name)) from exc

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other writers of views out, for a block; the directory is made if missing.

        Raises:
            StoreError: this user may not write there, or the disk failed.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise disk_error(exc, self.directory) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # The paths that are found for a view stay until it has been written.
            with roots_locked(self.directory.parent, is_exclusive=False):
                yield
        finally:
            os.close(fd)

    def path(self, name: str) -> Path:
        """Return where the text of a view is.

        Raises:
            ConfigError: no view may have that name.
        """
        return self.directory / check_view_name(name)

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_view_name(name: str) -> str:
    """Return `name` if a view may have it.

    Raises:
        ConfigError: no view may have it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"view {name!r}: {_NAME_RULE}")
    return name


def names_of(paths: Iterable[StorePath]) -> set[bytes]:
    """Return the names that the paths have in the root."""
    return {path.basename().encode() for path in paths}


def _file_of(line: str) -> ViewFile:
    match = _FILE_LINE.fullmatch(line)
    if not match or match[1] not in {REGISTRATION, STORE_PATHS}:
        raise DirectoryError(
            f"{line!r}: expected `#: NAME DIGEST SIZE`, with {REGISTRATION} or {STORE_PATHS} for "
            "the name"
        )
    return ViewFile(match[1], Digest.parse(match[2]), int(match[3]))
