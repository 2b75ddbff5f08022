"""Collecting garbage when the file system of a store becomes full.

`SpaceWatch` looks at the free space now and then. When there is too little, it runs `appliance gc
--keep-free` as a process of its own: a collection reads the whole store, which is no work for the
process that serves it, and LMDB, threads and event loops of the two have nothing to do with each
other.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

from appliance.services.addresses import LmdbAddress
from appliance.system.child_environment import child_environment

_LOG: Final = logging.getLogger(__name__)
_INTERVAL_S: Final = 10.0
# After a collection that has not helped, because too much is live.
_AGAIN_S: Final = 600.0


@contextlib.asynccontextmanager
async def keeping_free(
    store_path: Path | None, min_free_bytes: int | None, interval_s: float = _INTERVAL_S
) -> AsyncIterator[Mapping[str, int] | None]:
    """Run a `SpaceWatch` for a block, if both are given; yield its `outcomes`."""
    if store_path is None or min_free_bytes is None:
        yield None
        return
    watch = SpaceWatch(store_path, min_free_bytes, interval_s)
    try:
        yield watch.outcomes
    finally:
        await watch.close()


class SpaceWatch:
    """Keeps space free on the file system of a store while it is open; runs on one event loop.

    Args:
        store_path: directory of the store.
        min_free_bytes: a collection starts when less than this is free.
        interval_s: the time between two looks, in seconds.
    """

    def __init__(self, store_path: Path, min_free_bytes: int, interval_s: float) -> None:
        self._store_path = store_path
        self._min_free_bytes = min_free_bytes
        self._interval_s = interval_s
        self.outcomes = {"ok": 0, "failed": 0}
        """The collections that have ended, by outcome."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop looking; a collection that is running is ended, which harms nothing."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            if self._is_low():
                await self._collect()
                if self._is_low():
                    await asyncio.sleep(_AGAIN_S)
            await asyncio.sleep(self._interval_s)

    def _is_low(self) -> bool:
        try:
            status = os.statvfs(self._store_path)
        except OSError as exc:
            _LOG.warning("%s: %s; its free space is not known", self._store_path, exc.strerror)
            return False
        return status.f_bavail * status.f_frsize < self._min_free_bytes

    async def _collect(self) -> None:
        _LOG.info(
            "%s: less than %d bytes are free: collecting garbage",
            self._store_path,
            self._min_free_bytes,
        )
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "appliance", "gc"),
            *("--store", LmdbAddress(self._store_path).canonical()),
            *("--keep-free", str(self._min_free_bytes)),
            env=child_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await child.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            raise
        text = output.decode(errors="replace").strip().replace("\n", "; ")
        self.outcomes["failed" if child.returncode else "ok"] += 1
        log = _LOG.info if child.returncode == 0 else _LOG.error
        log("%s: garbage collection: %s", self._store_path, text)
