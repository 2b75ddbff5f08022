"""CPU time of a back-end: of the process that listens on its socket, and of all below it."""

import os
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_INIT_PID: Final = 1
_NS_PER_S: Final = 1e9


class BackEndCpu:
    """Reads the CPU time of a process and its descendants; threads that end are lost.

    Args:
        pid: the process; None, or one that cannot be the back-end alone, for nothing to read.
    """

    def __init__(self, pid: int | None) -> None:
        # The listener may be of a service manager, or of a process that started both ends.
        self._pid = None if pid is None or pid <= _INIT_PID or pid in _ancestors() else pid

    def snapshot(self) -> dict[tuple[int, int], int]:
        """Return the nanoseconds that each thread, by process and thread id, has run so far."""
        if self._pid is None:
            return {}
        return {thread: spent for pid in _descendants(self._pid) for thread, spent in _threads(pid)}

    def spent_s(self, before: dict[tuple[int, int], int]) -> float | None:
        """Return the seconds since a snapshot; None if there is nothing to read."""
        now = self.snapshot()
        if not now:
            return None
        return sum(spent - before.get(thread, 0) for thread, spent in now.items()) / _NS_PER_S


def _threads(pid: int) -> list[tuple[tuple[int, int], int]]:
    found = []
    try:
        for task in (_PROC / str(pid) / "task").iterdir():
            # Time on a CPU, time in the queue, runs (linux Documentation/scheduler/sched-stats).
            spent = (task / "schedstat").read_text().split()[0]
            found.append(((pid, int(task.name)), int(spent)))
    except (OSError, IndexError):
        pass  # it has ended meanwhile, or this kernel counts nothing
    return found


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for directory in _PROC.glob("[0-9]*"):
        parent = _parent(int(directory.name))
        if parent is not None:
            children.setdefault(parent, []).append(int(directory.name))
    found = [pid]
    for each in found:  # grows while it is walked
        found += children.get(each, [])
    return found


def _ancestors() -> set[int]:
    found = set()
    pid: int | None = os.getpid()
    while pid and pid not in found:
        found.add(pid)
        pid = _parent(pid)
    return found


def _parent(pid: int) -> int | None:
    try:
        # The name before it may hold blanks and parentheses (proc(5)).
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1])
