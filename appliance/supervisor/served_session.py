"""The supervisor's part of one session, which outlives its workers: memory, grants, resolving."""

import contextlib
from collections.abc import Sequence
from typing import Any

from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import Export
from appliance.resolve.resolver import Resolver, SessionGrants
from appliance.session.grant_table import GrantTable
from appliance.session.session_memory import SessionMemory
from appliance.session.wants import RootNameWanted, Want
from appliance.store.leases import Lease
from appliance.supervisor.open_files import OpenFiles
from appliance.supervisor.profiling import SessionProfile
from appliance.supervisor.restoring import Restoration
from appliance.supervisor.want_counters import WantCounters


class ServedSession:
    """The session of a front-end or mount; owns its session memory, its grants and its lease.

    Args:
        memory: its session memory.
        grants: its grants.
        export: what it may be granted. The caller has it begin or resume the session.
        resolver: the resolver of `export`.
        open_files: divides the files that workers may hold open; the session joins it.
        num_queues: the number of its queues or clones.
        lease: keeps what it is granted in the store (owned); None if nothing is collected there.
        profile: what it records, and what is played for it (owned); None: neither.

    Attributes:
        memory, grants, lease: as above, lent.
    """

    def __init__(
        self,
        memory: SessionMemory,
        grants: GrantTable,
        num_queues: int,
        export: Export,
        resolver: Resolver,
        open_files: OpenFiles,
        *,
        lease: Lease | None,
        profile: SessionProfile | None = None,
    ) -> None:
        self._profile = profile
        self.memory = memory
        self.grants = grants
        self._export = export
        self._resolver = resolver
        self.lease = lease
        self._session_grants = SessionGrants(grants, lease)
        self._wants = WantCounters()
        self._open_files = open_files
        open_files.join(grants, num_queues)

    @classmethod
    def create(
        cls,
        num_queues: int,
        export: Export,
        resolver: Resolver,
        open_files: OpenFiles,
        *,
        is_by_content: bool,
        lease: Lease | None,
        profile: SessionProfile | None = None,
    ) -> "ServedSession":
        """Return a new session. See the class for the arguments.

        If `is_by_content`, files with equal content have the same st_ino.

        Raises:
            OSError: there is not enough memory or no free descriptor.
        """
        with contextlib.ExitStack() as made:
            if profile is not None:
                made.callback(profile.end, lives_on=False)
            if lease is not None:
                made.callback(lease.close)
            memory = SessionMemory.create(num_queues)
            made.callback(memory.close)
            grants = GrantTable(is_by_content=is_by_content)
            made.callback(grants.close)
            session = cls(
                memory,
                grants,
                num_queues,
                export,
                resolver,
                open_files,
                lease=lease,
                profile=profile,
            )
            made.callback(open_files.leave, grants)
            export.begin(session._session_grants)
            made.pop_all()
        return session

    @classmethod
    def resume(
        cls,
        memory: SessionMemory,
        grants: GrantTable,
        num_queues: int,
        export: Export,
        resolver: Resolver,
        open_files: OpenFiles,
        *,
        lease: Lease | None,
        profile: SessionProfile | None = None,
    ) -> "ServedSession":
        """Return a session that another supervisor has begun; see the class."""
        session = cls(
            memory,
            grants,
            num_queues,
            export,
            resolver,
            open_files,
            lease=lease,
            profile=profile,
        )
        export.resume(session._session_grants)
        return session

    @property
    def kept_fds(self) -> Sequence[int]:
        """What the next supervisor needs (lent): writable grants, session memory, lease if any."""
        lease = [] if self.lease is None else [self.lease.fd]
        return (self.grants.writable_fd, self.memory.fd, *lease)

    @property
    def fds(self) -> Sequence[int]:
        """The descriptors (lent) of session memory and grants, which every worker gets first."""
        return self.memory.fd, self.grants.fd

    async def resolve(self, want: Want) -> int:
        """See `Resolver.resolve`."""
        with self._wants.counting(want) as outcome:
            outcome.error = await self._export.resolve(want, self._session_grants)
        if self._profile is not None and isinstance(want, RootNameWanted) and not outcome.error:
            self._profile.granted(want.name)
        return outcome.error

    def restoration(self, label: str, *, goes_on: bool) -> Restoration:
        """Return what grants a saved session in place of this one; see the class."""
        return Restoration(label, self._export, self._session_grants, goes_on=goes_on)

    def cache_used(self, keys: Sequence[bytes]) -> None:
        """See `Resolver.used`."""
        self._resolver.used(keys)

    def first_reads(self, reads: pb.FirstReads) -> None:
        """See `SessionProfile.first_reads`."""
        if self._profile is not None:
            self._profile.first_reads(reads)

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        await self._resolver.reap_readers()

    def statistics(self) -> dict[str, Any]:
        """Return what the workers have served and wanted; see `SessionStatistics.report`."""
        return {
            **self.memory.totals().report(),
            "wants": self._wants.report(),
            "grants": len(self.grants),
        }

    def holdings(self) -> dict[str, object]:
        """Return what the session keeps from garbage collection, for `status`."""
        if self.lease is None:
            return {}
        if self.lease.view is not None:
            return {"lease": self.lease.lease_id, "view": self.lease.view}
        held: int | str = "all" if self.lease.holds_all else len(self.lease)
        return {"lease": self.lease.lease_id, "paths": held}

    def close(self, *, lives_on: bool = False) -> None:
        """Close everything here, and end the lease unless the session lives on."""
        if self._profile is not None:
            self._profile.end(lives_on=lives_on)
        self._open_files.leave(self.grants)
        self._export.end(self._session_grants)
        self.memory.close()
        self.grants.close()
        if self.lease is not None:
            if lives_on:
                self.lease.leave()
            else:
                self.lease.close()
