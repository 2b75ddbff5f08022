"""Programs that serve a store collect garbage when its disk becomes full."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from appliance.collector.collection import CollectOptions, plan
from appliance.db.compaction import compact
from appliance.db.environment import WriteTransaction
from appliance.errors import StoreError
from appliance.services.space_watch import keeping_free
from appliance.store import schema
from appliance.store.root_lists import RootLists
from appliance.store.store import Store
from tests.collector.stored_trees import check_exactly, make_tree, put_tree
from tests.fakes.appliance_process import ApplianceProcess
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

ROOTED = make_tree("rooted", {b"a": b"needed"})
DEAD = make_tree("dead", {b"a": b"needed", b"b": b"large" * 40_000})
# More than any disk of this machine.
ALL = "900000T"


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """A store of which one path is a root; both were put long ago."""
    store = Store.open(tmp_path / "store", create=True)
    for tree in (ROOTED, DEAD):
        put_tree(store, tree)
    RootLists(store.path).add("system", [ROOTED.path])

    def forget(txn: WriteTransaction) -> None:
        for table in (schema.PATH_TIMES, schema.RECENT_PUTS):
            txn.drop(store.env.database(table), delete=False)

    store.env.write(forget)
    store.close()
    return tmp_path / "store"


def wait_until_collected(store_path: Path) -> None:
    """Wait until no dead record is left, and then until its files, which go after it, are gone."""
    for _ in every_event(DEADLINE_S):
        store = Store.open(store_path)
        try:
            is_planned = bool(plan(store, CollectOptions(grace_s=3600)).dead)
        finally:
            store.close()
        if not is_planned and not any((store_path / "blobs").glob("*/*")):
            return


@pytest.mark.slow
def test_a_daemon_collects(old_store: Path, tmp_path: Path) -> None:
    with DaemonProcess(f"lmdb://{old_store}", tmp_path, options=("--min-free", ALL)):
        wait_until_collected(old_store)


@pytest.mark.slow
def test_a_supervisor_collects(old_store: Path, tmp_path: Path) -> None:
    with ApplianceProcess(old_store, tmp_path, "--min-free", ALL) as process:
        wait_until_collected(old_store)
        assert "collecting garbage" in process.log()


@pytest.mark.slow
def test_nothing_is_collected_while_there_is_room(old_store: Path) -> None:
    async def watch() -> None:
        async with keeping_free(old_store, 1, interval_s=0.001):
            for _ in range(50):
                await asyncio.sleep(0)

    asyncio.run(watch())
    store = Store.open(old_store)
    assert plan(store, CollectOptions(grace_s=3600)).dead == [DEAD.path.digest]
    store.close()


@pytest.mark.slow
def test_compaction_gives_space_back_and_is_refused_while_the_store_is_open(
    tmp_path: Path,
) -> None:
    store = Store.open(tmp_path / "store", create=True)
    put_tree(store, make_tree("much", {b"f%d" % at: b"%d" % at * 9000 for at in range(99)}))
    put_tree(store, ROOTED)
    RootLists(store.path).add("system", [ROOTED.path])
    gc = [*APPLIANCE, "gc", "--store", f"lmdb://{store.path}"]
    subprocess.run([*gc, "--grace", "0"], check=True)
    refused = subprocess.run([*gc, "--compact"], check=False, capture_output=True, text=True)
    assert (refused.returncode, "has the store open" in refused.stderr) == (1, True)
    store.close()
    subprocess.run([*gc, "--compact"], check=True)
    before, after = compact(tmp_path / "store")
    assert before == after < 300_000
    store = Store.open(tmp_path / "store")
    check_exactly(store, [ROOTED])
    put_tree(store, DEAD)
    check_exactly(store, [ROOTED, DEAD])
    store.close()


def test_compaction_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store there"):
        compact(tmp_path)
