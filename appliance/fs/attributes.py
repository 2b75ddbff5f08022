"""Attributes that no image has: those of the root, of the file system, and extended attributes.

The root is the only directory that changes, since paths are added to the store. Its mtime is the
generation of the store, so that a guest that may list it notices within a second. To a guest that
may not, the root never changes, and its attributes do not expire. STATFS reports the file system
that the store is on, which is asked at most once a second.

The extended attributes of a file or directory are its castore digest, under two names. Two
implementations of the store protocol show the digest, each under a name and in a notation of its
own, and here both are served. The value is text, without a NUL at its end. The attributes are not
listed (see `Handler.listxattr`).
"""

import os
import time
from base64 import b64encode
from collections.abc import Callable
from errno import ENODATA, ERANGE
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
from appliance.fuse_proto.encode import FOREVER_S, NO_ENTRY, pack_direntplus
from appliance.images.entries import attributes, pack_attributes
from appliance.images.layout import DIRECTORY_SIZE, MODES, Kind
from appliance.images.places import ROOT_NODEID

# How long a guest that may list the root may cache its attributes.
_LISTABLE_VALID_S: Final = 1

_STATFS_VALID_S: Final = 1.0
_NS_PER_S: Final = 1_000_000_000
_TYPE: Final = MODES[Kind.DIRECTORY] >> 12

# The READDIRPLUS records of "." and ".." in the root.
DOTS: Final = tuple(
    memoryview(pack_direntplus(NO_ENTRY, ROOT_NODEID, off, _TYPE, name))
    for off, name in enumerate((b".", b".."), 1)
)


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


# --- The root ---


def root_attributes(generation: int, *, is_listable: bool) -> bytes:
    """Return the reply to GETATTR of the root.

    Args:
        generation: generation of the store; a later one yields a later mtime.
        is_listable: whether a guest can find out by a listing what is new in the root.
    """
    return pack_attributes(_attributes(generation), _valid_s(is_listable=is_listable))


def root_entry(generation: int, *, is_listable: bool) -> bytes:
    """Return the reply to LOOKUP of "." in the root, or of ".." in the root of a store path."""
    valid_s = _valid_s(is_listable=is_listable)
    # Linux requires generation 0 for the root's inode.
    return pack_entry_out(EntryOut(ROOT_NODEID, 0, valid_s, valid_s, 0, 0, _attributes(generation)))


def _valid_s(*, is_listable: bool) -> int:
    # Linux checks the root's mode on the way to each absolute path, and asks for attributes that
    # have expired (linux fs/fuse/dir.c: fuse_permission).
    return _LISTABLE_VALID_S if is_listable else FOREVER_S


def _attributes(generation: int) -> Attr:
    seconds, nanoseconds = divmod(generation, _NS_PER_S)
    return attributes(
        MODES[Kind.DIRECTORY],
        ino=ROOT_NODEID,
        size=DIRECTORY_SIZE,
        mtime=1 + seconds,
        mtimensec=nanoseconds,
    )


# --- The file system ---


class Statfs:
    """The reply to STATFS for a file system whose figures `figures` returns.

    It may raise an OSError, and must need no path: a worker cannot search the store's directory.
    """

    def __init__(self, figures: Callable[[], os.statvfs_result]) -> None:
        self._figures = figures
        self._reply = b""
        self._valid_until_s = 0.0

    def reply(self) -> bytes:
        """Return the packed reply, which may be a second old.

        Raises:
            OSError: the figures are not available.
        """
        now_s = time.monotonic()
        if not self._reply or now_s >= self._valid_until_s:
            self._reply = self._ask()
            self._valid_until_s = now_s + _STATFS_VALID_S
        return self._reply

    def _ask(self) -> bytes:
        stat = self._figures()
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


# --- Extended attributes ---


def value_of(kind: int, digest: bytes, name: bytes) -> bytes:
    """Return the value of the attribute `name` of a node with this kind and digest.

    Raises:
        OSError: ENODATA, there is no such attribute.
    """
    for attribute in _BY_KIND[kind]:
        if attribute.name == name:
            return attribute.prefix + b64encode(digest)
    raise OSError(ENODATA, "no such attribute")


def sized_reply(value: bytes, size: int) -> bytes:
    """Return the reply to GETXATTR or LISTXATTR: `value`, or its size if `size` is 0.

    Args:
        value: the value of the attribute, or the list of names.
        size: the bytes that the guest has room for.

    Raises:
        OSError: ERANGE, `value` is longer than `size`.
    """
    if size == 0:
        return pack_getxattr_out(GetxattrOut(len(value)))
    if len(value) > size:
        raise OSError(ERANGE, f"attribute value has {len(value)} bytes, room for {size}")
    return value
