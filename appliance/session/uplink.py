"""The channel between a process and one below it that it does not trust with descriptors.

A session process holds descriptors that a front-end chose. Whoever receives such a descriptor may
have to close it, and closing one can block for ever: a TCP socket that lingers, a file of a FUSE
server that does not answer. That also happens to a process that reads from a Unix socket without
asking for descriptors, or that closes one in which descriptors are queued, because the kernel then
closes them on its behalf. So the supervisor and the fork server receive nothing from a session
process through a socket:

    downwards   a SOCK_SEQPACKET socket, whose upper end is shut down for receiving before the lower
                end is handed out; messages carry descriptors
    upwards     a pipe in packet mode (O_DIRECT, pipe(2)), through which no descriptor can pass

One packet is one Envelope of at most `UPLINK_MESSAGE_MAX` bytes. The upper side sees the end of the
pipe when the last process that can write to it has ended.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from appliance.bounds import UPLINK_MESSAGE_MAX
from appliance.protos.control_pb2 import Envelope
from appliance.session import channel


class UpperEnd:
    """The side that sends descriptors and receives none; owns its socket and pipe."""

    def __init__(self, sock: socket.socket, pipe_fd: int) -> None:
        sock.shutdown(socket.SHUT_RD)
        sock.settimeout(0)
        os.set_blocking(pipe_fd, False)
        self._sock = sock
        self.receiving_fd = pipe_fd
        self.sending_fd = sock.fileno()

    def send(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """See `channel.send`; never blocks."""
        channel.send(self._sock, envelope, fds)

    def receive(self) -> tuple[Envelope, list[int]] | None:
        """Return the next message, which has no descriptors; None at the end.

        Raises:
            BlockingIOError: there is no message.
            OSError: what was received is not a message.
        """
        data = os.read(self.receiving_fd, UPLINK_MESSAGE_MAX)
        if not data:
            return None
        try:
            return Envelope.FromString(data), []
        except DecodeError as exc:
            raise OSError(errno.EBADMSG, str(exc)) from exc

    def close(self) -> None:
        """Close socket and pipe."""
        self._sock.close()
        os.close(self.receiving_fd)

    def detach(self) -> tuple[int, int]:
        """Return the descriptors of socket and pipe, which the caller owns from now on."""
        return self._sock.detach(), self.receiving_fd


class LowerEnd:
    """The side that receives descriptors and sends none; owns its socket and pipe."""

    def __init__(self, sock: socket.socket, pipe_fd: int) -> None:
        sock.settimeout(0)
        os.set_blocking(pipe_fd, False)
        self._sock = sock
        self.receiving_fd = sock.fileno()
        self.sending_fd = pipe_fd

    def send(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """Send one message, without descriptors.

        Raises:
            BlockingIOError: the pipe is full. Nothing was sent.
            ValueError: the message is too long, or there are descriptors.
            OSError: the peer is gone.
        """
        data = envelope.SerializeToString()
        if fds or len(data) > UPLINK_MESSAGE_MAX:
            raise ValueError(
                f"{len(data)} bytes and {len(fds)} descriptors, expected at most "
                f"{UPLINK_MESSAGE_MAX} and 0"
            )
        os.write(self.sending_fd, data)

    def receive(self) -> tuple[Envelope, list[int]] | None:
        """See `channel.receive`; never blocks."""
        return channel.receive(self._sock)

    def close(self) -> None:
        """Close socket and pipe."""
        self._sock.close()
        os.close(self.sending_fd)


class UplinkPair(NamedTuple):
    """The two sides of a new channel; the lower one as descriptors that the receiver owns."""

    upper: UpperEnd
    lower: tuple[int, int]
    """Socket and pipe, to be sent or inherited, and then closed here."""

    def close_lower(self) -> None:
        """Close the descriptors of the lower side."""
        for fd in self.lower:
            os.close(fd)


def uplink_pair() -> UplinkPair:
    """Return both sides of a new channel; all descriptors are close-on-exec.

    Raises:
        OSError: there is no free descriptor.
    """
    with contextlib.ExitStack() as stack:
        ours, theirs = channel.channel_pair()
        stack.callback(ours.close)
        stack.callback(theirs.close)
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
        stack.pop_all()
    return UplinkPair(UpperEnd(ours, reading), (theirs.detach(), writing))
