"""How many blob files the workers of each session may hold open.

A worker keeps the blob files that it read last open, because opening one for every READ would be
slow. Every open file takes kernel memory, and the number of files is limited for the whole machine.
So there is one bound for all workers of a supervisor. It is divided evenly among the sessions,
and the share of a session among its workers: a guest that reads many files takes nothing from the
others. The number is in the memory of the session's grants, and a worker looks at it before each
batch of requests. A worker that has no requests keeps what it has open until its next one.
"""

from typing import Final

from appliance.session.grant_table import GrantTable

OPEN_FILES: Final = 16384
"""The bound for all workers. This many open files, and the inodes they pin, take about 20 MiB."""
_LEAST: Final = 4


class OpenFiles:
    """Divides `total` open files among sessions.

    Args:
        total: the number of files that all workers together may hold open.
    """

    def __init__(self, total: int = OPEN_FILES) -> None:
        self._total = total
        self._num_workers: dict[GrantTable, int] = {}

    def join(self, session: GrantTable, num_workers: int) -> None:
        """Give a new session its share, and the others less from now on."""
        self._num_workers[session] = num_workers
        self._divide()

    def leave(self, session: GrantTable) -> None:
        """Give the share of a session that has ended to the others."""
        del self._num_workers[session]
        self._divide()

    def _divide(self) -> None:
        for session, num_workers in self._num_workers.items():
            share = self._total // (len(self._num_workers) * num_workers)
            session.set_open_files(max(_LEAST, share))
