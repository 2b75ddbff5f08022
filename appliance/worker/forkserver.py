"""The fork server: `python -m appliance.worker.forkserver FD PARENT LEVEL FORM STORE SANDBOX`.

It has imported everything that a worker needs and holds no thread, no event loop and no LMDB env,
so a fork of it is safe at any time and shares its memory. It forks a worker for each Spawn message,
reports each exit, and ends, with all its workers, when the supervisor does.
"""

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from appliance.db.data_file import is_pid_free
from appliance.errors import ApplianceError
from appliance.log import configure_logging, set_log_source
from appliance.protos.control_pb2 import Envelope, Exited, Spawned
from appliance.session import channel
from appliance.system.libc import signal_on_parent_death
from appliance.worker import startup as worker
from appliance.worker.sandbox import UNCONFINED, Surroundings, enter_namespaces, rehearse

_LOG = logging.getLogger(__name__)
_PID_ATTEMPTS: Final = 256


class ForkServer:
    """Forks workers on request; owns its end of the channel to the supervisor."""

    def __init__(
        self, sock: socket.socket, store_path: Path | None, surroundings: Surroundings
    ) -> None:
        self._sock = sock
        self._store_path = store_path
        self._surroundings = surroundings
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> None:
        """Serve until the supervisor closes the channel."""
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)
        # Objects alive now move to a generation that is never collected, so that no worker's
        # collector writes to pages it shares with its siblings.
        gc.collect()
        gc.freeze()
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while True:
            ready = {fd for fd, _event in poller.poll()}
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._reap()
            if self._sock.fileno() in ready and not self._serve_one():
                return

    def _serve_one(self) -> bool:
        message = channel.receive(self._sock)
        if message is None:
            return False
        envelope, fds = message
        (worker_fd,) = fds
        try:
            pid = self._fork(worker_fd, envelope.spawn.label)
        except OSError as exc:
            # No end of this process, and so of all workers that live.
            _LOG.error("cannot fork: %s", exc.strerror)
            pid = -1
        os.close(worker_fd)
        channel.send(self._sock, Envelope(id=envelope.id, spawned=Spawned(pid=pid)))
        return True

    def _fork(self, worker_fd: int, label: str) -> int:
        # Workers of another container have the ids that ours come to next, as like as not.
        parent = os.getpid()
        for _ in range(_PID_ATTEMPTS):
            verdict, child_verdict = os.pipe2(os.O_CLOEXEC)
            try:
                pid = os.fork()
                if pid == 0:
                    os.close(verdict)
                    self._become_worker(worker_fd, parent, label, child_verdict)
            except OSError:
                os.close(verdict)
                raise
            finally:
                os.close(child_verdict)
            is_good = os.read(verdict, 1)
            os.close(verdict)
            if is_good:
                return pid
            os.waitpid(pid, 0)
        _LOG.error("cannot fork: %s has a lock for every process id tried", self._store_path)
        return -1

    def _become_worker(self, worker_fd: int, parent: int, label: str, verdict: int) -> None:
        # Never returns: whatever happens, this process must not go on as a second fork server.
        status = 1
        try:
            if self._store_path is not None and not is_pid_free(self._store_path):
                os._exit(status)
            os.write(verdict, b"y")
            os.close(verdict)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal_on_parent_death(signal.SIGKILL, parent)
            set_log_source(label)
            self._sock.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            # Its channel may be closed while it is about to answer.
            with contextlib.suppress(BrokenPipeError):
                worker.main(socket.socket(fileno=worker_fd), self._surroundings)
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
            exited = Exited(pid=pid, status=os.waitstatus_to_exitcode(status))
            channel.send(self._sock, Envelope(exited=exited))


def main() -> None:
    """Run the fork server on the channel whose fd number is the first argument."""
    fd, parent = map(int, sys.argv[1:3])
    log_level, log_form, store_path, sandbox = sys.argv[3:]
    surroundings = enter_namespaces() if sandbox == "on" else UNCONFINED
    rehearse()
    signal_on_parent_death(signal.SIGKILL, parent)
    # The terminal's ^C or end and a service manager's SIGTERM reach the whole process group; the
    # supervisor alone decides, and closing its channels is how it tells.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    configure_logging(log_level, is_json=log_form == "json")
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    # The supervisor may go away between two messages.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        ForkServer(sock, Path(store_path) if store_path else None, surroundings).run()


if __name__ == "__main__":
    main()
