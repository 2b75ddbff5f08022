"""The root directory, the one that changes: what is answered of it."""

import os
import time
from base64 import b64encode
from errno import ENODATA, ERANGE
from pathlib import Path
from typing import Final, NamedTuple

from appliance.castore.names import NAME_MAX
from appliance.fuse_proto._fuse_wire import (
    Attr,
    EntryOut,
    GetxattrOut,
    Kstatfs,
    StatfsOut,
    pack_entry_out,
    pack_getxattr_out,
    pack_statfs_out,
)
from appliance.fuse_proto.encode import NO_ENTRY, pack_direntplus
from appliance.images.entries import attributes, pack_attributes
from appliance.images.layout import DIRECTORY_SIZE, MODES, Kind
from appliance.images.places import ROOT_NODEID

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


# --- STATFS: the figures of the file system that holds the store, asked at most once a second.

_VALID_S: Final = 1.0


class Statfs:
    """The reply to STATFS for the file system of `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reply = b""
        self._valid_until_s = 0.0

    def reply(self) -> bytes:
        """Return the packed reply.

        Raises:
            OSError: the file system could not be asked.
        """
        now_s = time.monotonic()
        if not self._reply or now_s >= self._valid_until_s:
            self._reply = self._ask()
            self._valid_until_s = now_s + _VALID_S
        return self._reply

    def _ask(self) -> bytes:
        stat = os.statvfs(self._path)
        return pack_statfs_out(
            StatfsOut(
                Kstatfs(
                    blocks=stat.f_blocks,
                    bfree=stat.f_bfree,
                    bavail=stat.f_bavail,
                    files=stat.f_files,
                    ffree=stat.f_ffree,
                    bsize=stat.f_bsize,
                    namelen=NAME_MAX,
                    frsize=stat.f_frsize,
                )
            )
        )


# --- Extended attributes: the castore digest of a file or directory, under two names.
#
# Two implementations of the store protocol show it, each under a name and in a notation of its own;
# here both do. The value is text without a NUL. The attributes are not listed.


class _Attribute(NamedTuple):
    name: bytes
    prefix: bytes


_OF_BLOB: Final = (
    _Attribute(b"user.snix.castore.blob.digest", b"blake3-"),
    _Attribute(b"user.tvix.castore.blob.digest", b"b3:"),
)
_OF_DIRECTORY: Final = (
    _Attribute(b"user.snix.castore.directory.digest", b"blake3-"),
    _Attribute(b"user.tvix.castore.directory.digest", b"b3:"),
)
_BY_KIND: Final[dict[int, tuple[_Attribute, ...]]] = {
    Kind.DIRECTORY: _OF_DIRECTORY,
    Kind.FILE: _OF_BLOB,
    Kind.EXECUTABLE: _OF_BLOB,
    Kind.SYMLINK: (),
}


def value_of(kind: int, digest: bytes, name: bytes) -> bytes:
    """Return the value of attribute `name`.

    Raises:
        OSError: ENODATA, there is no such attribute.
    """
    for attribute in _BY_KIND[kind]:
        if attribute.name == name:
            return attribute.prefix + b64encode(digest)
    raise OSError(ENODATA, "no such attribute")


def sized_reply(value: bytes, size: int) -> bytes:
    """Return the reply to GETXATTR and LISTXATTR: `value`, or its size when `size` is 0.

    Raises:
        OSError: ERANGE, the value is longer than `size`.
    """
    if size == 0:
        return pack_getxattr_out(GetxattrOut(len(value)))
    if len(value) > size:
        raise OSError(ERANGE, f"{len(value)} bytes do not fit {size}")
    return value
