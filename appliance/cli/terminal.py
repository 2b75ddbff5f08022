"""The standard streams, and one line that is rewritten on a terminal while something takes long."""

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
_STDOUT_FILENO: Final = 1
_MEGABYTE: Final = 1_000_000


class ProgressLine:
    """Totals and the current path on one line of a terminal; nothing where there is none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream if stream.isatty() else None
        self._started_s = time.monotonic()

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Show the totals so far and the file in hand."""
        if self._stream is None:
            return
        elapsed_s = max(time.monotonic() - self._started_s, 1e-3)
        line = (
            f"{num_files} files, {num_bytes / _MEGABYTE:.1f} MB, "
            f"{num_bytes / _MEGABYTE / elapsed_s:.0f} MB/s  {path}"
        )
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns or _DEFAULT_COLUMNS
        except OSError:  # hung up, as `_write` will find
            columns = _DEFAULT_COLUMNS
        # No character is wider than its encoding is long; a line that wraps would stay.
        self._write(_CLEAR_LINE + line.encode()[: columns - 1].decode(errors="ignore"))

    def clear(self) -> None:
        """Remove the line, so that something else can be printed."""
        self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # nobody is there any more; the import goes on
            self._stream = None


@contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """Show progress on stderr inside the block and leave nothing of it behind."""
    progress = ProgressLine(sys.stderr)
    try:
        yield progress
    finally:
        progress.clear()


def open_missing_streams() -> None:
    """Open /dev/null for each standard stream that is closed; writing to such a stdout fails.

    Else a file opened later has its number, and what is printed goes there.
    """
    flags = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, flags[fd]), True)  # noqa: FBT003 - its only form
            setattr(sys, name, open(fd, "r" if fd == 0 else "w"))  # noqa: PTH123, SIM115 - for good


def print_utf8() -> None:
    """Have what is printed from now on be UTF-8, as names are, whatever the locale has."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # it leads elsewhere by now, or nowhere: writing will say so
                stream.reconfigure(encoding="utf-8", errors=errors)


@contextmanager
def writing_output() -> Iterator[None]:
    """Print inside the block.

    Raises:
        BrokenPipeError: the reader is gone.
        ApplianceError: it cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        drop_output()
        raise ApplianceError(f"standard output: {exc.strerror}") from exc


def drop_output() -> None:
    """Forget what was printed and not written; nothing more can be."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def terminal_columns() -> int:
    """Return how wide what is printed may be: COLUMNS, or the terminal's, or 80."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(_STDOUT_FILENO).columns or _DEFAULT_COLUMNS
    except OSError:  # it is closed, or no terminal
        return _DEFAULT_COLUMNS
