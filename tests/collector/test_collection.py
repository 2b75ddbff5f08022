"""A collection removes what no root reaches, all of it and nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.collector.collection import CollectOptions, collect, plan
from appliance.db.environment import WriteTransaction
from appliance.errors import ContentMissingError, StoreError
from appliance.nix.path_info_rules import nar_key
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.leases import Lease, LeaseKind
from appliance.store.root_lists import RootLists
from appliance.store.store import Store
from appliance.store.views import View, Views
from tests.collector.stored_trees import (
    check_exactly,
    check_readable,
    files_of,
    keys_of,
    make_tree,
    objects_batch,
    put_tree,
)
from tests.store.audit import blob_path

NOW = CollectOptions(grace_s=0)
LARGE = os.urandom(schema.INLINE_MAX + 5)
SHARED = make_tree("shared", {b"both": b"in both", b"large": LARGE})
OTHER = make_tree("other", {b"both": b"in both", b"own": os.urandom(300_000)})
USER = make_tree("user", {b"program": b"runs"}, [SHARED.path])
TREES = (SHARED, OTHER, USER)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(tmp_path / "store", create=True)
    for tree in TREES:
        put_tree(made, tree)
    yield made
    made.close()


def test_without_roots_everything_goes(store: Store) -> None:
    swept = collect(store, NOW)
    assert (swept.num_paths, swept.num_blobs, swept.num_files) == (3, 4, 2)
    check_exactly(store, [])


def test_a_root_keeps_what_it_refers_to(store: Store) -> None:
    RootLists(store.path).add("system", [USER.path])
    collect(store, NOW)
    check_exactly(store, [USER, SHARED])


def test_views_and_leases_are_roots_until_they_end(store: Store) -> None:
    views = Views(store.path)
    with views.locked():
        views.write("web", View(frozenset([OTHER.path])))
    lease = Lease.begin(store.path, LeaseKind.SESSION, "/run/vm.sock")
    assert lease.hold([SHARED.path.basename().encode()])
    assert not lease.hold([SHARED.path.basename().encode()])
    collect(store, NOW)
    check_exactly(store, [OTHER, SHARED])
    with views.locked():
        views.delete("web")
    collect(store, NOW)
    check_exactly(store, [SHARED])
    lease.leave()  # as if its process had been killed
    collect(store, NOW)
    check_exactly(store, [])
    assert not list((store.path / "leases").iterdir())


def test_what_was_put_within_the_grace_is_kept(store: Store) -> None:
    half = make_tree("half", {b"new": b"no PathInfo yet", b"large": os.urandom(70_000)})
    store.commit(objects_batch(store, half))
    collect(store, CollectOptions(grace_s=3600))
    batch = Batch()
    batch.add_path_info(half.path.digest, half.path_info())
    store.commit(batch)
    check_exactly(store, [*TREES, half])


def test_what_a_running_import_has_put_is_kept(store: Store) -> None:
    collect(store, NOW)
    lease = Lease.begin(store.path, LeaseKind.IMPORT)
    store.commit(objects_batch(store, OTHER))
    collect(store, NOW)
    batch = Batch()
    batch.add_path_info(OTHER.path.digest, OTHER.path_info())
    store.commit(batch)
    check_exactly(store, [OTHER])
    lease.close()


def test_a_path_whose_objects_were_removed_meanwhile_is_refused(store: Store) -> None:
    half = make_tree("half", {b"new": b"no PathInfo yet"})
    store.commit(objects_batch(store, half))
    collect(store, NOW)
    batch = Batch()
    batch.add_path_info(half.path.digest, half.path_info())
    with pytest.raises(ContentMissingError, match=r"was removed from the store meanwhile"):
        store.commit(batch)
    check_exactly(store, [])
    put_tree(store, half)
    check_exactly(store, [half])


def test_a_path_whose_reference_was_removed_meanwhile_is_refused(store: Store) -> None:
    collect(store, NOW)
    put_tree(store, SHARED)
    # Who puts closures has found SHARED, and puts USER; meanwhile it goes.
    collect(store, NOW)
    store.commit(objects_batch(store, USER))
    batch = Batch()
    batch.add_path_info(USER.path.digest, USER.path_info(), needs_references=True)
    with pytest.raises(
        ContentMissingError, match=r"-user: refers to path \S+-shared, which is not"
    ):
        store.commit(batch)
    put_tree(store, SHARED)
    both = objects_batch(store, USER)
    both.add_path_info(USER.path.digest, USER.path_info(), needs_references=True)
    store.commit(both)
    check_exactly(store, [SHARED, USER])


def test_delete_refuses_what_is_live_and_names_the_root(store: Store) -> None:
    RootLists(store.path).add("system", [USER.path])
    with pytest.raises(StoreError, match=r"-shared is live: roots/system"):
        collect(store, CollectOptions(grace_s=0, chosen=[SHARED.path]))
    RootLists(store.path).remove("system")
    with pytest.raises(StoreError, match=r"-user refers to it and would stay"):
        collect(store, CollectOptions(grace_s=0, chosen=[SHARED.path]))
    check_exactly(store, TREES)
    collect(store, CollectOptions(grace_s=0, chosen=[SHARED.path, USER.path]))
    check_exactly(store, [OTHER])


def test_a_limit_takes_the_oldest_paths_first_and_tells_what_they_free(store: Store) -> None:
    made = plan(store, CollectOptions(grace_s=0, max_freed_bytes=1))
    assert len(made.dead) == 1
    swept = collect(store, CollectOptions(grace_s=0, max_freed_bytes=1))
    assert (swept.num_paths, swept.freed_bytes) == (1, made.freed_bytes)
    left = [tree for tree in TREES if tree.path.digest not in made.dead]
    check_exactly(store, left)


def test_paths_younger_than_asked_for_are_kept(store: Store) -> None:
    collect(store, CollectOptions(grace_s=0, older_than_s=3600))
    check_exactly(store, TREES)


def test_damage_below_a_live_path_stops_the_collection(store: Store) -> None:
    RootLists(store.path).add("system", [SHARED.path])
    directory = SHARED.directories[0]
    database = store.env.database(schema.DIRECTORIES)
    store.env.write(lambda txn: txn.put(directory.digest(), b"\x0a\x00", db=database))
    with pytest.raises(StoreError, match=rf"directory {directory.digest()} is damaged"):
        collect(store, NOW)
    assert len(keys_of(store, schema.PATH_INFOS)) == len(TREES)
    collect(store, CollectOptions(grace_s=0, is_forced=True))
    assert keys_of(store, schema.PATH_INFOS) == [SHARED.path.digest]


def test_files_without_records_and_half_made_images_go(store: Store) -> None:
    RootLists(store.path).add("all", [tree.path for tree in TREES])
    stray = blob_path(store, Digest.of(b"stray"))
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"of a killed process")
    key = schema.image_key(Digest.of(b"no directory"), 3)
    images = store.env.database(schema.IMAGES)
    nar_infos = store.env.database(schema.NAR_INFOS)
    store.env.write(lambda txn: txn.put(key, b"piece", db=images))
    of_shared = nar_key(SHARED.root)

    def put_nar_infos(txn: WriteTransaction) -> None:
        for nar in (of_shared, Digest.of(b"of nothing")):
            txn.put(nar, schema.pack_nar_info(1, bytes(32)), db=nar_infos)

    store.env.write(put_nar_infos)
    collect(store, NOW)
    check_exactly(store, TREES)
    assert keys_of(store, schema.NAR_INFOS) == [of_shared]


def test_a_store_without_times_is_collected(store: Store) -> None:
    # As an earlier release has left it.
    def forget(txn: WriteTransaction) -> None:
        for table in (schema.PATH_TIMES, schema.RECENT_PUTS):
            txn.drop(store.env.database(table), delete=False)

    store.env.write(forget)
    RootLists(store.path).add("system", [OTHER.path])
    collect(store, CollectOptions(grace_s=3600))
    check_readable(store, [OTHER])
    assert keys_of(store, schema.PATH_INFOS) == [OTHER.path.digest]
    assert files_of(store.path) == {Digest.of(OTHER.files[b"own"])}
