"""The fork server: `python -m appliance.worker.forkserver FD LISTENER LEVEL FORM STORE SANDBOX`.

It has imported everything that workers and session processes need and holds no thread, no event
loop and no LMDB environment, so a fork of it is safe at any time and shares its memory.

Theory of operation
-------------------
The fork server serves clients: the supervisor that started it, the supervisors that took sessions
over from that one, and its session processes. For each client it starts workers, and tells how they
ended. It never holds a descriptor that a front-end has chosen: what it receives from session
processes comes through pipes (`session/uplink.py`).

It outlives its supervisor as long as session processes need it, and is what the next supervisor
finds: a socket in the state directory, on which it listens (LISTENER, or -1). So that the next
supervisor can go on, it keeps the grants, the session memory and the lease of each session. A new
supervisor names the front-end sockets that it listens on, and is handed the sessions there whose
supervisor has ended. Their processes get a new channel to it.

The end of each of the processes has these effects:

    a supervisor           its sessions wait for another one; workers that serve it are killed
    a session process      its workers are killed, should they not have ended yet
    the fork server        session processes and their workers live on; the supervisor attaches
                           the sessions to its next fork server
    both of these          the next supervisor finds the session processes themselves, by their
                           mailboxes (`session/mailbox.py`), and attaches them to its fork server
    the first supervisor
    and all sessions       the fork server ends
"""

import contextlib
import gc
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from appliance.bounds import WORKERS_MAX
from appliance.db.data_file import is_pid_free
from appliance.errors import ApplianceError
from appliance.log import configure_logging, set_log_source
from appliance.protos import control_pb2 as pb
from appliance.protos.control_pb2 import Envelope, Exited, Spawned
from appliance.session import channel
from appliance.session import session_process as session
from appliance.session.link import End, SocketEnd, close_all
from appliance.session.uplink import UplinkPair, uplink_pair
from appliance.system.confinement import (
    UNCONFINED,
    Surroundings,
    enter_namespaces,
    rehearse,
)
from appliance.system.libc import signal_on_parent_death
from appliance.worker import courier
from appliance.worker import startup as worker
from appliance.worker.refused_calls import RefusedCalls
from appliance.worker.served_client import ServedClient

_LOG = logging.getLogger(__name__)
_PID_ATTEMPTS: Final = 256
# No descriptor has a higher number.
_FDS_MAX: Final = resource.getrlimit(resource.RLIMIT_NOFILE)[1] % (1 << 30)
_UCRED: Final = struct.Struct("=iII")


class _Session(NamedTuple):
    """What the next supervisor will need of a session; owns the descriptors."""

    record: pb.SessionRecord
    pidfd: int
    kept_fds: list[int]
    """Writable grants, session memory, and the lease if there is one."""


class ForkServer:
    """Forks processes on request.

    Args:
        end: the channel to the supervisor, owned.
        listener: where other supervisors connect, owned; None: nowhere.
        store_path: an LMDB environment; no child gets a process id that LMDB would take for
            another process in it.
        surroundings: what children have from this process.
    """

    def __init__(
        self,
        end: End,
        listener: socket.socket | None,
        store_path: Path | None,
        surroundings: Surroundings,
    ) -> None:
        self._listener = listener
        self._store_path = store_path
        self._surroundings = surroundings
        self._refused = RefusedCalls()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll = select.epoll()
        self._founder = ServedClient(end, is_session=False)
        self._clients = {end.receiving_fd: self._founder}
        self._parents: dict[int, ServedClient] = {}
        # The sessions, by their clients, and each with the supervisor that has it now.
        self._sessions: dict[ServedClient, _Session] = {}
        self._supervisors: dict[ServedClient, ServedClient | None] = {}

    def run(self) -> None:
        """Serve until the first supervisor and all sessions are gone."""
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)
        # Objects alive now move to a generation that is never collected, so that no child's
        # collector writes to pages it shares with its siblings.
        gc.collect()
        gc.freeze()
        self._epoll.register(self._wake_read, select.EPOLLIN)
        if self._listener is not None:
            self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._founder.end.receiving_fd, select.EPOLLIN)
        while self._founder.is_open or self._sessions:
            for fd, _event in self._epoll.poll():
                if fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                    self._reap()
                elif self._listener is not None and fd == self._listener.fileno():
                    self._accept(self._listener)
                elif client := self._clients.get(fd):
                    self._serve_one(client)
            self._flush()

    def _add(self, client: ServedClient) -> None:
        self._clients[client.end.receiving_fd] = client
        self._epoll.register(client.end.receiving_fd, select.EPOLLIN)

    def _flush(self) -> None:
        # What could not be sent is looked at again after the next event there or elsewhere.
        for client in self._clients.values():
            end = client.end
            if client.has_unsent:
                client.flush()
            if client.has_unsent != client.is_watched:
                client.is_watched = client.has_unsent
                out = select.EPOLLOUT if client.has_unsent else 0
                if end.sending_fd == end.receiving_fd:
                    self._epoll.modify(end.sending_fd, select.EPOLLIN | out)
                elif out:
                    self._epoll.register(end.sending_fd, out)
                else:
                    self._epoll.unregister(end.sending_fd)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _address = listener.accept()
        except OSError as exc:
            _LOG.error("cannot accept a supervisor: %s", exc.strerror)
            return
        _pid, uid, _gid = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if uid not in {0, os.geteuid()}:
            sock.close()
            return
        self._add(ServedClient(SocketEnd(sock), is_session=False))

    def _serve_one(self, client: ServedClient) -> None:
        client.flush()
        try:
            message = client.end.receive()
        except BlockingIOError:
            return
        except OSError:
            message = None
        if message is None:
            self._forget(client)
            return
        envelope, fds = message
        kind = envelope.WhichOneof("body")
        if kind == "spawn":
            self._spawn_worker(client, envelope)
        elif kind == "spawn_session" and not client.is_session:
            self._spawn_session(client, envelope, fds)
        elif kind == "attach" and not client.is_session:
            self._attach(client, envelope, fds)
        elif kind == "take_over" and not client.is_session:
            self._hand_over(client, envelope)
        else:
            close_all(fds)
            _LOG.warning("a message that this release does not know was ignored")

    def _forget(self, client: ServedClient) -> None:
        del self._clients[client.end.receiving_fd]
        client.close()
        for pid in client.workers:
            os.kill(pid, signal.SIGKILL)  # a child that was not reaped yet
        session_of_client = self._sessions.pop(client, None)
        if session_of_client is not None:
            del self._supervisors[client]
            close_all([session_of_client.pidfd, *session_of_client.kept_fds])
        for each, supervisor in self._supervisors.items():
            if supervisor is client:
                self._supervisors[each] = None

    # --- Requests ---

    def _spawn_worker(self, client: ServedClient, envelope: Envelope) -> None:
        spawn = envelope.spawn
        try:
            if len(client.workers) >= WORKERS_MAX:
                raise OSError(0, f"it has {WORKERS_MAX} workers")
            ours, theirs = channel.channel_pair()
            with theirs:
                pid, pidfd = self._fork(
                    {theirs.fileno()},
                    spawn.label,
                    self._work(client, spawn, theirs),
                    dies_with_us=spawn.dies_with_fork_server,
                )
        except OSError as exc:
            self._refuse(client, envelope, exc)
            return
        self._parents[pid] = client
        client.workers.add(pid)
        spawned = Envelope(id=envelope.id, spawned=Spawned(pid=pid))
        client.send(spawned, [ours.detach(), pidfd])

    def _work(
        self, client: ServedClient, spawn: pb.Spawn, sock: socket.socket
    ) -> Callable[[], None]:
        if spawn.is_courier and not client.is_session:
            return lambda: courier.main(sock)
        return lambda: worker.main(sock, self._surroundings)

    def _spawn_session(self, client: ServedClient, envelope: Envelope, fds: list[int]) -> None:
        sock_fd, pipe_fd, *kept_fds = fds
        record = envelope.spawn_session.session
        pair: UplinkPair | None = None
        try:
            pair = uplink_pair()
            lower = pair.lower
            pid, pidfd = self._fork(
                {sock_fd, pipe_fd, *lower},
                record.place.label,
                lambda: session.main((sock_fd, pipe_fd), lower, self._surroundings),
            )
            kept_pidfd = os.dup(pidfd)
        except OSError as exc:
            close_all(kept_fds)
            if pair is not None:
                pair.upper.close()
            self._refuse(client, envelope, exc)
            return
        finally:
            close_all([sock_fd, pipe_fd])
            if pair is not None:
                pair.close_lower()
        record.pid = pid
        self._parents[pid] = client
        self._keep(client, pair, _Session(record, kept_pidfd, kept_fds))
        client.send(Envelope(id=envelope.id, spawned=Spawned(pid=pid)), [pidfd])

    def _attach(self, client: ServedClient, envelope: Envelope, fds: list[int]) -> None:
        pidfd, *kept_fds = fds
        record = envelope.attach.session
        try:
            pair = uplink_pair()
        except OSError as exc:
            close_all(fds)
            self._refuse(client, envelope, exc)
            return
        self._keep(client, pair, _Session(record, pidfd, kept_fds))
        client.send(Envelope(id=envelope.id, spawned=Spawned(pid=record.pid)), pair.lower)

    def _keep(self, supervisor: ServedClient, pair: UplinkPair, kept: _Session) -> None:
        client = ServedClient(pair.upper, is_session=True)
        self._add(client)
        self._sessions[client] = kept
        self._supervisors[client] = supervisor

    def _hand_over(self, supervisor: ServedClient, envelope: Envelope) -> None:
        wanted = envelope.take_over
        for client, kept in self._sessions.items():
            record = kept.record
            if (
                self._supervisors[client] is not None
                or record.place not in wanted.places
                or record.store_path != wanted.store_path
            ):
                continue
            try:
                pair = uplink_pair()
                fds = [os.dup(fd) for fd in (kept.pidfd, *kept.kept_fds)]
            except OSError as exc:
                _LOG.error("%s: cannot hand the session over: %s", record.place.label, exc.strerror)
                break
            client.send(Envelope(new_peer=pb.NewPeer(is_supervisor=True)), pair.lower)
            self._supervisors[client] = supervisor
            if record.pid in self._parents:
                self._parents[record.pid] = supervisor
            taken_over = Envelope(taken_over=pb.TakenOver(session=record))
            supervisor.send(taken_over, [*pair.upper.detach(), *fds])
        supervisor.send(Envelope(id=envelope.id, done=pb.Done()))

    def _refuse(self, client: ServedClient, envelope: Envelope, exc: OSError) -> None:
        # No end of this process, and so of all that need it.
        _LOG.error("cannot fork: %s", exc.strerror)
        client.send(Envelope(id=envelope.id, spawned=Spawned(pid=-1, reason=exc.strerror or "")))

    # --- Children ---

    def _fork(
        self, keep: set[int], label: str, work: Callable[[], None], *, dies_with_us: bool = False
    ) -> tuple[int, int]:
        # Workers of another container have the ids that ours come to next, as like as not.
        parent = os.getpid()
        for _ in range(_PID_ATTEMPTS):
            verdict, child_verdict = os.pipe2(os.O_CLOEXEC)
            try:
                pid = os.fork()
                if pid == 0:
                    _close_all_but({child_verdict, *keep})
                    if dies_with_us:
                        signal_on_parent_death(signal.SIGKILL, parent)
                    self._become(label, child_verdict, work)
            except OSError:
                os.close(verdict)
                raise
            finally:
                os.close(child_verdict)
            is_good = os.read(verdict, 1)
            os.close(verdict)
            if is_good:
                try:
                    return pid, os.pidfd_open(pid)
                except OSError:
                    os.kill(pid, signal.SIGKILL)
                    raise
            os.waitpid(pid, 0)
        raise OSError(0, f"{self._store_path} has a lock for every process id tried")

    def _become(self, label: str, verdict: int, work: Callable[[], None]) -> None:
        # Never returns: whatever happens, this process must not go on as a second fork server.
        status = 1
        try:
            if self._store_path is not None and not is_pid_free(self._store_path):
                os._exit(status)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.write(verdict, b"y")
            os.close(verdict)
            set_log_source(label)
            # Its channel may be closed while it is about to answer.
            with contextlib.suppress(BrokenPipeError):
                work()
            status = 0
        except ApplianceError as exc:
            _LOG.error("worker failed: %s", exc)
        except BaseException:  # noqa: BLE001 - logged, and the process ends with status 1
            _LOG.exception("worker failed")
        finally:
            logging.shutdown()
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            client = self._parents.pop(pid, None)
            if client is not None:
                client.workers.discard(pid)
                exited = Exited(pid=pid, status=os.waitstatus_to_exitcode(status))
                call = self._refused.take(pid) if exited.status == -signal.SIGSYS else None
                if call is not None:
                    exited.system_call = call
                client.send(Envelope(exited=exited))


def _close_all_but(keep: set[int]) -> None:
    first = 3
    for fd in (*sorted(keep), _FDS_MAX):
        os.closerange(first, fd)
        first = fd + 1


def main() -> None:
    """Run the fork server on the channel whose fd number is the first argument."""
    fd, listener_fd = map(int, sys.argv[1:3])
    log_level, log_form, store_path, sandbox = sys.argv[3:]
    surroundings = enter_namespaces() if sandbox == "on" else UNCONFINED
    rehearse()
    # The terminal's ^C or end and a service manager's SIGTERM reach the whole process group; the
    # supervisor alone decides, and closing its channels is how it tells. SIGUSR1 is for it, too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    configure_logging(log_level, is_json=log_form == "json")
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    listener = None
    if listener_fd >= 0:
        listener = socket.socket(fileno=listener_fd)
        listener.set_inheritable(False)
        listener.settimeout(0)
    store = Path(store_path) if store_path else None
    ForkServer(SocketEnd(sock), listener, store, surroundings).run()


if __name__ == "__main__":
    main()
