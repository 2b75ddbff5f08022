"""Statistics of requests: what is counted, sums over queues, and quantiles."""

import pytest

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.session.request_statistics import (
    BUCKETS,
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


def test_without_requests_there_is_nothing_to_report(memory: memoryview) -> None:
    report = SessionStatistics(memory).report()
    assert report["requests"] == report["latency_us"] == {}
    assert SessionStatistics(memory).latency_us(Opcode.READ, 0.99) == 0


def test_quantiles_are_bounds_over_all_queues(
    memory: memoryview, queues: list[QueueStatistics]
) -> None:
    for _ in range(98):
        queues[0].add_latency(Opcode.LOOKUP, 1000)
    queues[0].add_latency(Opcode.LOOKUP, 1024)
    queues[1].add_latency(Opcode.LOOKUP, 1_000_000)
    queues[1].add_latency(Opcode.READ, 1)
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
    queues[0].add_latency(Opcode.READ, ns)
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
