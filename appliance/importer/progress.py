"""Telling a person how far an import is."""

from typing import Protocol


class Progress(Protocol):
    """What shows the progress."""

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Show the totals so far and the file in hand; called ten times a second at most."""
