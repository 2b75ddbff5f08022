from errno import EIO, ENAMETOOLONG, ENOENT, ENOSYS, ENOTTY, ERANGE, EROFS

import pytest

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.fuse_proto.encode import Reply, body_size
from appliance.fuse_proto.opcodes import OPS, Answer
from appliance.fuse_proto.operations import Body, FileSlice, Operations, Request
from tests.fakes import fuse_client
from tests.fuse_proto.rig import CONTENT, ENTRY, HANDLED, VALUE, OneFile, Rig, with_len

FIXED = [(op.number, op.answer) for op in OPS if not isinstance(op.answer, Answer)]


@pytest.fixture
def operations() -> OneFile:
    return OneFile()


@pytest.fixture
def rig(operations: OneFile) -> Rig:
    return Rig(operations)


# --- Answers by opcode ---


def test_lookup_reaches_the_operation_decoded(rig: Rig, operations: OneFile) -> None:
    answer = rig.answer(fuse_client.lookup(1, b"file", unique=2**63 + 5))
    assert answer == (2**63 + 5, 0, ENTRY)
    assert operations.seen == [Request(Opcode.LOOKUP, 2**63 + 5, 1, 0, 0, 1, None, (b"file",))]


def test_absent_name_is_a_negative_entry(rig: Rig) -> None:
    entry = fuse_client.parse_entry(rig.answer(fuse_client.lookup(1, b"none")).body)
    assert (entry.nodeid, entry.entry_valid) == (0, 9)


@pytest.mark.parametrize("name", HANDLED)
def test_operation_without_a_method_is_enosys(name: str) -> None:
    rig = Rig(Operations())
    assert rig.answer(HANDLED[name]) == (99, ENOSYS, b"")


def test_every_handled_opcode_is_in_these_tests() -> None:
    assert set(HANDLED) == {op.name for op in OPS if op.answer is Answer.OPERATIONS}


@pytest.mark.parametrize(("opcode", "error"), FIXED)
def test_fixed_answers_need_no_body(opcode: int, error: int) -> None:
    rig = Rig(OneFile())
    assert rig.answer(fuse_client.request(opcode, 1, unique=3)) == (3, error, b"")
    # The transport has not copied all of the payload: `len` includes it, the view does not.
    data = with_len(fuse_client.request(opcode, 1, b"x" * 8152, unique=3), 1 << 20)
    reply = rig.handle(data, readable_len=1 << 20)
    assert reply == Reply(3, error, b"")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (fuse_client.setattr_(2), EROFS),
        (fuse_client.symlink(1, b"a", b"b"), EROFS),
        (fuse_client.mknod(1, b"a"), EROFS),
        (fuse_client.mkdir(1, b"a"), EROFS),
        (fuse_client.unlink(1, b"a"), EROFS),
        (fuse_client.rmdir(1, b"a"), EROFS),
        (fuse_client.rename(1, b"a", 1, b"b"), EROFS),
        (fuse_client.rename2(1, b"a", 1, b"b"), EROFS),
        (fuse_client.link(1, b"a", 2), EROFS),
        (fuse_client.create(1, b"a"), EROFS),
        (fuse_client.write(2, 0, b"data"), EROFS),
        (fuse_client.setxattr(2, b"user.a", b"v"), EROFS),
        (fuse_client.removexattr(2, b"user.a"), EROFS),
        (fuse_client.fallocate(2, 10), EROFS),
        (fuse_client.copy_file_range(2, 2, 10), EROFS),
        (fuse_client.flush(2), ENOSYS),
        (fuse_client.fsync(2), ENOSYS),
        (fuse_client.fsyncdir(1), ENOSYS),
        (fuse_client.syncfs(), ENOSYS),
        (fuse_client.ioctl(2, 0x5401), ENOTTY),
        (fuse_client.releasedir(1), 0),
    ],
)
def test_real_requests_of_a_writer_are_turned_away(rig: Rig, data: bytes, error: int) -> None:
    assert rig.answer(data).error == error


@pytest.mark.parametrize("opcode", [0, 7, 19, 54, 63, 64, 4096, 2**32 - 1])
def test_unknown_opcode_is_enosys_and_counted_in_slot_zero(rig: Rig, opcode: int) -> None:
    assert rig.answer(fuse_client.request(opcode, 1, b"?")).error == ENOSYS
    assert rig.counted() == {0: 1}


@pytest.mark.parametrize(
    "data",
    [
        fuse_client.forget(2),
        fuse_client.batch_forget([2, 3]),
        fuse_client.interrupt(7),
        fuse_client.request(Opcode.NOTIFY_REPLY, 2, bytes(40)),
    ],
)
@pytest.mark.parametrize("is_initialised", [True, False])
def test_requests_without_reply_get_none(data: bytes, *, is_initialised: bool) -> None:
    rig = Rig(OneFile(), is_initialised=is_initialised)
    assert rig.handle(data, writable_len=0) is None
    assert rig.handle(data) is None
    assert rig.handle(with_len(data, 1 << 30)) is None
    assert sum(rig.counted().values()) == 3


# --- Framing ---


@pytest.mark.parametrize("name", HANDLED)
def test_request_cut_at_any_byte_is_eio(name: str) -> None:
    rig = Rig(Operations())
    data = HANDLED[name]
    for cut in range(len(data)):
        reply = rig.handle(data[:cut])
        assert reply == Reply(99 if cut >= 16 else 0, EIO, b"")


@pytest.mark.parametrize("name", HANDLED)
def test_request_that_states_a_cut_length_is_eio(name: str) -> None:
    rig = Rig(Operations())
    data = HANDLED[name]
    for cut in range(len(data)):
        assert rig.handle(with_len(data, cut)) == Reply(99, EIO, b"")


@pytest.mark.parametrize("name", ["LOOKUP", "GETATTR", "READ", "GETXATTR"])
def test_junk_behind_a_request_changes_nothing(name: str) -> None:
    rig = Rig(OneFile())
    data = HANDLED[name]
    answer = rig.answer(data)
    assert answer.error == 0
    assert rig.answer(data + b"junk") == answer
    assert rig.answer(with_len(data + b"junk", len(data) + 4)) == answer


def test_request_without_room_for_a_header_ends_without_reply(operations: OneFile) -> None:
    rig = Rig(operations)
    for room in range(16):
        assert rig.handle(HANDLED["LOOKUP"], writable_len=room) is None
        assert rig.handle(b"short", writable_len=room) is None
    assert operations.seen == []
    assert rig.counted() == {0: 16, Opcode.LOOKUP: 16}


@pytest.mark.parametrize("name", [b"", b"//", b"a/b"])
def test_lookup_of_an_impossible_name_is_enoent(rig: Rig, operations: OneFile, name: bytes) -> None:
    assert rig.answer(fuse_client.lookup(1, name)).error == ENOENT
    assert operations.seen == []


def test_long_name_is_enametoolong(rig: Rig, operations: OneFile) -> None:
    assert rig.answer(fuse_client.lookup(1, b"n" * 255)).error == 0
    assert rig.answer(fuse_client.lookup(1, b"n" * 256)).error == ENAMETOOLONG
    assert rig.answer(fuse_client.getxattr(1, b"n" * 256, 10)).error == ENAMETOOLONG
    assert len(operations.seen) == 1


def test_name_beyond_the_copied_part_is_eio(rig: Rig) -> None:
    data = with_len(fuse_client.request(Opcode.LOOKUP, 1, b"n" * 8152), 10000)
    assert rig.handle(data, readable_len=10000) == Reply(1, EIO, b"")


# --- Sizes ---


@pytest.mark.parametrize("room", [1, 100, 4096])
def test_read_size_is_cut_to_the_room(rig: Rig, operations: OneFile, room: int) -> None:
    answer = rig.answer(fuse_client.read(2, 5, 8192), writable_len=16 + room)
    assert answer.body == CONTENT[5 : 5 + room]
    assert operations.seen[0].args.size == room
    assert operations.seen[0].args.offset == 5


@pytest.mark.parametrize("room", [0, 24, 152, 4095])
def test_listing_size_is_cut_to_the_room(rig: Rig, room: int) -> None:
    answer = rig.answer(fuse_client.readdirplus(1, 0, 4096), writable_len=16 + room)
    assert answer.body == bytes(room)


def test_attribute_sizes(rig: Rig) -> None:
    size = fuse_client.parse_xattr_size(rig.answer(fuse_client.getxattr(2, b"user.a", 0)).body)
    assert size == len(VALUE)
    assert rig.answer(fuse_client.getxattr(2, b"user.a", size)).body == VALUE
    assert rig.answer(fuse_client.getxattr(2, b"user.a", size - 1)).error == ERANGE
    request = fuse_client.getxattr(2, b"user.a", 100)
    assert rig.answer(request, writable_len=16 + size - 1).error == ERANGE


def test_reply_without_room_is_eio_never_cut(rig: Rig) -> None:
    for room in range(16, 16 + len(ENTRY)):
        assert rig.answer(HANDLED["LOOKUP"], writable_len=room) == (99, EIO, b"")
    assert rig.answer(HANDLED["LOOKUP"], writable_len=16 + len(ENTRY)).body == ENTRY


class Overlong(Operations):
    def __init__(self, body: Body) -> None:
        self._body = body

    def read(self, request: Request) -> Body:
        del request
        return self._body

    def readlink(self, request: Request) -> Body:
        return self.read(request)


@pytest.mark.parametrize("body", [bytes(101), memoryview(bytes(101)), FileSlice(0, 0, 101)])
def test_body_longer_than_asked_for_is_eio(body: Body) -> None:
    rig = Rig(Overlong(body))
    assert rig.answer(fuse_client.read(2, 0, 100)).error == EIO
    assert rig.answer(fuse_client.readlink(2), writable_len=16 + 100).error == EIO
    reply = rig.handle(fuse_client.read(2, 0, 101))
    assert reply == Reply(1, 0, body)


def test_file_slice_is_passed_on_as_it_is() -> None:
    piece = FileSlice(5, 4096, 100)
    reply = Rig(Overlong(piece)).handle(fuse_client.read(2, 0, 100))
    assert reply == Reply(1, 0, piece)
    assert body_size(piece) == 100
