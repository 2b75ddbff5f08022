"""What the queues of one session have served: numbers that workers write and `status` reads.

Each queue, or clone of a mount, has a block of 19,008 bytes in session memory. Only its worker
writes to it, so plain stores suffice. `struct eng_statistics` (cffi_build/answers.h) is this block:

    offset  type  field
    0       u64   requests[64]: answered, by opcode; index 0 counts all other opcodes
    512     u64   latency[64][36]: the same requests by opcode, and by the binary logarithm of the
                  nanoseconds from when the worker took the request until its reply was published
    18944   u64   requests that were answered in C, without Python
    18952   u64   times that the worker went to sleep because the ring was empty
    18960   u64   times that it polled an empty ring, and a request came meanwhile
    18968   u64   times that it polled an empty ring in vain
    18976   u64   four unused words
"""

from collections.abc import Sequence
from typing import Any, Final

from appliance.fuse_proto._fuse_wire import Opcode

OPCODES: Final = 64
BUCKETS: Final = 36
_LATENCY_AT: Final = OPCODES  # in words
_EVENTS_AT: Final = _LATENCY_AT + OPCODES * BUCKETS
_EVENTS: Final = ("plain", "waits", "polls_paid", "polls_vain")
_WORDS: Final = _EVENTS_AT + 8
STATISTICS_BYTES: Final = 8 * _WORDS


class QueueStatistics:
    """The block of one queue.

    Args:
        memory: `STATISTICS_BYTES` bytes, writable for whoever adds to them.
    """

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        """The whole block, as bytes."""
        words = memory.cast("Q")
        self.requests: memoryview = words[:OPCODES]
        """The number of requests that were answered, by opcode."""
        self._latency = words[_LATENCY_AT:_EVENTS_AT]

    def add_latency(self, opcode: int, ns: int) -> None:
        """Note how long it took to answer a request, which is counted in `requests` elsewhere."""
        row = opcode if opcode < OPCODES else 0
        bucket = min(max(ns, 1).bit_length() - 1, BUCKETS - 1)
        self._latency[row * BUCKETS + bucket] += 1


class SessionStatistics:
    """The sums over the blocks of all queues of a session.

    Args:
        memory: the blocks, one after the other.
    """

    def __init__(self, memory: memoryview) -> None:
        words = memory.cast("Q")
        self._totals = [sum(words[index::_WORDS]) for index in range(_WORDS)]

    @property
    def requests(self) -> list[int]:
        """The number of requests that were answered, by opcode."""
        return self._totals[:OPCODES]

    def events(self) -> dict[str, int]:
        """Return the numbers that are not by opcode, by name."""
        return dict(zip(_EVENTS, self._totals[_EVENTS_AT:], strict=False))

    def latency_us(self, opcode: int, fraction: float) -> float:
        """Return a bound, a power of two of ns, that this fraction of the requests stayed below.

        Returns:
            Microseconds; 0 if there were no requests.
        """
        start = _LATENCY_AT + opcode * BUCKETS
        buckets = self._totals[start : start + BUCKETS]
        return _quantile_ns(buckets, fraction) / 1000

    def report(self) -> dict[str, Any]:
        """Return what `appliance status` shows: opcodes by name, without those never seen."""
        seen = {op.name: op.value for op in Opcode if op < OPCODES and self.requests[op]}
        if self.requests[0]:
            seen["UNKNOWN"] = 0
        return {
            "requests": {name: self.requests[number] for name, number in seen.items()},
            "latency_us": {
                name: {"p50": self.latency_us(number, 0.5), "p99": self.latency_us(number, 0.99)}
                for name, number in seen.items()
            },
            **self.events(),
        }


def _quantile_ns(buckets: Sequence[int], fraction: float) -> int:
    wanted = fraction * sum(buckets)
    below = 0
    for index, count in enumerate(buckets):
        below += count
        if below and below >= wanted:
            return 2 << index
    return 0
