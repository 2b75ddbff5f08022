"""Statistics of requests: what is counted, sums over queues, and quantiles."""

import errno

import pytest

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.fuse_proto.operations import FileSlice
from appliance.session.request_statistics import (
    BUCKETS,
    ERROR_ROWS,
    ERRORS_BYTES,
    OPCODES,
    STATISTICS_BYTES,
    QueueStatistics,
    SessionStatistics,
)


@pytest.fixture
def memory() -> memoryview:
    return memoryview(bytearray(2 * STATISTICS_BYTES))


@pytest.fixture
def queues(memory: memoryview) -> list[QueueStatistics]:
    halves = memory[:STATISTICS_BYTES], memory[STATISTICS_BYTES:]
    return [QueueStatistics(half) for half in halves]


def answer(queue: QueueStatistics, opcode: int, ns: int) -> None:
    """Count a request as a worker does."""
    queue.requests[opcode] += 1
    queue.add_latency(opcode, ns)


def test_without_requests_there_is_nothing_to_report(memory: memoryview) -> None:
    report = SessionStatistics(memory).report()
    assert report["requests"] == report["latency_us"] == {}
    assert SessionStatistics(memory).latency_us(Opcode.READ, 0.99) == 0


def test_quantiles_are_bounds_over_all_queues(
    memory: memoryview, queues: list[QueueStatistics]
) -> None:
    for _ in range(98):
        answer(queues[0], Opcode.LOOKUP, 1000)
    answer(queues[0], Opcode.LOOKUP, 1024)
    answer(queues[1], Opcode.LOOKUP, 1_000_000)
    answer(queues[1], Opcode.READ, 1)
    totals = SessionStatistics(memory)
    assert totals.latency_us(Opcode.LOOKUP, 0.5) == 1.024
    assert totals.latency_us(Opcode.LOOKUP, 0.98) == 1.024
    assert totals.latency_us(Opcode.LOOKUP, 0.99) == 2.048
    assert totals.latency_us(Opcode.LOOKUP, 0.999) == 1048.576
    assert totals.latency_us(Opcode.READ, 0.5) == 0.002


@pytest.mark.parametrize("ns", [-5, 0, 1 << 36, 1 << 90])
def test_what_no_bucket_is_for_is_in_the_first_or_the_last(
    memory: memoryview, queues: list[QueueStatistics], ns: int
) -> None:
    answer(queues[0], Opcode.READ, ns)
    bound = 2 if ns < 1 else 1 << BUCKETS
    assert SessionStatistics(memory).latency_us(Opcode.READ, 0.5) == bound / 1000


def test_opcodes_that_have_no_row_share_the_first(
    memory: memoryview, queues: list[QueueStatistics]
) -> None:
    for opcode in (OPCODES, 4096, 1 << 31):
        queues[1].add_latency(opcode, 1000)
        queues[1].requests[0] += 1
    report = SessionStatistics(memory).report()
    assert report["requests"] == {"UNKNOWN": 3}
    assert report["latency_us"] == {"UNKNOWN": {"p50": 1.024, "p99": 1.024}}


def test_errors_add_up_over_queues(memory: memoryview) -> None:
    errors = memoryview(bytearray(2 * ERRORS_BYTES))
    halves = errors[:ERRORS_BYTES], errors[ERRORS_BYTES:]
    one, two = (QueueStatistics(memory[:STATISTICS_BYTES], half) for half in halves)
    one.note(Opcode.READ, errno.EIO, b"")
    one.note(Opcode.READ, errno.EIO, b"")
    one.note(Opcode.SETATTR, errno.EROFS, b"")
    two.note(Opcode.READ, errno.EIO, b"")
    two.note(Opcode.READ, 500, b"")
    two.note(0, errno.EIO, b"")
    assert SessionStatistics(memory, errors).errors() == {
        "READ": {"EIO": 3, "other": 1},
        "SETATTR": {"EROFS": 1},
        "UNKNOWN": {"EIO": 1},
    }


def test_errors_without_a_row_of_their_own_are_counted_together(memory: memoryview) -> None:
    errors = memoryview(bytearray(ERRORS_BYTES))
    queue = QueueStatistics(memory[:STATISTICS_BYTES], errors)
    for error in range(1, ERROR_ROWS + 11):
        queue.note(Opcode.READ, error, b"")
    named = SessionStatistics(memory, errors).errors()
    assert sum(sum(of_opcode.values()) for of_opcode in named.values()) == ERROR_ROWS + 10
    assert named["UNKNOWN"] == {"other": 11}


def test_bytes_are_counted_by_where_they_were(memory: memoryview) -> None:
    queue = QueueStatistics(memory[:STATISTICS_BYTES])
    queue.note(Opcode.READ, 0, b"12345")
    queue.note(Opcode.READ, 0, FileSlice(0, 7, 1000))
    queue.note(Opcode.READ, errno.EIO, b"")  # there is no table of errors
    queue.set_taken(3)
    queue.set_parked(2)
    events = SessionStatistics(memory).events()
    assert (events["read_inline_bytes"], events["read_file_bytes"]) == (5, 1000)
    assert (events["taken"], events["parked"]) == (3, 2)
    queue.begin()
    events = SessionStatistics(memory).events()
    assert (events["read_file_bytes"], events["taken"], events["parked"]) == (1000, 0, 0)
