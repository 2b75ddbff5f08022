"""Commits that are gathered, and what happens to the others when one of them fails."""

import threading
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.errors import StoreError
from appliance.store.batch import Batch
from appliance.store.store import Store
from appliance.store.writer import CommitQueue
from tests.store.audit import audit


def batch_of(*contents: bytes) -> Batch:
    batch = Batch()
    for content in contents:
        batch.add_blob(Digest.of(content), content)
    return batch


def test_what_waits_during_a_commit_is_one_commit(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    queue = CommitQueue(store)
    held, release = threading.Event(), threading.Event()

    def hold(_txn: object) -> None:
        held.set()
        release.wait()

    holder = threading.Thread(target=store.env.write, args=(hold,))
    holder.start()
    held.wait()
    futures = [queue.submit(batch_of(b"%d" % number)) for number in range(50)]
    with store.env.read() as txn:
        before = txn.id()
    release.set()
    for future in futures:
        future.result(30)
    holder.join()
    with store.env.read() as txn:
        # One by the holder, one of the batch that the thread had taken, and one of all others.
        assert txn.id() - before <= 3
    queue.close()
    store.close()
    assert audit(tmp_path / "store").num_blobs == 50


def test_closing_commits_what_waits(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    queue = CommitQueue(store)
    futures = [queue.submit(batch_of(b"%d" % number)) for number in range(10)]
    queue.close()

    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(RuntimeError):
        queue.submit(batch_of(b"late"))
    store.close()


def test_same_file_from_two_is_kept_once_and_the_other_removed(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    queue = CommitQueue(store)
    content = b"x" * 100_000
    paths = [tmp_path / "store" / f"staged-{number}" for number in range(20)]
    futures = []
    for path in paths:
        path.write_bytes(content)
        batch = Batch()
        batch.add_file(Digest.of(content), path, len(content))
        futures.append(queue.submit(batch))
    for future in futures:
        future.result(30)
    queue.close()
    store.close()

    assert not any(path.exists() for path in paths)
    assert audit(tmp_path / "store").num_blobs == 1


def test_failure_is_told_to_all_that_were_part_of_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    queue = CommitQueue(store)
    batch = Batch()
    batch.add_file(Digest(bytes(32)), tmp_path / "nothing there", 5)

    with pytest.raises(StoreError):
        queue.submit(batch).result(30)
    queue.submit(batch_of(b"fine")).result(30)
    queue.close()
    store.close()
    assert audit(tmp_path / "store").num_blobs == 1
