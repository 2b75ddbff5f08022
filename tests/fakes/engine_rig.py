"""A driver and the engine joined over one guest memory, with the inflight area of a supervisor."""

import mmap
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from appliance.engine import INFLIGHT_ENTRY, INFLIGHT_HEADER, GuestMap, Ring, inflight_size
from tests.fakes.driver import DriverRing, GuestMemory

SMALL_REGIONS = ((0x10000, 0x40000),)


class Rig:
    """One queue with both of its ends. `ring` may be replaced by `restart()`."""

    def __init__(
        self,
        *,
        num: int = 16,
        event_idx: bool = True,
        indirect: bool = True,
        base: int = 0,
        regions: Sequence[tuple[int, int]] = SMALL_REGIONS,
        ring_region: int = -1,
    ) -> None:
        self.memory = GuestMemory(regions)
        self.driver = DriverRing(
            self.memory, num, event_idx=event_idx, base=base, region=ring_region
        )
        self.features = self.driver.features if indirect else self.driver.features & ~(1 << 28)
        # Shared and file-backed, so that it survives whoever works on it.
        self.inflight_fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        os.ftruncate(self.inflight_fd, inflight_size(num))
        self.area = mmap.mmap(self.inflight_fd, inflight_size(num))
        self._area_view = memoryview(self.area)
        self.map = GuestMap()
        self.memory.map_into(self.map)
        self.ring = self.start(base)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ring.close()
        self.map.close()
        self._area_view.release()
        self.area.close()
        os.close(self.inflight_fd)
        self.driver.close()
        self.memory.close()

    def start(self, base: int = 0) -> Ring:
        """Return a ring as a worker would make it."""
        return Ring(
            self.map,
            self.driver.layout(),
            base=base,
            features=self.features,
            inflight=self._area_view,
            call_fd=self.driver.call_fd,
            err_fd=self.driver.err_fd,
        )

    def restart(self) -> Ring:
        """Replace the ring by one that finds memory and inflight area as the old one left them."""
        self.ring.close()
        # The wrong base shows that a recovered ring does not use it.
        self.ring = self.start(base=0x5555)
        return self.ring

    def serve(self, length: int | None = None) -> int:
        """Answer everything that is pending with the bytes of the request, cut to fit."""
        served = 0
        while count := self.ring.pop():
            for slot in range(count):
                reply = bytes(self.ring.request(slot))[: self.ring.writable_len(slot)]
                self.ring.write(slot, 0, reply)
                self.ring.complete(slot, len(reply) if length is None else length)
                self.ring.signal()
            served += count
        return served

    # The inflight area, as a supervisor could read it.

    def set_inflight_header(self, *, last_batch_head: int, used_idx: int, version: int = 1) -> None:
        header = (0, version, self.driver.num, last_batch_head, used_idx & 0xFFFF)
        INFLIGHT_HEADER.pack_into(self.area, 0, *header)

    def inflight_header(self) -> tuple[int, int]:
        """Return (last_batch_head, used_idx)."""
        _, _, _, last_batch_head, used_idx = INFLIGHT_HEADER.unpack_from(self.area)
        return last_batch_head, used_idx

    def set_inflight_entry(
        self, head: int, *, inflight: int, next_head: int = 0, counter: int = 0
    ) -> None:
        at = INFLIGHT_HEADER.size + head * INFLIGHT_ENTRY.size
        INFLIGHT_ENTRY.pack_into(self.area, at, inflight, next_head, counter)

    def inflight_counter(self, head: int) -> int:
        """Return when a head was popped, as a number that only grows."""
        at = INFLIGHT_HEADER.size + head * INFLIGHT_ENTRY.size
        counter: int = INFLIGHT_ENTRY.unpack_from(self.area, at)[2]
        return counter

    def heads_in_flight(self) -> list[int]:
        """Return the marked heads in the order in which they were popped."""
        start = INFLIGHT_HEADER.size
        area = self.area[start : start + self.driver.num * INFLIGHT_ENTRY.size]
        entries = enumerate(INFLIGHT_ENTRY.iter_unpack(area))
        return [
            head
            for counter, head in sorted((entry[2], head) for head, entry in entries if entry[0])
        ]
