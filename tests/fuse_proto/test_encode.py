import pytest

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import Attr, EntryOut
from appliance.fuse_proto.encode import (
    FOREVER_S,
    NO_ENTRY,
    body_size,
    dirent_size,
    negative_entry,
    pack_dirent,
    pack_direntplus,
    pack_reply_header,
)
from appliance.fuse_proto.operations import FileSlice
from tests.fakes import fuse_client

DT_REG = 8
ENTRY = EntryOut(7, 0, 1, 2, 3, 4, Attr(*range(16)))


@pytest.mark.parametrize("size", range(1, 256))
def test_records_are_padded_to_eight_bytes(size: int) -> None:
    name = b"n" * size
    plain = pack_dirent(5, 6, DT_REG, name)
    plus = pack_direntplus(ENTRY, 5, 6, DT_REG, name)
    assert len(plain) == dirent_size(size)
    assert len(plain) % 8 == len(plus) % 8 == 0
    assert size + 24 <= len(plain) < size + 24 + 8
    assert plus == _fuse_wire.pack_entry_out(ENTRY) + plain


def test_listings_parse_back() -> None:
    names = [b".", b"..", b"a", b"seven77", b"eight888", b"x" * 255]
    records = [(number, number + 1, DT_REG, name) for number, name in enumerate(names)]
    plain = b"".join(pack_dirent(*record) for record in records)
    assert fuse_client.parse_dirents(plain) == records
    plus = b"".join(pack_direntplus(ENTRY, *record) for record in records)
    assert fuse_client.parse_direntplus(plus) == [(ENTRY, record) for record in records]


def test_negative_entry_is_nodeid_zero_with_a_time() -> None:
    entry = fuse_client.parse_entry(negative_entry(FOREVER_S))
    assert entry == NO_ENTRY._replace(entry_valid=FOREVER_S)
    assert entry.nodeid == 0


def test_errors_are_negative_on_the_wire() -> None:
    header = pack_reply_header(9, 30, 0)
    assert header == b"\x10\0\0\0\xe2\xff\xff\xff\x09\0\0\0\0\0\0\0"
    assert fuse_client.parse_reply(header) == (9, 30, b"")


def test_length_counts_header_and_body() -> None:
    body = b"12345"
    data = pack_reply_header(2**64 - 1, 0, body_size(body)) + body
    assert fuse_client.parse_reply(data) == (2**64 - 1, 0, body)


def test_size_of_a_file_slice_is_its_bytes() -> None:
    assert body_size(FileSlice(3, 100, 4096)) == 4096
    assert body_size(memoryview(b"abc")) == 3
