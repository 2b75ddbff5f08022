"""The loops in C: what they answer, what they leave, when they return, and what they signal."""

import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.directory import Node
from appliance.engine import Ring
from appliance.errors import RingError
from appliance.fuse_proto._fuse_wire import Opcode
from appliance.session.request_statistics import SessionStatistics
from appliance.store.store_reader import StoreReader
from appliance.worker.plain_answers import RingWait
from appliance.worker.ring_server import RingServer
from tests.fakes import fuse_client
from tests.fakes.driver import EVENTFD
from tests.fakes.engine_rig import Rig
from tests.fakes.running_command import every_event
from tests.store.test_store_reader import commit_elsewhere
from tests.worker.plain_tree import NUM_BIG, PLAIN, REPLY_BYTES, TREE, requests_of, top_of
from tests.worker.twins import Twins, filled_store

ROOT_PATH = Path(__file__).parents[2]


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only


def server_of(twins: Twins, rig: Rig) -> RingServer:
    return RingServer(
        rig.ring, twins.dispatcher, twins.handler, lambda _want: None, twins.statistics
    )


def queue(rig: Rig, requests: list[bytes]) -> list[int]:
    # Replies are scattered, so that none fits the first buffer.
    heads = [rig.driver.add_chain([request], [16, 100, REPLY_BYTES - 116]) for request in requests]
    rig.driver.publish()
    return heads


def test_plain_requests_are_answered_and_others_left(twins: Twins, rig: Rig) -> None:
    requests = requests_of(twins)
    heads = queue(rig, requests)
    before = list(twins.statistics_of_c.requests)
    left = twins.plain.serve_batch(rig.ring, 32)
    assert left == [index for index, is_plain in enumerate(PLAIN) if not is_plain]
    assert rig.driver.calls() == 1, "one signal for all of them"
    answers = {used.head: used.data for used in rig.driver.poll()}
    for head, request, is_plain in zip(heads, requests, PLAIN, strict=True):
        assert answers.get(head) == (twins.python(request) if is_plain else None)
    for slot in left:
        assert bytes(rig.ring.request(slot)) == requests[slot], "they are as they were"
    counted = [now - then for now, then in zip(twins.statistics_of_c.requests, before, strict=True)]
    assert sum(counted) == sum(PLAIN)
    assert counted[Opcode.READ] == 2


def test_a_server_answers_all_of_them(twins: Twins, rig: Rig) -> None:
    requests = requests_of(twins)
    heads = queue(rig, requests)
    server = server_of(twins, rig)
    server.answer_plain(twins.plain)
    assert not server.serve_batch()
    assert rig.driver.calls() == 1
    answers = {used.head: used.data for used in rig.driver.poll()}
    assert [answers[head] for head in heads] == [twins.python(request) for request in requests]


def test_a_chain_without_room_is_left(twins: Twins, rig: Rig) -> None:
    request = fuse_client.lookup(top_of(twins), b"file")
    rig.driver.add_chain([request], [16, 127])
    rig.driver.add_chain([request], [15])
    rig.driver.add_chain([request], [])
    rig.driver.add_chain([request[:39]], [200])
    rig.driver.publish()
    assert twins.plain.serve_batch(rig.ring, 32) == [0, 1, 2, 3]
    assert rig.driver.poll() == []


def test_a_request_in_pieces_of_any_size(twins: Twins, rig: Rig) -> None:
    request = fuse_client.lookup(top_of(twins), b"file")
    rig.driver.add_chain([request[:1], request[1:41], request[41:]], [1] * 20 + [200])
    rig.driver.publish()
    assert twins.plain.serve_batch(rig.ring, 32) == []
    assert [used.data for used in rig.driver.poll()] == [twins.python(request)]


def test_the_snapshot_has_ended_after_a_batch(twins: Twins, rig: Rig) -> None:
    queue(rig, requests_of(twins)[:1])
    twins.plain.serve_batch(rig.ring, 32)
    with twins.store.snapshot():
        pass


def test_files_held_open_are_those_used_last(twins: Twins, rig: Rig, store_path: Path) -> None:
    many = twins.lookup(top_of(twins), b"many").nodeid
    nodeids = [twins.lookup(many, b"%03d" % i).nodeid for i in range(NUM_BIG)]
    chance = random.Random(1)

    def read(index: int) -> None:
        queue(rig, [fuse_client.read(nodeids[index], 0, 4096)])
        assert twins.plain.serve_batch(rig.ring, 32) == []
        (used,) = rig.driver.poll()
        assert used.data[16:] == (b"%d" % index * 70_000)[:4096]

    def limit_to(limit: int) -> None:
        twins.table.set_open_files(limit)
        queue(rig, requests_of(twins)[:1])
        assert twins.plain.serve_batch(rig.ring, 32) == []
        rig.driver.poll()

    limit_to(0)
    before = num_open()
    for limit in (1, 2, 50, 7, NUM_BIG - 1, 2000):
        limit_to(limit)
        for index in [*range(NUM_BIG), *chance.choices(range(NUM_BIG), k=300)]:
            read(index)
        assert num_open() - before == min(limit, NUM_BIG)
    # No other file can be opened now.
    limit_to(10)
    recent = list(range(20, 30))
    for index in recent:
        read(index)
    (store_path / "blobs").rename(store_path / "gone")
    try:
        for index in recent:
            read(index)
    finally:
        (store_path / "gone").rename(store_path / "blobs")
    limit_to(0)
    assert num_open() == before
    limit_to(64)


def test_a_file_that_ends_early_is_left(twins: Twins, rig: Rig, store_path: Path) -> None:
    many = twins.lookup(top_of(twins), b"many").nodeid
    nodeid = twins.lookup(many, b"099").nodeid
    request = fuse_client.read(nodeid, 100_000, 4096)
    twins.both(request)
    digest = twins.handler._node(nodeid).digest.hex()
    path = store_path / "blobs" / digest[:2] / digest
    os.truncate(path, 100_100)
    queue(rig, [request])
    assert twins.plain.serve_batch(rig.ring, 32) == [0]


def test_what_was_used_of_a_cache_is_reported(twins: Twins, rig: Rig, nodes: list[Node]) -> None:
    top = top_of(twins)
    requests = [request for request in requests_of(twins) if twins.check(request)]
    later = [fuse_client.read(twins.lookup(top, b"file").nodeid, 0, 100)]
    cache = Twins(twins.store, nodes, is_cache=True)
    for _ in every_event(20):
        for batch in (requests, later):
            queue(rig, batch)
            assert cache.plain.serve_batch(rig.ring, 32) == []
            rig.driver.poll()
            for request in batch:
                cache.python(request)
        if len(set(cache.used)) == len(set(cache.used_by_c)) == 3:
            break
    cache.close()
    assert set(cache.used_by_c) == set(cache.used)
    assert len(set(cache.used)) == 3
    assert len(cache.used_by_c) < 10, "each once a second at most"


def test_files_that_were_evicted_can_be_closed(twins: Twins, store_path: Path) -> None:
    many = twins.lookup(top_of(twins), b"many").nodeid
    nodeid = twins.lookup(many, b"098").nodeid
    twins.both(fuse_client.read(nodeid, 0, 4096))
    digest = twins.handler._node(nodeid).digest.hex()
    path = store_path / "blobs" / digest[:2] / digest
    path.unlink()
    assert twins.check(fuse_client.read(nodeid, 0, 4096)), "it is open"
    twins.plain.close_unlinked()
    assert not twins.check(fuse_client.read(nodeid, 0, 4096))


def test_a_broken_ring_is_an_error(twins: Twins, rig: Rig) -> None:
    rig.driver.avail_idx = 1000
    with pytest.raises(RingError, match="runs ahead"):
        twins.plain.serve_batch(rig.ring, 32)
    with pytest.raises(RingError, match="stopped"):
        twins.plain.serve_batch(rig.ring, 32)


def test_requests_before_a_broken_chain_are_answered(twins: Twins, rig: Rig) -> None:
    queue(rig, requests_of(twins)[:1])
    rig.driver.offer(5000)
    rig.driver.publish()
    assert twins.plain.serve_batch(rig.ring, 32) == []
    assert len(rig.driver.poll()) == 1
    with pytest.raises(RingError, match="head 5000"):
        twins.plain.serve_batch(rig.ring, 32)


# --- Waiting ---


@pytest.fixture
def other() -> Iterator[tuple[select.epoll, int, int]]:
    """An epoll descriptor, a kick in it, and another descriptor in it, both eventfds."""
    poller = select.epoll()
    kick, other = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    poller.register(kick, select.EPOLLIN | select.EPOLLET)
    poller.register(other, select.EPOLLIN)
    yield poller, kick, other
    poller.close()
    os.close(kick)
    os.close(other)


def serve(twins: Twins, ring: Ring, poller: select.epoll, kick: int) -> list[int]:
    return twins.plain.serve_ring(ring, RingWait(poller.fileno(), kick))


def test_the_loop_returns_at_another_descriptor(
    twins: Twins, rig: Rig, other: tuple[select.epoll, int, int]
) -> None:
    poller, kick, other_fd = other
    os.eventfd_write(kick, 1)
    os.eventfd_write(other_fd, 1)
    assert serve(twins, rig.ring, poller, kick) == []
    assert poller.poll(0) == [(other_fd, select.EPOLLIN)], "the kick was taken, the other was not"
    assert os.eventfd_read(kick) == 1, "it is not read"


def test_the_loop_serves_until_something_is_left(
    twins: Twins, rig: Rig, other: tuple[select.epoll, int, int]
) -> None:
    poller, kick, other_fd = other
    requests = requests_of(twins)
    queue(rig, [requests[0]] * 16)
    queue(rig, [requests[1]])
    assert serve(twins, rig.ring, poller, kick) == [16]
    assert len(rig.driver.poll()) == 16
    rig.ring.complete(16, 0)
    # What was left is not left again.
    os.eventfd_write(other_fd, 1)
    assert serve(twins, rig.ring, poller, kick) == []


def test_a_kick_at_its_end_breaks_the_ring(twins: Twins, rig: Rig) -> None:
    kick, end = os.pipe()
    os.close(end)
    with select.epoll() as poller:
        poller.register(kick, select.EPOLLIN | select.EPOLLET)
        with pytest.raises(RingError, match="kick descriptor"):
            serve(twins, rig.ring, poller, kick)
    os.close(kick)


def test_a_loop_that_never_sleeps_looks_at_other_descriptors(
    twins: Twins, rig: Rig, other: tuple[select.epoll, int, int]
) -> None:
    poller, kick, other_fd = other
    (head,) = queue(rig, requests_of(twins)[:1])
    for _ in range(rig.driver.num):
        rig.driver.offer(head)
    ended = threading.Event()
    pid = os.fork()
    if pid == 0:  # a guest whose ring never runs empty
        rings = 0
        while True:
            rig.driver.avail_idx = rig.driver.used_idx + 64
            rings += 1
            if rings == 1000:
                os.eventfd_write(other_fd, 1)

    def end() -> None:
        ended.set()
        os.kill(pid, signal.SIGKILL)

    deadline = threading.Timer(20, end)
    deadline.start()
    try:
        assert serve(twins, rig.ring, poller, kick) == []
        assert os.eventfd_read(other_fd) == 1
        assert not ended.is_set(), "only the end of the guest has ended the loop"
    finally:
        deadline.cancel()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert twins.statistics_of_c.requests[Opcode.LOOKUP] > 128


def test_the_loop_asks_for_kicks(
    twins: Twins, rig: Rig, other: tuple[select.epoll, int, int]
) -> None:
    poller, kick, other_fd = other
    requests = requests_of(twins)
    queue(rig, requests[:1])
    os.eventfd_write(kick, 1)
    pid = os.fork()
    if pid == 0:  # a guest that goes on when it has its reply
        code = 1
        try:
            rig.driver.collect(1)
            rig.driver.add_chain([requests[1]], [4096])
            if rig.driver.publish():
                os.write(kick, EVENTFD.pack(1))
            code = 0
        finally:
            os._exit(code)
    # The loop ends by the second request, which is not plain; a lost kick would have it wait.
    assert serve(twins, rig.ring, poller, kick) == [0]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.eventfd_write(other_fd, 1)


def test_polling_in_vain_ends(twins: Twins, rig: Rig, other: tuple[select.epoll, int, int]) -> None:
    poller, kick, other_fd = other
    seen = SessionStatistics(twins.statistics_of_c.memory).events()
    wait = RingWait(poller.fileno(), kick)
    wait.cdata.poll_ns = 64_000

    def wake() -> None:
        """Kick without a request whenever the loop was found asleep twice, 10 ms apart."""
        for number in range(6):
            was_asleep = False
            for _ in every_event(10):
                now = SessionStatistics(twins.statistics_of_c.memory).events()
                is_asleep = now["waits"] > seen["waits"] + number
                if is_asleep and was_asleep:
                    break
                was_asleep = is_asleep
            os.eventfd_write(kick if number < 5 else other_fd, 1)

    guest = threading.Thread(target=wake)
    guest.start()
    twins.plain._poll_ns = 64_000
    assert twins.plain.serve_ring(rig.ring, wait) == []
    twins.plain._poll_ns = 0
    guest.join()
    now = SessionStatistics(twins.statistics_of_c.memory).events()
    # 64, 32, 16 and 8 us; then it sleeps at once.
    assert now["polls_vain"] - seen["polls_vain"] == 4
    assert now["waits"] - seen["waits"] == 6
    assert wait.cdata.poll_ns == 0


# --- A store that grows ---


def test_a_store_that_outgrows_its_map_is_left_once(tmp_path: Path) -> None:
    path = tmp_path / "store"
    nodes = filled_store(path, {"tree": TREE})
    store = StoreReader(path, map_size_bytes=1 << 20)
    twins = Twins(store, nodes)
    request = fuse_client.lookup(top_of(twins), b"file")
    commit_elsewhere(path, 1, 8 << 20)
    assert not twins.check(request)
    answer = twins.python(request)  # which has the store mapped anew
    assert answer is not None
    assert twins.check(request)
    assert twins.python(request) == answer
    twins.close()
    store.close()


WRITER_OF_DIRECTORIES = """
import sys
from pathlib import Path
from appliance.store.store import Store
from tests.fs.guest import File, put
store = Store.open(Path(sys.argv[1]))
for i in range(40):
    put(store, "more%d" % i, {b"%d" % j: {b"%d" % i: File(b"%d" % j)} for j in range(20)})
store.close()
"""


def test_an_image_that_has_moved_since(tmp_path: Path) -> None:
    path = tmp_path / "store"
    nodes = filled_store(path, {"tree": TREE})
    store = StoreReader(path)
    twins = Twins(store, nodes)
    top = top_of(twins)
    requests = [fuse_client.lookup(top, b"file"), fuse_client.readdirplus(top, 0)]
    before = [twins.both(request) for request in requests]
    # Every commit copies the pages that it changes, and uses again those of earlier ones.
    subprocess.run([sys.executable, "-c", WRITER_OF_DIRECTORIES, path], check=True, cwd=ROOT_PATH)
    assert [twins.both(request) for request in requests] == before
    twins.close()
    store.close()
