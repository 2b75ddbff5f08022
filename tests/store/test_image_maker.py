"""Stores of earlier releases, without images: these are made and stored, or made in memory."""

from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.image_maker import make_images
from appliance.store.store import Store
from tests.fakes import fuse_client
from tests.fs.guest import File, Guest, Tree, put

TREE: Tree = {b"%d" % i: {b"a": {b"b": File(b"%d" % i)}, b"c": {}} for i in range(50)}


def drop_images(store: Store) -> None:
    store.env.write(lambda txn: txn.drop(store.env.database(schema.IMAGES), delete=False))


def num_images(store: Store) -> int:
    with store.env.read() as txn:
        return txn.stat(store.env.database(schema.IMAGES))["entries"]


def test_the_first_lookup_makes_the_images_of_the_whole_path(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    name = put(guest.store, "old", TREE)
    made_by_the_commit = num_images(guest.store)
    assert made_by_the_commit > 100
    drop_images(guest.store)
    assert guest.body(fuse_client.read(guest.walk(name, b"7", b"a", b"b"), 0, 100)) == b"7"
    assert num_images(guest.store) == made_by_the_commit - 1, "the empty one needs none"
    assert len([r for r in caplog.records if "making its image" in r.message]) == 1
    assert len(guest.wants) == 1, "no directory is asked for by itself"


def test_images_that_are_lost_meanwhile_are_made_when_they_are_missed(guest: Guest) -> None:
    name = put(guest.store, "path", TREE)
    top = guest.walk(name)
    drop_images(guest.store)
    below = guest.lookup(guest.lookup(top, b"3").nodeid, b"a").nodeid
    assert guest.listing(below)[2].name == b"b"


def test_a_worker_makes_the_images_that_nobody_can_store(tmp_path: Path) -> None:
    guest = Guest(tmp_path, makes_images=True)
    name = put(guest.store, "path", TREE)
    top = guest.walk(name)
    drop_images(guest.store)
    for i in range(50):
        nodeid = guest.lookup(top, b"%d" % i).nodeid
        assert [record.name for record in guest.listing(nodeid)[2:]] == [b"a", b"c"]
    assert num_images(guest.store) == 0
    guest.close()


def test_one_bad_directory_keeps_no_other_from_its_image(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    batch = Batch()
    good = Directory(directories=[DirectoryNode(b"x", Directory().digest(), 0)])
    forged, missing = Digest.of(b"forged"), Digest.of(b"missing")
    root = Directory(
        directories=[
            DirectoryNode(b"forged", forged, 1),
            DirectoryNode(b"good", good.digest(), 1),
            DirectoryNode(b"missing", missing, 1),
        ]
    )
    batch.add_directory(good.digest(), good.to_bytes())
    batch.add_directory(root.digest(), root.to_bytes())
    batch.add_directory(forged, good.to_bytes())
    guest.store.commit(batch)
    drop_images(guest.store)
    make_images(guest.store, root.digest())
    with guest.store.snapshot() as snapshot:
        images = {
            name: snapshot.image(digest) is not None
            for name, digest in (
                ("root", root.digest()),
                ("good", good.digest()),
                ("forged", forged),
                ("missing", missing),
            )
        }
    assert images == {"root": True, "good": True, "forged": False, "missing": False}
    assert f"directory {forged}: the stored content has digest {good.digest()}" in caplog.text
    assert f"directory {missing}: not in the store" in caplog.text


@pytest.mark.slow
def test_an_image_comes_with_its_directory_and_never_without(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    below = [DirectoryNode(b"%06d" % i, Directory().digest(), 0) for i in range(20_000)]
    many = Directory(directories=below)
    batch = Batch()
    batch.add_directory(many.digest(), many.to_bytes())
    store.commit(batch)
    with store.snapshot() as snapshot:
        pieces = [snapshot.image(many.digest(), number) is not None for number in range(4)]
    assert pieces == [True, True, True, False]
    store.close()
