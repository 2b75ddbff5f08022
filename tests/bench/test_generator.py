"""The C generator against a device that answers as the test says."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.bench import fuse_requests, generator
from appliance.bench.generator import (
    CallKind,
    CallSet,
    Expected,
    Figures,
    PreparedCall,
    PreparedRequest,
    RequestSet,
    quantile_s,
)
from appliance.errors import BenchError
from appliance.fuse_proto._fuse_wire import ENTRY_OUT_SIZE, InHeader
from appliance.fuse_proto.encode import pack_reply_header
from tests.bench.scripted_back_end import ScriptedBackEnd, reply

LIB = vars(generator)["lib"]
FOUND = (7).to_bytes(8, "little").ljust(ENTRY_OUT_SIZE, b"\0")
ABSENT = bytes(ENTRY_OUT_SIZE)


def lookups(expected: Expected = Expected.FOUND) -> RequestSet:
    """Return requests with names of several lengths."""
    return RequestSet(
        [
            PreparedRequest(
                fuse_requests.lookup(1, b"n" * length),
                ENTRY_OUT_SIZE,
                ENTRY_OUT_SIZE,
                ENTRY_OUT_SIZE,
                expected,
            )
            for length in (1, 8, 200)
        ]
    )


def run(
    back_end: ScriptedBackEnd,
    requests: RequestSet,
    *,
    depth: int = 1,
    seconds: float = 0.05,
    stall_s: float = 5,
) -> Figures:
    figures = Figures()
    back_end.ring.run(requests, figures, depth=depth, seconds=seconds, stall_s=stall_s)
    return figures


@pytest.mark.parametrize("is_event_idx", [True, False])
@pytest.mark.parametrize("depth", [1, 5, 16])
def test_requests_are_answered_at_every_depth(depth: int, is_event_idx: bool) -> None:  # noqa: FBT001
    with ScriptedBackEnd(lambda header: reply(header, FOUND), is_event_idx=is_event_idx) as device:
        figures = run(device, lookups(), depth=depth)
        again = run(device, lookups(), depth=depth)
    assert device.pending_max <= depth
    assert figures.completed > depth
    assert again.completed > depth
    assert figures.body_bytes == figures.completed * ENTRY_OUT_SIZE
    assert figures.odd_lengths == 0
    assert 0.05 <= figures.elapsed_s < 5
    assert 0 < quantile_s([figures], 0.5) <= quantile_s([figures], 0.999) <= figures.max_s
    # The header and the arguments of each request, and the room for a whole reply.
    assert device.shapes == {(40 + n + 1, 16 + ENTRY_OUT_SIZE) for n in (1, 8, 200)}


def test_depth_1_has_one_request_outstanding() -> None:
    is_busy = threading.Lock()
    overlaps = []

    def answer(header: InHeader) -> tuple[bytes, int]:
        overlaps.append(not is_busy.acquire(blocking=False))
        time.thread_time()
        is_busy.release()
        return reply(header, FOUND)

    with ScriptedBackEnd(answer) as device:
        figures = run(device, lookups(), depth=1)
    assert device.pending_max == 1
    assert figures.waits >= figures.completed / 2, "most replies find the generator asleep"


@pytest.mark.slow
def test_the_indices_of_a_ring_wrap() -> None:
    with ScriptedBackEnd(lambda header: reply(header, FOUND)) as device:
        completed = 0
        while completed < 70_000:
            completed += run(device, lookups(), depth=16, seconds=0.5).completed


def test_a_single_request_is_asked() -> None:
    def answer(header: InHeader) -> tuple[bytes, int]:
        return reply(header, error=errno.EACCES) if header.opcode == 27 else reply(header, b"abc")

    with ScriptedBackEnd(answer) as device:
        target = device.ring.ask(fuse_requests.readlink(5), room=4096, timeout_s=5)
        refused = device.ring.ask(fuse_requests.opendir(5), room=16, timeout_s=5)
    assert target.body == b"abc"
    assert (refused.error, refused.body) == (errno.EACCES, b"")


def test_large_bodies_take_a_descriptor_for_each_page() -> None:
    size = 64 << 10
    request = PreparedRequest(fuse_requests.read(5, 0, size), size, size, size, Expected.DATA)
    content = os.urandom(size)
    with ScriptedBackEnd(lambda header: reply(header, content)) as device:
        figures = run(device, RequestSet([request]), depth=3)
        whole = device.ring.ask(request.data, room=size, timeout_s=5)
    assert figures.body_bytes == size * figures.completed > 0
    assert device.shapes == {(80, 16 + size)}
    assert whole.body == content


def test_absent_names_have_two_answers() -> None:
    answers = [ABSENT, b""]

    def answer(header: InHeader) -> tuple[bytes, int]:
        answers.append(answers.pop(0))
        body = answers[0]
        return reply(header, body, 0 if body else errno.ENOENT)

    with ScriptedBackEnd(answer) as device:
        assert run(device, lookups(Expected.ABSENT)).completed > 2


def test_a_used_length_that_is_not_the_reply_s_is_counted() -> None:
    with ScriptedBackEnd(lambda header: (reply(header, FOUND)[0], 0)) as device:
        figures = run(device, lookups())
    assert figures.odd_lengths == figures.completed > 0


def headed(*, length: int, unique: int) -> tuple[bytes, int]:
    data = pack_reply_header(unique, 0, length - 16) + FOUND
    return data, len(data)


WRONG: dict[str, tuple[Callable[[InHeader], tuple[bytes, int]], Expected, str]] = {
    "error": (
        lambda header: reply(header, error=errno.EIO),
        Expected.FOUND,
        r"the reply is an error: EIO \(Input/output error\)",
    ),
    "error where absence is right": (
        lambda header: reply(header, error=errno.EACCES),
        Expected.ABSENT,
        "the reply is an error: EACCES",
    ),
    "positive error": (
        lambda header: (pack_reply_header(header.unique, -errno.EIO, 0), 16),
        Expected.ANY,
        "the reply is an error: EIO",
    ),
    "error with a body": (
        lambda header: reply(header, FOUND, errno.ENOENT),
        Expected.ABSENT,
        "the reply's body has 128 bytes, expected 0",
    ),
    "short body": (
        lambda header: reply(header, FOUND[:-1]),
        Expected.FOUND,
        "the reply's body has 127 bytes, expected 128",
    ),
    "absent": (lambda header: reply(header, ABSENT), Expected.FOUND, "the reply's nodeid is 0"),
    "found": (lambda header: reply(header, FOUND), Expected.ABSENT, "the reply's nodeid is 7"),
    "other unique": (
        lambda header: headed(length=144, unique=header.unique + 1),
        Expected.FOUND,
        r"the reply is to request \d+, expected \d+",
    ),
    "short length": (
        lambda header: headed(length=15, unique=header.unique),
        Expected.FOUND,
        "the reply's header states 15 bytes, expected 16 to 144",
    ),
    "long length": (
        lambda header: headed(length=145, unique=header.unique),
        Expected.FOUND,
        "the reply's header states 145 bytes, expected 16 to 144",
    ),
}


@pytest.mark.parametrize(("script", "expected", "text"), WRONG.values(), ids=WRONG.keys())
def test_wrong_replies_are_named(
    script: Callable[[InHeader], tuple[bytes, int]], expected: Expected, text: str
) -> None:
    with (
        ScriptedBackEnd(script) as device,
        pytest.raises(BenchError, match=rf"^LOOKUP nodeid=1 b'n+'.*: {text}"),
    ):
        run(device, lookups(expected))


def test_a_back_end_that_is_silent_or_gone_is_named() -> None:
    with (
        ScriptedBackEnd(lambda _header: None) as device,
        pytest.raises(BenchError, match=r"^LOOKUP nodeid=1 b'n'.*: no reply in 0.05 s"),
    ):
        run(device, lookups(), stall_s=0.05)
    with ScriptedBackEnd(lambda _header: None) as device:
        device.connection.close()
        with pytest.raises(BenchError, match=r"^LOOKUP .*: the back-end closed the connection"):
            run(device, lookups(), depth=3)


@pytest.mark.parametrize(
    ("index", "text"),
    [(1, "the used ring names descriptor 9, which"), (5, "the used ring ran ahead, to 5")],
)
def test_a_reply_that_nobody_asked_for_is_named(index: int, text: str) -> None:
    with ScriptedBackEnd(lambda _header: None) as device:
        used = device.memory.offset(vars(device.ring)["_used_gpa"]) // 2
        device.memory.words[used + 1] = index
        device.memory.words[used + 2] = 9
        with pytest.raises(BenchError, match=text):
            run(device, lookups())


def test_buckets_are_ordered_and_narrow() -> None:
    assert [LIB.bench_bucket(value) for value in range(64)] == list(range(64))
    for value in [*range(5000), *(2**power + add for power in range(13, 64) for add in (-1, 0, 1))]:
        bucket = LIB.bench_bucket(value)
        assert bucket < LIB.BENCH_BUCKETS
        assert LIB.bench_bucket_start(bucket) <= value
        if bucket + 1 < LIB.BENCH_BUCKETS:
            end = LIB.bench_bucket_start(bucket + 1)
            assert value < end <= LIB.bench_bucket_start(bucket) * 33 / 32 + 1


def test_quantiles_are_those_of_all_figures_together() -> None:
    parts = [Figures(), Figures()]
    for latency_ns in range(1000, 101_000, 1000):
        part = parts[latency_ns // 1000 % 2].c
        part.completed += 1
        part.max_ns = max(part.max_ns, latency_ns)
        part.buckets[LIB.bench_bucket(latency_ns)] += 1
    assert quantile_s(parts, 0.5) == pytest.approx(50e-6, rel=0.04)
    assert quantile_s(parts, 0.99) == pytest.approx(99e-6, rel=0.04)
    assert quantile_s([Figures()], 0.5) == 0


# --- System calls ---


def test_calls_are_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    (tmp_path / "link").symlink_to("file")
    path = os.fsencode(tmp_path)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    directory = os.open(tmp_path, os.O_RDONLY)
    cases = {
        CallKind.STAT: PreparedCall(path + b"/file"),
        CallKind.ABSENT: PreparedCall(path + b"/other"),
        CallKind.FSTAT: PreparedCall(fd=fd),
        CallKind.LIST: PreparedCall(fd=directory),
        CallKind.READ: PreparedCall(fd=fd, offset=4096, size=4096),
        CallKind.READLINK: PreparedCall(path + b"/link"),
    }
    for kind, call in cases.items():
        figures = Figures()
        CallSet(kind, [call, call]).run(figures, seconds=0.01)
        assert figures.completed > 0
        if kind == CallKind.READ:
            assert figures.body_bytes == figures.completed * 4096
    os.close(fd)
    os.close(directory)


@pytest.mark.parametrize(
    ("kind", "call", "text"),
    [
        (CallKind.STAT, PreparedCall(b"/nowhere"), "STAT of /nowhere: ENOENT"),
        (CallKind.ABSENT, PreparedCall(b"/"), "ABSENT of /: not what was expected"),
        (CallKind.FSTAT, PreparedCall(fd=-1), "FSTAT of descriptor -1: EBADF"),
        (CallKind.READLINK, PreparedCall(b"/"), "READLINK of /: EINVAL"),
    ],
)
def test_calls_that_fail_are_named(kind: CallKind, call: PreparedCall, text: str) -> None:
    with pytest.raises(BenchError, match=text):
        CallSet(kind, [call]).run(Figures(), seconds=0.01)
