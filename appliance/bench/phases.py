"""The phases of a measurement on a back-end: prepared requests, run for some seconds each."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from appliance.bench import fuse_requests
from appliance.bench.back_end_cpu import BackEndCpu
from appliance.bench.generator import (
    ROOM_MAX,
    Expected,
    Figures,
    PreparedRequest,
    RequestSet,
    quantile_s,
)
from appliance.bench.tree_walk import Entry, GuestTree
from appliance.errors import BenchError
from appliance.fuse_proto._fuse_wire import ATTR_OUT_SIZE, ENTRY_OUT_SIZE

KIB: Final = 1 << 10
READ_SIZES: Final = {"read4k": 4 * KIB, "read128k": 128 * KIB, "read1m": ROOM_MAX}
OPS: Final = ("lookup", "miss", "getattr", "readlink", "readdirplus", *READ_SIZES)
NUM_PREPARED: Final = 4096
"""The requests of a phase, which are sent over and over."""
_NUM_OPEN: Final = 256
_LISTING_ROOM: Final = 4 * KIB  # a page, as Linux asks for
_WARM_UP_S: Final = 0.3
_SEED: Final = 0
_T = TypeVar("_T")


class NotMeasurableError(BenchError):
    """The tree or the back-end has nothing for this phase; the text says what is missing."""


@dataclass(frozen=True)
class PhaseResult:
    """What one phase has measured, or why it was left out."""

    op: str
    depth: int
    figures: Sequence[Figures] = ()
    cpu_s: float | None = None
    reason: str = ""

    @property
    def completed(self) -> int:
        """The number of replies."""
        return sum(each.completed for each in self.figures)

    @property
    def per_s(self) -> float:
        """Replies per second, of all queues together."""
        elapsed_s = max((each.elapsed_s for each in self.figures), default=0.0)
        return self.completed / elapsed_s if elapsed_s else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes of replies' bodies per second."""
        return sum(each.body_bytes for each in self.figures) / max(self.completed, 1) * self.per_s

    @property
    def cpu_each_s(self) -> float | None:
        """CPU time of the back-end for each request."""
        if self.cpu_s is None or not self.completed:
            return None
        return self.cpu_s / self.completed

    @property
    def odd_lengths(self) -> int:
        """Replies that the used ring states another length for."""
        return sum(each.odd_lengths for each in self.figures)

    def quantile_s(self, fraction: float) -> float:
        """Return the latency that this fraction of the replies did not exceed."""
        return quantile_s(self.figures, fraction)


@dataclass
class Load:
    """How hard a phase works: `depth` requests in flight in each of several queues."""

    depth: int
    seconds: float
    stall_s: float
    cpu: BackEndCpu = field(default_factory=lambda: BackEndCpu(None))

    def measure(self, op: str, runs: Sequence[Callable[[Figures, float], None]]) -> PhaseResult:
        """Call each of `runs`, with figures and seconds, in a thread of its own, and warm up first.

        Raises:
            BenchError: from the first run that failed, or because one never ended.
        """
        self._run_all(runs, [Figures() for _ in runs], min(_WARM_UP_S, self.seconds / 4))
        figures = [Figures() for _ in runs]
        before = self.cpu.snapshot()
        self._run_all(runs, figures, self.seconds)
        return PhaseResult(op, self.depth, figures, self.cpu.spent_s(before))

    def _run_all(
        self,
        runs: Sequence[Callable[[Figures, float], None]],
        figures: Sequence[Figures],
        seconds: float,
    ) -> None:
        errors: list[BenchError] = []

        def run(one: Callable[[Figures, float], None], into: Figures) -> None:
            try:
                one(into, seconds)
            except BenchError as exc:
                errors.append(exc)

        # Daemons, since a system call on a dead mount does not return.
        threads = [
            threading.Thread(target=run, args=pair, daemon=True)
            for pair in zip(runs, figures, strict=True)
        ]
        for thread in threads:
            thread.start()
        deadline_s = time.monotonic() + seconds + self.stall_s + 1
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive() and not errors:
                raise BenchError(f"the requests do not end: no answer in {self.stall_s:g} s")
        if errors:
            raise errors[0]


class GuestPhases:
    """Phases on a back-end, with requests for entries that a walk has found."""

    def __init__(self, tree: GuestTree, entries: Sequence[Entry], load: Load) -> None:
        self._tree = tree
        self._entries = entries
        self._load = load
        self._random = chooser()

    def run(self, op: str) -> PhaseResult:
        """Run one phase.

        Raises:
            BenchError: a reply is wrong or does not come, or the back-end is gone.
        """
        try:
            with self._prepared(op) as requests:
                return self._measure(op, RequestSet(requests))
        except NotMeasurableError as exc:
            return PhaseResult(op, self._load.depth, reason=str(exc))

    def _measure(self, op: str, requests: RequestSet) -> PhaseResult:
        load = self._load
        rings = self._tree.guest.rings
        # Queues start at different requests.
        step = max(1, len(requests.requests) // len(rings))

        def run(number: int, figures: Figures, seconds: float) -> None:
            rings[number].run(
                requests,
                figures,
                depth=load.depth,
                seconds=seconds,
                stall_s=load.stall_s,
                first=number * step,
            )

        return load.measure(op, [partial(run, number) for number in range(len(rings))])

    @contextmanager
    def _prepared(self, op: str) -> Iterator[list[PreparedRequest]]:
        if op in READ_SIZES:
            with self._opened(self._files(READ_SIZES[op]), _NUM_OPEN) as opened:
                yield self._reads(opened, READ_SIZES[op])
        elif op == "readdirplus":
            # A handle for each request in flight, since Linux lists through one at a time.
            num_in_flight = 2 * self._load.depth * len(self._tree.guest.rings)
            with self._opened(self._directories(), max(_NUM_OPEN, num_in_flight)) as opened:
                yield self._listings(opened)
        else:
            makers = {
                "lookup": self._lookups,
                "miss": self._misses,
                "getattr": self._getattrs,
                "readlink": self._readlinks,
            }
            yield makers[op]()

    @contextmanager
    def _opened(self, entries: Sequence[Entry], count: int) -> Iterator[list[tuple[Entry, int]]]:
        chosen = sample(self._random, entries, count)
        opened = [(entry, self._tree.open(entry)) for entry in chosen]
        yield [(entry, fh or 0) for entry, fh in opened]
        for entry, fh in opened:
            self._tree.release(entry, fh)

    def _files(self, size: int) -> list[Entry]:
        if size > self._tree.guest.max_read:
            raise NotMeasurableError(f"one READ has at most {self._tree.guest.max_read} bytes")
        return files_of(self._entries, size)

    def _directories(self) -> list[Entry]:
        if not self._tree.guest.has_readdirplus:
            raise NotMeasurableError("the back-end did not agree to READDIRPLUS")
        return directories_of(self._entries)

    def _lookups(self) -> list[PreparedRequest]:
        named = [entry for entry in self._entries if entry.parent and entry.path]
        if not named:
            raise NotMeasurableError("nothing is in the tree, or its root cannot be listed")
        return [
            PreparedRequest(
                fuse_requests.lookup(entry.parent, entry.name),
                ENTRY_OUT_SIZE,
                ENTRY_OUT_SIZE,
                ENTRY_OUT_SIZE,
                Expected.FOUND,
            )
            for entry in sample(self._random, named, NUM_PREPARED)
        ]

    def _misses(self) -> list[PreparedRequest]:
        directories = sample(self._random, directories_of(self._entries), NUM_PREPARED)
        return [
            PreparedRequest(
                fuse_requests.lookup(directory.nodeid, absent_name(number)),
                ENTRY_OUT_SIZE,
                ENTRY_OUT_SIZE,
                ENTRY_OUT_SIZE,
                Expected.ABSENT,
            )
            for number, directory in enumerate(directories)
        ]

    def _getattrs(self) -> list[PreparedRequest]:
        return [
            PreparedRequest(
                fuse_requests.getattr_(entry.nodeid),
                ATTR_OUT_SIZE,
                ATTR_OUT_SIZE,
                ATTR_OUT_SIZE,
                Expected.DATA,
            )
            for entry in sample(self._random, self._entries, NUM_PREPARED)
        ]

    def _readlinks(self) -> list[PreparedRequest]:
        return [
            PreparedRequest(
                fuse_requests.readlink(entry.nodeid),
                4 * KIB,
                1,
                4 * KIB,
                Expected.DATA,
            )
            for entry in sample(self._random, symlinks_of(self._entries), NUM_PREPARED)
        ]

    def _listings(self, opened: Sequence[tuple[Entry, int]]) -> list[PreparedRequest]:
        return [
            PreparedRequest(
                fuse_requests.readdirplus(directory.nodeid, 0, _LISTING_ROOM, fh=fh),
                _LISTING_ROOM,
                0,
                _LISTING_ROOM,
                Expected.DATA,
            )
            for directory, fh in opened
        ]

    def _reads(self, opened: Sequence[tuple[Entry, int]], size: int) -> list[PreparedRequest]:
        return [
            PreparedRequest(
                fuse_requests.read(entry.nodeid, offset, size, fh=fh),
                size,
                size,
                size,
                Expected.DATA,
            )
            for entry, fh in sample(self._random, opened, NUM_PREPARED)
            for offset in [random_offset(self._random, entry.size, size)]
        ]


# --- What phases on a back-end and on a mount have in common ---


def chooser() -> random.Random:
    """Return a source of choices that are the same in every run."""
    return random.Random(_SEED)  # noqa: S311 - nothing here is secret


def sample(source: random.Random, items: Sequence[_T], count: int) -> list[_T]:
    """Return `count` of `items` in random order; each is repeated if there are fewer."""
    repeated = [*items] * -(-count // len(items))
    return source.sample(repeated, count)


def random_offset(source: random.Random, file_size: int, size: int) -> int:
    """Return a multiple of `size` from which on a file of `file_size` has `size` bytes."""
    return source.randrange(file_size // size) * size


def absent_name(number: int) -> bytes:
    """Return a name that no directory is likely to have."""
    return b"no-such-entry-%d" % number


def files_of(entries: Sequence[Entry], size: int) -> list[Entry]:
    """Return the files of at least `size` bytes; raises NotMeasurableError if there are none."""
    files = [entry for entry in entries if entry.is_file and entry.size >= size]
    return _some(files, f"the tree has no file of {size} bytes")


def directories_of(entries: Sequence[Entry]) -> list[Entry]:
    """Return the directories; raises NotMeasurableError if there are none."""
    return _some([entry for entry in entries if entry.is_directory], "the tree is no directory")


def symlinks_of(entries: Sequence[Entry]) -> list[Entry]:
    """Return the symlinks; raises NotMeasurableError if there are none."""
    return _some([entry for entry in entries if entry.is_symlink], "the tree has no symlink")


def _some(entries: list[Entry], reason: str) -> list[Entry]:
    if not entries:
        raise NotMeasurableError(reason)
    return entries
