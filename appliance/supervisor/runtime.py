"""What every supervisor runs beside what it serves: envs, resolver, fork server, status."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import Resolver, SessionResolving
from appliance.services.addresses import ServiceAddresses
from appliance.session.grants import GrantTable
from appliance.session.session_memory import COUNTERS_PER_QUEUE, SessionMemory
from appliance.session.wants import Want
from appliance.store.store import Store
from appliance.supervisor.forker import Forker
from appliance.supervisor.status import StatusServer
from appliance.supervisor.worker_process import WorkerSettings


class ServedSession:
    """INIT's outcome, counters and grants of a front-end or mount; owns their memory.

    Raises:
        OSError: there is no memory or descriptor for it.
    """

    def __init__(self, num_queues: int, resolver: Resolver, *, is_by_content: bool) -> None:
        self.memory = SessionMemory.create(num_queues)
        try:
            self.grants = GrantTable(is_by_content=is_by_content)
        except OSError:
            self.memory.close()
            raise
        self._resolver = resolver
        self._resolving = SessionResolving(resolver, self.grants)

    @property
    def fds(self) -> Sequence[int]:
        """The descriptors (lent) that a worker of this session is given first."""
        return self.memory.fd, self.grants.fd

    async def resolve(self, want: Want) -> int:
        """See `SessionResolving.resolve`."""
        return await self._resolving.resolve(want)

    def cache_used(self, keys: Sequence[bytes]) -> None:
        """See `Resolver.used`."""
        self._resolver.used(keys)

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        await self._resolver.reap_readers()

    def requests(self) -> dict[str, int]:
        """Return how often each opcode was answered since the session began."""
        totals = self.memory.totals()
        counts = {op.name: totals[op] for op in Opcode if op < COUNTERS_PER_QUEUE and totals[op]}
        return counts | {"UNKNOWN": totals[0]} if totals[0] else counts

    def close(self) -> None:
        """Close the memory; the workers must have ended."""
        self.memory.close()
        self.grants.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """What every supervisor is told: the store, and how workers serve it."""

    services: ServiceAddresses
    blob_cache_bytes: int
    state_dir: Path
    is_root_listable: bool
    # Equal contents have one st_ino.
    is_by_content: bool
    log_level: str
    log_json: bool

    def worker_settings(
        self, store: Store, *, has_cache: bool, has_remote_root: bool
    ) -> WorkerSettings:
        """Return what workers are told of this, which read in `store`."""
        return WorkerSettings(
            store_path=str(store.path),
            is_root_listable=self.is_root_listable,
            has_remote_blobs=has_cache,
            has_remote_directories=has_cache,
            has_remote_root=has_remote_root,
            makes_images=not store.is_writable,
            log_level=self.log_level,
            log_json=self.log_json,
        )


@dataclass(frozen=True, slots=True)
class Runtime:
    """What is there while `running`."""

    forker: Forker
    resolver: Resolver
    worker_settings: WorkerSettings
    is_by_content: bool

    def new_session(self, num_queues: int) -> ServedSession:
        """Return a blank session for a front-end or mount, which owns it.

        Raises:
            OSError: there is no memory or descriptor for it.
        """
        return ServedSession(num_queues, self.resolver, is_by_content=self.is_by_content)


@contextlib.asynccontextmanager
async def running(
    config: RuntimeConfig, report: Callable[[], dict[str, Any]]
) -> AsyncIterator[Runtime]:
    """Open the envs and run the services; every worker must have ended before the block does.

    Raises:
        ApplianceError: the store or the state directory is unusable.
    """
    async with contextlib.AsyncExitStack() as stack:
        local_path = config.services.one_store()
        if local_path is not None:
            store = Store.open(local_path, create=True, or_readonly=True)
            stack.callback(store.close)
            resolver: Resolver = LocalResolver(store)
            settings = config.worker_settings(store, has_cache=False, has_remote_root=False)
        else:
            # Loaded here, as one local store has no need of gRPC.
            from appliance.resolve.remote import open_remote  # noqa: PLC0415 - see above

            resolver = remote = await stack.enter_async_context(
                open_remote(config.services, config.state_dir, config.blob_cache_bytes)
            )
            settings = config.worker_settings(
                remote.store, has_cache=remote.has_cache, has_remote_root=True
            )
        stack.push_async_callback(resolver.close)
        forker = Forker(
            config.log_level, log_json=config.log_json, store_path=Path(settings.store_path)
        )
        stack.push_async_callback(forker.close)
        status = StatusServer(config.state_dir, report)
        await status.start()
        stack.push_async_callback(status.close)
        yield Runtime(forker, resolver, settings, config.is_by_content)
