"""Requests from bytes. Nothing here is trusted; what breaks the format raises `FuseDecodeError`."""

from collections.abc import Callable
from errno import ENAMETOOLONG, ENOENT
from typing import Any, Final, NamedTuple

from appliance.errors import FuseDecodeError
from appliance.fuse_proto._fuse_wire import CODECS, IN_HEADER, IN_HEADER_SIZE, Buffer, InHeader
from appliance.fuse_proto.encode import NAME_MAX
from appliance.fuse_proto.opcodes import OPS, Op
from appliance.fuse_proto.operations import Request


class Plan(NamedTuple):
    """How to decode the body of one opcode: its `Op` with the codec looked up.

    `is_cut`: the arguments are always `op.compat` bytes, the rest of the structure reads zero.
    """

    op: Op
    unpack: Callable[[Buffer, int], tuple[Any, ...]] | None
    size: int
    names: int
    is_cut: bool


def make_plan(op: Op) -> Plan:
    """Return the plan of `op`."""
    codec = CODECS.get(op.args)
    return Plan(
        op,
        unpack=codec.unpack if codec else None,
        size=codec.size if codec else 0,
        names=op.names,
        is_cut=bool(op.names and op.compat),
    )


PLANS: Final = {op.number: make_plan(op) for op in OPS}


def decode_header_untrusted(request: memoryview) -> InHeader:
    """Return the header of `request`, whose `len` is still only a claim.

    Raises:
        FuseDecodeError: `request` is shorter than a header.
    """
    if len(request) < IN_HEADER_SIZE:
        raise FuseDecodeError(f"a request of {len(request)} bytes has no whole header")
    return InHeader._make(IN_HEADER.unpack_from(request))


def decode_body_untrusted(
    plan: Plan, header: tuple[int, ...], request: memoryview, end: int
) -> Request:
    """Return the request whose header was unpacked to `header`.

    Args:
        plan: of the header's opcode.
        header: the fields of `InHeader`.
        request: the request from its header on.
        end: where it ends, at most `len(request)`.

    Raises:
        FuseDecodeError: the arguments or a name do not end before `end`. Bytes behind both are
            left alone: later protocol minors append there.
    """
    at = IN_HEADER_SIZE
    args = None
    if plan.unpack is not None:
        if end - at >= plan.size and not plan.is_cut:
            args = plan.unpack(request, at)
            at += plan.size
        else:
            args, at = _unpack_short_untrusted(plan, request, end)
    names: tuple[bytes, ...] = ()
    if plan.names:
        ended = request[at:end].tobytes().split(b"\0", plan.names)
        if len(ended) <= plan.names:
            raise FuseDecodeError(f"{plan.op.name}: a name without NUL")
        del ended[-1]
        names = tuple(ended)
    _, opcode, unique, nodeid, uid, gid, pid, _ = header
    # Cheaper than calling the class, as in `_fuse_wire`.
    return tuple.__new__(Request, (opcode, unique, nodeid, uid, gid, pid, args, names))


def _unpack_short_untrusted(
    plan: Plan, request: memoryview, end: int
) -> tuple[tuple[Any, ...], int]:
    compat = plan.op.compat
    have = end - IN_HEADER_SIZE
    if plan.unpack is None or have < (compat or plan.size):
        raise FuseDecodeError(f"{plan.op.name}: {have} of {plan.size} bytes of arguments")
    sent = compat if plan.is_cut else have
    whole = request[IN_HEADER_SIZE : IN_HEADER_SIZE + sent].tobytes().ljust(plan.size, b"\0")
    return plan.unpack(whole, 0), IN_HEADER_SIZE + sent


def check_name_untrusted(name: bytes) -> None:
    """Refuse a name of a directory entry or an attribute that is too long.

    Raises:
        OSError: ENAMETOOLONG.
    """
    if len(name) > NAME_MAX:
        raise OSError(ENAMETOOLONG, f"a name of {len(name)} bytes")


def check_entry_name_untrusted(name: bytes) -> None:
    """Refuse a name no directory entry can have; ".", ".." and "/" may be looked up.

    Linux does so to find the inode of a file handle, and its parent (EXPORT_SUPPORT). "/" is what
    it calls a file that it knows by a handle alone, and looks up in the file itself for overlayfs.

    Raises:
        OSError: ENAMETOOLONG or ENOENT.
    """
    check_name_untrusted(name)
    if not name or (b"/" in name and name != b"/"):
        raise OSError(ENOENT, f"{name!r} is no entry's name")
