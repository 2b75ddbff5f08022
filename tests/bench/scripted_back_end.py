"""The device's end of a generator's ring, in a thread: what it answers is the test's choice."""

import os
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from appliance.bench.generator import GeneratorRing, ring_memory_size
from appliance.bench.guest_ram import PAGE, GuestRam
from appliance.engine import (
    FEATURE_EVENT_IDX,
    FEATURE_INDIRECT_DESC,
    GuestMap,
    Ring,
    inflight_size,
)
from appliance.fuse_proto._fuse_wire import InHeader, unpack_in_header
from appliance.fuse_proto.encode import pack_reply_header

NUM = 64
ROOM_MAX = 64 << 10

# What to answer: the whole reply and the length for the used ring, or None for silence.
Script = Callable[[InHeader], tuple[bytes, int] | None]


def reply(header: InHeader, body: bytes = b"", error: int = 0) -> tuple[bytes, int]:
    """Return a good reply; `error` is a positive errno."""
    data = pack_reply_header(header.unique, error, len(body)) + body
    return data, len(data)


class ScriptedBackEnd:
    """A generator's ring and a device that serves it; `pending_max` says how full it ever was."""

    def __init__(self, script: Script, *, is_event_idx: bool = True, slots: int = 16) -> None:
        self._script = script
        size = ring_memory_size(NUM, slots, ROOM_MAX)
        self.memory = GuestRam([(0, -(-size // PAGE) * PAGE)])
        self._theirs, self.connection = socket.socketpair()
        self.ring = GeneratorRing(
            self.memory,
            num=NUM,
            num_slots=slots,
            room_max=ROOM_MAX,
            is_event_idx=is_event_idx,
            back_end_fd=self._theirs.fileno(),
        )
        self.pending_max = 0
        self.shapes: set[tuple[int, int]] = set()
        self._map = GuestMap()
        for region in self.memory.regions:
            self._map.add(self.memory.fd, region)
        self._inflight = memoryview(bytearray(inflight_size(NUM)))
        self._device = Ring(
            self._map,
            self.ring.layout(),
            base=0,
            features=FEATURE_INDIRECT_DESC | (FEATURE_EVENT_IDX if is_event_idx else 0),
            inflight=self._inflight,
            call_fd=self.ring.call_fd,
            err_fd=-1,
        )
        self._stop_fd = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)
        self._device.close()
        self._map.close()
        self.ring.close()
        self.memory.close()
        self._theirs.close()
        self.connection.close()

    def _serve(self) -> None:
        while True:
            count = self._device.pop()
            self.pending_max = max(self.pending_max, count)
            for slot in range(count):
                self._answer(slot)
            self._device.signal()
            if count or self._device.arm():
                continue
            ready, _, _ = select.select([self.ring.kick_fd, self._stop_fd], [], [])
            if self._stop_fd in ready:
                return
            os.eventfd_read(self.ring.kick_fd)

    def _answer(self, slot: int) -> None:
        header = unpack_in_header(self._device.request(slot))
        self.shapes.add((self._device.readable_len(slot), self._device.writable_len(slot)))
        answer = self._script(header)
        if answer is None:
            return
        data, length = answer
        self._device.write(slot, 0, data)
        self._device.complete(slot, length)
