"""Profiles: what a session read first, in that order, so that it can be fetched ahead next time.

A profile is a text that a person can read, `profiles/NAME` in the directory of its store (in the
state directory where services are remote). docs/profiles.md has its format:

    # appliance profile 1
    path 0 5ndavkqr4ai2xn3pkdl1blgmnqmn4wlq-hello-2.12
    directory 12 b3:AhtTU5zJ1HdGnXjc7WSRQO5Mu6IB1vCXNtxqnCYLcw8=
    blob 14 b3:0gmzbx1xWB1uEtvYW5hBHFG6HqoO/7nBSWHt8q4rJfg= 4711
    blob 20 b3:hr3mC3ixnDeA5TjTfNzjIFYSwaTdbMEf3sBPkYO7pNY= 104857600 262144+524288

The number behind the kind is when it was read, in milliseconds since the first session began. A
blob has its size, and may have a range, which begins at an offset and has a length.

A file is replaced whole, by rename(2). A recording that is under way is `.NAME.recording` beside it
(see `recording`). If nobody writes it any more, because whoever did was killed, it counts as the
profile, as far as its lines are whole.

A profile names content and grants nothing: whoever is served by it sees what its session may see.
It keeps nothing from garbage collection either.
"""

import fcntl
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from appliance.bounds import RECORDED_MAX
from appliance.castore.digest import Digest
from appliance.errors import ApplianceError, ConfigError, StoreError, disk_error
from appliance.nix.store_path import StorePath

_DIRECTORY: Final = "profiles"
HEAD: Final = "# appliance profile 1\n"
_HEAD_START: Final = "# appliance profile "
# The name of a store path is one, too.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+?=-]{0,219}", re.ASCII)
_NAME_RULE: Final = (
    "expected 1 to 220 letters, digits and .-_+?=, of which the first is a letter or digit"
)
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_RANGE: Final = re.compile(r"(0|[1-9][0-9]{0,18})\+([1-9][0-9]{0,18})")
# Eleven days.
AT_MS_MAX: Final = 10**9
_SIZE_MAX: Final = 2**63 - 1
_TEXT_MAX: Final = 16 << 20


class ProfiledPath(NamedTuple):
    """A store path that was looked up by its name in the root, `at_ms` after the beginning."""

    at_ms: int
    name: str

    def to_line(self) -> str:
        """Return the line for it."""
        return f"path {self.at_ms} {self.name}\n"


class ProfiledDirectory(NamedTuple):
    """A Directory that was read, `at_ms` after the beginning."""

    at_ms: int
    digest: Digest

    def to_line(self) -> str:
        """Return the line for it."""
        return f"directory {self.at_ms} {self.digest.tvix()}\n"


class ProfiledBlob(NamedTuple):
    """A range of a blob that was read, `at_ms` after the beginning.

    Attributes:
        size: of the whole blob, as its directory states it.
        start, end: the range, in bytes.
    """

    at_ms: int
    digest: Digest
    size: int
    start: int
    end: int

    def to_line(self) -> str:
        """Return the line for it."""
        line = f"blob {self.at_ms} {self.digest.tvix()} {self.size}"
        is_whole = (self.start, self.end) == (0, self.size)
        return f"{line}\n" if is_whole else f"{line} {self.start}+{self.end - self.start}\n"


Read = ProfiledPath | ProfiledDirectory | ProfiledBlob


class Profile(NamedTuple):
    """What was read, in the order of the times."""

    reads: tuple[Read, ...]

    def to_text(self) -> str:
        """Return the text that `parse` reads."""
        return "".join([HEAD, *(read.to_line() for read in self.reads)])

    @property
    def num_bytes(self) -> int:
        """The bytes of content in all."""
        return sum(read.end - read.start for read in self.reads if isinstance(read, ProfiledBlob))

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """Read the text of a profile; lines need not be in order.

        Raises:
            StoreError: a line breaks a rule; the text has its number.
        """
        if not text.startswith(HEAD):
            line = text.partition("\n")[0][:60]
            if line.startswith(_HEAD_START):
                raise StoreError(f"line 1: {line!r}: this release reads version 1 of profiles")
            raise StoreError(f"line 1: {line!r}: expected {HEAD.strip()!r}")
        if not text.endswith("\n"):
            raise StoreError("the last line has no end; the file is cut off")
        reads: list[Read] = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line or line.startswith("#"):
                continue
            if len(reads) == RECORDED_MAX:
                raise StoreError(f"line {number}: a profile has {RECORDED_MAX} reads at most")
            try:
                reads.append(_read_of(line.split(" ")))
            except ApplianceError as exc:
                raise StoreError(f"line {number}: {exc}") from exc
        return cls(tuple(sorted(reads, key=lambda read: read.at_ms)))


class Profiles:
    """The profiles of a store.

    Args:
        directory: the directory of the store, or the state directory where services are remote. It
            need not exist until a profile is made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / _DIRECTORY

    def names(self) -> list[str]:
        """Return the names of all profiles, in order."""
        try:
            found = os.listdir(self.directory)  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return []
        left = [name[1:].removesuffix(_RECORDING) for name in found if name.endswith(_RECORDING)]
        names = {name for name in [*found, *left] if _NAME.fullmatch(name)}
        return sorted(name for name in names if self.seen(name) is not None)

    def seen(self, name: str) -> tuple[int, int, int] | None:
        """Return what changes whenever the profile does, or None if there is none."""
        path = self.path(name)
        for candidate in (self.recording_path(name), path):
            with suppress(OSError):
                status = candidate.stat()
                if candidate == path or (status.st_size > len(HEAD) and _is_left(candidate)):
                    return status.st_ino, status.st_mtime_ns, status.st_size
        return None

    def read(self, name: str) -> Profile:
        """Return a profile.

        Raises:
            ConfigError: no profile may have that name.
            StoreError: there is no such profile, or its text breaks a rule.
        """
        path, left = self.path(name), self.recording_path(name)
        try:
            if _is_left(left):
                return whole_lines(left)[0]
            return parse_file(path)
        except FileNotFoundError as exc:
            raise StoreError(f"profile {name}: there is none in {self.directory}") from exc
        except OSError as exc:
            raise disk_error(exc, path) from exc
        except StoreError as exc:
            raise StoreError(f"profile {name}: {path}: {exc}") from exc

    def write(self, name: str, profile: Profile) -> None:
        """Make the profile, or replace it as a whole, durably.

        Raises:
            ConfigError: no profile may have that name.
            StoreError: the disk failed; the profile is as it was before.
        """
        path = self.path(name)
        new = path.with_name(f".{name}.{os.getpid()}.new")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with new.open("w") as file:
                file.write(profile.to_text())
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
            self._sync()
        except OSError as exc:
            with suppress(OSError):
                new.unlink()
            raise disk_error(exc, path) from exc

    def delete(self, name: str) -> None:
        """Delete a profile, and what is left of a recording of it.

        Raises:
            ConfigError: no profile may have that name.
            StoreError: there is no such profile, or the disk failed.
        """
        if self.seen(name) is None:
            raise StoreError(f"profile {name}: there is none in {self.directory}")
        try:
            if _is_left(self.recording_path(name)):
                self.recording_path(name).unlink()
            self.path(name).unlink(missing_ok=True)
            self._sync()
        except OSError as exc:
            raise disk_error(exc, self.path(name)) from exc

    def path(self, name: str) -> Path:
        """Return where the text of a profile is.

        Raises:
            ConfigError: no profile may have that name.
        """
        return self.directory / check_profile_name(name)

    def recording_path(self, name: str) -> Path:
        """Return where a recording of it is while it is under way; see `path`."""
        return self.directory / f".{check_profile_name(name)}{_RECORDING}"

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_RECORDING: Final = ".recording"


def check_profile_name(name: str) -> str:
    """Return `name` if a profile may have it.

    Raises:
        ConfigError: no profile may have it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"profile {name!r}: {_NAME_RULE}")
    return name


def parse_file(path: Path) -> Profile:
    """Return the profile in a file, checked whole.

    Raises:
        OSError: it cannot be read.
        StoreError: it breaks a rule.
    """
    return Profile.parse(_text_of(path))


def whole_lines(path: Path) -> tuple[Profile, int]:
    """Return what a recording has that may be cut off anywhere, and the bytes of its whole lines.

    See `parse_file` for the errors.
    """
    text = _text_of(path)
    length = text.rfind("\n") + 1
    return Profile.parse(text[:length]) if length else Profile(()), length


def _text_of(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_TEXT_MAX + 1)
    if len(data) > _TEXT_MAX:
        raise StoreError(f"a profile has {_TEXT_MAX} bytes at most")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as exc:
        raise StoreError(f"byte {exc.start} is not ASCII") from exc


def _is_left(path: Path) -> bool:
    """Return whether there is a recording that nobody writes any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _read_of(words: list[str]) -> Read:
    match words:
        case ["path", at, name]:
            StorePath.parse(name)
            return ProfiledPath(_number(at, AT_MS_MAX), name)
        case ["directory", at, digest]:
            return ProfiledDirectory(_number(at, AT_MS_MAX), Digest.parse(digest))
        case ["blob", at, digest, size_word, *range_words] if len(range_words) <= 1:
            size = _number(size_word, _SIZE_MAX)
            start, end = _range_of(range_words, size)
            return ProfiledBlob(_number(at, AT_MS_MAX), Digest.parse(digest), size, start, end)
        case _:
            raise StoreError(
                f"{' '.join(words)[:100]!r}: expected `path MS NAME`, `directory MS DIGEST` or "
                "`blob MS DIGEST SIZE [OFFSET+LENGTH]`"
            )


def _number(word: str, maximum: int) -> int:
    if not _NUMBER.fullmatch(word) or int(word) > maximum:
        raise StoreError(f"{word[:40]!r}: expected a number from 0 to {maximum}")
    return int(word)


def _range_of(words: Iterable[str], size: int) -> tuple[int, int]:
    for word in words:
        match = _RANGE.fullmatch(word)
        if not match or int(match[1]) + int(match[2]) > size:
            raise StoreError(f"{word[:40]!r}: expected OFFSET+LENGTH within {size} bytes")
        return int(match[1]), int(match[1]) + int(match[2])
    return 0, size
