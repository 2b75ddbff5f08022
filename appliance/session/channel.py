"""The control channel: one Envelope per SOCK_SEQPACKET message, with file descriptors attached.

Both ends belong to this program, and neither has reason to distrust the other. A message that
cannot be parsed is therefore a bug rather than bad input, and is not handled.
"""

import array
import socket
from collections.abc import Sequence

from appliance.bounds import CHANNEL_FDS_MAX, CHANNEL_MESSAGE_MAX
from appliance.protos.control_pb2 import Envelope

# Of the messages between processes of different releases: supervisors, fork servers and session
# processes. It grows when a message is added or changes its meaning. Whoever receives a message or
# field that it does not know ignores it.
VERSION = 2
_ANCILLARY_BYTES = socket.CMSG_SPACE(CHANNEL_FDS_MAX * 4)


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new control channel, both close-on-exec; the caller owns them."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, envelope: Envelope, fds: Sequence[int] = ()) -> None:
    """Send one message. `fds` are lent: the peer gets duplicates.

    Raises:
        BlockingIOError: the socket is non-blocking and its buffer is full. Nothing was sent.
        OSError: the peer is gone.
    """
    data = envelope.SerializeToString()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[Envelope, list[int]] | None:
    """Return the next message and its descriptors, which the caller owns; None at the end.

    The end is reached when the peer has closed its socket or has died.

    Raises:
        BlockingIOError: the socket is non-blocking and has no message.
    """
    try:
        data, ancillary, _flags, _address = sock.recvmsg(
            CHANNEL_MESSAGE_MAX, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return None
    if not data:
        return None
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return Envelope.FromString(data), fds.tolist()
