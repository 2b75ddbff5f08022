"""What a supervisor shows of itself, its sessions and its store, to `status` and to metrics.

The numbers of sessions are in memory and are read on the event loop. Whatever takes system calls on
files, which may take any time, is read in a thread, and left out if it is not there in time: a
supervisor shows what it knows though its disk hangs.
"""

import asyncio
import os
import resource
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance import __version__
from appliance.errors import StoreError
from appliance.store import schema
from appliance.store.store import Store

# How long to wait for what is read in the thread.
_DEADLINE_S: Final = 2.0
_KIBIBYTE: Final = 1024
# In /proc/PID/status: memory of its own, neither shared nor of a file.
_OWN_MEMORY: Final = "RssAnon:"


@dataclass(slots=True)
class Supervised:
    """What a supervisor knows beside its sessions.

    Args:
        store: the store that workers read (lent).
        is_cache: whether it is a cache of services elsewhere.
        remote: returns what was asked of those; called in a thread. None: there are none.
    """

    store: Store
    is_cache: bool = False
    remote: Callable[[], dict[str, Any]] | None = None
    num_fork_servers: Callable[[], int] = int
    """Returns how many fork servers were started."""


class SupervisorFigures:
    """Puts reports together; used on one event loop.

    Args:
        sessions: returns the sessions, and the front-ends that wait.
        supervised: the rest.
    """

    def __init__(self, sessions: Callable[[], dict[str, Any]], supervised: Supervised) -> None:
        self._sessions = sessions
        self._supervised = supervised
        self._started_at = time.time()
        self._thread = ThreadPoolExecutor(1, "figures")
        self._reading: asyncio.Future[dict[str, Any]] | None = None

    async def gather(self) -> dict[str, Any]:
        """Return a report, which is JSON; it takes 2 s at most."""
        report = self._sessions()
        if self._reading is None or self._reading.done():
            pids = [pid for session in report["sessions"] for pid in _pids_of(session)]
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(self._thread, self._read, [os.getpid(), *pids])
        done, _pending = await asyncio.wait([self._reading], timeout=_DEADLINE_S)
        read = dict(self._reading.result()) if done else {}
        memory = read.pop("memory", {})
        for session in report["sessions"]:
            session["memory_bytes"] = sum(memory.get(pid, 0) for pid in _pids_of(session))
        return {**report, "supervisor": self._own(memory), **read}

    def close(self) -> None:
        """End the thread; what it reads now is waited for, as the store is closed next."""
        self._thread.shutdown(cancel_futures=True)

    def _own(self, memory: dict[int, int]) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "pid": os.getpid(),
            "version": __version__,
            "started_at": self._started_at,
            "uptime_s": time.time() - self._started_at,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "memory_bytes": memory.get(os.getpid(), 0),
            "fork_servers": self._supervised.num_fork_servers(),
        }

    # --- In the thread ---

    def _read(self, pids: Iterable[int]) -> dict[str, Any]:
        read: dict[str, Any] = {"memory": {pid: _own_memory(pid) for pid in pids}}
        with suppress(StoreError, OSError):
            read["store"] = _store_report(self._supervised)
        if self._supervised.remote is not None:
            with suppress(StoreError):
                read["remote"] = self._supervised.remote()
        return read


def _pids_of(session: dict[str, Any]) -> list[int]:
    workers = [worker["pid"] for worker in session["workers"]]
    return [session["pid"], *workers] if "pid" in session else workers


def _own_memory(pid: int) -> int:
    """Return how many bytes a process has to itself; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith(_OWN_MEMORY):
            return int(line.split()[1]) * _KIBIBYTE
    return 0


def _store_report(supervised: Supervised) -> dict[str, Any]:
    figures = supervised.store.env.figures()
    disk = os.statvfs(supervised.store.path)
    return {
        "path": str(supervised.store.path),
        "is_cache": supervised.is_cache,
        "schema": schema.VERSION,
        "free_bytes": disk.f_bavail * disk.f_frsize,
        **figures._asdict(),
    }
