"""`appliance virtiofs`: listens for front-ends and has each served by a process of its own.

The supervisor accepts a connection and passes it on before a byte is read, so it never holds a
descriptor that a front-end has sent: closing one can block for ever. Descriptors can already wait
in the connection, and the last process to close that closes them. So this process closes its side
only when a session process has the connection; one that is not to be served is passed on, too, to
be closed there.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from appliance.log import set_log_source
from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import Exported
from appliance.session.channel import VERSION
from appliance.session.link import LinkClosedError
from appliance.session.spawning import CannotSpawnError
from appliance.supervisor.admission import DescriptorRoom, WaitingFrontEnds
from appliance.supervisor.attached_session import AttachedSession
from appliance.supervisor.listeners import Listener
from appliance.supervisor.runtime import Runtime, RuntimeConfig, running
from appliance.supervisor.session_mailbox import SessionMailbox, find_sessions
from appliance.supervisor.succession import InheritedSession, OldForkServer, take_over
from appliance.system.listening import (
    announce_ready,
    announce_stopping,
    raise_descriptor_limit,
    stop_event,
)
from appliance.vhost.fs_device import DeviceProperties

_LOG = logging.getLogger(__name__)
# How long to wait before retrying when there is no descriptor or memory for a session.
_SESSION_AGAIN_S: Final = 1.0
# A front-end that comes back at once waits only for the end of the workers of its last connection.
_SHORT_WAIT_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsConfig(RuntimeConfig):
    """The options of `appliance virtiofs`."""

    tag: bytes | None
    """As `encode_tag` returns it; None if the front-end has the tag."""
    num_request_queues: int
    queue_size: int
    """The largest number of entries that a ring may have."""
    keeps_sessions: bool = False
    """Whether sessions live on after a signal has ended this process."""
    exits_on_disconnect: bool = False
    """Whether to end when a front-end leaves."""
    goes_on_without_paths: bool = False
    """Whether a saved guest that had store paths which are missing now goes on without them."""


def serve(config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
    """Serve front-ends on `listeners` (owned) until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ApplianceError: the store or the state directory is unusable.
    """
    raise_descriptor_limit()  # dozens of guests have regions, kicks and calls
    uvloop.run(Supervisor(config, listeners).run())


class Supervisor:
    """Serves one front-end at a time on each listener, with one session process for each."""

    def __init__(self, config: VirtiofsConfig, listeners: Sequence[Listener]) -> None:
        self._config = config
        self._listeners = listeners
        self._properties = DeviceProperties(
            num_queues=1 + config.num_request_queues,
            max_queue_size=config.queue_size,
            tag=config.tag,
        )
        self._sessions: dict[str, AttachedSession] = {}
        self._old_fork_servers: list[OldForkServer] = []
        # The sockets whose front-end is served, or about to be.
        self._busy: set[str] = set()
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
            room = DescriptorRoom(num_listeners=len(self._listeners))
            await self._take_over(runtime)
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
            "sessions": [session.report() for session in self._sessions.values()],
            "waiting": self._waiting.report(),
        }

    # --- The supervisor before this one, and the next ---

    async def _take_over(self, runtime: Runtime) -> None:
        places = [listener.place for listener in self._listeners]
        store_path = Path(runtime.configure.store_path)
        self._old_fork_servers = await take_over(self._config.state_dir, places, store_path)
        handed_over = [each for server in self._old_fork_servers for each in server.sessions]
        found = await find_sessions(
            self._config.state_dir,
            places,
            store_path,
            runtime.forker,
            [inherited.record.pid for inherited in handed_over],
        )
        for inherited in (*handed_over, *found):
            label = inherited.record.place.label
            _LOG.info("%s: session process %d is taken over", label, inherited.record.pid)
            self._sessions[label] = _attached(inherited, runtime, self._config)
        for inherited in found:
            session = self._sessions[inherited.record.place.label]
            self._spawn_task(session.attach(runtime.forker))

    async def _close(self, runtime: Runtime) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        sessions = list(self._sessions.values())
        if not self._config.keeps_sessions:
            # Concurrently, because each may take as long as the deadline for its end.
            await asyncio.gather(*(session.end() for session in sessions))
        for session in sessions:
            session.close(lives_on=self._config.keeps_sessions)
        for server in self._old_fork_servers:
            server.close()
        is_needed = self._config.keeps_sessions and bool(sessions)
        await runtime.forker.close(is_needed=is_needed)

    def _attach_all(self, runtime: Runtime) -> None:
        for session in self._sessions.values():
            self._spawn_task(session.attach(runtime.forker))

    # --- One listener ---

    async def _serve_listener(
        self, listener: Listener, runtime: Runtime, room: DescriptorRoom
    ) -> None:
        # One front-end is served at a time. The next one is accepted meanwhile, so that logs and
        # `status` can name it, but waits until the first leaves; others stay in the backlog.
        label = listener.label
        set_log_source(label)  # inherited by the tasks that this task starts
        if label in self._sessions:
            self._busy.add(label)
        accepting = asyncio.create_task(self._accept_next(listener))
        try:
            if label in self._sessions:
                async with room.place(label):
                    await self._stay_until_end(label)
            while True:
                sock = await asyncio.shield(accepting)
                self._busy.add(label)
                self._waiting.remove(label)
                accepting = asyncio.create_task(self._accept_next(listener))
                await self._serve_connection(sock, listener, runtime, room)
                if self._config.exits_on_disconnect:
                    self._stop.set()
        finally:
            accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self._spawn_task(self._hand_over(await accepting, listener, runtime, is_over=True))

    async def _accept_next(self, listener: Listener) -> socket.socket:
        sock = await listener.accept()
        session = self._sessions.get(listener.label)
        with contextlib.suppress(asyncio.CancelledError):
            if listener.label in self._busy and not (
                session is not None and await session.ends_within(_SHORT_WAIT_S)
            ):
                self._waiting.add(listener.label, sock)
        return sock

    async def _serve_connection(
        self, sock: socket.socket, listener: Listener, runtime: Runtime, room: DescriptorRoom
    ) -> None:
        label = listener.label
        _LOG.info("%s: front-end connected", label)
        try:
            async with room.place(label):
                await asyncio.shield(self._spawn_task(self._hand_over(sock, listener, runtime)))
                await self._stay_until_end(label)
        except Exception:  # noqa: BLE001 - a bug met by one front-end must not end the others
            _LOG.exception("%s: the connection is closed", label)
        _LOG.info("%s: front-end left", label)

    async def _stay_until_end(self, label: str) -> None:
        session = self._sessions[label]
        await session.wait()
        self._busy.remove(label)
        del self._sessions[label]
        session.close()

    async def _hand_over(
        self, sock: socket.socket, listener: Listener, runtime: Runtime, *, is_over: bool = False
    ) -> None:
        """Pass `sock` (taken) on to a new session process, however long that takes."""
        label = listener.label
        start = pb.StartSession(
            label=label,
            num_queues=self._properties.num_queues,
            max_queue_size=self._properties.max_queue_size,
            tag=self._properties.tag,
            configure=runtime.configure,
            is_over=is_over,
        )
        with sock:
            while (session := await self._started(sock, start, listener, runtime)) is None:
                pass
            self._sessions[label] = session
        if is_over:
            await self._stay_until_end(label)

    async def _started(
        self, sock: socket.socket, start: pb.StartSession, listener: Listener, runtime: Runtime
    ) -> AttachedSession | None:
        try:
            session = await self._new_session(listener, runtime, is_over=start.is_over)
        except LinkClosedError as exc:
            if isinstance(exc, CannotSpawnError):
                await asyncio.sleep(_SESSION_AGAIN_S)
            return None
        except OSError as exc:
            _LOG.error("%s: cannot serve the front-end now: %s", start.label, exc.strerror)
            await asyncio.sleep(_SESSION_AGAIN_S)
            return None
        try:
            await session.start(sock, start)
        except LinkClosedError:
            await session.end()
            await session.wait()  # logs why
            session.close()
            await asyncio.sleep(_SESSION_AGAIN_S)
            return None
        return session

    async def _new_session(
        self, listener: Listener, runtime: Runtime, *, is_over: bool
    ) -> AttachedSession:
        num_queues = self._properties.num_queues
        served = runtime.new_session(num_queues, listener.exported, listener.label)
        state_dir = self._config.state_dir
        mailbox = SessionMailbox(state_dir, "") if is_over else SessionMailbox.create(state_dir)
        record = pb.SessionRecord(
            place=listener.place,
            store_path=runtime.configure.store_path,
            is_by_content=runtime.is_by_content,
            version=VERSION,
            num_queues=num_queues,
            mailbox=mailbox.name,
        )
        try:
            started = await runtime.forker.spawn_session(record, served.kept_fds)
        except BaseException:
            served.close()
            mailbox.remove()
            raise
        record.pid = started.pid
        mailbox.write(record, served)
        return AttachedSession(
            record,
            started.pidfd,
            started.end,
            started.exit,
            served,
            mailbox,
            goes_on=self._config.goes_on_without_paths,
        )

    def _spawn_task(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        # The event loop keeps only weak references to tasks.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _attached(
    inherited: InheritedSession, runtime: Runtime, config: VirtiofsConfig
) -> AttachedSession:
    record = inherited.record
    place = record.place
    served = runtime.resumed_session(
        record.num_queues,
        Exported(place.view or None, place.root or None),
        (inherited.memory_fd, inherited.grants_fd),
        inherited.lease_fd,
    )
    return AttachedSession(
        record,
        inherited.pidfd,
        inherited.end,
        inherited.exit,
        served,
        SessionMailbox(config.state_dir, record.mailbox),
        goes_on=config.goes_on_without_paths,
    )


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
