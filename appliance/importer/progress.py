"""Telling a person how far an import is."""

import time
from collections.abc import Callable
from typing import Final, Protocol

_INTERVAL_S: Final = 0.1


class Progress(Protocol):
    """What shows the progress."""

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Show the totals so far and the file just done; called ten times a second at most."""


class Reporter:
    """Counts, and calls `report` with files, bytes and path, now and then."""

    def __init__(self, report: Callable[[int, int, bytes], None]) -> None:
        self._report = report
        self._num_files = 0
        self._num_bytes = 0
        self._due_s = 0.0

    def file_done(self, size: int, path: bytes) -> None:
        """Count a file."""
        self._num_files += 1
        self._num_bytes += size
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._due_s = now_s + _INTERVAL_S
            self._report(self._num_files, self._num_bytes, path)
