"""How a supervisor finds the sessions of the one before it, and is found by the next one.

A fork server outlives its supervisor as long as there are sessions, and listens on
`STATE_DIR/sessions/PID`, where PID is the id of the supervisor that started it. A supervisor that
starts connects to each of these sockets and names its own front-end sockets, what their front-ends
see, and its store. It gets the sessions there whose supervisor has ended, one message each: what
`SessionRecord` says, the grants, the session memory, the lease, a pidfd of the session process, and
a channel to it.

Sessions whose fork server has ended, too, are found by their mailboxes (`session_mailbox`).

Only the owner of the state directory can put sockets there or connect to them. Messages carry a
version; a release ignores messages and fields of others that it does not know.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from appliance.errors import StoreError
from appliance.protos import control_pb2 as pb
from appliance.session.channel import VERSION
from appliance.session.link import Link, LinkClosedError, SocketEnd, close_all
from appliance.session.spawning import Exits, WorkerExit
from appliance.session.uplink import UpperEnd
from appliance.system.listening import short_socket_path

_LOG = logging.getLogger(__name__)
# How long a fork server may take to answer.
_ANSWER_DEADLINE_S: Final = 10.0
_SOCKET_MODE: Final = 0o600
_UCRED: Final = struct.Struct("=iII")
_NUM_FDS: Final = 5


class SuccessorSocket:
    """The socket on which the fork servers of this supervisor listen.

    It can only be found from the first `listen` on, when this supervisor does not wait for the fork
    servers of others any more. Otherwise two that start at the same time would wait for each other.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = sessions_directory(state_dir) / str(os.getpid())
        self._sock: socket.socket | None = None

    def listen(self) -> int:
        """Return the descriptor of the listening socket, lent; make it if there is none yet.

        Raises:
            StoreError: it cannot be created in the state directory.
        """
        if self._sock is not None:
            return self._sock.fileno()
        with contextlib.ExitStack() as made:
            try:
                self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                self._path.unlink(missing_ok=True)
                sock = made.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                # Linux creates the socket file with the mode of the socket.
                os.fchmod(sock.fileno(), _SOCKET_MODE)
                with short_socket_path(self._path) as address:
                    sock.bind(address)
                sock.listen()
            except OSError as exc:
                raise StoreError(f"{self._path}: {exc.strerror}") from exc
            made.pop_all()
        self._sock = sock
        return sock.fileno()

    def close(self, *, is_needed: bool) -> None:
        """Close the socket here; remove its file, unless sessions live on."""
        if self._sock is None:
            return
        self._sock.close()
        if not is_needed:
            _remove(self._path)


class InheritedSession(NamedTuple):
    """A session that was taken over; the receiver owns the descriptors."""

    record: pb.SessionRecord
    pidfd: int
    grants_fd: int
    memory_fd: int
    lease_fd: int | None
    end: UpperEnd
    exit: "asyncio.Future[WorkerExit]"


class OldForkServer:
    """The fork server of a former supervisor, as long as it has sessions of ours."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self._path = path
        self._exits = Exits()
        self._is_closing = False
        self.sessions: list[InheritedSession] = []
        self._link = Link(SocketEnd(sock), self._on_message, self._on_closed)

    async def take_over(self, places: Sequence[pb.Place], store_path: Path) -> None:
        """Fill `sessions` with those on these front-end sockets that have no supervisor.

        Raises:
            LinkClosedError, TimeoutError: it has ended, or does not answer.
        """
        wanted = pb.TakeOver(version=VERSION, places=places, store_path=str(store_path))
        async with asyncio.timeout(_ANSWER_DEADLINE_S):
            await self._link.request(pb.Envelope(take_over=wanted))

    def close(self) -> None:
        """Let it go; it ends when its sessions have ended."""
        self._is_closing = True
        self._link.close()

    def _on_closed(self) -> None:
        if not self._is_closing:
            self._exits.watch_all()
            _remove(self._path)

    def _on_message(self, envelope: pb.Envelope, fds: list[int]) -> None:
        if envelope.HasField("taken_over") and len(fds) >= _NUM_FDS:
            record = envelope.taken_over.session
            sock_fd, pipe_fd, pidfd, grants_fd, memory_fd, *lease_fds = fds
            end = UpperEnd(socket.socket(fileno=sock_fd), pipe_fd)
            exit_ = self._exits.expect(record.pid, pidfd)
            self.sessions.append(
                InheritedSession(
                    record,
                    pidfd,
                    grants_fd,
                    memory_fd,
                    lease_fds[0] if lease_fds else None,
                    end,
                    exit_,
                )
            )
            return
        close_all(fds)
        if envelope.HasField("exited"):
            self._exits.told(envelope.exited)


async def take_over(
    state_dir: Path, places: Sequence[pb.Place], store_path: Path
) -> list[OldForkServer]:
    """Take over the sessions on these front-end sockets; see above.

    What cannot be taken over is logged and left alone.
    """
    found = []
    for path in sorted(sessions_directory(state_dir).glob("*[0-9]")):
        if path.name == str(os.getpid()):
            continue  # our own
        try:
            sock = _connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            _remove(path)  # its fork server has ended
            continue
        except OSError as exc:
            _LOG.error("sessions at %s are not taken over: %s", path, exc)
            continue
        server = OldForkServer(path, sock)
        found.append(server)
        try:
            await server.take_over(places, store_path)
        except (LinkClosedError, TimeoutError) as exc:
            _LOG.error("sessions at %s are not taken over: %s", path, str(exc) or "no answer")
    return found


def _connect(path: Path) -> socket.socket:
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.settimeout(0)
        with short_socket_path(path) as address:
            sock.connect(address)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _pid, uid, _gid = _UCRED.unpack(credentials)
        if uid not in {0, os.geteuid()}:
            raise OSError(f"it belongs to user {uid}")
        stack.pop_all()
    return sock


def _remove(path: Path) -> None:
    # The directory may be gone or read-only by now.
    with contextlib.suppress(OSError):
        path.unlink()


def sessions_directory(state_dir: Path) -> Path:
    """Return where sessions are found in a state directory."""
    return state_dir / "sessions"
