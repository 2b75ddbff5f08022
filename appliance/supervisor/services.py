"""What every supervisor runs beside what it serves: envs, resolver, fork server, status."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.control.session_memory import COUNTERS_PER_QUEUE, SessionMemory
from appliance.fuse_proto._wire import Opcode
from appliance.index.node_index import NodeIndex
from appliance.index.resolver import Resolver
from appliance.store.service_uri import ServiceAddresses
from appliance.store.store import Store
from appliance.supervisor.forker import Forker
from appliance.supervisor.kept_worker import WorkerSettings
from appliance.supervisor.resolving import ResolvingQueue
from appliance.supervisor.status import StatusServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What every supervisor is told: the store, and how workers serve it."""

    services: ServiceAddresses
    blob_cache_bytes: int
    state_dir: Path
    is_root_listable: bool
    log_level: str
    log_json: bool

    @property
    def index_path(self) -> Path:
        """Where the node index is."""
        return self.state_dir / "index"

    def worker_settings(
        self, store: Store, *, has_remote_blobs: bool, has_remote_root: bool
    ) -> WorkerSettings:
        """Return what workers are told of this, which read blobs in `store`."""
        return WorkerSettings(
            store_path=str(store.path),
            index_path=str(self.index_path),
            is_root_listable=self.is_root_listable,
            has_remote_blobs=has_remote_blobs,
            has_remote_root=has_remote_root,
            log_level=self.log_level,
            log_json=self.log_json,
        )


@dataclass(frozen=True, slots=True)
class Services:
    """What is there while `running`."""

    forker: Forker
    resolving: ResolvingQueue
    worker_settings: WorkerSettings


@contextlib.asynccontextmanager
async def running(
    config: ServiceConfig, report: Callable[[], dict[str, Any]]
) -> AsyncIterator[Services]:
    """Open the envs and run the services; every worker must have ended before the block does.

    Raises:
        ApplianceError: the store or the state directory is unusable.
    """
    async with contextlib.AsyncExitStack() as stack:
        index = NodeIndex.open(config.index_path, is_readonly=False)
        stack.callback(index.close)
        local_path = config.services.one_store()
        if local_path is not None:
            store = Store.open(local_path, create=True, or_readonly=True)
            stack.callback(store.close)
            resolving = ResolvingQueue(store, index, Resolver(store, index))
            settings = config.worker_settings(store, has_remote_blobs=False, has_remote_root=False)
        else:
            # Loaded here, as one local store has no need of gRPC.
            from appliance.supervisor.remote import open_remote  # noqa: PLC0415 - see above

            remote = await stack.enter_async_context(
                open_remote(config.services, index, config.state_dir, config.blob_cache_bytes)
            )
            resolving = ResolvingQueue(remote.store, index, remote)
            settings = config.worker_settings(
                remote.store, has_remote_blobs=remote.has_remote_blobs, has_remote_root=True
            )
        stack.callback(resolving.close)
        forker = Forker()
        stack.push_async_callback(forker.close)
        status = StatusServer(config.state_dir, report)
        await status.start()
        stack.push_async_callback(status.close)
        yield Services(forker, resolving, settings)


def request_counts(session: SessionMemory) -> dict[str, int]:
    """Return how often each opcode was answered since the session began."""
    totals = session.totals()
    counts = {op.name: totals[op] for op in Opcode if op < COUNTERS_PER_QUEUE and totals[op]}
    return counts | {"UNKNOWN": totals[0]} if totals[0] else counts
