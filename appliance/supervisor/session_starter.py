"""Starts a session process for each front-end, and takes over those of a former supervisor."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import Final

from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import Exported
from appliance.session.channel import VERSION
from appliance.session.link import LinkClosedError
from appliance.session.spawning import CannotSpawnError
from appliance.supervisor.attached_session import AttachedSession
from appliance.supervisor.listeners import Listener
from appliance.supervisor.profiling import NO_PROFILING
from appliance.supervisor.runtime import Runtime
from appliance.supervisor.session_mailbox import SessionMailbox
from appliance.supervisor.succession import InheritedSession
from appliance.vhost.fs_device import DeviceProperties

_LOG = logging.getLogger(__name__)
# How long to wait before retrying when there is no descriptor or memory for a session.
_SESSION_AGAIN_S: Final = 1.0


class SessionStarter:
    """Starts the sessions of one supervisor.

    Each has a device of `properties`, unless its listener has terms of its own. If `goes_on`, a
    guest that was saved goes on without store paths that are missing.
    """

    def __init__(
        self,
        runtime: Runtime,
        state_dir: Path,
        properties: DeviceProperties,
        *,
        goes_on: bool = False,
    ) -> None:
        self._goes_on = goes_on
        self._state_dir = state_dir
        self._runtime = runtime
        self._properties = properties

    async def start(
        self, sock: socket.socket, listener: Listener, *, is_over: bool = False
    ) -> AttachedSession:
        """Pass a connection on to a new session process, however long that takes.

        Args:
            sock: the connection, taken, of which no byte was read.
            listener: where it came.
            is_over: whether the connection is only to be closed there.
        """
        properties = self._properties_at(listener)
        start = pb.StartSession(
            label=listener.label,
            num_queues=properties.num_queues,
            max_queue_size=properties.max_queue_size,
            tag=properties.tag,
            configure=self._runtime.configure,
            is_over=is_over,
        )
        start.configure.is_recorded = listener.profiling.record is not None
        with sock:
            while (session := await self._started(sock, start, listener)) is None:
                pass
        return session

    def take_over(self, inherited: InheritedSession, listener: Listener) -> AttachedSession:
        """Return a session that a former supervisor has started, on the socket of `listener`."""
        record = inherited.record
        place = record.place
        served = self._runtime.resumed_session(
            record.num_queues,
            Exported(place.view or None, place.root or None),
            (inherited.memory_fd, inherited.grants_fd),
            inherited.lease_fd,
            listener.profiling,
        )
        return AttachedSession(
            record,
            inherited.pidfd,
            inherited.end,
            inherited.exit,
            served,
            SessionMailbox(self._state_dir, record.mailbox),
            goes_on=self._goes_on,
        )

    def _properties_at(self, listener: Listener) -> DeviceProperties:
        return self._properties if listener.terms is None else listener.terms.properties

    async def _started(
        self, sock: socket.socket, start: pb.StartSession, listener: Listener
    ) -> AttachedSession | None:
        try:
            session = await self._new_session(listener, is_over=start.is_over)
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

    async def _new_session(self, listener: Listener, *, is_over: bool) -> AttachedSession:
        num_queues = self._properties_at(listener).num_queues
        runtime, state_dir = self._runtime, self._state_dir
        profiling = NO_PROFILING if is_over else listener.profiling
        served = runtime.new_session(num_queues, listener.exported, listener.label, profiling)
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
            goes_on=self._goes_on,
        )
