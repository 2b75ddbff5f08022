"""The phases of a measurement on a mounted directory: system calls, from one thread or several.

What the kernel has in its caches is answered from there, so these figures say what programs see.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final, TypeVar

from appliance.bench.generator import CallKind, CallSet, Figures, PreparedCall
from appliance.bench.phases import (
    NUM_PREPARED,
    READ_SIZES,
    Load,
    NotMeasurableError,
    PhaseResult,
    absent_name,
    chooser,
    directories_of,
    files_of,
    random_offset,
    sample,
    symlinks_of,
)
from appliance.bench.tree_walk import Entry, MountedTree
from appliance.errors import BenchError

_NUM_OPEN: Final = 256
_T = TypeVar("_T")


class MountedPhases:
    """Phases on a mounted directory, with calls on entries that a walk has found."""

    def __init__(self, tree: MountedTree, entries: Sequence[Entry], load: Load) -> None:
        self._tree = tree
        self._entries = entries
        self._load = load
        self._random = chooser()

    def run(self, op: str) -> PhaseResult:
        """Run one phase; `depth` is the number of threads, each with one call under way.

        Raises:
            BenchError: a call failed, or did not return.
        """
        try:
            with ExitStack() as opened:
                return self._measure(op, self._calls(op, opened))
        except NotMeasurableError as exc:
            return PhaseResult(op, self._load.depth, reason=str(exc))
        except OSError as exc:
            raise BenchError(f"{op}: {exc.filename}: {exc.strerror}") from exc

    def _measure(self, op: str, calls: CallSet) -> PhaseResult:
        step = max(1, len(calls.calls) // self._load.depth)

        def run(number: int, figures: Figures, seconds: float) -> None:
            calls.run(figures, seconds=seconds, first=number * step)

        runs = [partial(run, number) for number in range(self._load.depth)]
        return self._load.measure(op, runs)

    def _calls(self, op: str, opened: ExitStack) -> CallSet:
        if op in READ_SIZES:
            return CallSet(CallKind.READ, self._reads(READ_SIZES[op], opened))
        if op == "readdirplus":
            # A descriptor has one position, so each thread must find one that is not in use.
            count = max(_NUM_OPEN, 2 * self._load.depth)
            directories = sample(self._random, directories_of(self._entries), count)
            return CallSet(CallKind.LIST, [self._opened(each, opened) for each in directories])
        if op == "getattr":
            named = sample(self._random, self._entries, _NUM_OPEN)
            return CallSet(CallKind.FSTAT, [self._opened(each, opened) for each in named])
        if op == "readlink":
            links = sample(self._random, symlinks_of(self._entries), NUM_PREPARED)
            return CallSet(CallKind.READLINK, [self._named(each) for each in links])
        if op == "miss":
            directories = sample(self._random, directories_of(self._entries), NUM_PREPARED)
            return CallSet(
                CallKind.ABSENT,
                [
                    PreparedCall(os.fsencode(self._tree.place(each)) + b"/" + absent_name(number))
                    for number, each in enumerate(directories)
                ],
            )
        chosen = sample(self._random, self._entries, NUM_PREPARED)
        return CallSet(CallKind.STAT, [self._named(each) for each in chosen])

    def _reads(self, size: int, opened: ExitStack) -> list[PreparedCall]:
        files = sample(self._random, files_of(self._entries, size), _NUM_OPEN)
        calls = [(self._opened(each, opened), each.size) for each in files]
        return [
            call._replace(offset=random_offset(self._random, file_size, size), size=size)
            for call, file_size in sample(self._random, calls, NUM_PREPARED)
        ]

    def _named(self, entry: Entry) -> PreparedCall:
        return PreparedCall(os.fsencode(self._tree.place(entry)))

    def _opened(self, entry: Entry, opened: ExitStack) -> PreparedCall:
        path = self._tree.place(entry)
        flags = os.O_PATH | os.O_NOFOLLOW if entry.is_symlink else os.O_RDONLY
        fd = os.open(path, flags | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        return PreparedCall(os.fsencode(path), fd=fd)


def within(timeout_s: float, what: str, work: Callable[[], _T]) -> _T:
    """Return the result of `work`; raises BenchError if it has not come after some seconds.

    A system call on a mount whose server hangs cannot be ended: its thread is left behind.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as exc:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise BenchError(f"{what}: not done in {timeout_s:g} s")
    return results[0]


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Raise a BenchError for each OSError inside the block."""
    try:
        yield
    except OSError as exc:
        raise BenchError(f"{what}: {exc.filename or ''}: {exc.strerror}") from exc
