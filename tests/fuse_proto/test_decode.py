import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import FuseDecodeError
from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import CODECS
from appliance.fuse_proto.decode import (
    PLANS,
    Plan,
    check_entry_name_untrusted,
    check_name_untrusted,
    decode_body_untrusted,
    decode_header_untrusted,
)
from appliance.fuse_proto.operations import Request
from tests.fakes import fuse_client

NAMES = (b"first", b"second\xff")
HEADER = _fuse_wire.IN_HEADER_SIZE


def arguments(plan: Plan) -> bytes:
    size = plan.op.compat if plan.is_cut else plan.size
    return bytes(range(1, size + 1))


def decode(plan: Plan, body: bytes, end: int) -> Request:
    data = memoryview(fuse_client.request(plan.op.number, 77, body, unique=5))
    return decode_body_untrusted(plan, decode_header_untrusted(data), data, end)


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: plan.op.name)
def test_body_is_decoded_whole_and_with_junk_behind_and_refused_when_cut(plan: Plan) -> None:
    sent = arguments(plan)
    names = NAMES[: plan.names]
    body = sent + fuse_client.names(*names)
    whole = decode(plan, body, HEADER + len(body))
    assert whole.nodeid == 77
    assert whole.unique == 5
    assert whole.names == names
    if plan.op.args:
        padded = sent.ljust(plan.size, b"\0")
        assert whole.args == CODECS[plan.op.args].unpack(padded, 0)
    else:
        assert whole.args is None
    assert decode(plan, body + b"junk\0junk", HEADER + len(body) + 9) == whole
    least = len(body) if plan.names else plan.op.compat or plan.size
    for cut in range(least):
        with pytest.raises(FuseDecodeError, match=plan.op.name):
            decode(plan, body, HEADER + cut)


@pytest.mark.parametrize("size", range(16, 64))
def test_fields_that_an_older_init_lacks_read_zero(size: int) -> None:
    body = _fuse_wire.pack_init_in(fuse_client.INIT_6_1)
    plan = PLANS[_fuse_wire.Opcode.INIT]
    decoded = decode(plan, body + b"\xff" * 64, HEADER + size)
    assert decoded.args[:4] == fuse_client.INIT_6_1[:4]
    assert decoded.args.flags2 == (0 if size == 16 else 0xB)


def test_setxattr_ends_its_structure_after_eight_bytes() -> None:
    data = memoryview(fuse_client.setxattr(3, b"user.a", b"value"))
    plan = PLANS[_fuse_wire.Opcode.SETXATTR]
    decoded = decode_body_untrusted(plan, decode_header_untrusted(data), data, len(data))
    assert decoded.names == (b"user.a",)
    assert decoded.args.size == 5


def test_short_header_is_refused() -> None:
    data = fuse_client.lookup(1, b"")
    for cut in range(HEADER):
        with pytest.raises(FuseDecodeError, match="header"):
            decode_header_untrusted(memoryview(data[:cut]))


@given(st.sampled_from(sorted(PLANS)), st.binary(max_size=200), st.integers(0, 200))
def test_any_body_decodes_or_is_refused(opcode: int, body: bytes, cut: int) -> None:
    plan = PLANS[opcode]
    try:
        decoded = decode(plan, body, HEADER + min(cut, len(body)))
    except FuseDecodeError:
        return
    assert len(decoded.names) == plan.names
    assert not any(b"\0" in name for name in decoded.names)


@pytest.mark.parametrize("name", [b"", b"a/b", b"//", b"a/", b"../a"])
def test_no_entry_has_such_a_name(name: bytes) -> None:
    with pytest.raises(FileNotFoundError):
        check_entry_name_untrusted(name)


@pytest.mark.parametrize("name", [b"a", b".", b"..", b"/", b"...", b".a", b"\xff" * 255])
def test_other_names_may_exist(name: bytes) -> None:
    check_entry_name_untrusted(name)


def test_long_names_are_refused() -> None:
    for check in (check_name_untrusted, check_entry_name_untrusted):
        with pytest.raises(OSError, match="name has 256 bytes"):
            check(b"/" * 256)
