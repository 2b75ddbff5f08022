"""What a device needs besides its front-end: processes, a session, and somebody who resolves."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from appliance.protos import control_pb2 as pb
from appliance.session.session_memory import SessionMemory
from appliance.session.spawning import Spawner
from appliance.session.worker_process import Keeper


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceServices:
    """Everything is lent; see `Device`."""

    spawner: Spawner
    keeper: Keeper
    start_apart: Callable[[], Awaitable[None]]
    """See `GrantTable.start_apart`; raises VhostError if nobody can do it."""
    changed: Callable[[], None]
    """Called when a worker has started or died."""
    memory: SessionMemory
    fds: Sequence[int]
    """Session memory and grants, which every worker gets first."""
    configure: pb.Configure
    """The part of the first message that is the same for every worker."""

    def configure_for(self, queue: int) -> pb.Configure:
        """Return the first message to the worker of `queue`."""
        configure = pb.Configure(queue=queue)
        configure.MergeFrom(self.configure)
        return configure
