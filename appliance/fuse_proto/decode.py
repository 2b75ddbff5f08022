"""Decodes requests. Their bytes are not trusted; malformed ones raise `FuseDecodeError`."""

from collections.abc import Callable
from errno import ENAMETOOLONG, ENOENT
from typing import Any, Final, NamedTuple

from appliance.errors import FuseDecodeError
from appliance.fuse_proto._fuse_wire import CODECS, IN_HEADER, IN_HEADER_SIZE, Buffer, InHeader
from appliance.fuse_proto.encode import NAME_MAX
from appliance.fuse_proto.opcodes import OPS, Op
from appliance.fuse_proto.operations import Request


class Plan(NamedTuple):
    """How to decode the body of requests with one opcode.

    Attributes:
        op: the row of the opcode.
        unpack: unpacks the structure of arguments, if there is one.
        size: size of that structure in bytes, or 0.
        names: number of names that follow.
        is_cut: whether the arguments are only the first `op.compat` bytes of the structure; the
            other fields read as zero.
    """

    op: Op
    unpack: Callable[[Buffer, int], tuple[Any, ...]] | None
    size: int
    names: int
    is_cut: bool


def make_plan(op: Op) -> Plan:
    """Return the plan for `op`."""
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
    """Return the header of `request`. Its fields, `len` among them, are not checked.

    Raises:
        FuseDecodeError: `request` is shorter than a header.
    """
    if len(request) < IN_HEADER_SIZE:
        raise FuseDecodeError(f"request has {len(request)} bytes, a header has {IN_HEADER_SIZE}")
    return InHeader._make(IN_HEADER.unpack_from(request))


def decode_body_untrusted(
    plan: Plan, header: tuple[int, ...], request: memoryview, end: int
) -> Request:
    """Return the decoded request.

    Bytes after the arguments and names are ignored, as later minor versions of the protocol append
    fields there.

    Args:
        plan: the plan for the opcode in the header.
        header: the fields of `InHeader`.
        request: the request, including its header.
        end: offset of its end, at most `len(request)`.

    Raises:
        FuseDecodeError: the arguments or a name extend beyond `end`.
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
            raise FuseDecodeError(f"{plan.op.name}: a name does not end with NUL")
        del ended[-1]
        names = tuple(ended)
    _, opcode, unique, nodeid, uid, gid, pid, _ = header
    # This takes less time than calling the class, as in `_fuse_wire`.
    return tuple.__new__(Request, (opcode, unique, nodeid, uid, gid, pid, args, names))


def _unpack_short_untrusted(
    plan: Plan, request: memoryview, end: int
) -> tuple[tuple[Any, ...], int]:
    compat = plan.op.compat
    have = end - IN_HEADER_SIZE
    if plan.unpack is None or have < (compat or plan.size):
        raise FuseDecodeError(f"{plan.op.name}: arguments have {have} bytes, expected {plan.size}")
    sent = compat if plan.is_cut else have
    whole = request[IN_HEADER_SIZE : IN_HEADER_SIZE + sent].tobytes().ljust(plan.size, b"\0")
    return plan.unpack(whole, 0), IN_HEADER_SIZE + sent


def check_name_untrusted(name: bytes) -> None:
    """Check the length of the name of a directory entry or an attribute.

    Raises:
        OSError: ENAMETOOLONG.
    """
    if len(name) > NAME_MAX:
        raise OSError(ENAMETOOLONG, f"name has {len(name)} bytes, the limit is {NAME_MAX}")


def check_entry_name_untrusted(name: bytes) -> None:
    """Check a name to be looked up: one that a directory entry can have, ".", ".." or "/".

    Linux looks up "." and ".." to find the inode of a file handle and its parent (EXPORT_SUPPORT).
    A file that it knows only by a handle has the name "/"; for overlayfs, Linux looks that name up
    in the file itself.

    Raises:
        OSError: ENAMETOOLONG or ENOENT.
    """
    check_name_untrusted(name)
    if not name or (b"/" in name and name != b"/"):
        raise OSError(ENOENT, f"{name!r} cannot be the name of an entry")
