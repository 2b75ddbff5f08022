"""Formats a request as one readable line, for logs and test failures; guest bytes are escaped."""

from typing import Final

from appliance.errors import FuseDecodeError
from appliance.fuse_proto._fuse_wire import IN_HEADER_SIZE, InHeader
from appliance.fuse_proto.decode import PLANS, decode_body_untrusted, decode_header_untrusted

# Bytes of a name or body that are shown.
SHOWN_MAX: Final = 80


def format_request_untrusted(request: memoryview) -> str:
    """Return one line that describes a request, whether or not its bytes are valid."""
    try:
        header = decode_header_untrusted(request)
    except FuseDecodeError as exc:
        return f"{exc}: {_bytes(request)}"
    words = [opcode_name(header.opcode)]
    words += [
        f"{name}={getattr(header, name)}" for name in ("unique", "nodeid", "uid", "gid", "pid")
    ]
    return " ".join(words + _body_words(header, request))


def opcode_name(opcode: int) -> str:
    """Return the name of an opcode, or its number if it is unknown."""
    plan = PLANS.get(opcode)
    return plan.op.name if plan else f"opcode {opcode}"


def _body_words(header: InHeader, request: memoryview) -> list[str]:
    words: list[str] = []
    if header.len != len(request):
        words.append(f"len={header.len} of {len(request)}")
    plan = PLANS.get(header.opcode)
    end = min(max(header.len, IN_HEADER_SIZE), len(request))
    if plan is None:
        return [*words, _bytes(request[IN_HEADER_SIZE:end])]
    try:
        decoded = decode_body_untrusted(plan, header, request, end)
    except FuseDecodeError as exc:
        return [*words, f"({exc})"]
    if decoded.args is not None:
        words.append(str(decoded.args))
    return words + [_bytes(name) for name in decoded.names]


def _bytes(data: bytes | memoryview) -> str:
    shown = repr(bytes(data[:SHOWN_MAX]))
    return shown if len(data) <= SHOWN_MAX else f"{shown}... ({len(data)} bytes)"
