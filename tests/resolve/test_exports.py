"""What sessions of a view, of a store path and of the whole store are granted."""

import asyncio
import errno
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.errors import ConfigError, StoreError
from appliance.images.layout import name_of
from appliance.nix.store_path import StorePath
from appliance.resolve.exports import LiveView, PathAsRoot
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import SessionGrants
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.session.grants_layout import FIRST_BASE
from appliance.session.wants import DirectoryWanted, RootListWanted, RootNameWanted
from appliance.store.store import Store
from appliance.store.views import REGISTRATION, View, ViewFile, Views
from tests.fs.guest import File, basename, put, store_path

ONE, TWO, THREE = (store_path(name) for name in ("one", "two", "three"))
REGISTERED = ViewFile(REGISTRATION, Digest.of(b"registered"), 10)


class Rig:
    """A store with three paths, a view called `v` of it, and sessions."""

    def __init__(self, directory: Path) -> None:
        self.store = Store.open(directory / "store", create=True)
        for name in ("one", "two", "three"):
            put(self.store, name, {b"name": File(name.encode())})
        self.views = Views(directory / "store")
        self.resolver = LocalResolver(self.store)
        self.tables: list[GrantTable] = []

    def set(self, *paths: StorePath, files: tuple[ViewFile, ...] = ()) -> None:
        with self.views.locked():
            self.views.write("v", View(frozenset(paths), files))

    def view(self) -> LiveView:
        return LiveView(self.resolver, self.views, "v")

    def session(self, view: LiveView | PathAsRoot) -> SessionGrants:
        table = GrantTable()
        self.tables.append(table)
        session = SessionGrants(table)
        view.begin(session)
        return session

    async def close(self) -> None:
        await self.resolver.close()
        for table in self.tables:
            table.close()
        self.store.close()


def run(directory: Path, work: Callable[[Rig], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        rig = Rig(directory)
        try:
            await work(rig)
        finally:
            await rig.close()

    asyncio.run(main())


def names_in(session: SessionGrants) -> list[bytes]:
    return [name_of(record) for record in Grants(session.table.fd).listing(0)]


def test_a_view_grants_its_names_and_no_others(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        rig.set(ONE, TWO, store_path("absent"))
        view = rig.view()
        session = rig.session(view)
        assert Grants(session.table.fd).view_state == 1
        for name, error in (
            (basename("one"), 0),
            (basename("three"), errno.ENOENT),
            (basename("absent"), errno.ENOENT),
            (REGISTRATION.encode(), errno.ENOENT),
            (b"no store path", errno.ENOENT),
        ):
            assert await view.resolve(RootNameWanted(name), session) == error, name
        assert names_in(session) == [basename("one")]
        assert await view.resolve(RootListWanted(), session) == 0
        assert sorted(names_in(session)) == sorted([basename("one"), basename("two")])
        assert session.table.root_generation == 1
        assert await view.resolve(DirectoryWanted(bytes(32)), session) == errno.EIO

    run(tmp_path, work)


def test_changes_reach_every_session(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        rig.set(ONE, TWO)
        view = rig.view()
        one, other, ended = (rig.session(view) for _ in range(3))
        for session in (one, other, ended):
            assert await view.resolve(RootListWanted(), session) == 0
        view.end(ended)
        rig.set(TWO, THREE)
        # An added path is there for the next lookup, which looks at the text itself.
        assert await view.resolve(RootNameWanted(basename("three")), one) == 0
        for session in (one, other):
            assert Grants(session.table.fd).num_revoked == 1
            assert basename("one") not in session.table
            assert Grants(session.table.fd).view_state == 2
        assert Grants(ended.table.fd).num_revoked == 0
        assert await view.resolve(RootNameWanted(basename("one")), one) == errno.ENOENT
        # And what comes back has other nodeids.
        rig.set(ONE)
        view.refresh()
        assert await view.resolve(RootListWanted(), one) == 0
        assert names_in(one) == [basename("one")]
        grant = Grants(one.table.fd).by_name(basename("one"))
        assert grant is not None
        assert grant.base > FIRST_BASE + 2

    run(tmp_path, work)


def test_a_name_that_is_removed_while_it_is_looked_up_is_not_granted(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        rig.set(ONE)
        view = rig.view()
        session = rig.session(view)
        asked = asyncio.create_task(view.resolve(RootNameWanted(basename("one")), session))
        await asyncio.sleep(0)
        rig.set()
        view.refresh()
        assert await asked == errno.ENOENT
        assert names_in(session) == []

    run(tmp_path, work)


def test_files_of_a_view_are_replaced_under_their_names(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        rig.set(ONE, files=(REGISTERED,))
        view = rig.view()
        session = rig.session(view)
        reader = Grants(session.table.fd)
        assert names_in(session) == []  # so that a session may still start apart
        assert await view.resolve(RootNameWanted(b".registration"), session) == 0
        first = reader.by_name(b".registration")
        rig.set(ONE, TWO, files=(REGISTERED,))
        view.refresh()
        assert reader.by_name(b".registration") == first
        rig.set(ONE, TWO, files=(ViewFile(REGISTRATION, Digest.of(b"more"), 4),))
        view.refresh()
        second = reader.by_name(b".registration")
        assert first is not None
        assert second is not None
        assert (second.size, second.digest) == (4, Digest.of(b"more"))
        assert reader.by_nodeid(first.base) is None
        rig.set(ONE)
        view.refresh()
        assert reader.by_name(b".registration") is None
        assert await view.resolve(RootListWanted(), session) == 0
        assert names_in(session) == [basename("one")]

    run(tmp_path, work)


def test_a_text_that_breaks_a_rule_changes_nothing_and_a_deleted_view_is_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(rig: Rig) -> None:
        rig.set(ONE)
        view = rig.view()
        session = rig.session(view)
        assert await view.resolve(RootListWanted(), session) == 0
        rig.views.path("v").write_text("nonsense")
        view.refresh()
        assert "line 1: 'nonsense'" in caplog.text
        assert await view.resolve(RootNameWanted(basename("one")), session) == 0
        with rig.views.locked():
            rig.views.delete("v")
        view.refresh()
        assert names_in(session) == []
        assert await view.resolve(RootListWanted(), session) == 0
        rig.set(TWO)
        assert await view.resolve(RootNameWanted(basename("two")), session) == 0

    run(tmp_path, work)


def test_a_view_must_be_there_at_the_start(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        with pytest.raises(StoreError, match="view v: there is none in"):
            rig.view()
        with pytest.raises(ConfigError, match=r"view '\.x': expected"):
            LiveView(rig.resolver, rig.views, ".x")

    run(tmp_path, work)


def test_a_store_path_as_root_is_all_that_a_session_has(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        export = await PathAsRoot.open(rig.resolver, basename("one").decode())
        session = rig.session(export)
        assert Grants(session.table.fd).has_path_as_root
        assert await export.resolve(RootNameWanted(basename("two")), session) == errno.EINVAL
        assert await export.resolve(RootListWanted(), session) == errno.EINVAL
        assert names_in(session) == [basename("one")]

    run(tmp_path, work)


def test_a_root_must_be_a_directory_of_the_store(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        put(rig.store, "file", File(b"x"))
        with pytest.raises(StoreError, match=r"root .*-absent: the store has no such path"):
            await PathAsRoot.open(rig.resolver, basename("absent").decode())
        with pytest.raises(StoreError, match=r"root .*-file: is no directory"):
            await PathAsRoot.open(rig.resolver, basename("file").decode())

    run(tmp_path, work)
