"""What every supervisor runs next to its front-ends or mount: resolver, fork server, status."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import Export, Exported, LiveView, PathAsRoot, WholeStore
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import Resolver
from appliance.services.addresses import ServiceAddresses
from appliance.store.store import Store
from appliance.store.views import Views
from appliance.supervisor.forker import Forker
from appliance.supervisor.served_session import ServedSession
from appliance.supervisor.status import StatusServer
from appliance.supervisor.succession import SuccessorSocket
from appliance.supervisor.view_watch import ViewWatch

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
    log_level: str
    log_json: bool


@dataclass(frozen=True, slots=True)
class Runtime:
    """What `running` provides to the code that serves front-ends or a mount."""

    forker: Forker
    resolver: Resolver
    exports: Mapping[Exported, Export]
    configure: pb.Configure
    """The part of the first message that is the same for every worker."""
    is_by_content: bool
    """As in `RuntimeConfig`."""

    def configure_for(self, slot: int, device: pb.Device) -> pb.Configure:
        """Return the first message to the worker of clone `slot` of a mount."""
        configure = pb.Configure(queue=slot, device=device)
        configure.MergeFrom(self.configure)
        return configure

    def new_session(self, num_queues: int, exported: Exported) -> ServedSession:
        """Return a new session for a front-end or mount; the caller owns it.

        Args:
            num_queues: the number of its queues or clones.
            exported: what it sees; one of those that `running` was given.

        Raises:
            OSError: there is not enough memory or no free descriptor.
        """
        return ServedSession.create(
            num_queues,
            self.exports[exported],
            self.resolver,
            is_by_content=self.is_by_content,
        )


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
        local_path = config.services.one_store()
        if local_path is not None:
            store = Store.open(local_path, create=True, or_readonly=True)
            stack.callback(store.close)
            resolver: Resolver = LocalResolver(store)
            has_cache, has_remote_root = False, False
        else:
            # Imported here because a local store does not need gRPC.
            from appliance.resolve.remote import open_remote  # noqa: PLC0415 - see above

            resolver = remote = await stack.enter_async_context(
                open_remote(config.services, config.state_dir, config.blob_cache_bytes)
            )
            store, has_cache, has_remote_root = remote.store, remote.has_cache, True
        stack.push_async_callback(resolver.close)
        exports = {one: await _open_export(config, one, resolver) for one in set(exported)}
        live_views = [export for export in exports.values() if isinstance(export, LiveView)]
        if live_views:
            watch = ViewWatch(_views(config).directory, live_views)
            stack.callback(watch.close)
        status = StatusServer(config.state_dir, report)
        await status.start()
        stack.push_async_callback(status.close)
        forker = Forker(
            config.log_level,
            log_json=config.log_json,
            store_path=store.path,
            is_sandboxed=config.is_sandboxed,
            successors=SuccessorSocket(config.state_dir) if has_sessions else None,
        )
        if not has_sessions:
            stack.push_async_callback(forker.close)
        configure = pb.Configure(
            store_path=str(store.path),
            list_root=config.is_root_listable,
            has_remote_blobs=has_cache,
            has_remote_directories=has_cache,
            has_remote_root=has_remote_root,
            makes_images=not store.is_writable,
            log_level=config.log_level,
            log_json=config.log_json,
            sandbox=_sandbox(store) if config.is_sandboxed else None,
        )
        yield Runtime(forker, resolver, exports, configure, config.is_by_content)


async def _open_export(config: RuntimeConfig, exported: Exported, resolver: Resolver) -> Export:
    if exported.view is not None:
        return LiveView(resolver, _views(config), exported.view)
    if exported.root is not None:
        return await PathAsRoot.open(resolver, exported.root)
    return WholeStore(resolver)


def _views(config: RuntimeConfig) -> Views:
    return Views(config.services.views_beside(config.state_dir))


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
