"""What the root directory of a session is: the store, a view of it, or one of its store paths.

Every session belongs to an export, which decides what the session may be granted; its resolver only
provides it. The whole store grants whatever is asked for. A view grants the names that it has, and
follows its text (`appliance.store.views`): sessions are granted what was added when they next ask
for it, and lose at once what was removed. A store path as the root is granted when the session
begins, and nothing else ever is.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from errno import EINVAL, ENOENT
from typing import Final, NamedTuple, Protocol

from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.errors import StoreError
from appliance.resolve.resolver import GRANTS_AT_A_TIME, Resolver, SessionGrants, errno_of
from appliance.session.grants_layout import NODEID_LIMIT
from appliance.session.wants import RootListWanted, RootNameWanted, Want
from appliance.store.views import View, Views, names_of

_LOG: Final = logging.getLogger(__name__)

# Names that are looked up at a time for a listing.
_NAMES_AT_A_TIME: Final = 1024
# How long a guest may keep the files of a view, whose content changes under one name, in seconds.
FILE_VALID_S: Final = 1


class Exported(NamedTuple):
    """What an operator asks the root directory to be: the whole store, if nothing is given.

    Args:
        view: the name of a view, or None.
        root: the base name of a store path, or None; only one of the two can be given.
    """

    view: str | None = None
    root: str | None = None


WHOLE_STORE: Final = Exported()


class Export(Protocol):
    """What the sessions of a socket or mount may be granted; used on one event loop."""

    def begin(self, session: SessionGrants) -> None:
        """Grant what a new session has from the start."""

    def resume(self, session: SessionGrants) -> None:
        """Take on a session that another supervisor has begun with an export of the same name."""

    def end(self, session: SessionGrants) -> None:
        """Forget a session."""

    async def nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """Return what sessions may be granted under these names, of those that are there.

        Raises:
            ApplianceError: the store or service failed.
        """

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        """Do as `Resolver.resolve`, for a session that has begun."""


class WholeStore:
    """The export of all store paths."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    def begin(self, session: SessionGrants) -> None:
        """Do nothing: names are granted when they are looked up."""

    def resume(self, session: SessionGrants) -> None:
        """Do nothing."""

    def end(self, session: SessionGrants) -> None:
        """Do nothing."""

    async def nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """See `Export.nodes`."""
        return await self._resolver.root_nodes(names)

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        """See `Export.resolve`."""
        return await self._resolver.resolve(want, session)


class PathAsRoot:
    """The export of one store path, which is the root directory itself.

    Args:
        resolver: provides images and blobs.
        node: the root node of the store path.
    """

    def __init__(self, resolver: Resolver, node: DirectoryNode) -> None:
        self._resolver = resolver
        self._node = node

    @classmethod
    async def open(cls, resolver: Resolver, name: str) -> "PathAsRoot":
        """Find the store path with this base name.

        Raises:
            StoreError: it is not there, it is not a directory, or the service failed.
        """
        nodes = await resolver.root_nodes([name.encode()])
        if not nodes:
            raise StoreError(f"root {name}: the store has no such path")
        (node,) = nodes
        if not isinstance(node, DirectoryNode):
            raise StoreError(f"root {name}: is no directory; only a directory can be the root")
        if node.size >= NODEID_LIMIT - 1:
            raise StoreError(f"root {name}: its {node.size} nodes are more than there are nodeids")
        return cls(resolver, node)

    def begin(self, session: SessionGrants) -> None:
        """See `Export.begin`."""
        session.table.grant_root(self._node)

    def resume(self, session: SessionGrants) -> None:
        """Do nothing: the content of a store path is the same for every supervisor."""

    def end(self, session: SessionGrants) -> None:
        """Do nothing."""

    async def nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """See `Export.nodes`."""
        return [self._node] if self._node.name in names else []

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        """See `Export.resolve`; no name or listing of store paths can be wanted."""
        if isinstance(want, RootNameWanted | RootListWanted):
            return EINVAL
        return await self._resolver.resolve(want, session)


class LiveView:
    """The export of a view, as its text is at the moment.

    Args:
        resolver: finds the paths, and provides images and blobs.
        views: where the view is.
        name: the name of the view.

    Raises:
        ConfigError: no view may have that name.
        StoreError: there is no such view, or its text breaks a rule.
    """

    def __init__(self, resolver: Resolver, views: Views, name: str) -> None:
        self._resolver = resolver
        self._views = views
        self._name = name
        self._sessions: set[SessionGrants] = set()
        self._state = 0
        self._files: dict[bytes, FileNode] = {}
        self._seen = self._look()
        self._set(views.read(name))

    def begin(self, session: SessionGrants) -> None:
        """See `Export.begin`."""
        self._sessions.add(session)
        session.table.set_view_state(self._state)

    def resume(self, session: SessionGrants) -> None:
        """See `Export.resume`; what has been removed or changed meanwhile is withdrawn."""
        table = session.table
        self._state = max(self._state, table.view_state + 1)
        self._sessions.add(session)
        changed = {
            name
            for name in table.names()
            if name in self._files and table.digest_of(name) != self._files[name].digest
        }
        self._withdraw(session, changed)

    def end(self, session: SessionGrants) -> None:
        """See `Export.end`."""
        self._sessions.discard(session)

    def refresh(self) -> None:
        """Follow the text if it has changed; a view that is gone is empty until there is one again.

        If its text cannot be read or breaks a rule, the view stays as it is, with a log line.
        """
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            view = View() if seen is None else self._views.read(self._name)
        except StoreError as exc:
            _LOG.error("%s; its sessions go on with what it had before", exc)
            return
        if seen is None:
            _LOG.warning("view %s was deleted; its sessions see nothing now", self._name)
        self._set(view)

    async def nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """See `Export.nodes`."""
        self.refresh()
        files = [self._files[name] for name in names if name in self._files]
        found = await self._resolver.root_nodes([name for name in names if name in self._names])
        # Again, because names may have been removed meanwhile.
        return [*files, *(node for node in found if node.name in self._names)]

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        """See `Export.resolve`."""
        match want:
            case RootNameWanted(name):
                self.refresh()
                if name in self._files:
                    return await errno_of(want, self._add_files(session, [name]))
                if name not in self._names:
                    return ENOENT
                return await self._still(name, session, await self._resolver.resolve(want, session))
            case RootListWanted():
                self.refresh()
                return await errno_of(want, self._add_all(session))
            case _:
                return await self._resolver.resolve(want, session)

    def _look(self) -> tuple[int, int, int] | None:
        # A view is replaced by rename(2), so another text is another file.
        try:
            status = self._views.path(self._name).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _set(self, view: View) -> None:
        before, self._files = (
            self._files,
            {
                file.name.encode(): FileNode(
                    file.name.encode(), file.digest, file.size, executable=False
                )
                for file in view.files
            },
        )
        self._names = names_of(view.paths)
        self._state += 1
        changed = {name for name, node in self._files.items() if before.get(name) != node}
        for session in self._sessions:
            self._withdraw(session, changed)

    def _withdraw(self, session: SessionGrants, changed: set[bytes]) -> None:
        table = session.table
        for name in table.names():
            if name in changed:
                self._replace(session, name)
            elif name not in self._names and name not in self._files:
                table.revoke(name)
        # Last, so that a worker that sees the new state sees none of what was removed.
        table.set_view_state(self._state)

    def _replace(self, session: SessionGrants, name: bytes) -> None:
        try:
            session.table.replace(self._files[name], name_valid_s=FILE_VALID_S)
        except (OSError, StoreError) as exc:
            _LOG.error("view %s: %s keeps its old content: %s", self._name, name.decode(), exc)

    async def _add_files(self, session: SessionGrants, names: Iterable[bytes]) -> None:
        for name in names:
            session.table.grant(self._files[name], name_valid_s=FILE_VALID_S)

    async def _still(self, name: bytes, session: SessionGrants, error: int) -> int:
        # The name may have been removed while it was looked up.
        if not error and name not in self._names:
            if name in session.table:
                session.table.revoke(name)
            return ENOENT
        return error

    async def _add_all(self, session: SessionGrants) -> None:
        async with session.listing:
            # Again if the view has changed meanwhile: the worker would only ask again.
            while session.table.root_generation < self._state:
                state = self._state
                await self._add_paths(session)
                if state == self._state:
                    await self._add_files(session, self._files)
                    session.table.set_root_generation(state)

    async def _add_paths(self, session: SessionGrants) -> None:
        wanted = sorted(name for name in self._names if name not in session.table)
        num_found = 0
        for start in range(0, len(wanted), _NAMES_AT_A_TIME):
            nodes = await self._resolver.root_nodes(wanted[start : start + _NAMES_AT_A_TIME])
            num_found += len(nodes)
            for first in range(0, len(nodes), GRANTS_AT_A_TIME):
                # Each time anew: names may be removed between two turns of the event loop.
                part = nodes[first : first + GRANTS_AT_A_TIME]
                session.add_if_possible([node for node in part if node.name in self._names])
                await asyncio.sleep(0)
        if num_found < len(wanted):
            num_missing = len(wanted) - num_found
            _LOG.warning("view %s: the store lacks %d of its paths", self._name, num_missing)
