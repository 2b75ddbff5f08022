"""`appliance virtiofs`: listens for front-ends and serves each with a device of its own."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import uvloop

from appliance.errors import VhostError
from appliance.log import set_log_source
from appliance.sockets import notify, raise_descriptor_limit, told_to_stop
from appliance.supervisor.descriptors import DescriptorRoom
from appliance.supervisor.device import Device
from appliance.supervisor.services import ServiceConfig, Services, running
from appliance.supervisor.sockets import Listener
from appliance.vhost.conversation import converse
from appliance.vhost.session import DeviceProperties, Session
from appliance.vhost.transport import Connection

_LOG = logging.getLogger(__name__)
_ACCEPT_AGAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsConfig(ServiceConfig):
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

    async def run(self) -> None:
        """Serve until told to stop, then end every worker."""
        stop = told_to_stop()
        async with contextlib.AsyncExitStack() as stack:
            for listener in self._listeners:
                stack.callback(listener.close)
            services = await stack.enter_async_context(running(self._config, self.report))
            room = DescriptorRoom(
                num_queues=self._properties.num_queues, num_listeners=len(self._listeners)
            )
            serving = [
                asyncio.create_task(self._serve_listener(listener, services, room))
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
            ]
        }

    async def _serve_listener(
        self, listener: Listener, services: Services, room: DescriptorRoom
    ) -> None:
        # One front-end at a time on a socket; a second one waits in the backlog until the first
        # leaves.
        set_log_source(listener.label)  # for this task, and what it begins
        while True:
            sock = await _accept(listener)
            _LOG.info("%s: front-end connected", listener.label)
            try:
                with sock:
                    async with room.place(listener.label):
                        await self._serve_front_end(sock, listener.label, services)
            except VhostError as exc:
                _LOG.error("%s: %s; the connection is closed", listener.label, exc)
            except OSError as exc:
                _LOG.error("%s: %s; the connection is closed", listener.label, exc.strerror)
            except Exception:  # noqa: BLE001 - a bug met by one front-end is not the others' end
                _LOG.exception("%s: the connection is closed", listener.label)
            _LOG.info("%s: front-end left", listener.label)

    async def _serve_front_end(self, sock: socket.socket, label: str, services: Services) -> None:
        device = await self._new_device(label, services)
        self._devices.append(device)
        try:
            await converse(Connection(sock), Session(self._properties, device))
        finally:
            self._devices.remove(device)

    async def _new_device(self, label: str, services: Services) -> Device:
        # As in `_accept`: there may be no descriptor or memory left for now.
        while True:
            try:
                return Device(
                    label, self._properties.num_queues, self._properties.max_queue_size, services
                )
            except OSError as exc:
                _LOG.error("%s: the front-end cannot be served now: %s", label, exc.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN_S)


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
