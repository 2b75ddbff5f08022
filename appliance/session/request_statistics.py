"""What the queues of one session have served: numbers that workers write and supervisors read.

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
    18976   u64   bytes of answers to READ that were in the database
    18984   u64   bytes of answers to READ that were read from files of blobs
    18992   u64   requests that the last look at the ring has found, or 0: a depth, and no counter
    19000   u64   requests that wait for the supervisor now: the same

Errors are rare, and in a table of their own: `ERROR_ROWS` rows of two u64, opcode << 32 | errno and
how often that was answered. The last row counts what finds no row. Memory that an earlier release
made has no such table, and zeros in the last four words.
"""

import contextlib
import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.fuse_proto.operations import Body, FileSlice

OPCODES: Final = 64
BUCKETS: Final = 36
_LATENCY_AT: Final = OPCODES  # in words
_EVENTS_AT: Final = _LATENCY_AT + OPCODES * BUCKETS
_EVENTS: Final = (
    *("plain", "waits", "polls_paid", "polls_vain"),
    *("read_inline_bytes", "read_file_bytes", "taken", "parked"),
)
_READ_INLINE, _READ_FILE, _TAKEN, _PARKED = (
    _EVENTS_AT + _EVENTS.index(name)
    for name in ("read_inline_bytes", "read_file_bytes", "taken", "parked")
)
_WORDS: Final = _EVENTS_AT + len(_EVENTS)
STATISTICS_BYTES: Final = 8 * _WORDS
ERROR_ROWS: Final = 64
ERRORS_BYTES: Final = 16 * ERROR_ROWS
_ERRNO_BITS: Final = 32
# The key of the last row, once it counts more than one thing.
_ANY_ERROR: Final = (1 << 32) - 1
_NO_ERRORS: Final = memoryview(b"")
_UNKNOWN: Final = "UNKNOWN"


class QueueStatistics:
    """The block of one queue.

    Args:
        memory: `STATISTICS_BYTES` bytes, writable for whoever adds to them.
        errors: `ERRORS_BYTES` bytes, or none where there is no table of errors.
    """

    def __init__(self, memory: memoryview, errors: memoryview = _NO_ERRORS) -> None:
        self.memory = memory
        """The whole block, as bytes."""
        self._words = words = memory.cast("Q")
        self.requests: memoryview = words[:OPCODES]
        """The number of requests that were answered, by opcode."""
        self._latency = words[_LATENCY_AT:_EVENTS_AT]
        self._errors = errors.cast("Q") if errors else errors

    def begin(self) -> None:
        """Note that a worker begins: whatever the one before it had at hand is gone."""
        self._words[_TAKEN] = self._words[_PARKED] = 0

    def set_taken(self, number: int) -> None:
        """Note how many requests a look at the ring has found."""
        self._words[_TAKEN] = number

    def set_parked(self, number: int) -> None:
        """Note how many requests wait for the supervisor."""
        self._words[_PARKED] = number

    def note(self, opcode: int, error: int, body: Body) -> None:
        """Note an answer that is an error (a positive errno), or the content for a READ."""
        if error:
            self._add_error(opcode << _ERRNO_BITS | error)
        elif type(body) is FileSlice:
            self._words[_READ_FILE] += body.size
        else:
            self._words[_READ_INLINE] += len(body)

    def add_latency(self, opcode: int, ns: int) -> None:
        """Note how long it took to answer a request, which is counted in `requests` elsewhere."""
        row = opcode if opcode < OPCODES else 0
        self._latency[row * BUCKETS + bucket_of(ns)] += 1

    def _add_error(self, key: int) -> None:
        rows = self._errors
        for at in range(0, len(rows), 2):
            if rows[at] not in {0, key} and at + 2 < len(rows):
                continue
            rows[at] = key if rows[at] in {0, key} else _ANY_ERROR
            rows[at + 1] += 1
            return


class SessionStatistics:
    """The sums over the blocks of all queues of a session.

    Args:
        memory: the blocks, one after the other.
        errors: the tables of errors, one after the other.
    """

    def __init__(self, memory: memoryview, errors: memoryview = _NO_ERRORS) -> None:
        words = memory.cast("Q")
        blocks = [words[at : at + _WORDS] for at in range(0, len(words), _WORDS)]
        self.requests = _sums(blocks, 0, OPCODES)
        """The number of requests that were answered, by opcode."""
        self._events = _sums(blocks, _EVENTS_AT, _WORDS)
        # Most opcodes are never seen, and a supervisor has many sessions to read.
        starts = ((opcode, _LATENCY_AT + opcode * BUCKETS) for opcode in range(OPCODES))
        self._latency = {
            opcode: _sums(blocks, start, start + BUCKETS)
            for opcode, start in starts
            if self.requests[opcode]
        }
        self._errors: Counter[int] = Counter()
        rows = errors.cast("Q").tolist() if errors else []
        for key, number in zip(rows[::2], rows[1::2], strict=True):
            if number:
                self._errors[key] += number

    def events(self) -> dict[str, int]:
        """Return the numbers that are not by opcode, by name."""
        return dict(zip(_EVENTS, self._events, strict=True))

    def latency_us(self, opcode: int, fraction: float) -> float:
        """Return a bound, a power of two of ns, that this fraction of the requests stayed below.

        Returns:
            Microseconds; 0 if there were no requests.
        """
        return quantile_ns(self._buckets(opcode), fraction) / 1000

    def errors(self) -> dict[str, dict[str, int]]:
        """Return how often each error was answered, by the names of opcode and error."""
        named: dict[str, dict[str, int]] = {}
        for key, number in sorted(self._errors.items()):
            opcode, error = key >> _ERRNO_BITS, key & ((1 << _ERRNO_BITS) - 1)
            of_opcode = named.setdefault(_opcode_name(opcode), {})
            name = errno.errorcode.get(error, "other")
            of_opcode[name] = of_opcode.get(name, 0) + number
        return named

    def report(self) -> dict[str, Any]:
        """Return what `appliance status` shows: opcodes by name, without those never seen.

        `histograms` has the buckets behind `latency_us`, for metrics.
        """
        seen = dict(self._seen())
        return {
            "requests": {name: self.requests[number] for name, number in seen.items()},
            "latency_us": {
                name: {"p50": self.latency_us(number, 0.5), "p99": self.latency_us(number, 0.99)}
                for name, number in seen.items()
            },
            "histograms": {name: self._buckets(number) for name, number in seen.items()},
            "errors": self.errors(),
            **self.events(),
        }

    def _seen(self) -> Iterator[tuple[str, int]]:
        for number, count in enumerate(self.requests):
            if count and number:
                yield _opcode_name(number), number
        if self.requests[0]:
            yield _UNKNOWN, 0

    def _buckets(self, opcode: int) -> list[int]:
        return self._latency.get(opcode, [0] * BUCKETS)


def _sums(blocks: Sequence[memoryview], start: int, end: int) -> list[int]:
    return list(map(sum, zip(*(block[start:end].tolist() for block in blocks), strict=True)))


def bucket_of(ns: int) -> int:
    """Return the index of the bucket of a duration in nanoseconds."""
    return min(max(ns, 1).bit_length() - 1, BUCKETS - 1)


def quantile_ns(buckets: Sequence[int], fraction: float) -> int:
    """Return a bound, a power of two, that this fraction stayed below; 0 if nothing is counted."""
    wanted = fraction * sum(buckets)
    below = 0
    for index, count in enumerate(buckets):
        below += count
        if below and below >= wanted:
            return 2 << index
    return 0


def _opcode_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        if number:
            return Opcode(number).name
    return _UNKNOWN
