from appliance.fuse_proto._fuse_wire import Opcode
from appliance.fuse_proto.format import format_request_untrusted
from tests.fakes import fuse_client


def shown(data: bytes) -> str:
    return format_request_untrusted(memoryview(data))


def test_request_line_has_header_arguments_and_names() -> None:
    assert shown(fuse_client.lookup(1, b"bin", unique=8)) == (
        "LOOKUP unique=8 nodeid=1 uid=0 gid=0 pid=1 b'bin'"
    )
    assert "ReadIn(fh=0, offset=10, size=20," in shown(fuse_client.read(5, 10, 20))
    assert shown(fuse_client.rename(1, b"a", 7, b"b")).endswith("RenameIn(newdir=7) b'a' b'b'")


def test_guests_bytes_are_escaped_and_cut() -> None:
    line = shown(fuse_client.lookup(1, b"\x1b[2J\n" + b"x" * 1000))
    assert line.isprintable()
    assert r"\x1b[2J\n" in line
    assert line.endswith("(1005 bytes)")


def test_broken_requests_have_a_line_too() -> None:
    assert "request has 3 bytes, a header has 40: b'abc'" in shown(b"abc")
    assert "LOOKUP: a name does not end with NUL" in shown(
        fuse_client.request(Opcode.LOOKUP, 1, b"bin")
    )
    assert shown(fuse_client.request(54, 1, b"?!")).startswith("opcode 54 unique=1 nodeid=1")
    data = fuse_client.request(Opcode.STATFS, 1)
    assert "len=40 of 44" in shown(data + b"junk")
