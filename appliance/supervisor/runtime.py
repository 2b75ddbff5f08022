"""What every supervisor runs next to its front-ends or mount: resolver, fork server, status."""

import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from appliance.errors import StoreError
from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import Exported
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import Resolver
from appliance.resolve.substituting import SubstitutingResolver, Substitution
from appliance.services.addresses import ServiceAddresses
from appliance.services.space_watch import keeping_free
from appliance.session.grant_table import GrantTable
from appliance.session.session_memory import SessionMemory
from appliance.store.leases import Lease, LeaseKind
from appliance.store.profiles import Profiles
from appliance.store.store import Store
from appliance.store.views import Views
from appliance.supervisor.figures import Supervised, SupervisorFigures
from appliance.supervisor.forker import Forker
from appliance.supervisor.open_exports import OpenExports
from appliance.supervisor.open_files import OpenFiles
from appliance.supervisor.profiling import NO_PROFILING, Profiling, SessionProfiles
from appliance.supervisor.served_session import ServedSession
from appliance.supervisor.signs_of_life import giving_signs_of_life
from appliance.supervisor.status import StatusServer
from appliance.supervisor.succession import SuccessorSocket
from appliance.system.listening import ListeningSocket

_LOG = logging.getLogger(__name__)
# The user and group of workers whose supervisor is root: they own no file.
_NOBODY: Final = 65534


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """The options that all supervisors share: the store, and how workers serve it."""

    services: ServiceAddresses
    blob_cache_bytes: int
    """The largest size of the cache of blobs from remote services."""
    state_dir: Path
    is_root_listable: bool
    is_by_content: bool
    """Whether files with equal content have the same st_ino."""
    is_sandboxed: bool
    """Whether workers are locked down before they serve."""
    is_answered_in_python: bool
    """Whether workers leave every request to the Python handler, which is the reference."""
    poll_us: int
    """How long a worker may poll its ring before it sleeps, in microseconds."""
    min_free_bytes: int | None
    """Garbage is collected when less is free on the file system of the store; None: never."""
    log_level: str
    log_json: bool
    substitution: Substitution | None = None
    """Where store paths are copied from that a local store lacks."""
    metrics: ListeningSocket | None = None
    """Where metrics are served (lent)."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What `running` provides to the code that serves front-ends or a mount."""

    forker: Forker
    resolver: Resolver
    exports: OpenExports
    configure: pb.Configure
    """The part of the first message that is the same for every worker."""
    is_by_content: bool
    """As in `RuntimeConfig`."""
    profiles: SessionProfiles
    """What sessions record, and what is played for them."""
    open_files: OpenFiles = field(default_factory=OpenFiles)
    """Divides the blob files that may be open among the sessions."""
    leased_store: Path | None = None
    """The store in which sessions keep what they are granted; None if nothing is collected there,
    or this process may not write to it."""

    def configure_for(
        self, slot: int, device: pb.Device, *, is_recorded: bool = False
    ) -> pb.Configure:
        """Return the first message to the worker of clone `slot` of a mount."""
        configure = pb.Configure(queue=slot, device=device, is_recorded=is_recorded)
        configure.MergeFrom(self.configure)
        return configure

    def new_session(
        self,
        num_queues: int,
        exported: Exported,
        owner: str,
        profiling: Profiling = NO_PROFILING,
    ) -> ServedSession:
        """Return a new session for a front-end or mount; the caller owns it.

        Args:
            num_queues: the number of its queues or clones.
            exported: what it sees; an open one of `exports`.
            owner: its socket or mount, for people.
            profiling: what it records, and what is played for it.

        Raises:
            OSError: there is not enough memory, no free descriptor, or no room for its lease.
        """
        return ServedSession.create(
            num_queues,
            self.exports[exported],
            self.resolver,
            self.open_files,
            is_by_content=self.is_by_content,
            lease=self._new_lease(owner, exported),
            profile=self.profiles.begin(exported, profiling),
        )

    def resumed_session(
        self,
        num_queues: int,
        exported: Exported,
        memory_fds: tuple[int, int],
        lease_fd: int | None,
        profiling: Profiling,
    ) -> ServedSession:
        """Return a session that another supervisor has begun; the caller owns it.

        Args:
            num_queues: the number of its queues.
            exported: what it sees; an open one of `exports`.
            memory_fds: its session memory and its writable grants, taken.
            lease_fd: the descriptor that holds its lease, taken; None if it has none.
            profiling: what it goes on to record, and what is played for it.
        """
        memory_fd, grants_fd = memory_fds
        lease = None
        if lease_fd is not None and self.leased_store is not None:
            lease = Lease.adopt(self.leased_store, lease_fd)
        return ServedSession.resume(
            SessionMemory(memory_fd),
            GrantTable(is_by_content=self.is_by_content, writable_fd=grants_fd),
            num_queues,
            self.exports[exported],
            self.resolver,
            self.open_files,
            lease=lease,
            profile=self.profiles.begin(exported, profiling, goes_on=True),
        )

    def _new_lease(self, owner: str, exported: Exported) -> Lease | None:
        if self.leased_store is None:
            return None
        try:
            lease = Lease.begin(self.leased_store, LeaseKind.SESSION, owner, view=exported.view)
            if exported.root is not None:  # it is never asked for
                lease.hold([exported.root.encode()])
        except StoreError as exc:
            raise OSError(errno.EIO, str(exc)) from exc
        return lease


@contextlib.asynccontextmanager
async def running(
    config: RuntimeConfig,
    exported: Iterable[Exported],
    report: Callable[[], dict[str, Any]],
    *,
    has_sessions: bool,
) -> AsyncIterator[Runtime]:
    """Open the store or services, and run the fork server and the status socket, for a block.

    Args:
        config: the options.
        exported: what sessions will be of.
        report: returns what `appliance status` shows of this supervisor.
        has_sessions: whether session processes may outlive this process. `Forker.close` must then
            be called within the block; otherwise every worker must have ended before its end.

    Raises:
        ApplianceError: the store or the state directory is unusable; a view or path is missing.
    """
    async with contextlib.AsyncExitStack() as stack:
        resolver, supervised = await _open_content(config, stack)
        store = supervised.store
        leased_store = _leased_store(config, store)
        views = Views(config.services.views_beside(config.state_dir))
        exports = OpenExports(resolver, views, leased_store)
        stack.callback(exports.close)
        for one in set(exported):
            await exports.open(one)
        figures = SupervisorFigures(report, supervised)
        stack.callback(figures.close)
        status = StatusServer(config.state_dir, figures.gather)
        await status.start()
        stack.push_async_callback(status.close)
        if config.metrics is not None:
            await stack.enter_async_context(_serving_metrics(config.metrics, figures))
        forker = Forker(
            config.log_level,
            log_json=config.log_json,
            store_path=store.path,
            is_sandboxed=config.is_sandboxed,
            successors=SuccessorSocket(config.state_dir) if has_sessions else None,
        )
        supervised.num_fork_servers = lambda: forker.num_started
        if not has_sessions:
            stack.push_async_callback(forker.close)
        await stack.enter_async_context(giving_signs_of_life(report, figures.gather, forker))
        keeping = keeping_free(leased_store, config.min_free_bytes)
        supervised.collections = await stack.enter_async_context(keeping)
        profiles = Profiles(config.services.views_beside(config.state_dir))
        yield Runtime(
            forker,
            resolver,
            exports,
            _configure(config, supervised),
            config.is_by_content,
            SessionProfiles(profiles, resolver),
            leased_store=leased_store,
        )


async def _open_content(
    config: RuntimeConfig, stack: contextlib.AsyncExitStack
) -> tuple[Resolver, Supervised]:
    """Open the store or services until `stack` ends; return what finds content there."""
    resolver: Resolver
    local_path = config.services.one_store()
    if local_path is not None:
        store = Store.open(local_path, create=True, or_readonly=True)
        stack.callback(store.close)
        resolver = _local_resolver(store, config.substitution)
        supervised = Supervised(store)
    else:
        # Imported here because a local store does not need gRPC.
        from appliance.resolve.remote_opening import open_remote  # noqa: PLC0415 - see above

        resolver = remote = await stack.enter_async_context(
            open_remote(config.services, config.state_dir, config.blob_cache_bytes)
        )
        supervised = Supervised(remote.store, remote.has_cache, remote.report)
    stack.push_async_callback(resolver.close)
    return resolver, supervised


def _leased_store(config: RuntimeConfig, store: Store) -> Path | None:
    """Return the local store in which sessions keep what they are granted, if there can be one."""
    local_path = config.services.one_store()
    if local_path is not None and not store.is_writable:
        _LOG.info(
            "%s: this user cannot write there, so garbage collection by others does not see what "
            "sessions use",
            local_path,
        )
        return None
    return local_path


def _serving_metrics(
    socket: ListeningSocket, figures: SupervisorFigures
) -> contextlib.AbstractAsyncContextManager[None]:
    # Imported here because others need neither an HTTP server nor prometheus_client.
    from appliance.metrics.metrics_server import serving_metrics  # noqa: PLC0415 - see above
    from appliance.supervisor.exposition import exposition  # noqa: PLC0415 - the same

    return serving_metrics(
        socket, figures.gather, lambda report, accept: exposition([report], accept)
    )


def _configure(config: RuntimeConfig, supervised: Supervised) -> pb.Configure:
    """Return the part of the first message to a worker that is the same for all."""
    store, has_cache = supervised.store, supervised.is_cache
    return pb.Configure(
        store_path=str(store.path),
        list_root=config.is_root_listable,
        has_remote_blobs=has_cache,
        has_remote_directories=has_cache,
        has_remote_root=config.services.one_store() is None,
        makes_images=not store.is_writable,
        log_level=config.log_level,
        log_json=config.log_json,
        answers_in_python=config.is_answered_in_python,
        poll_us=config.poll_us,
        sandbox=_sandbox(store) if config.is_sandboxed else None,
    )


def _local_resolver(store: Store, substitution: Substitution | None) -> Resolver:
    """Return the resolver of a local store, with substituters if there are any."""
    resolver = LocalResolver(store)
    if substitution is None:
        return resolver
    if not store.is_writable:
        raise StoreError(f"{store.path}: cannot be written by this user, as substituters need it")
    return SubstitutingResolver(resolver, store.path, substitution)


def _sandbox(store: Store) -> pb.Sandbox:
    owner = store.files.private_to() if os.geteuid() == 0 else None
    if owner is None:
        return pb.Sandbox(uid=_NOBODY, gid=_NOBODY)
    _LOG.warning(
        "%s: not all files in blobs/ are readable for other users, so workers run as their owner; "
        "`chmod -R a+rX` there corrects that",
        store.path,
    )
    return pb.Sandbox(uid=owner[0], gid=owner[1])
