"""Guests that break their rings or send invalid FUSE requests to a real supervisor and workers.

A broken ring stops without affecting other rings. An invalid request in a valid chain gets the
answer that `fuse_proto.dispatch` specifies, and its chain is always returned.
"""

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import (
    CODECS,
    IN_HEADER_SIZE,
    OUT_HEADER_SIZE,
    InHeader,
    Opcode,
)
from appliance.fuse_proto.opcodes import OPS, Answer, Op
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.driver import DriverRing
from tests.fakes.hostile_guest import (
    ROOM,
    ROOT,
    SMALL,
    HostileGuest,
    descendants,
    error_of,
    wait_readable,
)
from tests.fakes.ring_attacks import BREAKS, avail_jump, loop_of_two
from tests.fakes.vmms import Qemu

pytestmark = pytest.mark.slow

U64_MAX: Final = (1 << 64) - 1
U32_MAX: Final = (1 << 32) - 1


@pytest.fixture(scope="module")
def appliance(
    store: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApplianceProcess]:
    directory = tmp_path_factory.mktemp("run")
    # At debug level, repeated log lines are not suppressed.
    options = ("--num-request-queues=2", "--list-root", "--log-level=debug")
    with ApplianceProcess(store[0], directory, *options, sockets=("a", "b")) as process:
        yield process
        assert "Traceback" not in process.log()


@pytest.fixture(scope="module")
def attacker(appliance: ApplianceProcess) -> Iterator[HostileGuest]:
    with HostileGuest(appliance.connect(0)) as guest:
        guest.mount()
        for queue in (0, 2):  # whose workers start with their first requests
            assert guest.ask(fuse_client.statfs(), queue=queue).error == 0
        yield guest


@pytest.fixture
def guest(attacker: HostileGuest) -> HostileGuest:
    attacker.mount()
    return attacker


@pytest.fixture(scope="module")
def neighbour(appliance: ApplianceProcess) -> Iterator[FakeGuest]:
    front_end = appliance.connect(1)
    with FakeGuest(front_end, vmm=Qemu(front_end, 2)) as other:
        other.mount()
        yield other


@pytest.fixture
def top(guest: HostileGuest, store: tuple[Path, bytes]) -> int:
    return guest.lookup(ROOT, store[1])


@pytest.fixture(autouse=True)
def _no_process_ends(
    appliance: ApplianceProcess, attacker: HostileGuest, neighbour: FakeGuest
) -> Iterator[None]:
    for guest in (attacker, neighbour):
        guest.vmm.front_end.get_features()  # answered when all its workers serve
    before = descendants(appliance.process.pid)
    yield
    assert appliance.process.poll() is None
    assert descendants(appliance.process.pid) == before


# --- Rings ---


@pytest.mark.parametrize(
    ("attack", "rule"), [pytest.param(*case, id=case[0].__name__) for case in BREAKS]
)
def test_a_broken_ring_stops_alone_and_a_reset_heals_it(
    appliance: ApplianceProcess,
    guest: HostileGuest,
    neighbour: FakeGuest,
    top: int,
    attack: Callable[[DriverRing], None],
    rule: str,
) -> None:
    log_start = len(appliance.log())
    ring = guest.rings[1]
    attack(ring)
    wait_readable(ring.err_fd)
    assert rule in appliance.log()[log_start:]
    assert guest.ask(fuse_client.lookup(top, b"small"), queue=2).error == 0
    assert neighbour.ask(fuse_client.getattr_(ROOT)).error == 0
    used_before = ring.used_idx
    guest.reset()  # asserts that GET_VRING_BASE answers
    assert ring.used_idx == used_before
    assert guest.ask(fuse_client.read(guest.lookup(top, b"small"), 0, 100)).body == SMALL


def test_a_broken_hiprio_ring_leaves_the_requests_alone(guest: HostileGuest, top: int) -> None:
    loop_of_two(guest.rings[0])
    wait_readable(guest.rings[0].err_fd)
    assert guest.lookup(top, b"small")
    guest.reset()


def test_all_rings_broken_at_once_are_healed_by_one_reset(guest: HostileGuest, top: int) -> None:
    for ring in guest.rings:
        avail_jump(ring)
    for ring in guest.rings:
        wait_readable(ring.err_fd)
    guest.reset()
    assert guest.lookup(top, b"small")


def test_requests_popped_before_the_break_are_answered_or_left_alone(
    guest: HostileGuest, top: int
) -> None:
    ring = guest.rings[1]
    heads = {ring.add_chain([fuse_client.lookup(top, b"small")], [ROOM]) for _ in range(50)}
    ring.offer(ring.num + 5)
    ring.publish()
    wait_readable(ring.err_fd)
    done = ring.poll()
    assert {used.head for used in done} <= heads
    assert {error_of(used.data) for used in done} <= {0}
    guest.reset()


# --- FUSE requests in valid chains ---


# Requests with bytes after their arguments and names.
WITH_PAYLOAD = {"WRITE", "SETXATTR", "IOCTL", "NOTIFY_REPLY", "BATCH_FORGET", "REMOVEMAPPING"}


def whole_request(op: Op) -> bytes:
    args = CODECS[op.args].size if op.args else 0
    body = bytes(args) + b"n\0" * op.names + b"p" * 8 * (op.name in WITH_PAYLOAD)
    return fuse_client.request(op.number, ROOT, body, unique=op.number)


def with_len(request: bytes, length: int) -> bytes:
    header = _fuse_wire.unpack_in_header(request)._replace(len=length)
    return _fuse_wire.pack_in_header(header) + request[IN_HEADER_SIZE:]


def needed_bytes(op: Op) -> int:
    """Return the smallest length to which `whole_request(op)` can be cut and still be decoded."""
    args = (op.compat or CODECS[op.args].size) if op.args else 0
    # A structure that has a shorter form and is followed by names is always sent in that form.
    names = 2 * op.names if op.names else 0
    return IN_HEADER_SIZE + args + names


def check_truncated(op: Op, size: int, reply: bytes) -> None:
    what = f"{op.name} cut to {size} bytes"
    if size < IN_HEADER_SIZE:
        answer = fuse_client.parse_reply(reply)
        assert answer == (op.number if size >= 16 else 0, errno.EIO, b""), what
    elif op.answer is Answer.NOTHING:
        assert reply == b"", what
    else:
        answer = fuse_client.parse_reply(reply)
        assert answer.unique == op.number, what
        if isinstance(op.answer, int):
            assert answer.error == op.answer, what
        elif size < needed_bytes(op):
            assert answer.error == errno.EIO, what
        else:
            assert answer.error != errno.EIO, what


@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_a_request_cut_at_any_byte_is_answered(guest: HostileGuest, op: Op) -> None:
    whole = whole_request(op)
    cuts = range(len(whole) + 1)
    honest = [(with_len(whole, size)[:size], ROOM) for size in cuts]
    for size, reply in zip(cuts, guest.exchange(honest), strict=True):
        check_truncated(op, size, reply)


@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_a_request_that_lies_about_its_length_is_eio(guest: HostileGuest, op: Op) -> None:
    whole = whole_request(op)
    lies = [0, 1, IN_HEADER_SIZE - 1, len(whole) + 1, 1 << 20, U32_MAX]
    requests = [(with_len(whole, length), ROOM) for length in lies]
    requests += [(whole[:size], ROOM) for size in range(IN_HEADER_SIZE, len(whole))]
    expected = None if op.answer is Answer.NOTHING else errno.EIO
    assert {error_of(reply) for reply in guest.exchange(requests)} == {expected}


def test_a_request_without_room_for_a_header_comes_back_empty(
    guest: HostileGuest, top: int
) -> None:
    good = [whole_request(op) for op in OPS if op.name not in {"INIT", "DESTROY"}]
    good += [fuse_client.lookup(top, b"small"), fuse_client.readdirplus(top, 0)]
    requests = [(request, room) for request in good for room in (0, 8, 15)]
    assert set(guest.exchange(requests)) == {b""}


def test_a_reply_that_does_not_fit_is_eio_or_shorter(guest: HostileGuest, top: int) -> None:
    small = guest.lookup(top, b"small")
    lookup, read, readlink, readdir = guest.exchange(
        [
            (fuse_client.lookup(top, b"small"), OUT_HEADER_SIZE + _fuse_wire.ENTRY_OUT_SIZE - 1),
            (fuse_client.read(small, 0, 100), OUT_HEADER_SIZE + 5),
            (fuse_client.readlink(guest.lookup(top, b"link")), OUT_HEADER_SIZE + 4),
            (fuse_client.readdir(top, 0, 1 << 20), OUT_HEADER_SIZE + 8),
        ]
    )
    assert error_of(lookup) == errno.EIO
    assert fuse_client.parse_reply(read).body == SMALL[:5]
    assert error_of(readlink) == errno.EIO
    assert error_of(readdir) == errno.EINVAL


def test_unknown_opcodes_are_enosys(guest: HostileGuest) -> None:
    known = {op.number for op in OPS}
    numbers = [*range(200), 4096, 1 << 31, U32_MAX]
    requests = [(fuse_client.request(n, ROOT, bytes(64)), ROOM) for n in numbers if n not in known]
    assert {error_of(reply) for reply in guest.exchange(requests)} == {errno.ENOSYS}


def test_before_init_and_after_destroy_only_early_opcodes_are_not_eio(
    guest: HostileGuest,
) -> None:
    guest.vmm.front_end.reset_device()
    guest.renew_rings()
    requests = [(whole_request(op), ROOM) for op in OPS if not op.is_early]
    requests.append((fuse_client.request(4096, ROOT), ROOM))
    assert {error_of(reply) for reply in guest.exchange(requests)} == {errno.EIO}
    guest.mount()
    assert guest.ask(fuse_client.destroy()).error == 0
    assert {error_of(reply) for reply in guest.exchange(requests)} == {errno.EIO}
    assert guest.ask(fuse_client.destroy()).error == 0
    guest.mount()
    assert guest.ask(fuse_client.getattr_(ROOT)).error == 0


def test_odd_inits_are_refused_and_a_second_one_starts_over(guest: HostileGuest) -> None:
    swapped = b"".join(
        fuse_client.init()[at : at + 4][::-1] for at in range(0, len(fuse_client.init()), 4)
    )
    length = len(swapped).to_bytes(4, "little")
    assert guest.ask(length + swapped[4:]).error == errno.EIO
    assert guest.ask(fuse_client.getattr_(ROOT)).error == 0
    old = guest.ask(fuse_client.init(fuse_client.INIT_6_1._replace(major=6)))
    assert old.error == errno.EPROTO
    newer = guest.ask(fuse_client.init(fuse_client.INIT_6_1._replace(major=8)))
    assert fuse_client.parse_init(newer.body).major == 7
    assert guest.ask(fuse_client.getattr_(ROOT)).error == errno.EIO
    for _ in range(2):
        guest.mount()
        assert guest.ask(fuse_client.getattr_(ROOT)).error == 0


def test_nodeids_never_handed_out_are_stale(guest: HostileGuest) -> None:
    rng = random.Random(1)
    numbers = [0, U32_MAX, *(rng.randrange(1 << 20, U32_MAX) for _ in range(50))]
    nodeids = [n | rng.getrandbits(32) << 32 for n in numbers] + [1 << 32, U64_MAX, 1 << 63]
    for make in (
        fuse_client.getattr_,
        fuse_client.readlink,
        lambda n: fuse_client.lookup(n, b"x"),
        lambda n: fuse_client.read(n, 0, 100),
        lambda n: fuse_client.readdir(n, 0),
        lambda n: fuse_client.readdirplus(n, 0),
        lambda n: fuse_client.getxattr(n, b"user.x", 0),
        lambda n: fuse_client.listxattr(n, 0),
    ):
        replies = guest.exchange([(make(nodeid), ROOM) for nodeid in nodeids])
        assert {error_of(reply) for reply in replies} == {errno.ESTALE}


def test_every_bit_of_a_nodeid_counts(guest: HostileGuest, top: int) -> None:
    small = guest.lookup(top, b"small")
    assert guest.ask(fuse_client.read(small, 0, 100)).body == SMALL
    for high in (1, 0xFFFFFFFF):
        moved = small | high << 32
        assert guest.ask(fuse_client.read(moved, 0, 100)).error == errno.ESTALE


def test_reads_behind_the_end_are_empty(guest: HostileGuest, top: int) -> None:
    for name in (b"small", b"large"):
        nodeid = guest.lookup(top, name)
        offsets = [1 << 20, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, U64_MAX - 4095, U64_MAX]
        for size in (0, 1, ROOM, 1 << 20, U32_MAX):
            requests = [(fuse_client.read(nodeid, offset, size), ROOM) for offset in offsets]
            for reply in guest.exchange(requests):
                assert fuse_client.parse_reply(reply)[1:] == (0, b"")


def test_a_read_of_4_gib_fills_the_room_there_is(guest: HostileGuest, top: int) -> None:
    (reply,) = guest.exchange([(fuse_client.read(guest.lookup(top, b"large"), 7, U32_MAX), ROOM)])
    assert len(fuse_client.parse_reply(reply).body) == ROOM - OUT_HEADER_SIZE


@pytest.mark.parametrize("make", [fuse_client.readdir, fuse_client.readdirplus])
def test_wild_cookies_and_sizes_get_whole_records_or_einval(
    guest: HostileGuest, top: int, make: Callable[[int, int, int], bytes]
) -> None:
    rng = random.Random(2)
    cookies = [0, 1, 5, 301, 302, 303, 1000, 1 << 31, 1 << 32, 1 << 63, U64_MAX]
    cookies += [rng.getrandbits(64) for _ in range(10)]
    sizes = [0, 1, 23, 24, 151, 152, 4095, 4096, 1 << 31, U32_MAX]
    for nodeid in (ROOT, top, guest.lookup(top, b"sub")):
        requests = [(make(nodeid, cookie, size), ROOM) for cookie in cookies for size in sizes]
        replies = [fuse_client.parse_reply(reply) for reply in guest.exchange(requests)]
        assert {reply.error for reply in replies} == {0, errno.EINVAL}
        for reply in replies:
            if make is fuse_client.readdir:
                fuse_client.parse_dirents(reply.body)
            else:
                fuse_client.parse_direntplus(reply.body)


def test_listing_what_is_no_directory_is_enotdir(guest: HostileGuest, top: int) -> None:
    for name in (b"small", b"link"):
        nodeid = guest.lookup(top, name)
        replies = guest.exchange([(fuse_client.readdir(nodeid, U64_MAX, 0), ROOM)])
        assert [error_of(reply) for reply in replies] == [errno.ENOTDIR]


@pytest.mark.parametrize(
    ("raw_name", "expected"),
    [
        (b"a/b\0", errno.ENOENT),
        (b"/\0", 0),
        (b"\0", errno.ENOENT),
        (b".\0", 0),
        (b"..\0", 0),
        (b"small\0junk\0", 0),
        (b"small", errno.EIO),
        (b"", errno.EIO),
        (b"n" * 255 + b"\0", 0),
        (b"n" * 256 + b"\0", errno.ENAMETOOLONG),
        (b"n" * 4096 + b"\0", errno.ENAMETOOLONG),
        (b"n" * 65536 + b"\0", errno.EIO),
        (b"\xff\xfe\0", 0),
    ],
    ids=lambda value: f"{len(value)}:{value[:8]!r}" if isinstance(value, bytes) else None,
)
def test_names_no_entry_can_have_are_refused_and_dots_are_answered(
    guest: HostileGuest, top: int, raw_name: bytes, expected: int
) -> None:
    below = guest.ask(fuse_client.request(Opcode.LOOKUP, top, raw_name))
    assert below.error == expected
    if expected == 0:
        entry = fuse_client.parse_entry(below.body)
        there = {b"small\0junk\0", b"/\0", b".\0", b"..\0"}
        assert (entry.nodeid != 0) == (raw_name in there)
    in_root = guest.ask(fuse_client.request(Opcode.LOOKUP, ROOT, raw_name))
    is_dots = raw_name in {b"/\0", b".\0", b"..\0"}
    assert in_root.error == (0 if is_dots else expected or errno.ENOENT)


def test_a_request_of_64_kib_in_many_pieces_is_answered(guest: HostileGuest, top: int) -> None:
    requests = [
        (fuse_client.write(top, 0, bytes(65536)), errno.EROFS),
        (fuse_client.setxattr(top, b"user.x", bytes(65536)), errno.EROFS),
        (fuse_client.getattr_(top) + bytes(65536), 0),
    ]
    ring = guest.rings[1]
    for request, expected in requests:
        whole = with_len(request, len(request))
        pieces = [whole[at : at + 700] for at in range(0, len(whole), 700)]
        ring.add_chain(pieces, [1, 7, 8, 4080], indirect=True)
        ring.publish()
        (used,) = ring.collect()
        assert error_of(used.data) == expected


def test_random_bytes_as_requests_all_come_back(guest: HostileGuest) -> None:
    rng = random.Random(3)
    requests = []
    for _ in range(2000):
        header = InHeader(
            len=rng.choice([40, 64, 100, rng.getrandbits(32)]),
            opcode=rng.choice(OPS).number,
            unique=rng.getrandbits(64),
            nodeid=rng.choice([1, rng.randrange(400), rng.getrandbits(64)]),
            uid=rng.getrandbits(32),
            gid=0,
            pid=1,
            total_extlen=rng.getrandbits(16),
        )
        body = rng.randbytes(rng.randrange(200))
        requests.append((_fuse_wire.pack_in_header(header) + body, rng.choice([0, 16, 100, ROOM])))
    assert len(guest.exchange(requests)) == 2000
    guest.mount()
    assert guest.ask(fuse_client.getattr_(ROOT)).error == 0
