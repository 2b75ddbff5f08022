"""`appliance mount`: mounts, serves until told to stop or unmounted, and unmounts."""

import asyncio
import contextlib
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from appliance.errors import MountError
from appliance.fuse_proto._wire import InitFlag
from appliance.sockets import notify
from appliance.store.service_uri import LmdbAddress
from appliance.supervisor.mount import Mount
from appliance.supervisor.mountpoint import Mountpoint
from appliance.supervisor.services import ServiceConfig, Services, running

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig(ServiceConfig):
    """What `appliance mount` was asked to do."""

    path: Path
    num_workers: int
    allows_other: bool
    has_passthrough: bool


def serve(config: MountConfig) -> None:
    """Mount and serve until SIGTERM, SIGINT or an unmount from outside.

    Raises:
        MountError: the mount point cannot be used.
        ApplianceError: the store or the state directory is unusable.
    """
    uvloop.run(Mounter(config).run())


class Mounter:
    """The long-lived state of one mounting process."""

    def __init__(self, config: MountConfig) -> None:
        self._config = config
        self._mount: Mount | None = None

    async def run(self) -> None:
        """Serve to the end."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
        config = self._config
        _check_covers_nothing_needed(config)
        mountpoint = Mountpoint(config.path, allows_other=config.allows_other)
        async with contextlib.AsyncExitStack() as stack:
            services = await stack.enter_async_context(running(config, self.report))
            # The interpreter may be on the very path that is mounted on.
            await services.forker.warm_up()
            mountpoint.mount()
            stack.callback(mountpoint.close)
            await self._serve(self._mounted(mountpoint, services), stop)
            notify("STOPPING=1")

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
                    "requests": mount.requests(),
                }
            ]
        }

    def _mounted(self, mountpoint: Mountpoint, services: Services) -> Mount:
        config = self._config
        try:
            mount = self._mount = Mount(
                mountpoint,
                config.num_workers,
                services.worker_settings,
                services,
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
            await asyncio.wait([ready, *ends], return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not ready.exception():
                flags = mount.session.memory.flags
                if self._config.has_passthrough and not flags & InitFlag.PASSTHROUGH:
                    _LOG.warning("this kernel has no FUSE passthrough; going on without")
                _say_ready(mount.label)
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if mount.failure or not mount.ended.is_set():
                mount.mountpoint.unmount()
            await mount.close()
            mount.mountpoint.close()  # which ends a probe that still waits
            for task in (ready, *ends):
                task.cancel()
            error, *_ = await asyncio.gather(ready, *ends, return_exceptions=True)
        reason = mount.failure or error
        if reason and (mount.failure or not (stop.is_set() or mount.ended.is_set())):
            raise MountError(f"mount point {mount.label}: {reason}")


def _check_covers_nothing_needed(config: MountConfig) -> None:
    # Workers open blob files by their paths: they would ask the mount, and so wait for themselves.
    stores = [address.path for address in config.services if isinstance(address, LmdbAddress)]
    for needed in (*stores, config.state_dir):
        if needed.resolve().is_relative_to(config.path.resolve()):
            raise MountError(f"mount point {config.path}: would cover {needed}, which it needs")


async def _come_up(mount: Mount) -> None:
    await mount.start()
    # The probe waits for INIT and for an answer, in the kernel: on a thread of its own.
    await asyncio.to_thread(mount.mountpoint.probe)


def _say_ready(label: str) -> None:
    sys.stderr.write(f"READY: mounted on {label}\n")
    sys.stderr.flush()
    notify("READY=1")
