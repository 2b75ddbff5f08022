"""A courier fetches memory from a session process that has neither supervisor nor fork server.

The session process has the only descriptors of its session memory and grants. A supervisor must not
receive them from there, because a session process that its front-end has taken over could send any
descriptor instead, and closing one can block for ever. A courier is a child of the fork server that
fetches from one session process and ends. It passes on nothing but memfds, which never block, and
only those two that an earlier supervisor has written down by their inode numbers. If it hangs, it
hangs alone, and the supervisor leaves that session where it is.
"""

import fcntl
import os
import select
import socket
from pathlib import Path
from typing import Final

from appliance.errors import ApplianceError
from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.system.listening import short_socket_path

# How long a session process may take to answer.
_ANSWER_DEADLINE_MS: Final = 8000
# fcntl.h. It fails for what is no file in memory.
_F_GET_SEALS: Final = 1034
_NUM_FDS: Final = 2


class _NothingFetchedError(ApplianceError):
    """The session process did not hand out what it should have."""


def main(sock: socket.socket) -> None:
    """Carry out one Fetch.

    Args:
        sock: the channel to the supervisor, taken.
    """
    message = channel.receive(sock)
    if message is None:
        return
    envelope, _none = message
    done, fds = pb.Done(), list[int]()
    try:
        fds = _fetch(envelope.fetch)
    except (OSError, _NothingFetchedError) as exc:
        done.error = str(exc)
    channel.send(sock, pb.Envelope(id=envelope.id, done=done), fds)
    # The end of this process closes whatever else was received.


def _fetch(fetch: pb.Fetch) -> list[int]:
    ours, theirs = channel.channel_pair()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, theirs:
        sender.settimeout(0)
        with short_socket_path(Path(fetch.path)) as address:
            sender.connect(address)
        channel.send(sender, pb.Envelope(surrender=pb.Surrender()), [theirs.fileno()])
    poller = select.poll()
    poller.register(ours, select.POLLIN)
    if not poller.poll(_ANSWER_DEADLINE_MS):
        raise _NothingFetchedError("it does not answer")
    # What it says is not looked at: the descriptors are the answer.
    _data, fds, _flags, _address = socket.recv_fds(ours, 1, _NUM_FDS)
    if not fds:
        raise _NothingFetchedError("it has another supervisor")
    if len(fds) != _NUM_FDS:
        raise _NothingFetchedError(f"it sent {len(fds)} descriptors, expected {_NUM_FDS}")
    for fd, inode in zip(fds, (fetch.memory_inode, fetch.grants_inode), strict=True):
        _check(fd, inode)
    memory_fd, grants_fd = fds
    # A session process cannot write to its grants; a supervisor can.
    return [memory_fd, os.open(f"/proc/self/fd/{grants_fd}", os.O_RDWR | os.O_CLOEXEC)]


def _check(fd: int, inode: int) -> None:
    # First whether it is a file in memory, because fstat(2) can block for others.
    fcntl.fcntl(fd, _F_GET_SEALS)
    own = os.memfd_create("own", os.MFD_CLOEXEC)
    status, own_status = os.fstat(fd), os.fstat(own)
    if (status.st_dev, status.st_ino) != (own_status.st_dev, inode):
        raise _NothingFetchedError(f"it sent a file with inode {status.st_ino}, expected {inode}")
