"""`appliance mount`: mounts, serves until a signal or an unmount ends it, and unmounts."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from appliance.errors import MountError
from appliance.fuse_proto._fuse_wire import InitFlag
from appliance.resolve.backings import Backings
from appliance.resolve.exports import Exported
from appliance.supervisor.mount_worker import MountWorker
from appliance.supervisor.mountpoint import MountFlags, Mountpoint
from appliance.supervisor.profiling import Profiling
from appliance.supervisor.runtime import Runtime, RuntimeConfig, running
from appliance.system.listening import announce_ready, announce_stopping, stop_event

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig(RuntimeConfig):
    """The options of `appliance mount`."""

    path: Path
    """The mount point."""
    exported: Exported
    profiling: Profiling
    num_workers: int
    has_passthrough: bool
    flags: MountFlags


class Mount:
    """A mount that is served by `num_workers` worker processes.

    This process keeps a duplicate of every worker's /dev/fuse descriptor. Requests that a worker
    had read when it was killed therefore stay with the kernel, which can send them again.
    """

    def __init__(
        self,
        mountpoint: Mountpoint,
        num_workers: int,
        runtime: Runtime,
        *,
        exported: Exported,
        profiling: Profiling,
        has_passthrough: bool,
    ) -> None:
        self.label = str(mountpoint.path)
        self.has_passthrough = has_passthrough
        self.is_recorded = profiling.record is not None
        self.backings = Backings(mountpoint.fd, runtime.resolver.open_blob)
        # Set when the mount is gone or cannot be served; in the latter case `failure` says why.
        self.ended = asyncio.Event()
        self.failure = ""
        self.mountpoint = mountpoint
        self.session = runtime.new_session(num_workers, exported, self.label, profiling)
        self._mount_workers = [MountWorker(slot, self, runtime) for slot in range(num_workers)]

    def statistics(self) -> dict[str, Any]:
        """Return what the workers have served; see `SessionStatistics.report`."""
        return self.session.statistics()

    def workers(self) -> list[dict[str, object]]:
        """Return the pid, slot and number of restarts of each living worker, for `status`."""
        return [
            {"pid": mount_worker.pid, "queues": [slot], "restarts": mount_worker.restarts}
            for slot, mount_worker in enumerate(self._mount_workers)
            if mount_worker.is_alive
        ]

    async def start(self) -> None:
        """Start every worker; if one cannot be started, the mount fails (see `fail`)."""
        await asyncio.gather(*(mount_worker.start() for mount_worker in self._mount_workers))

    def fail(self, reason: str) -> None:
        """Give the mount up because it could not be served when it was started."""
        self.failure = reason
        self.ended.set()

    async def close(self) -> None:
        """End the workers and close the session; a mount that is still in the tree is then dead."""
        await asyncio.gather(*(mount_worker.close() for mount_worker in self._mount_workers))
        self.session.close()


def serve(config: MountConfig, when_ready: Callable[[str], None] | None = None) -> None:
    """Mount and serve until SIGTERM, SIGINT, SIGHUP or an unmount from outside.

    Args:
        config: what to mount, and where.
        when_ready: called with the mount point once the mount answers; by default, readiness is
            announced on stderr and to the service manager.

    Raises:
        MountError: the mount point cannot be used, or the connection to the kernel was aborted.
        ApplianceError: the store or the state directory is unusable.
    """
    uvloop.run(Mounter(config, when_ready or _announce_mounted).run())


class Mounter:
    """Mounts, keeps a `Mount` served, and unmounts; one per process."""

    def __init__(self, config: MountConfig, when_ready: Callable[[str], None]) -> None:
        self._config = config
        self._when_ready = when_ready
        self._mount: Mount | None = None

    async def run(self) -> None:
        """Mount and serve until the end; see `serve` for the errors."""
        stop = stop_event()
        config = self._config
        _check_covers_nothing_needed(config)
        mountpoint = Mountpoint(config.path, config.flags)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(mountpoint.close)
            runtime = await stack.enter_async_context(
                running(config, [config.exported], self.report, has_sessions=False)
            )
            # The interpreter's files may lie below the mount point, which the mount will cover.
            await runtime.forker.warm_up()
            mountpoint.mount()
            await self._serve(self._mounted(mountpoint, runtime), stop)
            announce_stopping()

    def report(self) -> dict[str, Any]:
        """Return what `appliance status` shows of this process."""
        mount = self._mount
        if mount is None:
            return {"sessions": []}
        return {
            "sessions": [
                {
                    "mount": mount.label,
                    "workers": mount.workers(),
                    **mount.statistics(),
                    "holds": mount.session.holdings(),
                }
            ]
        }

    def _mounted(self, mountpoint: Mountpoint, runtime: Runtime) -> Mount:
        config = self._config
        try:
            mount = self._mount = Mount(
                mountpoint,
                config.num_workers,
                runtime,
                exported=config.exported,
                profiling=config.profiling,
                has_passthrough=config.has_passthrough,
            )
        except OSError as exc:
            mountpoint.unmount()
            raise MountError(f"mount point {mountpoint.path}: {exc.strerror}") from exc
        return mount

    async def _serve(self, mount: Mount, stop: asyncio.Event) -> None:
        ready = asyncio.create_task(_come_up(mount))
        ends = [asyncio.create_task(stop.wait()), asyncio.create_task(mount.ended.wait())]
        try:
            # Until the mount answers or cannot be served, a signal comes, or the mount ends.
            await asyncio.wait([ready, *ends], return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not ready.exception():
                flags = mount.session.memory.flags
                if self._config.has_passthrough and not flags & InitFlag.PASSTHROUGH:
                    _LOG.warning("this kernel has no FUSE passthrough; it is not used")
                self._when_ready(mount.label)
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if not stop.is_set():
                    _note_unmount(mount)
        finally:
            mount.mountpoint.unmount()
            await mount.close()
            mount.mountpoint.close()  # this ends a probe that still waits
            for task in (ready, *ends):
                task.cancel()
            error, *_ = await asyncio.gather(ready, *ends, return_exceptions=True)
        # The error of `ready` is the reason only if nothing else has ended the mount, because an
        # unmount makes the probe fail, too.
        reason = mount.failure or error
        if reason and (mount.failure or not (stop.is_set() or mount.ended.is_set())):
            raise MountError(f"mount point {mount.label}: {reason}")


def _note_unmount(mount: Mount) -> None:
    """Note why the mount ended although no signal asked this process to stop."""
    if mount.mountpoint.is_mounted:
        # For example through /sys/fs/fuse/connections/N/abort: users of the mount get errors.
        mount.failure = mount.failure or "the connection to the kernel was aborted"
    else:
        _LOG.info("%s: unmounted from outside", mount.label)


def _check_covers_nothing_needed(config: MountConfig) -> None:
    # Workers open blob files by path. If the mount covered them, workers would send requests to the
    # mount and wait for themselves.
    stores = [place for address in config.services if (place := address.directory()) is not None]
    for needed in (*stores, config.state_dir):
        if needed.resolve().is_relative_to(config.path.resolve()):
            raise MountError(f"mount point {config.path}: would cover {needed}, which it needs")


async def _come_up(mount: Mount) -> None:
    await mount.start()
    # On another thread, because the probe blocks in the kernel until INIT and its own request are
    # answered.
    await asyncio.to_thread(mount.mountpoint.probe)


def _announce_mounted(label: str) -> None:
    announce_ready(f"mounted on {label}")
