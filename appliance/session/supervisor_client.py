"""A session process's way to its supervisor, and to the next one when that has ended.

What workers want is asked of the supervisor and, if it ends before it has answered, of the next
one. Guests that miss nothing see no difference meanwhile. What is wanted while there is no
supervisor waits for `_ABSENCE_S`, and then fails with EIO; it is asked for again when a guest wants
it again.
"""

import asyncio
from collections.abc import Callable, Sequence
from errno import EIO
from typing import Final

from appliance.bounds import WANTS_MAX
from appliance.errors import VhostError
from appliance.protos import control_pb2 as pb
from appliance.protos.device_state_pb2 import DeviceState
from appliance.session.device_state import parts
from appliance.session.link import Link, LinkClosedError, close_all
from appliance.session.uplink import LowerEnd
from appliance.session.wants import Want, pack_want

# How long to wait for the next supervisor.
_ABSENCE_S: Final = 30.0
# How long the supervisor may take to find the store paths of one message.
_RESTORE_DEADLINE_S: Final = 90.0
# Keys of cache entries in one message, which must fit a packet.
_KEYS_MAX: Final = 64


class SupervisorClient:
    """A `Keeper`, for all workers of the session.

    Args:
        end: this side of the channel, taken.
        on_end: called when the supervisor asks this process to end.
        on_new_fork_server: called when there is another fork server, with the descriptors (taken)
            of this side of the channel to it; see `fork_client.lower_end_of`.
    """

    def __init__(
        self,
        end: LowerEnd,
        on_end: Callable[[], None],
        on_new_fork_server: Callable[[list[int]], None],
    ) -> None:
        self._on_end = on_end
        self._on_new_fork_server = on_new_fork_server
        self._room = asyncio.Semaphore(WANTS_MAX)
        self._is_there = asyncio.Event()
        self._workers: pb.SessionStatus | None = None
        self._has_dead_worker = False
        self._link = self._connected(end)

    @property
    def has_supervisor(self) -> bool:
        """Whether there is a supervisor at present."""
        return self._link.is_open

    def connect(self, end: LowerEnd) -> None:
        """Ask the supervisor at the other side of `end`, which is taken, from now on."""
        self._link.close()
        self._link = self._connected(end)
        if self._workers is not None:
            self._link.post(pb.Envelope(session_status=self._workers))
        if self._has_dead_worker:
            self._has_dead_worker = False
            self._link.post(pb.Envelope(worker_died=pb.WorkerDied()))

    def answer(self, request: pb.Envelope) -> None:
        """Send Done for a request of the supervisor."""
        self._link.post(pb.Envelope(id=request.id, done=pb.Done()))

    def show(self, workers: Sequence[pb.WorkerStatus]) -> None:
        """Have `appliance status` show these workers."""
        self._workers = pb.SessionStatus(workers=workers)
        self._link.post(pb.Envelope(session_status=self._workers))

    async def start_apart(self) -> None:
        """See `GrantTable.start_apart`.

        Raises:
            VhostError: there is no supervisor.
        """
        if await self._ask(pb.Envelope(start_apart=pb.StartApart())) is None:
            raise VhostError("there is no supervisor that could number the nodes")

    async def restore(self, state: DeviceState) -> None:
        """Have the session granted what `state` says, in place of what it is granted now.

        No worker of the session may live. If the state is refused, nothing is changed.

        Raises:
            VhostError: a store path is missing, or has other content; or there is no supervisor.
        """
        is_first = True
        for part in parts(state):
            await self._restore(pb.Restore(is_first=is_first, part=part))
            is_first = False
        await self._restore(pb.Restore(is_last=True))

    async def _restore(self, message: pb.Restore) -> None:
        try:
            async with asyncio.timeout(_RESTORE_DEADLINE_S):
                reply = await self._ask(pb.Envelope(restore=message))
        except TimeoutError:
            reply = None
        if reply is None:
            raise VhostError("there is no supervisor that could grant the saved store paths")
        if reply.done.error:
            raise VhostError(reply.done.error)

    # --- Keeper ---

    async def resolve(self, want: Want) -> int:
        """See `Keeper.resolve`."""
        async with self._room:
            reply = await self._ask(pb.Envelope(resolve=pack_want(want)))
        return EIO if reply is None else reply.resolved.errno

    def cache_used(self, keys: Sequence[bytes]) -> None:
        """See `Keeper.cache_used`."""
        for start in range(0, len(keys), _KEYS_MAX):
            used = pb.CacheUsed(keys=keys[start : start + _KEYS_MAX])
            self._link.post(pb.Envelope(cache_used=used))

    def first_reads(self, reads: pb.FirstReads) -> None:
        """See `Keeper.first_reads`."""
        self._link.post(pb.Envelope(first_reads=reads))

    async def reap_readers(self) -> None:
        """See `Keeper.reap_readers`."""
        if self._link.is_open:
            self._link.post(pb.Envelope(worker_died=pb.WorkerDied()))
        else:
            self._has_dead_worker = True

    # --- The channel ---

    async def _ask(self, request: pb.Envelope) -> pb.Envelope | None:
        """Return the reply, or None if there is no supervisor for too long."""
        while True:
            try:
                async with asyncio.timeout(_ABSENCE_S):
                    await self._is_there.wait()
            except TimeoutError:
                return None
            try:
                return await self._link.request(request)
            except LinkClosedError:
                continue  # the next supervisor is asked

    def _connected(self, end: LowerEnd) -> Link:
        self._is_there.set()
        return Link(end, self._on_message, self._is_there.clear)

    def _on_message(self, envelope: pb.Envelope, fds: list[int]) -> None:
        kind = envelope.WhichOneof("body")
        if kind == "end_session":
            self._on_end()
        elif kind == "new_peer" and len(fds) == 2:
            self._on_new_fork_server(fds)
            return
        close_all(fds)
