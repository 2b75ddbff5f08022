"""What a person sees while something takes long: one line that is rewritten on a terminal."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final, TextIO

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
        """Show the totals so far and the file just done."""
        if self._stream is None:
            return
        elapsed_s = max(time.monotonic() - self._started_s, 1e-3)
        line = (
            f"{num_files} files, {num_bytes / _MEGABYTE:.1f} MB, "
            f"{num_bytes / _MEGABYTE / elapsed_s:.0f} MB/s  {path}"
        )
        columns = os.get_terminal_size(self._stream.fileno()).columns
        self._stream.write(_CLEAR_LINE + line[: columns - 1])
        self._stream.flush()

    def clear(self) -> None:
        """Remove the line, so that something else can be printed."""
        if self._stream is not None:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()


@contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """Show progress on stderr inside the block and leave nothing of it behind."""
    progress = ProgressLine(sys.stderr)
    try:
        yield progress
    finally:
        progress.clear()


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
