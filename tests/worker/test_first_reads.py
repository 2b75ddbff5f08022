"""What a worker tells of a session that is recorded, whether C or Python has answered."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.bounds import UPLINK_MESSAGE_MAX
from appliance.castore.digest import Digest
from appliance.castore.directory import Node
from appliance.protos import control_pb2 as pb
from appliance.session import first_reads as first_reads_module
from appliance.session.first_reads import SEGMENT_SIZE, FirstRead, FirstReads, unpack_reads
from appliance.store.store_reader import StoreReader
from tests.fakes import fuse_client
from tests.fakes.engine_rig import Rig
from tests.fakes.fuse_client import ROOT
from tests.fs.guest import File, Link, Model, basename
from tests.worker.twins import Twins, filled_store

LARGE = os.urandom(5 * SEGMENT_SIZE + 100)
TREE: dict[bytes, Model] = {
    b"large": File(LARGE),
    b"link": Link(b"target"),
    b"sub": {b"%03d" % number: File(b"content of %d" % number) for number in range(300)},
}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "store"


@pytest.fixture(scope="module")
def nodes(store_path: Path) -> list[Node]:
    return filled_store(store_path, {"tree": TREE})


@pytest.fixture(params=["store", "cache"])
def twins(request: pytest.FixtureRequest, store_path: Path, nodes: list[Node]) -> Iterator[Twins]:
    store = StoreReader(store_path)
    pair = Twins(store, nodes, is_cache=request.param == "cache", is_recorded=True)
    yield pair
    pair.close()
    store.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(num=128) as rig:
        yield rig


def top_of(twins: Twins) -> int:
    return twins.lookup(ROOT, basename("tree")).nodeid


def read(twins: Twins, nodeid: int, offset: int, size: int) -> None:
    twins.both(fuse_client.read(nodeid, offset, size))


def test_both_tell_the_same_in_the_order_in_which_it_was_read(twins: Twins) -> None:
    top = top_of(twins)
    sub = twins.lookup(top, b"sub").nodeid
    large = twins.lookup(top, b"large").nodeid
    for name in (b"007", b"003", b"007"):
        read(twins, twins.lookup(sub, name).nodeid, 0, 4096)
    read(twins, large, 3 * SEGMENT_SIZE - 10, 100)
    read(twins, large, 0, 1)
    read(twins, large, len(LARGE), 4096)  # behind its end, so nothing of it
    read(twins, large, len(LARGE) - 1, 4096)
    twins.plain.report_used()
    expected = [
        *((name, 0) for name in (b"007", b"003")),
        *((b"large", segment) for segment in (2, 3, 0, 5)),
    ]
    contents = {b"large": LARGE, b"007": b"content of 7", b"003": b"content of 3"}
    assert [one for one in twins.first.reads if one.size is not None] == [
        FirstRead(Digest.of(contents[name]), 0, len(contents[name]), segment)
        for name, segment in expected
    ]
    directories = [one for one in twins.first.reads if one.size is None]
    assert len(directories) == 2
    assert set(twins.first_by_c.reads) == set(twins.first.reads)
    for kind in (True, False):
        by_c = [one for one in twins.first_by_c.reads if (one.size is None) == kind]
        assert by_c == [one for one in twins.first.reads if (one.size is None) == kind]


def test_nothing_is_lost_when_much_is_read_at_once(twins: Twins, rig: Rig) -> None:
    sub = twins.lookup(top_of(twins), b"sub").nodeid
    nodeids = [twins.lookup(sub, b"%03d" % number).nodeid for number in range(300)]
    for start in range(0, len(nodeids), 30):
        for nodeid in nodeids[start : start + 30]:
            rig.driver.add_chain([fuse_client.read(nodeid, 0, 4096)], [16, 4096])
        rig.driver.publish()
        assert twins.plain.serve_batch(rig.ring, 32) == []
        rig.driver.poll()
    twins.plain.report_used()
    read_digests = {one.digest for one in twins.first_by_c.reads if one.size is not None}
    assert read_digests == {Digest.of(b"content of %d" % number) for number in range(300)}


def test_messages_fit_a_packet_however_large_the_numbers_are() -> None:
    messages: list[pb.FirstReads] = []
    noted = FirstReads(messages.append)
    reads = [FirstRead(os.urandom(32), 2**63, 2**63, 2**32 - 1) for _ in range(1000)]
    for one in reads:
        noted.note(one)
        noted.note(one)
    noted.flush()
    noted.flush()
    assert max(pb.Envelope(first_reads=one).ByteSize() for one in messages) <= UPLINK_MESSAGE_MAX
    assert [one for message in messages for one in unpack_reads(message)] == reads


def test_a_worker_notes_a_bounded_number_of_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_reads_module, "RECORDED_MAX", 10)
    messages: list[pb.FirstReads] = []
    noted = FirstReads(messages.append)
    for _ in range(20):
        noted.note(FirstRead(os.urandom(32), 1))
    noted.flush()
    assert sum(len(message.reads) for message in messages) == 10
