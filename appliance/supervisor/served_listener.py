"""One listening socket that is served: its front-ends, each with a session, and the one that waits.

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
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from appliance.log import set_log_source
from appliance.supervisor.admission import DescriptorRoom, WaitingFrontEnds
from appliance.supervisor.attached_session import AttachedSession
from appliance.supervisor.listeners import Listener
from appliance.supervisor.session_starter import SessionStarter

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
# A front-end that comes back at once waits only for the end of the workers of its last connection.
_SHORT_WAIT_S: Final = 0.5


class ServedListener:
    """Serves up to a number of front-ends of one socket at a time; others wait.

    The next front-end is accepted while it has to wait, so that logs and `status` can name it; all
    others stay in the backlog of the socket.

    Args:
        listener: the socket, owned.
        starter: starts sessions.
        room: admits front-ends.
        waiting: where front-ends that wait are noted.
        max_front_ends: the number of front-ends that are served at a time.
        on_left: called when a front-end has left.
    """

    def __init__(
        self,
        listener: Listener,
        starter: SessionStarter,
        room: DescriptorRoom,
        waiting: WaitingFrontEnds,
        *,
        max_front_ends: int,
        on_left: Callable[[], None],
    ) -> None:
        self.listener = listener
        self.sessions: list[AttachedSession] = []
        self._starter = starter
        self._room = room
        self._waiting = waiting
        self._max_front_ends = max_front_ends
        self._on_left = on_left
        # Those whose session runs, and those for which one is about to be started.
        self._num_served = 0
        self._left = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None
        self._front_ends: set[asyncio.Task[None]] = set()
        # Connections that were accepted, and of which no session process knows.
        self._unpassed: set[socket.socket] = set()
        # What must come to its end: connections that are being passed on.
        self._passing: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        """Accept and serve front-ends from now on, beside those in `sessions`."""
        for session in self.sessions:
            self._begin(self._serve_inherited(session))
        self._accepting = asyncio.create_task(self._accept_all())

    async def stop(self) -> None:
        """Accept and serve no others; those that are served go on, and are in `sessions`."""
        if self._accepting is not None:
            await _cancel([self._accepting])
        await _cancel(self._front_ends)
        for sock in self._unpassed:
            self._pass_on(self._turn_away(sock))
        self._unpassed.clear()
        while self._passing:
            await asyncio.gather(*self._passing, return_exceptions=True)

    async def end(self, *, keeps_sessions: bool = False) -> None:
        """Stop, end all sessions or leave them to another supervisor, and close the socket.

        Its file is removed.
        """
        await self.stop()
        if not keeps_sessions:
            # Concurrently, because each may take as long as the deadline for its end.
            await asyncio.gather(*(session.end() for session in self.sessions))
        for session in self.sessions:
            session.close(lives_on=keeps_sessions)
        self.sessions.clear()
        self.listener.close()

    # --- Accepting ---

    async def _accept_all(self) -> None:
        set_log_source(self.listener.label)  # inherited by the tasks that this task starts
        while True:
            accepting = asyncio.create_task(self.listener.accept())
            try:
                sock = await asyncio.shield(accepting)
            except asyncio.CancelledError:
                accepting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    self._unpassed.add(await accepting)
                raise
            self._unpassed.add(sock)
            await self._wait_for_turn(sock)
            self._begin(self._serve_new(sock))

    async def _wait_for_turn(self, sock: socket.socket) -> None:
        if self._num_served < self._max_front_ends:
            return
        label = self.listener.label
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHORT_WAIT_S):
                    await self._one_leaves()
                    return
            self._waiting.add(label, sock)
            await self._one_leaves()
        finally:
            self._waiting.remove(label)

    async def _one_leaves(self) -> None:
        while self._num_served >= self._max_front_ends:
            self._left.clear()
            await self._left.wait()

    # --- One front-end ---

    def _begin(self, serving: Coroutine[None, None, None]) -> None:
        self._num_served += 1
        task = asyncio.create_task(serving)
        self._front_ends.add(task)
        task.add_done_callback(self._front_ends.discard)

    async def _serve_new(self, sock: socket.socket) -> None:
        label = self.listener.label
        _LOG.info("%s: front-end connected", label)
        try:
            async with self._room.place(label):
                self._unpassed.discard(sock)
                session = await asyncio.shield(self._pass_on(self._hand_over(sock)))
                await self._stay_until_end(session)
        except Exception:  # noqa: BLE001 - a bug met by one front-end must not end the others
            _LOG.exception("%s: the connection is closed", label)
        finally:
            self._note_left()
        self._on_left()

    async def _serve_inherited(self, session: AttachedSession) -> None:
        try:
            async with self._room.place(self.listener.label):
                await self._stay_until_end(session)
        finally:
            self._note_left()

    def _note_left(self) -> None:
        self._num_served -= 1
        self._left.set()

    async def _stay_until_end(self, session: AttachedSession) -> None:
        await session.wait()
        self.sessions.remove(session)
        session.close()
        _LOG.info("%s: front-end left", self.listener.label)

    async def _hand_over(self, sock: socket.socket) -> AttachedSession:
        session = await self._starter.start(sock, self.listener)
        self.sessions.append(session)
        return session

    async def _turn_away(self, sock: socket.socket) -> None:
        session = await self._starter.start(sock, self.listener, is_over=True)
        await session.wait()
        session.close()

    def _pass_on(self, work: Coroutine[None, None, T]) -> "asyncio.Task[T]":
        # The event loop keeps only weak references to tasks.
        task = asyncio.create_task(work)
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        return task


async def _cancel(tasks: "set[asyncio.Task[None]] | list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
