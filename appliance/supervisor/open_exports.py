"""The exports that the sessions of one supervisor may be of, opened when a listener needs them."""

from dataclasses import dataclass
from pathlib import Path

from appliance.resolve.exports import Export, Exported, LiveView, PathAsRoot, WholeStore
from appliance.resolve.resolver import Resolver
from appliance.resolve.substituting import SubstitutingResolver
from appliance.store.leases import Lease, LeaseKind
from appliance.store.views import Views
from appliance.supervisor.view_watch import ViewWatch


@dataclass(slots=True)
class _Opened:
    export: Export
    lease: Lease | None
    num_users: int


class OpenExports:
    """Opens each export once, however many listeners use it.

    Args:
        resolver: provides what is exported.
        views: where views are.
        leased_store: the store in which a store path that is a root directory is kept between
            sessions, too; None if nothing is collected there.
    """

    def __init__(self, resolver: Resolver, views: Views, leased_store: Path | None) -> None:
        self._resolver = resolver
        self._views = views
        self._leased_store = leased_store
        self._opened: dict[Exported, _Opened] = {}
        self._live_views: list[LiveView] = []  # the watch reads it
        self._watch: ViewWatch | None = None

    def __getitem__(self, exported: Exported) -> Export:
        """Return an export that is open."""
        return self._opened[exported].export

    async def open(self, exported: Exported) -> None:
        """Open an export for one more user, which must `release` it. Calls must not overlap.

        Raises:
            ApplianceError: the view or path is missing or breaks a rule.
        """
        opened = self._opened.get(exported)
        if opened is not None:
            opened.num_users += 1
            return
        lease = None
        if exported.root is not None and self._leased_store is not None:
            lease = Lease.begin(self._leased_store, LeaseKind.SESSION, "the supervisor")
        try:
            if lease is not None and exported.root is not None:
                lease.hold([exported.root.encode()])
            export = await self._new_export(exported)
        except BaseException:
            if lease is not None:
                lease.close()
            raise
        self._opened[exported] = _Opened(export, lease, 1)

    def release(self, exported: Exported) -> None:
        """Close an export unless it has other users; no session of it may be left then."""
        opened = self._opened[exported]
        opened.num_users -= 1
        if opened.num_users:
            return
        del self._opened[exported]
        if isinstance(opened.export, LiveView):
            self._live_views.remove(opened.export)
        if opened.lease is not None:
            opened.lease.close()

    def close(self) -> None:
        """Close all exports."""
        if self._watch is not None:
            self._watch.close()
        for opened in self._opened.values():
            if opened.lease is not None:
                opened.lease.close()
        self._opened.clear()

    async def _new_export(self, exported: Exported) -> Export:
        if exported.root is not None:
            name = exported.root.encode()
            if isinstance(self._resolver, SubstitutingResolver) and not (
                await self._resolver.root_nodes([name])
            ):
                await self._resolver.provide(name)
            return await PathAsRoot.open(self._resolver, exported.root)
        if exported.view is None:
            return WholeStore(self._resolver)
        view = LiveView(self._resolver, self._views, exported.view)
        self._live_views.append(view)
        if self._watch is None:
            self._watch = ViewWatch(self._views.directory, self._live_views)
        return view
