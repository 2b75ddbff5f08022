"""OPEN and RELEASE where files may have backing files."""

import errno
import os
from collections.abc import Iterator

import pytest

from appliance.castore.digest import Digest
from appliance.fs.passthrough import PassthroughHandler
from appliance.fuse_proto._fuse_wire import (
    LseekIn,
    OpenFlag,
    OpenIn,
    ReleaseIn,
    unpack_lseek_out,
    unpack_open_out,
)
from appliance.fuse_proto.operations import NotReady, Request
from appliance.session.wants import BackingWanted
from appliance.store.schema import INLINE_MAX
from tests.fakes import fuse_client
from tests.fs.guest import File, Guest, basename, put
from tests.store.audit import blob_path

RESENT = 1 << 63
LARGE = b"l" * (INLINE_MAX + 1)
BLOCK = 4096
HOLE = INLINE_MAX
# Data, a hole, data, a hole.
SPARSE = (b"d" * BLOCK + bytes(HOLE)) * 2


class Rig:
    def __init__(self, guest: Guest) -> None:
        tree = {b"small": File(b"s" * INLINE_MAX), b"large": File(LARGE), b"sparse": File(SPARSE)}
        put(guest.store, "tree", tree)
        self.small = guest.walk(basename("tree"), b"small")
        self.large = guest.walk(basename("tree"), b"large")
        self.sparse = guest.walk(basename("tree"), b"sparse")
        self.top = guest.walk(basename("tree"))
        with blob_path(guest.store, Digest.of(SPARSE)).open("wb") as file:
            for offset in (0, BLOCK + HOLE):
                file.seek(offset)
                file.write(b"d" * BLOCK)
            file.truncate(len(SPARSE))
        self.released: list[int] = []
        self.handler = PassthroughHandler(
            guest.grants, guest.store, is_root_listable=True, released=self.released.append
        )

    def open(self, nodeid: int, unique: int = 5) -> tuple[int, int, int]:
        request = Request(14, unique, nodeid, 0, 0, 1, OpenIn(0, 0), ())
        with self.handler.batch():
            body = self.handler.open(request)
        assert isinstance(body, bytes)
        return unpack_open_out(body)

    def lseek(self, nodeid: int, offset: int, whence: int) -> int:
        """Return the offset found, or the errno."""
        request = Request(46, 9, nodeid, 0, 0, 1, LseekIn(0, offset, whence), ())
        try:
            with self.handler.batch():
                body = self.handler.lseek(request)
        except OSError as exc:
            return exc.errno or 0
        assert isinstance(body, bytes)
        return unpack_lseek_out(body).offset

    def release(self, fh: int, unique: int = 7) -> None:
        request = Request(18, unique, self.large, 0, 0, 1, ReleaseIn(fh, 0, 0, 0), ())
        assert self.handler.release(request) == b""


@pytest.fixture
def rig(guest: Guest) -> Iterator[Rig]:
    made = Rig(guest)
    yield made
    made.handler.close()


def test_an_inline_blob_is_opened_at_once_and_nothing_hears_of_its_end(rig: Rig) -> None:
    assert rig.open(rig.small) == (0, OpenFlag.KEEP_CACHE, 0)
    rig.release(0)
    assert rig.released == []


def test_each_open_of_a_file_waits_for_an_id_of_its_own(rig: Rig) -> None:
    wants = []
    for unique in (5, 6):
        with pytest.raises(NotReady) as caught:
            rig.open(rig.large, unique)
        want = caught.value.want
        assert want == BackingWanted(rig.large, unique, Digest.of(LARGE), len(LARGE))
        wants.append(want)
    rig.handler.grant(wants[0], 3)
    rig.handler.grant(wants[1], 0)
    assert rig.open(rig.large, 5) == (rig.large, OpenFlag.PASSTHROUGH, 3)
    assert rig.open(rig.large, 6) == (rig.large, OpenFlag.KEEP_CACHE, 0)
    with pytest.raises(NotReady):
        rig.open(rig.large, 5)  # a grant is for one open


def test_the_end_of_an_open_is_told_once(rig: Rig) -> None:
    rig.release(9)
    rig.release(9, RESENT | 8)
    assert rig.released == [9]


def test_an_open_that_nobody_waits_for_has_ended(rig: Rig) -> None:
    rig.handler.unanswered(memoryview(fuse_client.open_(rig.large)))
    rig.handler.unanswered(memoryview(fuse_client.getattr_(rig.large)))
    assert rig.released == [rig.large]


@pytest.mark.parametrize(
    ("offset", "whence", "found"),
    [
        (0, os.SEEK_DATA, 0),
        (0, os.SEEK_HOLE, BLOCK),
        (BLOCK, os.SEEK_DATA, BLOCK + HOLE),
        (BLOCK + 1, os.SEEK_HOLE, BLOCK + 1),
        (BLOCK + HOLE, os.SEEK_HOLE, 2 * BLOCK + HOLE),
        (2 * BLOCK + HOLE, os.SEEK_DATA, errno.ENXIO),
        (len(SPARSE), os.SEEK_HOLE, errno.ENXIO),
        (0, os.SEEK_CUR, errno.EINVAL),
    ],
)
def test_the_holes_of_a_file_are_found(rig: Rig, offset: int, whence: int, found: int) -> None:
    assert rig.lseek(rig.sparse, offset, whence) == found


@pytest.mark.parametrize(
    ("offset", "whence", "found"),
    [
        (7, os.SEEK_DATA, 7),
        (7, os.SEEK_HOLE, INLINE_MAX),
        (INLINE_MAX, os.SEEK_DATA, errno.ENXIO),
    ],
)
def test_an_inline_blob_has_no_holes(rig: Rig, offset: int, whence: int, found: int) -> None:
    assert rig.lseek(rig.small, offset, whence) == found


def test_a_directory_has_no_holes(rig: Rig) -> None:
    assert rig.lseek(rig.top, 0, os.SEEK_HOLE) == errno.EINVAL
