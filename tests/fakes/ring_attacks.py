"""What a driver must not write into a split virtqueue, one function per broken rule.

`BREAKS` pairs each with what the log line about it says. VIRTIO 1.3, 2.7.
"""

from collections.abc import Callable, Sequence
from typing import Final

from tests.fakes.driver import (
    DESC,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DriverRing,
    GuestMemory,
)

U64_MAX: Final = (1 << 64) - 1
U32_MAX: Final = (1 << 32) - 1
LONGEST_QUEUE: Final = 32768  # VIRTIO 1.3, 2.7


def offer_descs(ring: DriverRing, *descs: tuple[int, int, int, int]) -> None:
    for index, desc in enumerate(descs):
        ring.set_desc(index, *desc)
    ring.offer(0)
    ring.publish()


def offer_indirect(ring: DriverRing, *descs: tuple[int, int, int, int], size: int = -1) -> None:
    image = b"".join(DESC.pack(*desc) for desc in descs)
    table = ring.memory.alloc(len(image))
    ring.memory.write(table, image)
    offer_descs(ring, (table, len(image) if size < 0 else size, DESC_INDIRECT, 0))


def good_gpa(memory: GuestMemory) -> int:
    return memory.regions[-1].gpa


def end_gpa(memory: GuestMemory) -> int:
    return memory.regions[-1].gpa + memory.regions[-1].size


def loop_of_two(ring: DriverRing) -> None:
    gpa = good_gpa(ring.memory)
    offer_descs(ring, (gpa, 64, DESC_NEXT, 1), (gpa, 64, DESC_NEXT, 0))


def loop_of_all(ring: DriverRing) -> None:
    gpa = good_gpa(ring.memory)
    offer_descs(ring, *((gpa, 1, DESC_NEXT, (i + 1) % ring.num) for i in range(ring.num)))


def loop_in_indirect_table(ring: DriverRing) -> None:
    gpa = good_gpa(ring.memory)
    offer_indirect(ring, (gpa, 1, DESC_NEXT, 1), (gpa, 1, DESC_NEXT, 0))


def table_longer_than_any_queue(ring: DriverRing) -> None:
    gpa = good_gpa(ring.memory)
    offer_indirect(ring, (gpa, 1, 0, 0), size=(LONGEST_QUEUE + 1) * DESC.size)


def next_beyond_table(ring: DriverRing) -> None:
    offer_descs(ring, (good_gpa(ring.memory), 64, DESC_NEXT, ring.num))


def address_in_hole(ring: DriverRing) -> None:
    offer_descs(ring, (0xA0000, 64, 0, 0))


def buffer_across_the_end(ring: DriverRing) -> None:
    offer_descs(ring, (end_gpa(ring.memory) - 32, 64, DESC_WRITE, 0))


def address_wraps(ring: DriverRing) -> None:
    offer_descs(ring, (U64_MAX - 7, 64, 0, 0))


def length_of_all_ones(ring: DriverRing) -> None:
    offer_descs(ring, (good_gpa(ring.memory), U32_MAX, DESC_WRITE, 0))


def more_than_4_gib(ring: DriverRing) -> None:
    region = ring.memory.regions[-1]
    descs = [(region.gpa, region.size, DESC_WRITE | DESC_NEXT, i + 1) for i in range(130)]
    offer_descs(ring, *descs)


def readable_behind_writable(ring: DriverRing) -> None:
    gpa = good_gpa(ring.memory)
    offer_descs(ring, (gpa, 64, DESC_WRITE | DESC_NEXT, 1), (gpa, 64, 0, 0))


def nested_indirect(ring: DriverRing) -> None:
    offer_indirect(ring, (good_gpa(ring.memory), 16, DESC_INDIRECT, 0))


def indirect_with_next(ring: DriverRing) -> None:
    gpa = good_gpa(ring.memory)
    offer_descs(ring, (gpa, 16, DESC_INDIRECT | DESC_NEXT, 1), (gpa, 64, 0, 0))


def odd_indirect_length(ring: DriverRing) -> None:
    offer_indirect(ring, (good_gpa(ring.memory), 64, 0, 0), size=17)


def empty_indirect_table(ring: DriverRing) -> None:
    offer_indirect(ring, (good_gpa(ring.memory), 64, 0, 0), size=0)


def next_beyond_indirect_table(ring: DriverRing) -> None:
    offer_indirect(ring, (good_gpa(ring.memory), 64, DESC_NEXT, 1))


def table_outside_memory(ring: DriverRing) -> None:
    offer_descs(ring, (end_gpa(ring.memory), 32, DESC_INDIRECT, 0))


def avail_jump(ring: DriverRing) -> None:
    ring.avail_idx = ring.avail_idx + ring.num + 1
    ring.kick()


def head_beyond_queue(ring: DriverRing) -> None:
    ring.offer(ring.num)
    ring.publish()


BREAKS: Final[Sequence[tuple[Callable[[DriverRing], None], str]]] = (
    (loop_of_two, "chain loops"),
    (loop_of_all, "chain loops"),
    (loop_in_indirect_table, "chain loops"),
    (table_longer_than_any_queue, "bad length of an indirect table"),
    (next_beyond_table, "next is beyond the descriptor table"),
    (address_in_hole, "not guest memory"),
    (buffer_across_the_end, "not guest memory"),
    (address_wraps, "wraps around the address space"),
    (length_of_all_ones, "not guest memory"),
    (more_than_4_gib, "more than 4 GiB"),
    (readable_behind_writable, "readable buffer behind a writable one"),
    (nested_indirect, "INDIRECT inside an indirect table"),
    (indirect_with_next, "INDIRECT together with NEXT"),
    (odd_indirect_length, "bad length of an indirect table"),
    (empty_indirect_table, "bad length of an indirect table"),
    (next_beyond_indirect_table, "next is beyond the descriptor table"),
    (table_outside_memory, "not guest memory"),
    (avail_jump, "avail.idx runs ahead by more than the queue size"),
    (head_beyond_queue, "is beyond the queue"),
)
