"""The supervisor's part of one session, which outlives its workers: memory, grants, resolving."""

import contextlib
from collections.abc import Sequence
from typing import Any

from appliance.resolve.exports import Export
from appliance.resolve.resolver import Resolver, SessionGrants
from appliance.session.grants import GrantTable
from appliance.session.session_memory import SessionMemory
from appliance.session.wants import Want
from appliance.store.leases import Lease
from appliance.supervisor.open_files import OpenFiles


class ServedSession:
    """The session of a front-end or mount; owns its session memory and its grants.

    Args:
        num_queues: the number of its queues or clones.
        export: what it may be granted.
        resolver: the resolver of `export`.
        is_by_content: whether files with equal content have the same st_ino.
        lease: keeps what it is granted in the store (owned); None if nothing is collected there.

    Raises:
        OSError: there is not enough memory or no free descriptor.
    """

    def __init__(
        self,
        num_queues: int,
        export: Export,
        resolver: Resolver,
        open_files: OpenFiles,
        *,
        is_by_content: bool,
        lease: Lease | None,
    ) -> None:
        with contextlib.ExitStack() as made:
            self._lease = lease
            if lease is not None:
                made.callback(lease.close)
            self.memory = SessionMemory.create(num_queues)
            made.callback(self.memory.close)
            self.grants = GrantTable(is_by_content=is_by_content)
            made.callback(self.grants.close)
            self._export = export
            self._resolver = resolver
            self._session_grants = SessionGrants(self.grants, lease)
            export.begin(self._session_grants)
            open_files.join(self.grants, num_queues)
            self._open_files = open_files
            made.pop_all()

    @property
    def fds(self) -> Sequence[int]:
        """The descriptors (lent) of session memory and grants, which every worker gets first."""
        return self.memory.fd, self.grants.fd

    async def resolve(self, want: Want) -> int:
        """See `Resolver.resolve`."""
        return await self._export.resolve(want, self._session_grants)

    def cache_used(self, keys: Sequence[bytes]) -> None:
        """See `Resolver.used`."""
        self._resolver.used(keys)

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        await self._resolver.reap_readers()

    def statistics(self) -> dict[str, Any]:
        """Return what the workers have served; see `SessionStatistics.report`."""
        return self.memory.totals().report()

    def holdings(self) -> dict[str, object]:
        """Return what the session keeps from garbage collection, for `status`."""
        if self._lease is None:
            return {}
        if self._lease.view is not None:
            return {"lease": self._lease.lease_id, "view": self._lease.view}
        held: int | str = "all" if self._lease.holds_all else len(self._lease)
        return {"lease": self._lease.lease_id, "paths": held}

    def close(self) -> None:
        """Close session memory and grants; all workers must have ended before."""
        self._open_files.leave(self.grants)
        self._export.end(self._session_grants)
        self.memory.close()
        self.grants.close()
        if self._lease is not None:
            self._lease.close()
