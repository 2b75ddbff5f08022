"""Replies to READDIR and READDIRPLUS, cut out of images (linux/fuse.h).

A cookie is the index of the record to continue with, so a listing can be resumed from any cookie,
however old. A reply has whole records only, from one piece of an image. An empty reply means the
end of the directory, so a buffer that is too small for the next record is EINVAL. Only the records
that are sent are copied, and in the copy places are replaced by nodeids.
"""

from bisect import bisect_right
from collections.abc import Iterable
from errno import EINVAL
from itertools import pairwise
from typing import Final

from appliance.fuse_proto._fuse_wire import ENTRY_OUT_SIZE
from appliance.images.places import PlacedNode, Places

# Positions in a record, in words of 8 bytes; the first word is the nodeid.
_GENERATION: Final = 1
_ATTR_INO: Final = 5
_DIRENT_INO: Final = ENTRY_OUT_SIZE // 8
# Index of the record of "..".
_DOTDOT: Final = 1


class Listing:
    """The records of one directory, from a cookie on.

    Args:
        places: the places of the session.
        directory: the node of the directory.
        parent_ino: st_ino of "..".
        generation: the generation in every entry of the session.
        cookie: the cookie from the guest, which may be any number.

    Raises:
        OSError: see `Places.image`.
    """

    def __init__(
        self,
        places: Places,
        directory: PlacedNode,
        *,
        parent_ino: int,
        generation: int,
        cookie: int,
    ) -> None:
        self._places = places
        self._directory = directory
        self._parent_ino = parent_ino
        self._generation = generation
        self._image = places.piece_at(directory, cookie)
        self._is_by_content = places.is_by_content
        # Index, in this piece, of the first record to send.
        self._first = cookie - self._image.first_cookie

    def plus(self, size: int) -> bytes | memoryview:
        """Return the READDIRPLUS reply of at most `size` bytes.

        Raises:
            OSError: EINVAL, the next record alone is larger than `size`.
        """
        offsets = self._image.offsets
        first = self._first
        if first >= len(offsets) - 1:
            return b""
        start = offsets[first]
        end = bisect_right(offsets, start + size, lo=first) - 1
        if end == first:
            raise _too_small(size)
        reply = memoryview(bytearray(self._image.view[start : offsets[end]]))
        words = reply.cast("Q")
        base, generation = self._directory.nodeid, self._generation
        # Budget: 0.4 us per record.
        for index, at in enumerate(offsets[first:end], first):
            word = (at - start) >> 3
            place = words[word]
            if place:
                words[word] = base + place
                words[word + _GENERATION] = generation
                words[word + _ATTR_INO] = words[word + _DIRENT_INO] = self._ino(index, place)
            else:
                words[word + _DIRENT_INO] = self._ino_of_link(index)
        return reply

    def plain(self, size: int) -> bytes | memoryview:
        """Return the READDIR reply of at most `size` bytes.

        Raises:
            OSError: EINVAL, the next record alone is larger than `size`.
        """
        view = self._image.view
        parts: list[memoryview] = []
        left = size
        for at, end in pairwise(self._image.offsets[self._first :]):
            left -= end - at - ENTRY_OUT_SIZE
            if left < 0:
                break
            parts.append(view[at + ENTRY_OUT_SIZE : end])
        if left < 0 and not parts:
            raise _too_small(size)
        reply = memoryview(bytearray().join(parts))
        words = reply.cast("Q")
        word = 0
        for index, part in enumerate(parts, self._first):
            place = words[word]
            words[word] = self._ino(index, place) if place else self._ino_of_link(index)
            word += len(part) >> 3
        return reply

    def _ino(self, index: int, place: int) -> int:
        if not self._is_by_content:
            return self._directory.nodeid + place
        return self._places.ino(self._directory, self._image, index - self._image.links)

    def _ino_of_link(self, index: int) -> int:
        return self._parent_ino if index == _DOTDOT else self._directory.ino


def plus_stream(records: Iterable[memoryview], size: int) -> bytes:
    """Return as many of the READDIRPLUS `records`, already with nodeids, as fit `size` bytes.

    Raises:
        OSError: EINVAL, the first record alone is larger than `size`.
    """
    return _joined(records, size, 0)


def plain_stream(records: Iterable[memoryview], size: int) -> bytes:
    """Return as many of `records`, each without its entry_out, as fit `size` bytes.

    Raises:
        OSError: EINVAL, the first record alone is larger than `size`.
    """
    return _joined(records, size, ENTRY_OUT_SIZE)


def _joined(records: Iterable[memoryview], size: int, skip: int) -> bytes:
    parts: list[memoryview] = []
    left = size
    for record in records:
        part = record[skip:]
        left -= len(part)
        if left < 0:
            if not parts:
                raise _too_small(size)
            break
        parts.append(part)
    return b"".join(parts)


def _too_small(size: int) -> OSError:
    return OSError(EINVAL, f"a buffer of {size} bytes has no room for a directory record")
