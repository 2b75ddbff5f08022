"""Walking a tree in the order of its NAR, without recursion and without following symlinks."""

from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final, TypeAlias

from appliance.importer.beneath import FILE, SYMLINK
from appliance.importer.listing import list_directory, list_entry
from appliance.importer.root import Identity, OpenRoot


class Step(IntEnum):
    """What the walk has come to."""

    FILE = 0
    SYMLINK = 1
    DIRECTORY = 2
    # The directory's entries are all done.
    END_DIRECTORY = 3


# One step of the walk: its kind, the name, and a detail. That is the target of a symlink; the path
# of a directory, relative to the root; or of a file, the path of the directory that it is in.
Event: TypeAlias = tuple[Step, bytes, bytes]

NOTHING: Final[Mapping[Identity, str]] = MappingProxyType({})

_END: Final[Event] = (Step.END_DIRECTORY, b"", b"")


def walk(root: OpenRoot, excluded: Mapping[Identity, str] = NOTHING) -> Iterator[Event]:
    """Yield the steps of a tree; the root itself comes with an empty name.

    Args:
        root: open until the end of the walk.
        excluded: directories that the walk must not come to, and why.

    Raises:
        ImportTreeError: something is neither file, directory nor symlink, is excluded, or cannot be
            read.
    """
    if root.entry:
        _, _, rest = list_entry(root).partition(b"\0")
        yield (Step.FILE, b"", b"") if rest[0] == FILE else (Step.SYMLINK, b"", rest[1:])
        return
    yield (Step.DIRECTORY, b"", b"")
    stack = [(b"", iter(list_directory(root, b"", excluded)))]
    while stack:
        path, entries = stack[-1]
        for entry in entries:
            name, _, rest = entry.partition(b"\0")
            kind = rest[0]
            if kind == FILE:
                yield (Step.FILE, name, path)
            elif kind == SYMLINK:
                yield (Step.SYMLINK, name, rest[1:])
            else:
                child = b"%b/%b" % (path, name) if path else name
                yield (Step.DIRECTORY, name, child)
                stack.append((child, iter(list_directory(root, child, excluded))))
                break
        else:
            yield _END
            stack.pop()
