"""The supervisor's part of one session, which outlives its workers: memory, grants, resolving."""

from collections.abc import Sequence

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.resolve.resolver import Resolver, SessionGrants
from appliance.session.grants import GrantTable
from appliance.session.session_memory import COUNTERS_PER_QUEUE, SessionMemory
from appliance.session.wants import Want


class ServedSession:
    """The session of a front-end or mount; owns its session memory and its grants."""

    def __init__(self, memory: SessionMemory, grants: GrantTable, resolver: Resolver) -> None:
        self.memory = memory
        self.grants = grants
        self._resolver = resolver
        self._session_grants = SessionGrants(grants)

    @classmethod
    def create(cls, num_queues: int, resolver: Resolver, *, is_by_content: bool) -> "ServedSession":
        """Return a blank session.

        Raises:
            OSError: there is not enough memory or no free descriptor.
        """
        memory = SessionMemory.create(num_queues)
        try:
            grants = GrantTable(is_by_content=is_by_content)
        except OSError:
            memory.close()
            raise
        return cls(memory, grants, resolver)

    @property
    def fds(self) -> Sequence[int]:
        """The descriptors (lent) of session memory and grants, which every worker gets first."""
        return self.memory.fd, self.grants.fd

    async def resolve(self, want: Want) -> int:
        """See `Resolver.resolve`."""
        return await self._resolver.resolve(want, self._session_grants)

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
        self.memory.close()
        self.grants.close()
