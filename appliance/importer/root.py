"""What is imported, by its name."""

from typing import NamedTuple


class Root(NamedTuple):
    """A path to import, and the name that its store path gets."""

    path: bytes
    name: str
