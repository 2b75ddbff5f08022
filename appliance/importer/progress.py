"""Telling a person how far an import is."""

import time
from typing import Final, Protocol

from appliance.importer.walk import display

_INTERVAL_S: Final = 0.1


class Progress(Protocol):
    """What shows the progress."""

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Show the totals so far and the file just done; called ten times a second at most."""


class Reporter:
    """Counts, and calls a `Progress` now and then."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
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
            self._progress.update(
                num_files=self._num_files, num_bytes=self._num_bytes, path=display(path)
            )
