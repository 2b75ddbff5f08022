"""The standard streams, and a progress line on the terminal."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import TextIOWrapper
from typing import Final, TextIO

from appliance.errors import ApplianceError

_CLEAR_LINE: Final = "\r\x1b[K"
_DEFAULT_COLUMNS: Final = 80
_DEFAULT_ROWS: Final = 24
_STDOUT_FILENO: Final = 1
_MEGABYTE: Final = 1_000_000


class ProgressLine:
    """A line with totals and the current path; nothing is shown unless `stream` is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream if stream.isatty() else None
        self._started_s = time.monotonic()

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Show the totals so far and the current file."""
        if self._stream is None:
            return
        elapsed_s = max(time.monotonic() - self._started_s, 1e-3)
        line = (
            f"{num_files} files, {num_bytes / _MEGABYTE:.1f} MB, "
            f"{num_bytes / _MEGABYTE / elapsed_s:.0f} MB/s  {path}"
        )
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns or _DEFAULT_COLUMNS
        except OSError:  # the terminal is gone, and `_write` will fail
            columns = _DEFAULT_COLUMNS
        # A line that wraps could not be cleared. No character takes more columns than its encoding
        # has bytes, so cutting the line by bytes is enough.
        self._write(_CLEAR_LINE + line.encode()[: columns - 1].decode(errors="ignore"))

    def clear(self) -> None:
        """Remove the line, so that something else can be printed in its place."""
        self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal is gone; the command goes on
            self._stream = None


@contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """Return a progress line on stderr; it is removed at the end of the block."""
    progress = ProgressLine(sys.stderr)
    try:
        yield progress
    finally:
        progress.clear()


def open_missing_streams() -> None:
    """Open /dev/null for each standard stream that is closed.

    Otherwise a file opened later would get the number of the stream, and what is printed would go
    there. Standard output is opened for reading, so that printing to it is an error.
    """
    flags = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The kernel assigns the lowest free number, which is that of this stream.
            os.set_inheritable(os.open(os.devnull, flags[fd]), True)  # noqa: FBT003 - has no keyword
            setattr(sys, name, open(fd, "r" if fd == 0 else "w"))  # noqa: PTH123, SIM115 - stays open


def print_utf8() -> None:
    """Print UTF-8 to both standard streams from now on, whatever the locale says."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # flushing failed; the next write reports that
                stream.reconfigure(encoding="utf-8", errors=errors)


@contextmanager
def writing_output() -> Iterator[None]:
    """Translate errors of printing to standard output inside the block.

    Raises:
        BrokenPipeError: the reader has closed its end.
        ApplianceError: standard output cannot be written for another reason.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        drop_output()
        raise ApplianceError(f"standard output: {exc.strerror}") from exc


def drop_output() -> None:
    """Discard what has been printed but not written, and all further output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def terminal_columns() -> int:
    """Return the width for help texts: COLUMNS, or else the width of the terminal, or else 80."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(_STDOUT_FILENO).columns or _DEFAULT_COLUMNS
    except OSError:  # stdout is closed or not a terminal
        return _DEFAULT_COLUMNS


def terminal_rows() -> int:
    """Return the height of the terminal in lines, or 24 if standard output is none."""
    try:
        return os.get_terminal_size(_STDOUT_FILENO).lines or _DEFAULT_ROWS
    except OSError:
        return _DEFAULT_ROWS
