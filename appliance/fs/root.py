"""The root directory, the one that changes: what is answered of it."""

from typing import Final

from appliance.fuse_proto._wire import Attr, EntryOut, pack_entry_out
from appliance.fuse_proto.encode import NO_ENTRY, pack_direntplus
from appliance.images.layout import DIRECTORY_SIZE, MODES, Kind
from appliance.images.places import ROOT_NODEID
from appliance.images.records import attributes, pack_attributes

ATTR_VALID_S: Final = 1

_NS_PER_S: Final = 1_000_000_000
_TYPE: Final = MODES[Kind.DIRECTORY] >> 12

# The READDIRPLUS records of "." and "..".
DOTS: Final = tuple(
    memoryview(pack_direntplus(NO_ENTRY, ROOT_NODEID, off, _TYPE, name))
    for off, name in enumerate((b".", b".."), 1)
)


def root_attributes(generation: int) -> bytes:
    """Return the reply to GETATTR of the root; its mtime tells a guest that paths were added.

    Args:
        generation: of the store; a later one gives a later mtime.
    """
    return pack_attributes(_attributes(generation), ATTR_VALID_S)


def root_entry(generation: int) -> bytes:
    """Return the reply to LOOKUP of "." in the root, or of ".." in the root of a store path."""
    # Linux wants the generation of the root to be 0.
    entry = EntryOut(ROOT_NODEID, 0, ATTR_VALID_S, ATTR_VALID_S, 0, 0, _attributes(generation))
    return pack_entry_out(entry)


def _attributes(generation: int) -> Attr:
    seconds, nanoseconds = divmod(generation, _NS_PER_S)
    return attributes(
        MODES[Kind.DIRECTORY],
        ino=ROOT_NODEID,
        size=DIRECTORY_SIZE,
        mtime=1 + seconds,
        mtimensec=nanoseconds,
    )
