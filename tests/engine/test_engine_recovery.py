"""What a killed worker leaves behind, and what the next one makes of it."""

import os
import random
import select
import signal
import threading
import traceback
from collections.abc import Callable, Iterator

import pytest

from appliance.engine import INFLIGHT_ENTRY, INFLIGHT_HEADER, Ring
from appliance.errors import RingError
from tests.fakes.driver import USED_ELEM, Used, drain_eventfd
from tests.fakes.engine_rig import Rig


@pytest.fixture(params=[0, 65534], ids=["start", "wrap"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(base=request.param) as made:
        yield made


def add_three(rig: Rig) -> list[int]:
    """Three chains whose heads do not ascend."""
    heads = [rig.driver.add_chain([b"%d" % i], [16]) for i in range(5)]
    rig.driver.publish()
    rig.serve()
    rig.driver.collect(5)
    first, second, third = [rig.driver.add_chain([b"request %d" % i], [16]) for i in range(3)]
    assert heads != sorted([first, second, third])
    rig.driver.publish()
    return [first, second, third]


def finish(rig: Rig) -> list[Used]:
    """Run what was recovered, then what is in the ring, and take everything back."""
    for head in rig.ring.recovered:
        rig.ring.load(head)
        reply = bytes(rig.ring.request(0))
        rig.ring.write(0, 0, reply)
        rig.ring.complete(0, len(reply))
    rig.serve()
    return rig.driver.poll()


def test_a_fresh_area_starts_at_the_base_given(rig: Rig) -> None:
    assert (rig.ring.recovered, rig.ring.in_flight) == ([], 0)
    assert rig.ring.last_avail == rig.driver.base


def test_heads_are_recovered_in_the_order_of_popping(rig: Rig) -> None:
    heads = add_three(rig)
    assert rig.ring.pop() == 3
    last_avail = rig.ring.last_avail
    ring = rig.restart()
    assert ring.recovered == heads
    assert (ring.last_avail, ring.in_flight) == (last_avail, 3)
    assert ring.pop() == 0
    assert [used.data for used in finish(rig)] == [b"request 0", b"request 1", b"request 2"]
    assert rig.restart().recovered == []


def test_recovery_goes_on_where_an_idle_ring_was_left(rig: Rig) -> None:
    add_three(rig)
    rig.serve()
    last_avail = rig.ring.last_avail
    ring = rig.restart()
    assert (ring.recovered, ring.last_avail, ring.in_flight) == ([], last_avail, 0)


def test_recovery_signals_because_the_last_signal_may_be_lost(rig: Rig) -> None:
    add_three(rig)
    rig.ring.pop()
    rig.ring.complete(0, 0)
    drain_eventfd(rig.driver.call_fd)
    rig.restart()
    assert rig.driver.calls() == 1


def test_out_of_order_completions_leave_the_others_in_flight(rig: Rig) -> None:
    first, second, third = add_three(rig)
    rig.ring.pop()
    rig.ring.complete(1, 0)
    ring = rig.restart()
    assert ring.recovered == [first, third]
    assert [used.head for used in finish(rig)] == [second, first, third]


def test_order_survives_two_restarts(rig: Rig) -> None:
    heads = add_three(rig)
    rig.ring.pop(2)
    rig.restart()
    rig.ring.pop()
    assert rig.restart().recovered == heads


# The stores of one completion, in the order of the engine: a kill may fall between any two of them.

Step = Callable[[Rig, int], None]


def _entry_next(rig: Rig, head: int) -> None:
    last_batch_head, _ = rig.inflight_header()
    counter = rig.inflight_counter(head)
    rig.set_inflight_entry(head, inflight=1, next_head=last_batch_head, counter=counter)


def _last_batch_head(rig: Rig, head: int) -> None:
    _, used_idx = rig.inflight_header()
    rig.set_inflight_header(last_batch_head=head, used_idx=used_idx)


def _used_element(rig: Rig, head: int) -> None:
    driver = rig.driver
    at = driver.used_gpa + 4 + USED_ELEM.size * (driver.used_idx % driver.num)
    rig.memory.write(at, USED_ELEM.pack(head, 0))


def _used_idx(rig: Rig, _: int) -> None:
    rig.driver.used_idx += 1


def _clear_flag(rig: Rig, head: int) -> None:
    rig.set_inflight_entry(head, inflight=0, counter=rig.inflight_counter(head))


def _inflight_used_idx(rig: Rig, head: int) -> None:
    rig.set_inflight_header(last_batch_head=head, used_idx=rig.driver.used_idx)


STEPS: tuple[Step, ...] = (
    _entry_next,
    _last_batch_head,
    _used_element,
    _used_idx,
    _clear_flag,
    _inflight_used_idx,
)
PUBLISHED = STEPS.index(_used_idx) + 1


@pytest.mark.parametrize("done", range(len(STEPS) + 1))
def test_a_kill_between_any_two_steps_of_a_completion_loses_and_repeats_nothing(
    rig: Rig, done: int
) -> None:
    heads = add_three(rig)
    assert rig.ring.pop() == 3
    last_avail = rig.ring.last_avail
    for step in STEPS[:done]:
        step(rig, heads[1])
    ring = rig.restart()
    is_published = done >= PUBLISHED
    assert ring.recovered == ([heads[0], heads[2]] if is_published else heads)
    assert ring.last_avail == last_avail
    assert rig.heads_in_flight() == ring.recovered
    expected = [heads[1], heads[0], heads[2]] if is_published else heads
    assert [used.head for used in finish(rig)] == expected
    assert rig.heads_in_flight() == []


def test_a_published_batch_of_several_is_cleared_along_its_list(rig: Rig) -> None:
    heads = add_three(rig)
    rig.ring.pop()
    for head in heads[:2]:
        for step in STEPS[:PUBLISHED]:
            step(rig, head)
    assert rig.restart().recovered == heads[2:]


def test_the_steps_above_are_those_of_the_engine(rig: Rig) -> None:
    heads = add_three(rig)
    rig.ring.pop()
    by_engine, by_hand = heads[0], heads[1]
    rig.ring.complete(0, 0)
    last_batch_head, used_idx = rig.inflight_header()
    assert (last_batch_head, used_idx) == (by_engine, rig.driver.used_idx)
    for step in STEPS:
        step(rig, by_hand)
    assert rig.inflight_header() == (by_hand, (used_idx + 1) & 0xFFFF)
    assert rig.heads_in_flight() == heads[2:]


@pytest.mark.parametrize("is_flagged", [False, True])
def test_a_kill_while_popping_loses_and_repeats_nothing(rig: Rig, *, is_flagged: bool) -> None:
    heads = add_three(rig)
    rig.ring.pop(2)
    counter = rig.inflight_counter(heads[1]) + 1
    rig.set_inflight_entry(heads[2], inflight=int(is_flagged), counter=counter)
    ring = rig.restart()
    assert ring.recovered == (heads if is_flagged else heads[:2])
    assert [used.head for used in finish(rig)] == heads


def test_an_area_of_another_size_is_fresh(rig: Rig) -> None:
    add_three(rig)
    rig.ring.pop()
    header = bytearray(rig.area[:16])
    header[10:12] = b"\x08\x00"
    rig.area[:16] = bytes(header)
    ring = rig.restart()
    assert ring.recovered == []
    assert ring.last_avail == 0x5555, "the base of the new start"


@pytest.mark.parametrize("used_idx", [17, 0xFFFF])
def test_a_used_idx_that_the_guest_moved_breaks_the_ring(used_idx: int) -> None:
    with Rig() as rig:
        rig.driver.used_idx = used_idx
        with pytest.raises(RingError, match=f"used.idx does not follow .*: {used_idx}"):
            rig.restart()


def test_a_list_that_leaves_the_table_breaks_the_ring() -> None:
    with Rig() as rig:
        rig.set_inflight_header(last_batch_head=16, used_idx=0)
        rig.driver.used_idx = 1
        with pytest.raises(RingError, match="inflight record names head 16"):
            rig.restart()


def test_a_record_that_changes_while_it_is_read_is_read_once() -> None:
    # The front-end's doing. Read twice, it gave more heads than were counted in flight.
    with Rig(num=1024, regions=((0x10000, 0x100000),)) as rig:
        done = threading.Event()
        flag, stop = INFLIGHT_HEADER.size + 1023 * INFLIGHT_ENTRY.size, done.is_set

        def change() -> None:
            while not stop():
                rig.area[flag] = 1
                rig.area[flag] = 0

        front_end = threading.Thread(target=change)
        front_end.start()
        try:
            for _ in range(200):
                ring = rig.restart()
                assert ring.in_flight == len(ring.recovered)
        finally:
            done.set()
            front_end.join()


def test_a_list_that_loops_ends() -> None:
    with Rig() as rig:
        rig.set_inflight_entry(3, inflight=1, next_head=3)
        rig.set_inflight_header(last_batch_head=3, used_idx=0)
        rig.driver.used_idx = 16
        assert rig.restart().recovered == []


def test_an_area_too_small_or_misaligned_is_refused() -> None:
    with Rig() as rig:
        layout = rig.driver.layout()
        for size, start in ((16 + 16 * 16 - 1, 0), (16 + 16 * 16, 4)):
            area = memoryview(bytearray(size + start))[start:]
            with pytest.raises(ValueError, match="inflight area"):
                Ring(rig.map, layout, base=0, features=0, inflight=area, call_fd=-1, err_fd=-1)


def work(rig: Rig, seed: int) -> None:
    """A worker: recovers, then answers in random order until it is killed."""
    choice = random.Random(seed)
    poller = select.poll()
    poller.register(rig.driver.kick_fd, select.POLLIN)
    parked = rig.restart().recovered
    while True:
        count = rig.ring.pop(choice.randint(1, 8))
        parked += [rig.ring.head(slot) for slot in range(count)]
        if not count and not parked:
            if not rig.ring.arm():
                poller.poll(10_000)
                drain_eventfd(rig.driver.kick_fd)
            continue
        choice.shuffle(parked)
        for head in [parked.pop() for _ in range(choice.randint(0, len(parked)))]:
            rig.ring.load(head)
            reply = bytes(rig.ring.request(0)) * 20
            rig.ring.write(0, 0, reply)
            rig.ring.complete(0, len(reply))
            rig.ring.signal()


def fork_worker(rig: Rig, seed: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(60)
    try:
        work(rig, seed)
    except BaseException:  # noqa: BLE001 - this child must not go on as a second pytest
        traceback.print_exc()
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("event_idx", [False, True])
def test_sigkill_at_any_moment_is_invisible_to_the_guest(*, event_idx: bool) -> None:
    choice = random.Random(20260101)
    with Rig(num=64, event_idx=event_idx) as rig:
        driver = rig.driver
        expected: dict[int, bytes] = {}
        sent = answered = 0
        for life in range(60):
            worker = fork_worker(rig, seed=life)
            goal = answered + choice.randint(1, 60)
            while answered < goal:
                while len(expected) < 20:
                    text = b"%06d" % sent
                    sent += 1
                    expected[driver.add_chain([text], [50, 70])] = text * 20
                    driver.publish()
                for used in driver.collect(timeout_s=30):
                    assert used.data == expected.pop(used.head)
                    answered += 1
            os.kill(worker, signal.SIGKILL)
            _, status = os.waitpid(worker, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL, "it did not fail by itself"
        parked = rig.restart().recovered
        assert set(parked) <= expected.keys()
        for head in parked:
            rig.ring.load(head)
            rig.ring.write(0, 0, bytes(rig.ring.request(0)) * 20)
            rig.ring.complete(0, 120)
        while count := rig.ring.pop():
            for slot in range(count):
                rig.ring.write(slot, 0, bytes(rig.ring.request(slot)) * 20)
                rig.ring.complete(slot, 120)
        for used in driver.poll():
            assert used.data == expected.pop(used.head)
        assert not expected
        assert rig.heads_in_flight() == []
