"""A session process: serves one front-end from its first byte to its end.

It receives all descriptors of its front-end, speaks vhost-user, and keeps the workers alive that
serve the queues. So whatever a front-end can do to whoever holds its descriptors, it does to its
own session. The theory of operation:

    supervisor      accepts the connection and passes it on before a byte is read; grants and
                    fetches what workers miss; may end and be replaced (`supervisor_client`)
    fork server     starts this process and its workers; may end and be replaced (`fork_client`)
    this process    opens no file and no database, and locks itself down before it reads the first
                    byte of its front-end (`confinement`); the next supervisor finds it through the
                    fork server or, if that has ended, too, by its mailbox (`mailbox`)

It ends when the front-end has left, or when the supervisor asks it to.
"""

import asyncio
import contextlib
import logging
import select
import socket
from typing import Final

from appliance.errors import VhostError
from appliance.log import configure_logging, set_log_source
from appliance.protos import control_pb2 as pb
from appliance.session.device import Device
from appliance.session.fork_client import ForkClient, lower_end_of
from appliance.session.kick_watch import KickWatch
from appliance.session.mailbox import Mailbox
from appliance.session.ring_worker import DeviceServices
from appliance.session.session_memory import SessionMemory
from appliance.session.session_sandbox import lock_down_session
from appliance.session.supervisor_client import SupervisorClient
from appliance.session.uplink import LowerEnd
from appliance.system.confinement import Surroundings
from appliance.vhost.fs_device import DeviceProperties
from appliance.vhost.session import Session, converse
from appliance.vhost.transport import Connection

_LOG = logging.getLogger(__name__)
# How long to wait before retrying when there is no descriptor or memory for a device.
_DEVICE_AGAIN_S: Final = 1.0


def main(
    supervisor_fds: tuple[int, int], fork_server_fds: tuple[int, int], surroundings: Surroundings
) -> None:
    """Serve the front-end that the supervisor names in its first message.

    Args:
        supervisor_fds: the lower side of the channel to the supervisor, taken.
        fork_server_fds: that of the channel to the fork server, taken.
        surroundings: what this process has from its fork server.
    """
    supervisor_end = lower_end_of(list(supervisor_fds))
    poller = select.poll()
    poller.register(supervisor_end.receiving_fd, select.POLLIN)
    poller.poll()
    message = supervisor_end.receive()
    if message is None:
        return
    request, fds = message
    start = request.start_session
    configure_logging(start.configure.log_level, is_json=start.configure.log_json)
    set_log_source(start.label)
    connection_fd, memory_fd, grants_fd, *found_by = fds
    sock, memory = socket.socket(fileno=connection_fd), SessionMemory(memory_fd)

    async def serve() -> None:
        ends = supervisor_end, lower_end_of(list(fork_server_fds))
        process = SessionProcess(request, sock, memory, grants_fd, ends)
        # With the lease, which only has to stay open.
        mailbox = process.listen(found_by[0]) if found_by else contextlib.nullcontext()
        with mailbox:
            await process.run(kicks)

    with asyncio.Runner() as runner:
        # Before the sandbox, because they make sockets and an epoll.
        runner.get_loop()
        kicks = KickWatch()
        if start.configure.HasField("sandbox"):
            lock_down_session(start.configure.sandbox, surroundings)
        runner.run(serve())


class SessionProcess:
    """One front-end, its device, and the channels of its process.

    Args:
        request: the first message of the supervisor, which is answered when this process is ready.
        sock: the connection to the front-end, of which no byte was read; owned.
        memory: the session memory, owned.
        grants_fd: a read-only descriptor of the grants, owned.
        ends: this side of the channels to the supervisor and to the fork server, owned.
    """

    def __init__(
        self,
        request: pb.Envelope,
        sock: socket.socket,
        memory: SessionMemory,
        grants_fd: int,
        ends: tuple[LowerEnd, LowerEnd],
    ) -> None:
        self._request = request
        self._start = request.start_session
        self._sock = sock
        self._memory = memory
        self._grants_fd = grants_fd
        supervisor_end, fork_server_end = ends
        self._serving: asyncio.Task[None] | None = None
        self._supervisor = SupervisorClient(supervisor_end, self._end, self._use_fork_server)
        self._fork_server = ForkClient(self._use_supervisor)
        self._fork_server.connect(fork_server_end)

    def listen(self, fd: int) -> "contextlib.closing[Mailbox]":
        """Let the next supervisor find this process by its mailbox `fd`, taken; see there."""
        memory_fds = (self._memory.fd, self._grants_fd)
        client = self._supervisor
        return contextlib.closing(
            Mailbox(fd, memory_fds, lambda: client.has_supervisor, self._use_supervisor)
        )

    async def run(self, kicks: KickWatch) -> None:
        """Serve until the front-end has left or the supervisor asks to end.

        Args:
            kicks: watches no descriptor yet; lent.
        """
        self._serving = asyncio.create_task(self._serve_or_close(kicks))
        self._supervisor.answer(self._request)
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving
        self._fork_server.close()

    def _end(self) -> None:
        if self._serving is not None:
            self._serving.cancel()

    def _use_fork_server(self, fds: list[int]) -> None:
        self._fork_server.connect(lower_end_of(fds))

    def _use_supervisor(self, fds: list[int]) -> None:
        self._supervisor.connect(lower_end_of(fds))

    async def _serve_or_close(self, kicks: KickWatch) -> None:
        label = self._start.label
        try:
            with self._sock:
                if not self._start.is_over:
                    await self._serve(kicks)
        except VhostError as exc:
            _LOG.error("%s: %s; the connection is closed", label, exc)
        except OSError as exc:
            _LOG.error("%s: %s; the connection is closed", label, exc.strerror)
        except Exception:  # noqa: BLE001 - a bug must not leave the front-end without an end
            _LOG.exception("%s: the connection is closed", label)

    async def _serve(self, kicks: KickWatch) -> None:
        start = self._start
        properties = DeviceProperties(
            num_queues=start.num_queues,
            max_queue_size=start.max_queue_size,
            tag=start.tag if start.HasField("tag") else None,
        )
        device = await self._new_device(properties, kicks)
        # Without a sandbox, somebody may have stopped a worker in a debugger.
        is_looking = start.configure.HasField("sandbox")
        looking = asyncio.create_task(device.keep_looking()) if is_looking else None
        try:
            await converse(Connection(self._sock), Session(properties, device))
        finally:
            if looking is not None:
                looking.cancel()

    async def _new_device(self, properties: DeviceProperties, kicks: KickWatch) -> Device:
        services = DeviceServices(
            spawner=self._fork_server,
            keeper=self._supervisor,
            start_apart=self._supervisor.start_apart,
            restore=self._supervisor.restore,
            changed=lambda: self._supervisor.show(device.workers()),
            memory=self._memory,
            fds=(self._memory.fd, self._grants_fd),
            kicks=kicks,
            configure=self._start.configure,
        )
        label = self._start.label
        while True:  # there may be no free descriptor or memory at the moment
            try:
                device = Device(label, properties.num_queues, properties.max_queue_size, services)
            except OSError as exc:
                _LOG.error("%s: cannot serve the front-end now: %s", label, exc.strerror)
                await asyncio.sleep(_DEVICE_AGAIN_S)
            else:
                return device
