"""What every supervisor runs beside what it serves: envs, resolver, fork server, status."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.control.session_memory import COUNTERS_PER_QUEUE, SessionMemory
from appliance.fuse_proto._wire import Opcode
from appliance.index.node_index import NodeIndex
from appliance.store.store import Store
from appliance.supervisor.forker import Forker
from appliance.supervisor.kept_worker import WorkerSettings
from appliance.supervisor.resolving import ResolvingQueue
from appliance.supervisor.status import StatusServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What every supervisor is told: the store, and how workers serve it."""

    store_path: Path
    state_dir: Path
    is_root_listable: bool
    log_level: str
    log_json: bool

    @property
    def index_path(self) -> Path:
        """Where the node index is."""
        return self.state_dir / "index"

    def worker_settings(self) -> WorkerSettings:
        """Return what workers are told of this."""
        return WorkerSettings(
            store_path=str(self.store_path),
            index_path=str(self.index_path),
            is_root_listable=self.is_root_listable,
            log_level=self.log_level,
            log_json=self.log_json,
        )


@dataclass(frozen=True, slots=True)
class Services:
    """What is there while `running`."""

    store: Store
    forker: Forker
    resolving: ResolvingQueue


@contextlib.asynccontextmanager
async def running(
    config: ServiceConfig, report: Callable[[], dict[str, Any]]
) -> AsyncIterator[Services]:
    """Open the envs and run the services; every worker must have ended before the block does.

    Raises:
        ApplianceError: the store or the state directory is unusable.
    """
    async with contextlib.AsyncExitStack() as stack:
        store = Store.open(config.store_path, create=True)
        stack.callback(store.close)
        index = NodeIndex.open(config.index_path, is_readonly=False)
        stack.callback(index.close)
        resolving = ResolvingQueue(store, index)
        stack.callback(resolving.close)
        forker = Forker()
        stack.push_async_callback(forker.close)
        status = StatusServer(config.state_dir, report)
        await status.start()
        stack.push_async_callback(status.close)
        yield Services(store, forker, resolving)


def request_counts(session: SessionMemory) -> dict[str, int]:
    """Return how often each opcode was answered since the session began."""
    totals = session.totals()
    counts = {op.name: totals[op] for op in Opcode if op < COUNTERS_PER_QUEUE and totals[op]}
    return counts | {"UNKNOWN": totals[0]} if totals[0] else counts
