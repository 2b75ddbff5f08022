"""The supervisor's part of one session, which outlives its workers: memory, grants, resolving."""

import contextlib
from collections.abc import Sequence

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.resolve.exports import Export
from appliance.resolve.resolver import Resolver, SessionGrants
from appliance.session.grants import GrantTable
from appliance.session.session_memory import COUNTERS_PER_QUEUE, SessionMemory
from appliance.session.wants import Want


class ServedSession:
    """The session of a front-end or mount; owns its session memory and its grants.

    Args:
        memory: its session memory.
        grants: its grants.
        export: what it may be granted. The caller has it begin or resume the session.
        resolver: the resolver of `export`.
    """

    def __init__(
        self, memory: SessionMemory, grants: GrantTable, export: Export, resolver: Resolver
    ) -> None:
        self.memory = memory
        self.grants = grants
        self._export = export
        self._resolver = resolver
        self._session_grants = SessionGrants(grants)

    @classmethod
    def create(
        cls, num_queues: int, export: Export, resolver: Resolver, *, is_by_content: bool
    ) -> "ServedSession":
        """Return a new session with `num_queues` queues or clones.

        Raises:
            OSError: there is not enough memory or no free descriptor.
        """
        with contextlib.ExitStack() as made:
            memory = SessionMemory.create(num_queues)
            made.callback(memory.close)
            grants = GrantTable(is_by_content=is_by_content)
            made.callback(grants.close)
            session = cls(memory, grants, export, resolver)
            export.begin(session._session_grants)
            made.pop_all()
        return session

    @classmethod
    def resume(
        cls, memory: SessionMemory, grants: GrantTable, export: Export, resolver: Resolver
    ) -> "ServedSession":
        """Return a session that another supervisor has begun."""
        session = cls(memory, grants, export, resolver)
        export.resume(session._session_grants)
        return session

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

    def requests(self) -> dict[str, int]:
        """Return how many requests were answered, by opcode name; opcodes without any are absent.

        Requests with unknown opcodes are counted under "UNKNOWN".
        """
        totals = self.memory.totals()
        counts = {op.name: totals[op] for op in Opcode if op < COUNTERS_PER_QUEUE and totals[op]}
        return counts | {"UNKNOWN": totals[0]} if totals[0] else counts

    def close(self) -> None:
        """Close session memory and grants here."""
        self._export.end(self._session_grants)
        self.memory.close()
        self.grants.close()
