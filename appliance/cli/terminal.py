"""The standard streams, and a progress line on the terminal."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import cache
from io import TextIOWrapper
from typing import Final, TextIO

from appliance.errors import ApplianceError

_CLEAR_LINE: Final = "\r\x1b[K"
_DEFAULT_COLUMNS: Final = 80
_DEFAULT_ROWS: Final = 24
_STDOUT_FILENO: Final = 1
_MEGABYTE: Final = 1_000_000
# How often progress is written where there is no terminal.
_PLAIN_INTERVAL_S: Final = 10.0
_SHORTEST_S: Final = 1e-3
# Of what is done up to here, no time can be estimated.
_FRACTION_MIN: Final = 0.01


class ProgressForm(StrEnum):
    """How progress is shown where there is no terminal."""

    PLAIN = "plain"
    JSON = "json"
    NONE = "none"
    """Not at all, on a terminal neither."""


class ProgressLine:
    """Totals, speed, time left and the current path, as far as they are known.

    On a terminal they are one line that is written over. Otherwise, every 10 seconds, they are a
    line of text or of JSON, so that a log of a long command shows where it is.
    """

    def __init__(self, stream: TextIO, form: ProgressForm = ProgressForm.PLAIN) -> None:
        self._stream: TextIO | None = None if form is ProgressForm.NONE else stream
        self._is_terminal = stream.isatty()
        self._is_json = form is ProgressForm.JSON
        self._started_s = self._written_s = time.monotonic()

    def update(
        self, *, num_files: int, num_bytes: int, path: str, fraction: float | None = None
    ) -> None:
        """Show the totals so far and the current file.

        Args:
            num_files: the number of files done.
            num_bytes: the number of bytes done.
            path: the current file.
            fraction: how much of the work is done, 0 to 1, if it is known.
        """
        if self._stream is None:
            return
        now_s = time.monotonic()
        if self._is_terminal and not self._is_json:
            line = _progress_text(num_files, num_bytes, path, fraction, now_s - self._started_s)
            self._show(line)
        elif now_s - self._written_s >= _PLAIN_INTERVAL_S:
            self._written_s = now_s
            render = _progress_json if self._is_json else _progress_text
            elapsed_s = now_s - self._started_s
            self._write(render(num_files, num_bytes, path, fraction, elapsed_s) + "\n")

    def clear(self) -> None:
        """Remove the line, so that something else can be printed in its place."""
        if self._is_terminal and not self._is_json:
            self._write(_CLEAR_LINE)

    def _show(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns or _DEFAULT_COLUMNS
        except OSError:  # the terminal is gone, and `_write` will fail
            columns = _DEFAULT_COLUMNS
        # A line that wraps could not be cleared. No character takes more columns than its encoding
        # has bytes, so cutting the line by bytes is enough.
        self._write(_CLEAR_LINE + line.encode()[: columns - 1].decode(errors="ignore"))

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal is gone; the command goes on
            self._stream = None


def _progress_text(
    num_files: int, num_bytes: int, path: str, fraction: float | None, elapsed_s: float
) -> str:
    speed = num_bytes / _MEGABYTE / max(elapsed_s, _SHORTEST_S)
    text = f"{num_files} files, {num_bytes / _MEGABYTE:.1f} MB, {speed:.0f} MB/s"
    left_s = _seconds_left(fraction, elapsed_s)
    if fraction is not None and left_s is not None:
        minutes, seconds = divmod(round(left_s), 60)
        text += f", {fraction:.0%}, {minutes}:{seconds:02} left"
    return f"{text}  {path}"


def _progress_json(
    num_files: int, num_bytes: int, path: str, fraction: float | None, elapsed_s: float
) -> str:
    import json

    left_s = _seconds_left(fraction, elapsed_s)
    event = {
        "event": "progress",
        "files": num_files,
        "bytes": num_bytes,
        "bytesPerSecond": round(num_bytes / max(elapsed_s, _SHORTEST_S)),
        "fraction": fraction,
        "secondsLeft": None if left_s is None else round(left_s),
        "path": path,
    }
    return json.dumps(event)


def _seconds_left(fraction: float | None, elapsed_s: float) -> float | None:
    """Return the time left at the average speed so far, or None if that says nothing yet."""
    if fraction is None or fraction < _FRACTION_MIN:
        return None
    return elapsed_s * (1 - fraction) / fraction


@contextmanager
def progress_line(form: ProgressForm = ProgressForm.PLAIN) -> Iterator[ProgressLine]:
    """Return a progress line on stderr; it is removed at the end of the block."""
    progress = ProgressLine(sys.stderr, form)
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
