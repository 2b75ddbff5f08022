"""The mailboxes of sessions in the state directory, and who is found by them.

`STATE_DIR/sessions/NAME.mailbox` is the socket of a session process (`session/mailbox.py`), and
`NAME.record` beside it a SessionRecord, with what the next supervisor needs to know that it has the
right process and the right memory. Both are there as long as the session. They are used only where
the supervisor and its fork server have ended; otherwise sessions are handed over by the latter.

Only the owner of the state directory can put files there, or send to a mailbox.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.link import Link, LinkClosedError, SocketEnd, close_all
from appliance.session.spawning import Exits
from appliance.session.uplink import uplink_pair
from appliance.store.leases import Lease
from appliance.supervisor.forker import Forker
from appliance.supervisor.served_session import ServedSession
from appliance.supervisor.succession import InheritedSession, sessions_directory
from appliance.system.listening import short_socket_path
from appliance.system.process import start_ticks

_LOG = logging.getLogger(__name__)
_SOCKET_MODE: Final = 0o600
# How long a courier may take.
_ANSWER_DEADLINE_S: Final = 10.0
_NUM_FDS: Final = 2


class SessionMailbox:
    """The files of one session. Owns them, and the socket until it is handed out.

    Args:
        state_dir: the state directory.
        name: the name of the mailbox there; empty if there is none.
    """

    def __init__(self, state_dir: Path, name: str) -> None:
        self.name = name
        self._base = sessions_directory(state_dir) / name
        self._sock: socket.socket | None = None

    @classmethod
    def create(cls, state_dir: Path) -> "SessionMailbox":
        """Return a new mailbox, or one that is none where it cannot be created; that is logged."""
        mailbox = cls(state_dir, secrets.token_hex(8))
        with contextlib.ExitStack() as made:
            try:
                sock = made.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                # Linux creates the socket file with the mode of the socket.
                os.fchmod(sock.fileno(), _SOCKET_MODE)
                with short_socket_path(mailbox.path) as address:
                    sock.bind(address)
            except OSError as exc:
                _LOG.warning(
                    "%s: %s; the session there is lost if its supervisor and fork server both end",
                    mailbox.path,
                    exc.strerror,
                )
                return cls(state_dir, "")
            made.pop_all()
        mailbox._sock = sock
        return mailbox

    @property
    def path(self) -> Path:
        """The socket."""
        return self._base.with_suffix(".mailbox")

    def take_fds(self, lease: Lease | None) -> Sequence[int]:
        """Return what the session process must hold; the caller owns it.

        There is nothing if there is no mailbox, or no free descriptor at the moment.
        """
        sock, self._sock = self._sock, None
        if sock is None:
            return ()
        try:
            shared = () if lease is None else (lease.shared_fd(),)
        except OSError:
            sock.close()
            return ()
        return (sock.detach(), *shared)

    def write(self, record: pb.SessionRecord, served: ServedSession) -> None:
        """Write down whose mailbox it is."""
        if not self.name:
            return
        unready = self._base.with_suffix(".new")
        try:
            described = pb.SessionRecord(
                start_ticks=start_ticks(record.pid),
                memory_inode=os.fstat(served.memory.fd).st_ino,
                grants_inode=os.fstat(served.grants.fd).st_ino,
                lease_id="" if served.lease is None else served.lease.lease_id,
            )
            described.MergeFrom(record)
            unready.write_bytes(described.SerializeToString())
            unready.rename(self._base.with_suffix(".record"))
        except OSError as exc:
            _LOG.warning("%s: %s", unready, exc.strerror)

    def remove(self) -> None:
        """Remove the files, and close the socket if it was not handed out."""
        if self._sock is not None:
            self._sock.close()
        if self.name:
            # The directory may be gone or read-only by now.
            for suffix in (".mailbox", ".record", ".new"):
                with contextlib.suppress(OSError):
                    self._base.with_suffix(suffix).unlink()


async def find_sessions(
    state_dir: Path,
    places: Sequence[pb.Place],
    store_path: Path,
    forker: Forker,
    known: Collection[int],
) -> list[InheritedSession]:
    """Take over the sessions on these front-end sockets that have no fork server any more.

    What cannot be taken over is logged and left alone.

    Args:
        state_dir: the state directory.
        places: the front-end sockets, and what their front-ends see.
        store_path: the store of which the sessions must be.
        forker: starts the couriers.
        known: the pids of session processes that have been taken over already.
    """
    found = [
        (mailbox, record)
        for mailbox, record in _living(state_dir)
        if record.place in places
        and record.store_path == str(store_path)
        and record.pid not in known
    ]
    taken = await asyncio.gather(*(_take_over(*each, store_path, forker) for each in found))
    return [session for session in taken if session is not None]


def _living(state_dir: Path) -> Iterator[tuple[SessionMailbox, pb.SessionRecord]]:
    # Mailboxes that nobody reads are removed: their process has ended without a supervisor.
    for path in sorted(sessions_directory(state_dir).glob("*.mailbox")):
        mailbox = SessionMailbox(state_dir, path.stem)
        try:
            with _sender(path):
                record = pb.SessionRecord.FromString(path.with_suffix(".record").read_bytes())
        except ConnectionRefusedError:
            mailbox.remove()
        except FileNotFoundError:
            continue  # it is being made or removed
        except (OSError, DecodeError) as exc:
            _LOG.error("the session at %s is not taken over: %s", path, exc)
        else:
            yield mailbox, record


async def _take_over(
    mailbox: SessionMailbox, record: pb.SessionRecord, store_path: Path, forker: Forker
) -> InheritedSession | None:
    with contextlib.ExitStack() as taken:
        try:
            pidfd = _open_process(record)
            taken.callback(os.close, pidfd)
            memory_fd, grants_fd = await _fetch(mailbox, record, forker)
            taken.callback(close_all, [memory_fd, grants_fd])
            lease_fd = None
            if record.lease_id:
                lease_fd = Lease.find(store_path, record.lease_id)
                taken.callback(os.close, lease_fd)
            pair = uplink_pair()
            taken.callback(pair.upper.close)
            new_peer = pb.Envelope(new_peer=pb.NewPeer(is_supervisor=True))
            try:
                with _sender(mailbox.path) as sender:
                    channel.send(sender, new_peer, pair.lower)
            finally:
                pair.close_lower()
        except ProcessLookupError:
            mailbox.remove()
            return None
        except (OSError, TimeoutError) as exc:
            reason = str(exc) or "no answer"
            _LOG.error("the session at %s is not taken over: %s", mailbox.path, reason)
            return None
        taken.pop_all()
    exits = Exits()
    exit_ = exits.expect(record.pid, pidfd)
    exits.watch_all()  # nobody will tell
    return InheritedSession(record, pidfd, grants_fd, memory_fd, lease_fd, pair.upper, exit_)


def _open_process(record: pb.SessionRecord) -> int:
    pidfd = os.pidfd_open(record.pid)
    try:
        if start_ticks(record.pid) != record.start_ticks:
            raise ProcessLookupError
    except OSError as exc:
        os.close(pidfd)
        raise ProcessLookupError from exc
    return pidfd


async def _fetch(
    mailbox: SessionMailbox, record: pb.SessionRecord, forker: Forker
) -> tuple[int, int]:
    fetch = pb.Fetch(
        path=str(mailbox.path),
        memory_inode=record.memory_inode,
        grants_inode=record.grants_inode,
    )
    courier = await forker.spawn_courier(record.place.label)
    link = Link(SocketEnd(courier.sock), lambda _envelope, fds: close_all(fds), lambda: None)
    try:
        async with asyncio.timeout(_ANSWER_DEADLINE_S):
            reply, fds = await link.request_with_fds(pb.Envelope(fetch=fetch))
    finally:
        link.close()
        forker.discard(courier)  # it may hang in what it received
    if len(fds) != _NUM_FDS:
        close_all(fds)
        raise LinkClosedError(reply.done.error)
    memory_fd, grants_fd = fds
    return memory_fd, grants_fd


@contextlib.contextmanager
def _sender(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0)
        with short_socket_path(path) as address:
            sock.connect(address)
        yield sock
