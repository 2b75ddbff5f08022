"""Sizes add up to what the store takes up on the disk."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.collector.collection import CollectOptions, collect
from appliance.collector.disk_usage import disk_usage
from appliance.nix.path_info import read_path_info
from appliance.services.contracts import Services
from appliance.store import schema
from appliance.store.root_lists import RootLists
from appliance.store.store import Store
from tests.collector.stored_trees import keys_of, make_tree, put_tree
from tests.contracts.rig import Rig
from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import APPLIANCE

COMMON = {b"c%d" % at: b"common %d" % at * 300 for at in range(300)} | {b"z": os.urandom(3 << 20)}
ONE = make_tree("one", COMMON | {b"own": os.urandom(2 << 20)})
OTHER = make_tree("other", COMMON | {b"o%d" % at: b"other %d" % at * 99 for at in range(300)})
APART = make_tree("apart", {b"a%d" % at: b"apart %d" % at * 2000 for at in range(200)})
TREES = (ONE, OTHER, APART)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(tmp_path / "store", create=True)
    for tree in TREES:
        put_tree(made, tree)
    yield made
    made.close()


def size_on_disk(store: Store) -> int:
    """Return what the file system says, without the pages of data.mdb that are not in use."""
    files = (store.path / "blobs").glob("*/*")
    blocks = sum(path.stat().st_blocks for path in files)
    return blocks * 512 + (store.path / "data.mdb").stat().st_size - store.env.unused_bytes()


def test_exclusive_and_shared_add_up_to_the_size_of_the_store(store: Store) -> None:
    usage = disk_usage(store)
    total = usage.exclusive_bytes + usage.shared_bytes
    assert abs(total / size_on_disk(store) - 1) < 0.01
    assert usage.unreferenced_bytes == 0
    assert abs(sum(row.exclusive_bytes for row in usage.rows) - usage.exclusive_bytes) < 10
    by_name = {row.label: row for row in usage.rows}
    one, other, apart = (by_name[tree.path.absolute()] for tree in TREES)
    # The directories differ: each has a name of its own, but all files of COMMON are shared.
    assert one.shared_bytes == other.shared_bytes == usage.shared_bytes
    assert one.shared_bytes > 3 << 20
    assert one.exclusive_bytes > 2 << 20
    assert apart.shared_bytes == 0
    for tree, row in zip(TREES, (one, other, apart), strict=True):
        assert row.apparent_bytes == 2 * sum(map(len, tree.files.values()))


@pytest.mark.slow
def test_sizes_of_a_store_of_every_kind_add_up(tmp_path: Path) -> None:
    uri = f"lmdb://{tmp_path}/store"
    chance = random.Random(4)
    shared = {f"s{at}": chance.randbytes(chance.randrange(9000)) for at in range(400)}
    shared["large"] = chance.randbytes(9 << 20)  # of which there are chunks
    for name in ("one", "other"):
        tree = tmp_path / name
        tree.mkdir()
        own = {f"o{at}": chance.randbytes(chance.randrange(3000)) for at in range(300)}
        for file, content in (shared | own | {"own": chance.randbytes(2 << 20)}).items():
            (tree / file).write_bytes(content)
        wide = tree / "wide"
        wide.mkdir()
        for at in range(3000):
            (wide / f"{name}{at}").symlink_to("nowhere")
    names = import_tree(uri, tmp_path / "one", tmp_path / "other")
    calculate_nars(uri)
    done = subprocess.run(
        [*APPLIANCE, "du", "--store", uri, "--json"], check=True, stdout=subprocess.PIPE
    )
    found = json.loads(done.stdout)
    rows = {Path(row["of"]).name: row for row in found["rows"]}
    totals = found["store"]
    store = Store.open(tmp_path / "store")
    size = size_on_disk(store)
    for table in (schema.CHUNKS, schema.CHUNK_PLACES, schema.IMAGES, schema.NAR_INFOS):
        assert keys_of(store, table)
    store.close()
    assert abs((totals["sharedBytes"] + totals["exclusiveBytes"]) / size - 1) < 0.01
    assert abs(sum(row["exclusiveBytes"] for row in rows.values()) - totals["exclusiveBytes"]) < 10
    assert {row["sharedBytes"] for row in rows.values()} == {totals["sharedBytes"]}
    assert rows.keys() == set(names)
    assert totals["sharedBytes"] > 9 << 20
    assert all(row["exclusiveBytes"] > 2 << 20 for row in rows.values())


def calculate_nars(uri: str) -> None:
    """Have the store calculate the NARs of its paths, and keep what they are."""

    async def work(services: Services) -> None:
        encoded = [one async for one in services.path_infos.list()]
        for one in encoded:
            await services.path_infos.calculate_nar(read_path_info(one).node)

    Rig(uri).run(work)


def test_paths_of_a_group_share_nothing_with_each_other(store: Store) -> None:
    pair = [ONE.path.digest, OTHER.path.digest]
    usage = disk_usage(store, [("pair", pair)])
    (row,) = usage.rows
    assert row.shared_bytes == 0
    alone = disk_usage(store, [("one", pair[:1]), ("other", pair[1:])])
    exclusive = [one.exclusive_bytes for one in alone.rows]
    assert abs(row.exclusive_bytes - sum(exclusive) - alone.shared_bytes) < 10


def test_what_was_exclusive_is_what_a_collection_frees(store: Store) -> None:
    before = disk_usage(store)
    row = next(one for one in before.rows if one.label == ONE.path.absolute())
    size = size_on_disk(store)
    RootLists(store.path).add("kept", [OTHER.path, APART.path])
    collect(store, CollectOptions(grace_s=0))
    freed = size - size_on_disk(store)
    assert abs(freed / row.exclusive_bytes - 1) < 0.05
    assert disk_usage(store).shared_bytes == 0
