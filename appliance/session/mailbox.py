"""A session process's mailbox, where the next supervisor finds it if its fork server is gone, too.

The mailbox is a datagram socket in the state directory, bound by the supervisor, to which only the
owner of that directory can send. It is listened to only while there is no supervisor. Two messages
come, one after the other:

    Surrender   from a courier (`worker/courier.py`): hand out session memory and grants, which
                nobody else has any more
    NewPeer     from the supervisor: this process's side of a channel to it

The rest is as after any change of supervisors: the supervisor attaches the session to its own fork
server. Nothing goes back through the mailbox, and no descriptor goes to the supervisor from here.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence

from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.link import close_all


class Mailbox:
    """Reads what comes, in the running event loop. Owns its socket.

    Args:
        fd: the socket, taken.
        memory_fds: session memory and grants, lent.
        has_supervisor: whether there is a supervisor.
        on_supervisor: called when there is another one, with the descriptors (taken) of this side
            of the channel to it; see `fork_client.lower_end_of`.
    """

    def __init__(
        self,
        fd: int,
        memory_fds: Sequence[int],
        has_supervisor: Callable[[], bool],
        on_supervisor: Callable[[list[int]], None],
    ) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.settimeout(0)
        self._memory_fds = memory_fds
        self._has_supervisor = has_supervisor
        self._on_supervisor = on_supervisor
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._sock, self._read)

    def close(self) -> None:
        """Close the socket; the process can no longer be found."""
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _read(self) -> None:
        try:
            message = channel.receive(self._sock)
        except BlockingIOError:
            return
        if message is None:
            return  # an empty datagram
        envelope, fds = message
        kind = envelope.WhichOneof("body")
        if self._has_supervisor():
            close_all(fds)
        elif kind == "surrender" and len(fds) == 1:
            self._surrender(fds[0])
        elif kind == "new_peer" and len(fds) == 2:
            self._on_supervisor(fds)
        else:
            close_all(fds)

    def _surrender(self, fd: int) -> None:
        with socket.socket(fileno=fd) as sock:
            sock.settimeout(0)
            try:
                channel.send(sock, pb.Envelope(done=pb.Done()), self._memory_fds)
            except OSError:
                return  # the courier has ended meanwhile
