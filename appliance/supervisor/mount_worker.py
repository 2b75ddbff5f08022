"""The supervisor's side of one clone of a mount's /dev/fuse descriptor, and of its worker."""

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from appliance.fuse_proto._fuse_wire import InitFlag
from appliance.protos import control_pb2 as pb
from appliance.session.link import Link, LinkClosedError
from appliance.session.wants import BackingWanted, unpack_want
from appliance.session.worker_process import (
    START_ATTEMPTS,
    WorkerFailedError,
    WorkerProcess,
)
from appliance.supervisor.runtime import Runtime

if TYPE_CHECKING:
    from appliance.supervisor.mount import Mount

_LOG = logging.getLogger(__name__)
# How long a worker may take to end after the unmount. A mount that is still in use lives on after
# it was detached from the tree, so its workers do not end by themselves and are killed.
_END_DEADLINE_S: Final = 0.2


class MountWorker:
    """Keeps a worker process serving one clone; owns the clone. The process's `WorkerOwner`."""

    def __init__(self, slot: int, mount: "Mount", runtime: Runtime) -> None:
        self._slot = slot
        self._mount = mount
        self._runtime = runtime
        self._fd = mount.mountpoint.clone()
        label = f"{mount.label} worker {slot}"
        self._process = WorkerProcess(label, runtime.forker, mount.session, self)

    @property
    def pid(self) -> int:
        """The process id of the worker started last, or 0 if none was started."""
        return self._process.pid

    @property
    def restarts(self) -> int:
        """How many workers of this clone have died."""
        return self._process.restarts

    @property
    def is_alive(self) -> bool:
        """Whether the channel to a worker is open."""
        return self._process.link is not None

    async def close(self) -> None:
        """End the worker and close the clone; the mount must have been unmounted before."""
        # The worker blocks in read(2) on its clone, not on its channel, so it ends by itself only
        # when the mount ends.
        await self._process.close(_END_DEADLINE_S)
        os.close(self._fd)

    async def start(self) -> None:
        """Return when a worker has the clone; the mount fails if no worker lives long enough."""
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
            self._slot,
            pb.Device(passthrough=self._mount.has_passthrough),
            is_recorded=self._mount.is_recorded,
        )
        return configure, [*self._mount.session.fds, self._fd]

    async def bring_up(self, link: Link) -> None:
        """See `WorkerOwner`. The descriptors sent with `Configure` are all that is needed."""

    def died(self) -> None:
        """See `WorkerOwner`."""
        if self.restarts >= START_ATTEMPTS and not self._mount.session.memory.is_initialised:
            self._mount.fail(f"{START_ATTEMPTS} workers died at startup")
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
        """Do nothing: a step that succeeds as soon as a worker lives."""

    async def _grant(self, envelope: pb.Envelope, link: Link | None) -> None:
        want = unpack_want(envelope.resolve)
        assert isinstance(want, BackingWanted)  # noqa: S101 - WorkerProcess handles the others
        backing_id = await self._mount.backings.take(want)
        if link is not None:
            resolved = pb.Resolved(backing_id=backing_id)
            link.post(pb.Envelope(id=envelope.id, resolved=resolved))

    def _recover_requests(self) -> None:
        # Only the dead worker could have answered the requests that it had read from its clone.
        mountpoint = self._mount.mountpoint
        try:
            if self._mount.session.memory.flags & InitFlag.HAS_RESEND:
                mountpoint.resend()
                return
            # Before Linux 6.9 the kernel cannot resend requests. Closing the clone makes them fail
            # instead of leaving them unanswered for ever.
            replacement = mountpoint.clone()
        except OSError as exc:
            _LOG.error("%s: %s", self._mount.label, exc.strerror)
            return
        os.close(self._fd)
        self._fd = replacement
