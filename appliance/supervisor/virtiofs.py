"""`appliance virtiofs`: listens for front-ends and has each served by a process of its own."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from appliance.errors import ConfigError
from appliance.supervisor.admission import DescriptorRoom, WaitingFrontEnds
from appliance.supervisor.attached_listeners import AttachedListeners
from appliance.supervisor.control_socket import ControlSocket
from appliance.supervisor.listeners import Listener
from appliance.supervisor.runtime import Runtime, RuntimeConfig, running
from appliance.supervisor.served_listener import ServedListener
from appliance.supervisor.session_mailbox import find_sessions
from appliance.supervisor.session_starter import SessionStarter
from appliance.supervisor.succession import OldForkServer, take_over
from appliance.system.listening import (
    announce_ready,
    announce_stopping,
    raise_descriptor_limit,
    stop_event,
)
from appliance.vhost.fs_device import DeviceProperties

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsConfig(RuntimeConfig):
    """The options of `appliance virtiofs`."""

    tag: bytes | None
    """As `encode_tag` returns it; None if the front-end has the tag."""
    num_request_queues: int
    queue_size: int
    """The largest number of entries that a ring may have."""
    max_front_ends: int = 1
    """The number of front-ends that are served at a time on each socket."""
    listen_dir: Path | None = None
    """Where the sockets of `appliance attach` are; None if nothing can be attached."""
    keeps_sessions: bool = False
    """Whether sessions live on after a signal has ended this process."""
    exits_on_disconnect: bool = False
    """Whether to end when a front-end leaves."""
    goes_on_without_paths: bool = False
    """Whether a saved guest that had store paths which are missing now goes on without them."""

    @property
    def properties(self) -> DeviceProperties:
        """Those of the device, on sockets without terms of their own."""
        return DeviceProperties(
            num_queues=1 + self.num_request_queues,
            max_queue_size=self.queue_size,
            tag=self.tag,
        )


def serve(config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
    """Serve front-ends on `listeners` (owned) until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ApplianceError: the store or the state directory is unusable.
    """
    raise_descriptor_limit()  # dozens of guests have regions, kicks and calls
    uvloop.run(Supervisor(config, listeners).run())


class Supervisor:
    """Serves the front-ends of all listeners, with one session process for each front-end."""

    def __init__(self, config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
        self._config = config
        self._listeners = listeners
        self._served: dict[str, ServedListener] = {}
        self._are_started = False
        self._attached: AttachedListeners | None = None
        self._old_fork_servers: list[OldForkServer] = []
        self._waiting = WaitingFrontEnds()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until a signal asks to stop; then end every session, or leave them to the next."""
        stop = self._stop = stop_event()
        async with contextlib.AsyncExitStack() as stack:
            for listener in self._listeners:
                stack.callback(listener.close)
            exported = [listener.exported for listener in self._listeners]
            runtime = await stack.enter_async_context(
                running(self._config, exported, self.report, has_sessions=True)
            )
            stack.push_async_callback(self._close, runtime)
            runtime.forker.when_it_dies(lambda: self._attach_all(runtime))
            room = DescriptorRoom(num_open=len(self._listeners))
            config = self._config
            starter = SessionStarter(
                runtime, config.state_dir, config.properties, goes_on=config.goes_on_without_paths
            )
            for listener in self._listeners:
                self._add(listener, starter, room)
            await self._serve_attached(stack, runtime, starter, room)
            await self._take_over(runtime, starter)
            runtime.forker.listen_for_successors()
            self._start_all()
            announce_ready(f"serving on {', '.join(self._served) or self._config.listen_dir}")
            runtime.forker.start_ahead()
            await stop.wait()
            announce_stopping()

    def report(self) -> dict[str, Any]:
        """Return what `appliance status` shows of this supervisor."""
        return {
            "sessions": [
                session.report() for served in self._served.values() for session in served.sessions
            ],
            "waiting": self._waiting.report(),
            "attached": [] if self._attached is None else self._attached.report(),
        }

    # --- Listeners ---

    def _add(self, listener: Listener, starter: SessionStarter, room: DescriptorRoom) -> None:
        room.add_listener()
        terms = listener.terms
        max_front_ends = None if terms is None else terms.max_front_ends
        self._served[listener.label] = ServedListener(
            listener,
            starter,
            room,
            self._waiting,
            max_front_ends=max_front_ends or self._config.max_front_ends,
            on_left=self._note_left,
        )

    def _note_left(self) -> None:
        if self._config.exits_on_disconnect:
            self._stop.set()

    async def _serve_attached(
        self,
        stack: contextlib.AsyncExitStack,
        runtime: Runtime,
        starter: SessionStarter,
        room: DescriptorRoom,
    ) -> None:
        listen_dir = self._config.listen_dir
        if listen_dir is None:
            return
        try:
            listen_dir.mkdir(mode=0o755, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"--listen-dir {listen_dir}: {exc.strerror}") from exc

        def begin(listener: Listener) -> None:
            self._add(listener, starter, room)
            if self._are_started:
                self._served[listener.label].start()

        async def end(path: Path) -> None:
            await self._served.pop(str(path)).end()
            room.remove_listener()

        self._attached = AttachedListeners(
            self._config.state_dir, listen_dir.absolute(), runtime.exports, begin, end
        )
        control = ControlSocket(self._config.state_dir, self._attached.handle)
        await control.start()
        stack.push_async_callback(control.close)
        await self._attached.restore()

    def _start_all(self) -> None:
        self._are_started = True
        for served in self._served.values():
            served.start()
        if self._attached is not None:
            self._attached.begin_changes()

    # --- The supervisor before this one, and the next ---

    async def _take_over(self, runtime: Runtime, starter: SessionStarter) -> None:
        places = [served.listener.place for served in self._served.values()]
        store_path = Path(runtime.configure.store_path)
        self._old_fork_servers = await take_over(self._config.state_dir, places, store_path)
        handed_over = [each for server in self._old_fork_servers for each in server.sessions]
        known = [inherited.record.pid for inherited in handed_over]
        state_dir, forker = self._config.state_dir, runtime.forker
        found = await find_sessions(state_dir, places, store_path, forker, known)
        for inherited in (*handed_over, *found):
            label = inherited.record.place.label
            _LOG.info("%s: session process %d is taken over", label, inherited.record.pid)
            session = starter.take_over(inherited, self._served[label].listener)
            self._served[label].sessions.append(session)
            if inherited in found:  # it has no fork server
                self._spawn_task(session.attach(forker))

    async def _close(self, runtime: Runtime) -> None:
        keeps_sessions = self._config.keeps_sessions
        # Concurrently, because each may take as long as the deadline for its end.
        await asyncio.gather(*(served.stop() for served in self._served.values()))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        is_needed = keeps_sessions and any(served.sessions for served in self._served.values())
        await asyncio.gather(
            *(served.end(keeps_sessions=keeps_sessions) for served in self._served.values())
        )
        for server in self._old_fork_servers:
            server.close()
        await runtime.forker.close(is_needed=is_needed)

    def _attach_all(self, runtime: Runtime) -> None:
        for served in self._served.values():
            for session in served.sessions:
                self._spawn_task(session.attach(runtime.forker))

    def _spawn_task(self, work: Coroutine[None, None, None]) -> None:
        # The event loop keeps only weak references to tasks.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
