"""What a supervisor shows of itself, its sessions and its store, to `status` and to metrics.

The numbers of sessions are in memory and are read on the event loop. Whatever takes system calls on
files, which may take any time, is read in a thread, and left out if it is not there in time: a
supervisor shows what it knows though its disk hangs.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from appliance.errors import StoreError
from appliance.metrics.program_figures import (
    SlowReading,
    own_memory,
    process_figures,
    store_figures,
)
from appliance.store.store import Store


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
    collections: Mapping[str, int] | None = None
    """Collections that this supervisor has begun, by outcome; None: it begins none."""


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
        self._reading: SlowReading[dict[str, Any]] = SlowReading("figures")

    async def gather(self) -> dict[str, Any]:
        """Return a report, which is JSON; it takes 2 s at most."""
        report = self._sessions()
        pids = [pid for session in report["sessions"] for pid in _pids_of(session)]
        read = dict(await self._reading.result(lambda: self._read([os.getpid(), *pids])) or {})
        memory = read.pop("memory", {})
        for session in report["sessions"]:
            session["memory_bytes"] = sum(memory.get(pid, 0) for pid in _pids_of(session))
        own = process_figures(self._started_at, memory.get(os.getpid(), 0))
        own["fork_servers"] = self._supervised.num_fork_servers()
        if self._supervised.collections is not None:
            read["collections"] = dict(self._supervised.collections)
        return {**report, "supervisor": own, **read}

    def close(self) -> None:
        """End the thread; what it reads now is waited for, as the store is closed next."""
        self._reading.close()

    # --- In the thread ---

    def _read(self, pids: Iterable[int]) -> dict[str, Any]:
        read: dict[str, Any] = {"memory": {pid: own_memory(pid) for pid in pids}}
        with suppress(StoreError, OSError):
            read["store"] = {
                **store_figures(self._supervised.store),
                "is_cache": self._supervised.is_cache,
            }
        if self._supervised.remote is not None:
            with suppress(StoreError):
                read["remote"] = self._supervised.remote()
        return read


def _pids_of(session: dict[str, Any]) -> list[int]:
    workers = [worker["pid"] for worker in session["workers"]]
    return [session["pid"], *workers] if "pid" in session else workers
