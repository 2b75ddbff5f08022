"""Grants a saved session what it had: the same store paths under the same nodeids.

The state comes from a front-end by way of its session process, and neither is trusted: a session is
granted only what its export has, and what a path's name stands for here must be what it stood for
when the session was saved. All of it is found and compared first; the grants change at the end,
together.

Names in the root that are not store paths are the files of a view. A guest looks these up again
every second, so one that has changed, or that is not there, is left out.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance.bounds import GRANTS_MAX
from appliance.castore.directory import DirectoryNode, Node
from appliance.errors import ApplianceError, StoreError
from appliance.fuse_proto.encode import FOREVER_S
from appliance.nix.store_path import StorePath, StorePathError
from appliance.protos import control_pb2 as pb
from appliance.protos.device_state_pb2 import DeviceState, SavedGrant
from appliance.resolve.exports import FILE_VALID_S, Export
from appliance.resolve.resolver import GRANTS_AT_A_TIME, SessionGrants
from appliance.session.device_state import is_of
from appliance.session.grants_layout import FIRST_BASE, NODEID_LIMIT, ROOT_NODEID

_LOG: Final = logging.getLogger(__name__)
# Names in one error.
_NAMED_MAX: Final = 5
_OTHER_ROOT: Final = (
    "a store path was the root directory of the guest, and is not that of this socket, or the "
    "other way"
)


class _Row(NamedTuple):
    """A grant to be made; without a node, its nodeids are to be stale."""

    base: int
    span: int
    node: Node | None
    name_valid_s: int


class Restoration:
    """The state of one session on its way in.

    Args:
        label: the name of the front-end's socket, for logs.
        export: what the session may be granted.
        session: its grants.
        goes_on: whether nodes of a path that is missing are stale, rather than the state refused.
    """

    def __init__(
        self, label: str, export: Export, session: SessionGrants, *, goes_on: bool
    ) -> None:
        self._label = label
        self._export = export
        self._session = session
        self._goes_on = goes_on
        self._taking = asyncio.Lock()
        self._head: DeviceState | None = None
        self._is_rooted = False
        self._rows: list[_Row] = []
        self._end = 0

    async def take(self, message: pb.Restore) -> str:
        """Do what `message` says; return an empty string, or why that is impossible.

        After an error, the next message has to be the first one of a state.
        """
        async with self._taking:
            try:
                await self._take(message)
            except OSError as exc:
                error = exc.strerror or str(exc)
            except ApplianceError as exc:
                error = str(exc)
            except Exception:  # noqa: BLE001 - whatever it was, the front-end must get an answer
                _LOG.exception("%s: restoring", self._label)
                error = "the supervisor has an error, see its log"
            else:
                return ""
            self._forget()
            return f"the device state cannot be loaded: {error}"

    async def _take(self, message: pb.Restore) -> None:
        if message.is_first:
            self._forget()
            self._is_rooted = self._session.table.has_path_as_root
            self._head = _head_untrusted(message.part, self._session)
        if self._head is None:
            raise StoreError("its supervisor has ended meanwhile")
        await self._find_untrusted(message.part.grants)
        if message.is_last:
            await self._replace_untrusted(self._head)
            self._forget()

    def _forget(self) -> None:
        self._head = None
        self._rows = []
        self._end = 0

    async def _find_untrusted(self, grants: Sequence[SavedGrant]) -> None:
        names = [saved.name for saved in grants if saved.name]
        nodes = {node.name: node for node in await self._export.nodes(names)}
        if await self._session.hold(nodes):
            # Again, as a path may have been removed before it was held.
            nodes = {node.name: node for node in await self._export.nodes(list(nodes))}
        lost = []
        for saved in grants:
            self._check_base_untrusted(saved)
            node = nodes.get(saved.name)
            if reason := _reason_of_loss(saved, node):
                lost.append(reason)
            if node is not None and not is_of(saved, node):
                node = None
            self._append(saved, node)
        if lost:
            text = "; ".join(lost[:_NAMED_MAX]) + ("; ..." if len(lost) > _NAMED_MAX else "")
            # Without its root directory, a guest has nothing to go on with.
            if not self._goes_on or self._is_rooted:
                raise StoreError(text)
            _LOG.warning("%s: %s: the guest finds its files stale", self._label, text)

    def _append(self, saved: SavedGrant, node: Node | None) -> None:
        span = saved.span if node is None else _span(node)
        name_valid_s = FOREVER_S if _is_store_path(saved.name) else FILE_VALID_S
        self._rows.append(_Row(saved.base, span, node, name_valid_s))
        self._end = saved.base + span

    def _check_base_untrusted(self, saved: SavedGrant) -> None:
        is_root = saved.base == ROOT_NODEID and not self._rows
        if is_root != (self._is_rooted and not self._rows):
            raise StoreError(_OTHER_ROOT)
        if not is_root and saved.base < max(FIRST_BASE, self._end):
            raise StoreError(f"base {saved.base}, expected {max(FIRST_BASE, self._end)} or more")
        if not 0 < saved.span <= NODEID_LIMIT - saved.base:
            raise StoreError(f"{saved.span} nodeids from base {saved.base} on are out of range")
        if len(self._rows) >= GRANTS_MAX:
            raise StoreError(f"a session can be granted {GRANTS_MAX} store paths, not more")

    async def _replace_untrusted(self, head: DeviceState) -> None:
        if self._is_rooted and not self._rows:
            raise StoreError(_OTHER_ROOT)
        least = max(FIRST_BASE, self._end)
        if not least <= head.next_base <= NODEID_LIMIT:
            raise StoreError(f"the next base is {head.next_base}, expected {least} or more")
        table = self._session.table
        table.begin_again(head.generation)
        for number, row in enumerate(self._rows):
            table.go_on_at(row.base)
            if row.node is None:
                table.leave_out(row.span)
            else:
                table.grant(row.node, name_valid_s=row.name_valid_s)
            if number % GRANTS_AT_A_TIME == 0:
                await asyncio.sleep(0)
        table.go_on_at(head.next_base)
        _LOG.info("%s: the state of a saved guest was loaded: %d paths", self._label, len(table))


def _head_untrusted(head: DeviceState, session: SessionGrants) -> DeviceState:
    if head.is_by_content != session.table.is_by_content:
        was, is_ = ("content", "place") if head.is_by_content else ("place", "content")
        raise StoreError(f"the guest was served with --inodes={was}, this socket has {is_}")
    return DeviceState(generation=head.generation, next_base=head.next_base)


def _span(node: Node) -> int:
    return 1 + (node.size if isinstance(node, DirectoryNode) else 0)


def _reason_of_loss(saved: SavedGrant, node: Node | None) -> str:
    """Return why the guest loses a store path, or nothing."""
    if not _is_store_path(saved.name):
        return ""  # a file of a view, or a grant that was revoked
    name = saved.name.decode()
    if node is None:
        return f"{name} is not in the store and cannot be fetched"
    return "" if is_of(saved, node) else f"{name} has other content here"


def _is_store_path(name: bytes) -> bool:
    try:
        StorePath.parse(name)
    except StorePathError:
        return False
    return True
