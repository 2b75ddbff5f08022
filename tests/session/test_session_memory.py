import errno
import fcntl
import os
import resource

import pytest

from appliance.engine import inflight_size
from appliance.fuse_proto._fuse_wire import Opcode
from appliance.session.request_statistics import OPCODES, STATISTICS_BYTES
from appliance.session.session_memory import (
    InflightMemory,
    SessionMemory,
)


def test_what_one_process_starts_another_sees() -> None:
    ours = SessionMemory.create(2)
    theirs = SessionMemory(os.dup(ours.fd))
    seen = [theirs.is_initialised]
    ours.start(38, 0x1234, 131072)
    seen.append(theirs.is_initialised)
    assert theirs.minor == 38
    theirs.end()
    seen.append(ours.is_initialised)
    assert seen == [False, True, False]
    ours.close()
    theirs.close()


def test_memory_that_cannot_be_mapped_leaves_no_descriptor() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
    try:
        for _ in range(2):  # the second time, the only free descriptor is free again
            with pytest.raises(OSError, match="Too many open files"):
                SessionMemory.create(1)
            assert os.dup(0) == lowest_free
            os.close(lowest_free)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_statistics_of_queues_add_up_and_do_not_mix() -> None:
    memory = SessionMemory.create(3)
    for queue in range(3):
        requests = memory.statistics(queue).requests
        assert len(requests) == OPCODES
        requests[Opcode.READ] += 10**queue
    memory.statistics(1).requests[0] += 5
    totals = memory.totals()
    assert totals.requests[Opcode.READ] == 111
    assert totals.requests[0] == 5
    assert sum(totals.requests) == 116
    memory.close()


def test_statistics_outlive_a_start_and_an_end() -> None:
    memory = SessionMemory.create(1)
    memory.statistics(0).requests[Opcode.INIT] += 1
    memory.start(38, 0, 0)
    memory.end()
    assert memory.totals().requests[Opcode.INIT] == 1
    memory.close()


@pytest.mark.parametrize(("queue_size", "size"), [(1, 64), (3, 64), (4, 128), (128, 2112)])
def test_an_inflight_area_has_the_size_that_front_ends_compute(queue_size: int, size: int) -> None:
    assert inflight_size(queue_size) == size


def test_clearing_one_queue_leaves_the_others() -> None:
    memory = InflightMemory.create(3, 16)
    for queue in range(3):
        memory.area(queue)[:] = bytes([queue + 1]) * memory.area_bytes
    memory.clear(1)
    assert bytes(memory.area(0)) == b"\1" * memory.area_bytes
    assert bytes(memory.area(1)) == bytes(memory.area_bytes)
    assert bytes(memory.area(2)) == b"\3" * memory.area_bytes
    assert not memory.is_blank
    memory.close()


def test_new_inflight_memory_is_blank() -> None:
    memory = InflightMemory.create(2, 1024)
    assert memory.is_blank
    memory.close()


def test_nobody_can_shrink_our_memory_under_a_mapping() -> None:
    memory = InflightMemory.create(1, 16)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    memory.close()


def test_a_buffer_too_small_for_its_queues_is_refused() -> None:
    fd = os.memfd_create("small")
    os.ftruncate(fd, 64)
    with pytest.raises(ValueError, match="the file has 64 bytes, expected at least"):
        InflightMemory(fd, offset=0, num_queues=2, queue_size=1024)
    os.close(fd)


def test_memory_of_an_earlier_release_has_no_table_of_errors() -> None:
    fd = os.memfd_create("session")
    os.ftruncate(fd, 4096 + 2 * STATISTICS_BYTES)
    memory = SessionMemory(fd)
    memory.statistics(1).requests[Opcode.READ] += 1
    memory.statistics(1).note(Opcode.READ, errno.EIO, b"")
    assert memory.totals().requests[Opcode.READ] == 1
    assert memory.totals().errors() == {}
    memory.close()


def test_errors_of_queues_do_not_mix_with_statistics() -> None:
    memory = SessionMemory.create(2)
    for queue in range(2):
        memory.statistics(queue).note(Opcode.READ, errno.EIO, b"")
    assert memory.totals().errors() == {"READ": {"EIO": 2}}
    assert sum(memory.totals().requests) == 0
    memory.close()
