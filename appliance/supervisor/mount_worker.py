"""A worker on a clone of a mount's /dev/fuse descriptor, as the supervisor sees it."""

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from appliance.fuse_proto._fuse_wire import InitFlag
from appliance.protos import control_pb2 as pb
from appliance.session.wants import BackingWanted, unpack_want
from appliance.supervisor.link import Link, LinkClosedError
from appliance.supervisor.runtime import Runtime
from appliance.supervisor.worker_process import (
    START_ATTEMPTS,
    WorkerFailedError,
    WorkerProcess,
)

if TYPE_CHECKING:
    from appliance.supervisor.mount import Mount

_LOG = logging.getLogger(__name__)
# A mount that is in use outlives its place in the tree; its workers are killed then.
_END_DEADLINE_S: Final = 0.2


class MountWorker:
    """Serves one clone with a worker of its own; the `WorkerOwner` of that process."""

    def __init__(self, slot: int, mount: "Mount", runtime: Runtime) -> None:
        self._slot = slot
        self._mount = mount
        self._runtime = runtime
        self._fd = mount.mountpoint.clone()
        label = f"{mount.label} worker {slot}"
        self._process = WorkerProcess(label, runtime.forker, mount.session, self)

    @property
    def pid(self) -> int:
        """The process id of the last worker started, 0 if there was none."""
        return self._process.pid

    @property
    def restarts(self) -> int:
        """How often a worker of this clone died."""
        return self._process.restarts

    @property
    def is_alive(self) -> bool:
        """Whether there is a process, as far as is known."""
        return self._process.link is not None

    async def close(self) -> None:
        """End the worker and close the clone; the mount must be gone by then."""
        # The worker waits in read(2), not on its channel: it ends by itself only with the mount.
        await self._process.close(_END_DEADLINE_S)
        os.close(self._fd)

    async def start(self) -> None:
        """Return when a worker has its clone; the mount fails if none lives long enough."""
        try:
            await self._process.do(self._nothing_more, attempts=START_ATTEMPTS)
        except WorkerFailedError as exc:
            self._mount.fail(str(exc))
        except LinkClosedError:
            return  # closing

    # --- WorkerOwner ---

    def configuration(self) -> tuple[pb.Configure, Sequence[int]]:
        """See `WorkerOwner`."""
        configure = self._runtime.configure_for(
            self._slot, pb.Device(passthrough=self._mount.has_passthrough)
        )
        return configure, [*self._mount.session.fds, self._fd]

    async def bring_up(self, link: Link) -> None:
        """See `WorkerOwner`; the descriptor is all that this worker needs."""

    def died(self) -> None:
        """See `WorkerOwner`."""
        if self.restarts >= START_ATTEMPTS and not self._mount.session.memory.is_initialised:
            self._mount.fail(f"{START_ATTEMPTS} workers died at their start")
            self._process.begin_close()
            return
        self._recover_requests()

    def received(self, envelope: pb.Envelope) -> None:
        """See `WorkerOwner`."""
        match envelope.WhichOneof("body"):
            case "device_ended":
                self._process.begin_close()
                self._mount.ended.set()
            case "resolve":
                self._process.spawn_task(self._grant(envelope, self._process.link))
            case "released":
                self._mount.backings.release(envelope.released.nodeid)

    async def _nothing_more(self, link: Link) -> None:
        """Do nothing: a worker that lives has what it needs."""

    async def _grant(self, envelope: pb.Envelope, link: Link | None) -> None:
        want = unpack_want(envelope.resolve)
        assert isinstance(want, BackingWanted)  # noqa: S101 - WorkerProcess takes the others
        backing_id = await self._mount.backings.take(want)
        if link is not None:
            resolved = pb.Resolved(backing_id=backing_id)
            link.post(pb.Envelope(id=envelope.id, resolved=resolved))

    def _recover_requests(self) -> None:
        # Nobody but the dead worker could answer what was read from its clone.
        mountpoint = self._mount.mountpoint
        try:
            if self._mount.session.memory.flags & InitFlag.HAS_RESEND:
                mountpoint.resend()
                return
            # Before Linux 6.9: closing the clone fails its requests, rather than leave them.
            replacement = mountpoint.clone()
        except OSError as exc:
            _LOG.error("%s: %s", self._mount.label, exc.strerror)
            return
        os.close(self._fd)
        self._fd = replacement
