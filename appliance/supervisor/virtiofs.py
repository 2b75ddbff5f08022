"""`appliance virtiofs`: listens for front-ends and serves each with a device of its own."""

import asyncio
import contextlib
import logging
import select
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import uvloop

from appliance.errors import VhostError
from appliance.log import set_log_source
from appliance.supervisor.admission import DescriptorRoom
from appliance.supervisor.device import Device
from appliance.supervisor.listeners import Listener
from appliance.supervisor.runtime import Runtime, RuntimeConfig, running
from appliance.system.listening import notify, raise_descriptor_limit, told_to_stop
from appliance.vhost.session import DeviceProperties, Session, converse
from appliance.vhost.transport import Connection

_LOG = logging.getLogger(__name__)
_ACCEPT_AGAIN_S: Final = 1.0
# struct ucred (unix(7)): pid, uid, gid.
_UCRED: Final = struct.Struct("=iII")


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsConfig(RuntimeConfig):
    """What `appliance virtiofs` was asked to do."""

    tag: bytes | None
    num_request_queues: int
    queue_size: int


def serve(config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
    """Serve front-ends on `listeners` (owned) until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ApplianceError: the store or the state directory is unusable.
    """
    raise_descriptor_limit()  # of regions, kicks and calls of dozens of guests
    uvloop.run(Supervisor(config, listeners).run())


class Supervisor:
    """The long-lived state: envs, fork server, listeners, one session per connected front-end."""

    def __init__(self, config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
        self._config = config
        self._listeners = listeners
        self._properties = DeviceProperties(
            num_queues=1 + config.num_request_queues,
            max_queue_size=config.queue_size,
            tag=config.tag,
        )
        self._devices: list[Device] = []
        self._waiting = _Waiting()

    async def run(self) -> None:
        """Serve until told to stop, then end every worker."""
        stop = told_to_stop()
        async with contextlib.AsyncExitStack() as stack:
            for listener in self._listeners:
                stack.callback(listener.close)
            runtime = await stack.enter_async_context(running(self._config, self.report))
            room = DescriptorRoom(
                num_queues=self._properties.num_queues, num_listeners=len(self._listeners)
            )
            serving = [
                asyncio.create_task(self._serve_listener(listener, runtime, room))
                for listener in self._listeners
            ]
            stack.push_async_callback(_cancel, serving)
            _say_ready(self._listeners)
            await stop.wait()
            notify("STOPPING=1")

    def report(self) -> dict[str, Any]:
        """Return what `appliance status` shows of this supervisor."""
        return {
            "sessions": [
                {
                    "socket": device.label,
                    "workers": device.workers(),
                    "requests": device.requests(),
                }
                for device in self._devices
            ],
            "waiting": self._waiting.report(),
        }

    async def _serve_listener(
        self, listener: Listener, runtime: Runtime, room: DescriptorRoom
    ) -> None:
        # One front-end at a time on a socket. The next one is accepted, so that it can be told of,
        # and waits until the first leaves; those after it wait in the backlog.
        set_log_source(listener.label)  # for this task, and what it begins
        accepting = asyncio.create_task(_accept(listener))
        try:
            while True:
                sock = await accepting
                accepting = asyncio.create_task(self._accept_next(listener, sock))
                await self._serve_connection(sock, listener, runtime, room)
                self._waiting.remove(listener.label)
        finally:
            await _give_up(accepting)

    async def _accept_next(self, listener: Listener, served: socket.socket) -> socket.socket:
        sock = await _accept(listener)
        if not _has_left(served):  # one that has is no reason to wait, only its workers still end
            self._waiting.add(listener.label, sock)
        return sock

    async def _serve_connection(
        self, sock: socket.socket, listener: Listener, runtime: Runtime, room: DescriptorRoom
    ) -> None:
        _LOG.info("%s: front-end connected", listener.label)
        try:
            with sock:
                async with room.place(listener.label):
                    await self._serve_front_end(sock, listener.label, runtime)
        except VhostError as exc:
            _LOG.error("%s: %s; the connection is closed", listener.label, exc)
        except OSError as exc:
            _LOG.error("%s: %s; the connection is closed", listener.label, exc.strerror)
        except Exception:  # noqa: BLE001 - a bug met by one front-end is not the others' end
            _LOG.exception("%s: the connection is closed", listener.label)
        _LOG.info("%s: front-end left", listener.label)

    async def _serve_front_end(self, sock: socket.socket, label: str, runtime: Runtime) -> None:
        device = await self._new_device(label, runtime)
        self._devices.append(device)
        try:
            await converse(Connection(sock), Session(self._properties, device))
        finally:
            self._devices.remove(device)

    async def _new_device(self, label: str, runtime: Runtime) -> Device:
        # As in `_accept`: there may be no descriptor or memory left for now.
        while True:
            try:
                return Device(
                    label, self._properties.num_queues, self._properties.max_queue_size, runtime
                )
            except OSError as exc:
                _LOG.error("%s: the front-end cannot be served now: %s", label, exc.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN_S)


class _Waiting:
    """Front-ends that wait for the one served on their socket to leave."""

    def __init__(self) -> None:
        self._socks: dict[str, socket.socket] = {}

    def add(self, label: str, sock: socket.socket) -> None:
        """Note, and log, that the front-end at the other end of `sock` waits."""
        self._socks[label] = sock
        _LOG.warning(
            "%s: a second front-end, process %d, waits until the one that is served leaves",
            label,
            _pid_of(sock),
        )

    def remove(self, label: str) -> None:
        """Note that nobody waits at this socket any more."""
        self._socks.pop(label, None)

    def report(self) -> list[dict[str, object]]:
        """Return who waits; those that have given up meanwhile do not."""
        return [
            {"socket": label, "pid": _pid_of(sock)}
            for label, sock in self._socks.items()
            if not _has_left(sock)
        ]


def _pid_of(sock: socket.socket) -> int:
    pid, _uid, _gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return int(pid)


def _has_left(sock: socket.socket) -> bool:
    if sock.fileno() < 0:
        return True  # and has been closed since
    poller = select.poll()
    poller.register(sock, 0)  # of hanging up one always hears
    return bool(poller.poll(0))


async def _give_up(accepting: "asyncio.Task[socket.socket]") -> None:
    accepting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        (await accepting).close()


async def _accept(listener: Listener) -> socket.socket:
    # Whatever accept(2) fails with concerns one connection, or passes: there may be no descriptor
    # left for now. The listener must outlive it.
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, _address = await loop.sock_accept(listener.sock)
        except OSError as exc:
            _LOG.error("%s: no front-end is accepted now: %s", listener.label, exc.strerror)
            await asyncio.sleep(_ACCEPT_AGAIN_S)
        else:
            return sock


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _say_ready(listeners: Sequence[Listener]) -> None:
    places = ", ".join(listener.label for listener in listeners)
    sys.stderr.write(f"READY: serving on {places}\n")
    sys.stderr.flush()
    notify("READY=1")
