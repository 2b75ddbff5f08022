"""`appliance virtiofs`: listens for vhost-user front-ends and serves each with its own device."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import uvloop

from appliance.errors import VhostError
from appliance.log import set_log_source
from appliance.supervisor.admission import DescriptorRoom, WaitingFrontEnds, has_hung_up
from appliance.supervisor.device import Device
from appliance.supervisor.listeners import Listener, cancel_accept
from appliance.supervisor.runtime import Runtime, RuntimeConfig, running
from appliance.system.listening import (
    announce_ready,
    announce_stopping,
    raise_descriptor_limit,
    stop_event,
)
from appliance.vhost.fs_device import DeviceProperties
from appliance.vhost.session import Session, converse
from appliance.vhost.transport import Connection

_LOG = logging.getLogger(__name__)
# How long to wait before retrying when there is no descriptor or memory for a device.
_DEVICE_AGAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsConfig(RuntimeConfig):
    """The options of `appliance virtiofs`."""

    tag: bytes | None
    """As `encode_tag` returns it; None if the front-end has the tag."""
    num_request_queues: int
    queue_size: int
    """The largest number of entries that a ring may have."""
    exits_on_disconnect: bool = False
    """Whether to end when a front-end leaves."""


def serve(config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
    """Serve front-ends on `listeners` (owned) until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ApplianceError: the store or the state directory is unusable.
    """
    raise_descriptor_limit()  # dozens of guests have regions, kicks and calls
    uvloop.run(Supervisor(config, listeners).run())


class Supervisor:
    """Serves one front-end at a time on each listener, with one session per connection."""

    def __init__(self, config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
        self._config = config
        self._listeners = listeners
        self._properties = DeviceProperties(
            num_queues=1 + config.num_request_queues,
            max_queue_size=config.queue_size,
            tag=config.tag,
        )
        self._devices: list[Device] = []
        self._waiting = WaitingFrontEnds()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until a signal asks to stop, then end every worker."""
        stop = self._stop = stop_event()
        async with contextlib.AsyncExitStack() as stack:
            for listener in self._listeners:
                stack.callback(listener.close)
            exported = [listener.exported for listener in self._listeners]
            runtime = await stack.enter_async_context(running(self._config, exported, self.report))
            room = DescriptorRoom(
                num_queues=self._properties.num_queues, num_listeners=len(self._listeners)
            )
            serving = [
                asyncio.create_task(self._serve_listener(listener, runtime, room))
                for listener in self._listeners
            ]
            stack.push_async_callback(_cancel, serving)
            labels = ", ".join(listener.label for listener in self._listeners)
            announce_ready(f"serving on {labels}")
            await stop.wait()
            announce_stopping()

    def report(self) -> dict[str, Any]:
        """Return what `appliance status` shows of this supervisor."""
        return {
            "sessions": [
                {
                    "socket": device.label,
                    "workers": device.workers(),
                    **device.statistics(),
                    "holds": device.holdings(),
                }
                for device in self._devices
            ],
            "waiting": self._waiting.report(),
        }

    async def _serve_listener(
        self, listener: Listener, runtime: Runtime, room: DescriptorRoom
    ) -> None:
        # One front-end is served at a time. The next one is accepted meanwhile, so that logs and
        # `status` can name it, but waits until the first leaves; others stay in the backlog.
        set_log_source(listener.label)  # inherited by the tasks that this task starts
        accepting = asyncio.create_task(listener.accept())
        try:
            while True:
                sock = await accepting
                accepting = asyncio.create_task(self._accept_next(listener, sock))
                await self._serve_connection(sock, listener, runtime, room)
                if self._config.exits_on_disconnect:
                    self._stop.set()
                self._waiting.remove(listener.label)
        finally:
            await cancel_accept(accepting)

    async def _accept_next(self, listener: Listener, served: socket.socket) -> socket.socket:
        sock = await listener.accept()
        # If the front-end on `served` has hung up, only its workers must still end: a short wait.
        if not has_hung_up(served):
            self._waiting.add(listener.label, sock)
        return sock

    async def _serve_connection(
        self, sock: socket.socket, listener: Listener, runtime: Runtime, room: DescriptorRoom
    ) -> None:
        label = listener.label
        _LOG.info("%s: front-end connected", label)
        try:
            with sock:
                async with room.place(label):
                    await self._serve_front_end(sock, listener, runtime)
        except VhostError as exc:
            _LOG.error("%s: %s; the connection is closed", label, exc)
        except OSError as exc:
            _LOG.error("%s: %s; the connection is closed", label, exc.strerror)
        except Exception:  # noqa: BLE001 - a bug met by one front-end must not end the others
            _LOG.exception("%s: the connection is closed", label)
        _LOG.info("%s: front-end left", label)

    async def _serve_front_end(
        self, sock: socket.socket, listener: Listener, runtime: Runtime
    ) -> None:
        device = await self._new_device(listener, runtime)
        self._devices.append(device)
        try:
            await converse(Connection(sock), Session(self._properties, device))
        finally:
            self._devices.remove(device)

    async def _new_device(self, listener: Listener, runtime: Runtime) -> Device:
        # As in `Listener.accept`, there may be no free descriptor or memory at the moment.
        while True:
            try:
                return Device(
                    listener.label,
                    self._properties.num_queues,
                    self._properties.max_queue_size,
                    runtime,
                    listener.exported,
                )
            except OSError as exc:
                _LOG.error("%s: cannot serve the front-end now: %s", listener.label, exc.strerror)
                await asyncio.sleep(_DEVICE_AGAIN_S)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
