"""What a program shows of itself and of its store.

Whatever takes system calls on files, which may take any time, is read in a thread, and left out if
it is not there in time: a program shows what it knows though its disk hangs.
"""

import asyncio
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from appliance import __version__
from appliance.errors import StoreError
from appliance.store import schema
from appliance.store.store import Store

R = TypeVar("R")

# How long to wait for what is read in the thread.
_DEADLINE_S: Final = 2.0
_KIBIBYTE: Final = 1024
# In /proc/PID/status: memory of its own, neither shared nor of a file.
_OWN_MEMORY: Final = "RssAnon:"


class SlowReading(Generic[R]):
    """Has a function read something in a thread of its own; used on one event loop.

    Args:
        name: that of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._reading: asyncio.Future[R] | None = None

    async def result(self, read: Callable[[], R]) -> R | None:
        """Return what `read` returns, or None if that takes more than two seconds.

        While an earlier one is under way, that is waited for instead.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, read)
        done, _pending = await asyncio.wait([self._reading], timeout=_DEADLINE_S)
        return self._reading.result() if done else None

    def close(self) -> None:
        """End the thread; what it reads now is waited for, as the store is closed next."""
        self._thread.shutdown(cancel_futures=True)


class ProgramFigures:
    """Puts the figures of a program with one process together; used on one event loop.

    Args:
        store: the store that it serves (lent), if it does.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._started_at = time.time()
        self._reading: SlowReading[dict[str, Any]] = SlowReading("figures")

    async def gather(self) -> dict[str, Any]:
        """Return `program` and, unless there is none or its disk hangs, `store`."""
        read = dict(await self._reading.result(self._read) or {})
        memory = read.pop("memory", 0)
        return {"program": process_figures(self._started_at, memory), **read}

    def close(self) -> None:
        """End the thread; the store is still open."""
        self._reading.close()

    def _read(self) -> dict[str, Any]:
        read: dict[str, Any] = {"memory": own_memory(os.getpid())}
        if self._store is not None:
            with suppress(StoreError, OSError):
                read["store"] = store_figures(self._store)
        return read


def process_figures(started_at: float, memory_bytes: int) -> dict[str, Any]:
    """Return what this process is, and what it has used.

    Args:
        started_at: when it was started, in seconds since 1970.
        memory_bytes: see `own_memory`.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "pid": os.getpid(),
        "version": __version__,
        "started_at": started_at,
        "uptime_s": time.time() - started_at,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "memory_bytes": memory_bytes,
    }


def own_memory(pid: int) -> int:
    """Return how many bytes a process has to itself; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith(_OWN_MEMORY):
            return int(line.split()[1]) * _KIBIBYTE
    return 0


def store_figures(store: Store) -> dict[str, Any]:
    """Return the sizes of a store as of now.

    Raises:
        StoreError: LMDB failed.
        OSError: its file system did.
    """
    figures = store.env.figures()
    disk = os.statvfs(store.path)
    return {
        "path": str(store.path),
        "schema": schema.VERSION,
        "free_bytes": disk.f_bavail * disk.f_frsize,
        **figures._asdict(),
    }
