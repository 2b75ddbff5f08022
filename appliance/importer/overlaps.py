"""Which of the paths to import are the same, or lie in one another."""

import os
from collections.abc import Iterator, Sequence

from appliance.importer.root import Root


class Overlaps:
    """The paths of one import.

    They are told apart without the symlinks on the way to them; a path that is one stays one.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        # One path is like no other, and need not be looked at.
        resolve = _resolved if len(roots) > 1 else bytes
        self._paths = [resolve(root.path) for root in roots]
        self._given = {path: root.path for path, root in zip(self._paths, roots, strict=True)}
        self._outermost: dict[bytes, bytes] = {}
        self._parts: dict[bytes, set[bytes]] = {path: set() for path in self._given}
        for path in self._given:
            outermost = next((above for above in _downwards(path) if above in self._given), path)
            self._outermost[path] = outermost
            if path != outermost:
                self._parts[outermost].add(path.removeprefix(outermost).lstrip(b"/"))

    def path(self, index: int) -> bytes:
        """Return what tells the root of this number from others."""
        return self._paths[index]

    def given(self, path: bytes) -> bytes:
        """Return `path` as the user calls it."""
        return self._given[path]

    def outermost(self, path: bytes) -> bytes:
        """Return `path`, or of all paths that it lies in the one that lies in none."""
        return self._outermost[path]

    def parts(self, path: bytes) -> set[bytes]:
        """Return, relative to the outermost `path`, the paths that lie in it."""
        return self._parts[path]


def _resolved(path: bytes) -> bytes:
    parent, _, name = path.rpartition(b"/")
    if not parent:
        parent = b"/" if path.startswith(b"/") else b"."
    return os.path.realpath(parent).rstrip(b"/") + b"/" + name


def _downwards(path: bytes) -> Iterator[bytes]:
    """Yield the directories that `path` lies in, outermost first."""
    end = path.find(b"/")
    while end >= 0:
        yield path[:end] or b"/"
        end = path.find(b"/", end + 1)
