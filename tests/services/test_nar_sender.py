"""NARs sent from a store into a socket: whole, in parts, to slow readers, and what is damaged."""

import hashlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode, Node
from appliance.db.environment import WriteTransaction
from appliance.errors import ContentMissingError, NarError, WrongDigestError
from appliance.services.local_nar import LocalNar
from appliance.services.nar_plan import KeptPlans, NarPlan
from appliance.services.nar_sender import NarSender
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.services.test_local_nar import (
    LARGE,
    ROOT_NODE,
    ROOTS,
    SMALL,
    directory,
    expected_nar,
    file,
    fill,
)

NUM_SMALL = 3000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "store", create=True)
    try:
        fill(opened, tmp_path)
        yield opened
    finally:
        opened.close()


def plan_of(store: Store, root: Node) -> NarPlan:
    plan = LocalNar(store, root).plan()
    assert plan is not None
    return plan


def received(store: Store, plan: NarPlan, start: int, end: int) -> bytes:
    """Send a range into a socket that another thread reads."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as executor:
        ours.settimeout(0)
        read = executor.submit(read_all, theirs)
        sender = NarSender(store, plan, start, end)
        try:
            while not sender.send(ours.fileno()):
                pass
        finally:
            sender.close()
            ours.shutdown(socket.SHUT_WR)
        assert sender.num_sent == end - start
        return read.result()


def read_all(sock: socket.socket) -> bytes:
    out = bytearray()
    while data := sock.recv(1 << 20):
        out += data
    return bytes(out)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS.keys())
def test_every_range_is_that_part_of_the_nar(store: Store, root: Node) -> None:
    nar = expected_nar(root)
    plan = plan_of(store, root)
    assert plan.nar_size == len(nar)
    assert received(store, plan, 0, len(nar)) == nar
    assert all(plan.is_checked)
    assert received(store, plan, 0, len(nar)) == nar
    assert plan.kept is not None
    step = 9973 if len(nar) > 10_000 else 37
    starts = [*range(0, min(len(nar), 700), 61), *range(0, len(nar), step), len(nar) - 1]
    for start in starts:
        for size in (1, 8, 300_000):
            end = min(start + size, len(nar))
            assert received(store, plan, start, end) == nar[start:end], (start, size)


def many_small(store: Store) -> Node:
    contents = [b"%d " % number * (number % 3000) for number in range(NUM_SMALL)]
    files = [file(b"%05d" % number, content) for number, content in enumerate(contents)]
    made = Directory(files=files)
    batch = Batch()
    for content in contents:
        batch.add_blob(Digest.of(content), content)
    batch.add_directory(made.digest(), made.to_bytes())
    store.commit(batch)
    return directory(b"", made)


def test_more_buffers_than_one_call_takes(store: Store) -> None:
    root = many_small(store)
    whole = b"".join(map(bytes, LocalNar(store, root).pieces()))
    plan = plan_of(store, root)
    assert received(store, plan, 0, len(whole)) == whole
    assert received(store, plan, 12_345_678, 12_345_678 + 99) == whole[12_345_678:][:99]


def test_a_reader_that_stops_holds_no_snapshot(store: Store) -> None:
    root = many_small(store)
    plan = plan_of(store, root)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0)
        sender = NarSender(store, plan, 0, plan.nar_size)
        digest = hashlib.sha256()
        while not sender.send(ours.fileno()):
            with store.snapshot():  # A thread has at most one.
                pass
            digest.update(theirs.recv(100_000))
        ours.shutdown(socket.SHUT_WR)
        digest.update(read_all(theirs))
    whole = b"".join(map(bytes, LocalNar(store, root).pieces()))
    assert digest.digest() == hashlib.sha256(whole).digest()


def test_wrong_content_is_not_sent(store: Store) -> None:
    wrong = Digest.of(b"another")
    batch = Batch()
    batch.add_blob(wrong, SMALL)
    store.commit(batch)
    sent = Directory(files=[FileNode(b"a", wrong, len(SMALL), executable=False)])
    batch = Batch()
    batch.add_directory(sent.digest(), sent.to_bytes())
    store.commit(batch)
    plan = plan_of(store, directory(b"", sent))
    with pytest.raises(WrongDigestError):
        received(store, plan, 0, plan.nar_size)
    with pytest.raises(WrongDigestError):
        NarSender(store, plan, 0, plan.nar_size).check()


def test_damaged_files_are_not_sent(store: Store) -> None:
    plan = plan_of(store, file(b"", LARGE))
    (path,) = (path for path in (store.path / "blobs").rglob("*") if path.is_file())
    path.chmod(0o600)
    with path.open("r+b") as changed:
        changed.seek(500_000)
        changed.write(b"changed")
    with pytest.raises(WrongDigestError):
        received(store, plan, 0, plan.nar_size)
    # A part that begins or ends within it is not compared.
    assert len(received(store, plan, 1000, 2000)) == 1000
    os.truncate(path, 1000)
    with pytest.raises(ContentMissingError):
        received(store, plan, 0, plan.nar_size)
    path.unlink()
    with pytest.raises(ContentMissingError):
        received(store, plan, 0, plan.nar_size)


def test_what_was_removed_or_has_another_size_is_an_error(store: Store) -> None:
    plan = plan_of(store, ROOT_NODE)
    assert received(store, plan, 0, plan.nar_size) == expected_nar(ROOT_NODE)
    store.env.write(lambda txn: store.remove_blob(txn, Digest.of(SMALL)))
    with pytest.raises(ContentMissingError):
        received(store, plan, 0, plan.nar_size)
    batch = Batch()
    batch.add_blob(Digest.of(SMALL), SMALL + b"more")
    store.commit(batch)
    with pytest.raises(NarError, match="its node says 7"):
        received(store, plan, 0, plan.nar_size)


def test_a_reader_that_is_gone_is_an_error(store: Store) -> None:
    plan = plan_of(store, ROOT_NODE)
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(ConnectionError):
        NarSender(store, plan, 0, plan.nar_size).send(ours.fileno())


def test_plans_that_were_not_used_go_first(store: Store) -> None:
    plans = {root: plan_of(store, root) for root in ROOTS.values()}
    room = sum(plan.size_bytes() for plan in plans.values())
    kept = KeptPlans(room - 1)
    first, second, *_rest, last = plans
    for root in list(plans)[:-1]:
        kept.keep(root, plans[root])
    assert kept.get(first._replace(name=b"named")) is plans[first]
    kept.keep(last, plans[last])
    assert kept.get(second) is None
    assert kept.get(first) is plans[first]
    assert kept.get(last) is plans[last]


# --- What was found before ---


def test_buffers_are_kept_until_something_changes(store: Store) -> None:
    root = many_small(store)
    whole = b"".join(map(bytes, LocalNar(store, root).pieces()))
    plan = plan_of(store, root)
    for _ in range(2):
        assert received(store, plan, 0, len(whole)) == whole
    first = plan.kept
    assert received(store, plan, 0, len(whole)) == whole
    assert plan.kept is first
    # Everything below is moved to other pages, into a larger map.
    batch = Batch()
    for number in range(3000):
        content = b"%d" % number * 4000
        batch.add_blob(Digest.of(content), content)
    store.commit(batch)
    grow_map(store)
    assert received(store, plan, 0, len(whole)) == whole
    assert plan.kept is not first


def grow_map(store: Store) -> None:
    before = store.env.map_size_bytes()
    runs = []

    def put_too_much(txn: WriteTransaction) -> None:
        runs.append(txn)
        if len(runs) == 1:
            txn.put(b"too much", bytes(before))  # is refused before it is copied

    store.env.write(put_too_much)
    assert len(runs) == 2
    assert store.env.map_size_bytes() > before


def test_a_part_is_sent_without_finding_the_whole(store: Store) -> None:
    root = many_small(store)
    plan = plan_of(store, root)
    received(store, plan, 0, plan.nar_size)
    plan.kept = None
    received(store, plan, 1000, plan.nar_size // 3)
    assert plan.kept is None
