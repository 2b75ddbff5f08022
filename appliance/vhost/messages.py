"""Codec between header, payload and descriptors, and Message and MessageReply; without I/O.

Only what can be checked for a message on its own is checked here: the header's flags and the
payload's size. A message that breaks these rules ends the connection, because the stream can no
longer be trusted. Everything else (order, features, values) is checked by the session.

Spec: vhost-user: Header; Payload; VHOST_USER_PROTOCOL_F_REPLY_ACK.
"""

from typing import Final, NamedTuple, Self

from appliance.bounds import PAYLOAD_MAX
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    CODECS,
    CONFIG_SIZE,
    MEM_TABLE_SIZE,
    REGION_SIZE,
    Header,
    HeaderFlag,
    Word,
    pack_header,
    pack_word,
    unpack_config,
    unpack_header,
    unpack_mem_table,
)
from appliance.vhost.fds import ReceivedFds
from appliance.vhost.requests import REQUESTS, RequestRow, Tail

ROWS: Final = {row.number: row for row in REQUESTS}
_REQUEST_FLAGS: Final = (HeaderFlag.VERSION_1, HeaderFlag.VERSION_1 | HeaderFlag.NEED_REPLY)
_REPLY_FLAGS: Final = HeaderFlag.VERSION_1 | HeaderFlag.REPLY  # front-ends compare for equality


class MessageReply(NamedTuple):
    """One message to the front-end; `fds` are lent until it has been sent."""

    request: int
    payload: bytes
    fds: tuple[int, ...] = ()


class Message:
    """One request. Owns the descriptors that came with it, until they are taken or it is closed.

    Args:
        header: the decoded header.
        payload: the bytes after the header, of a checked size.
        fds: the descriptors, owned by the message from now on.
    """

    def __init__(self, header: Header, payload: bytes, fds: ReceivedFds) -> None:
        self.number = header.request
        self.row: RequestRow | None = ROWS.get(header.request)
        self.needs_reply = bool(header.flags & HeaderFlag.NEED_REPLY)
        self.payload = payload
        self.fds = fds

    @property
    def name(self) -> str:
        """The request's name, or its number if it is unknown."""
        return self.row.name if self.row else f"request {self.number}"

    def take_fd(self, index: int) -> int:
        """Return the descriptor at `index`; the caller owns it from now on."""
        return self.fds.take(index)

    def close(self) -> None:
        """Close every descriptor that was not taken."""
        self.fds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __str__(self) -> str:
        parts = [self.name]
        if self.row and self.row.payload:
            parts.append(str(CODECS[self.row.payload].unpack(self.payload, 0)))
        elif self.payload:
            parts.append(f"{len(self.payload)} bytes")
        if len(self.fds):
            parts.append(f"{len(self.fds)} fds")
        if self.needs_reply:
            parts.append("need_reply")
        return " ".join(parts)


def decode_header_untrusted(data: bytes) -> Header:
    """Return the header in `data`, which has exactly HEADER_SIZE bytes.

    Raises:
        VhostError: the header has a version or flag that no request has, or announces a payload
            of more than PAYLOAD_MAX bytes.
    """
    header = unpack_header(data)
    row = ROWS.get(header.request)
    name = row.name if row else f"request {header.request}"
    if header.flags not in _REQUEST_FLAGS:
        raise VhostError(f"{name}: header flags 0x{header.flags:x}, expected 0x1 or 0x9")
    if header.size > PAYLOAD_MAX:
        raise VhostError(f"{name}: payload of {header.size} bytes, expected at most {PAYLOAD_MAX}")
    return header


def decode_untrusted(header: Header, payload: bytes, fds: ReceivedFds) -> Message:
    """Return the message, which owns `fds` from now on.

    Raises:
        VhostError: the payload does not have the request's size. The caller still owns `fds`.
    """
    row = ROWS.get(header.request)
    if row is not None and row.refused is None:
        _check_size_untrusted(row, payload)
    return Message(header, payload, fds)


def encode_reply(reply: MessageReply) -> bytes:
    """Return the header and payload of `reply` as bytes; its descriptors are not touched."""
    return pack_header(Header(reply.request, _REPLY_FLAGS, len(reply.payload))) + reply.payload


def ack(message: Message, *, is_ok: bool) -> MessageReply:
    """Return the answer to a request that has no reply of its own: a u64, 0 for success.

    Spec: vhost-user: VHOST_USER_PROTOCOL_F_REPLY_ACK.
    """
    return MessageReply(message.number, pack_word(Word(0 if is_ok else 1)))


def _check_size_untrusted(row: RequestRow, payload: bytes) -> None:
    fixed = CODECS[row.payload].size if row.payload else 0
    if len(payload) < fixed or (row.tail is Tail.NONE and len(payload) != fixed):
        raise VhostError(f"{row.name}: payload of {len(payload)} bytes, expected {fixed}")
    if row.tail is Tail.REGIONS:
        num_regions = unpack_mem_table(payload).num_regions
        wanted = MEM_TABLE_SIZE + REGION_SIZE * num_regions
        # UML before 6.13 always sends two slots, whatever the number of regions.
        if len(payload) < wanted:
            raise VhostError(
                f"{row.name}: payload of {len(payload)} bytes for {num_regions} regions, "
                f"expected at least {wanted}"
            )
    elif row.tail is Tail.CONFIG:
        wanted = CONFIG_SIZE + unpack_config(payload).size
        if len(payload) != wanted:
            raise VhostError(f"{row.name}: payload of {len(payload)} bytes, expected {wanted}")
