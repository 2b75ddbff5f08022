"""What runs cost: figures with their spread, CPU time and memory of other processes."""

import ctypes
import hashlib
import os
import re
import resource
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from blake3 import blake3

MIB: Final = 1 << 20
_PIECE_SIZE: Final = 1 << 20
_HIGH_WATER_MARK: Final = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_PSS: Final = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)
_MAPPING: Final = re.compile(r"^[0-9a-f]+-[0-9a-f]+ [r-][w-][x-]([ps]) ")
_PRIVATE_DIRTY: Final = re.compile(r"^Private_Dirty:\s+(\d+) kB")


class Spread(NamedTuple):
    """A figure measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """Return "MEDIAN [LOW .. HIGH]"."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f} .. {self.high:.{digits}f}]"


class Size(NamedTuple):
    """What a tree holds; symlinks and directories have no bytes."""

    files: int
    directories: int
    size_bytes: int

    def rates(self, seconds: float) -> str:
        """Return "N files/s, N MB/s" of what took `seconds`."""
        return f"{self.files / seconds:,.0f} files/s, {self.size_bytes / 1e6 / seconds:,.0f} MB/s"


class Cost(NamedTuple):
    """What something took; `cpu_s` is user and system time, of children too."""

    seconds: float
    cpu_s: float


def regular_files(tree: Path) -> list[str]:
    """Return the paths of all regular files below `tree`; symlinks are not followed."""
    return [
        path
        for directory, _names, names in os.walk(tree)
        for path in (os.path.join(directory, name) for name in names)  # noqa: PTH118 -- many
        if not os.path.islink(path)  # noqa: PTH114 -- many
    ]


def size_of(tree: Path) -> Size:
    """Return what `tree` holds."""
    files = regular_files(tree)
    directories = sum(1 for _ in os.walk(tree))
    return Size(len(files), directories, sum(os.lstat(path).st_size for path in files))


def run_measured(command: Sequence[str]) -> Cost:
    """Run a command that must succeed; only its own output of an error is kept.

    Raises:
        CalledProcessError: with that output as `stderr`.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def write_and_sync(path: Path, size: int) -> float:
    """Return the seconds that it takes to write `size` bytes to a new file and sync it."""
    piece = os.urandom(_PIECE_SIZE)
    started = time.perf_counter()
    with path.open("xb", buffering=0) as file:
        for start in range(0, size, _PIECE_SIZE):
            file.write(piece[: size - start])
        os.fsync(file.fileno())
    return time.perf_counter() - started


def bare_loop(tree: Path) -> Cost:
    """Read and hash all files of `tree` with one thread.

    Nothing but that is on the clock: neither the walk nor the interpreter's start.
    """
    files = regular_files(tree)
    started, started_cpu = time.monotonic(), time.process_time()
    buffer = memoryview(bytearray(_PIECE_SIZE))
    nar = hashlib.sha256()
    for path in files:
        blob = blake3()
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 -- the least Python there is
            while num_read := file.readinto(buffer):
                blob.update(buffer[:num_read])
                nar.update(buffer[:num_read])
        blob.digest()
    nar.digest()
    return Cost(time.monotonic() - started, time.process_time() - started_cpu)


def descendants(pid: int) -> list[int]:
    """Return `pid` and all processes below it, in the order of their start at each level."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, _read(children).split())
    return found


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process: user and system, all threads, without its children.

    It is what /proc/PID/stat has as utime + stime, there in steps of 10 ms, here of 1 ns.
    """
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, f"clock_getcpuclockid of process {pid}")
    return time.clock_gettime(clock.value)


def peak_bytes(pid: int) -> int:
    """Return the most a process has had in memory, its share of shared pages in full; 0 if gone."""
    return _kib(_HIGH_WATER_MARK, _read(Path(f"/proc/{pid}/status")))


def proportional_bytes(pid: int) -> int:
    """Return the memory of a process, each page divided by the number of its users; 0 if gone."""
    return _kib(_PSS, _read(Path(f"/proc/{pid}/smaps_rollup")))


def own_bytes(pid: int) -> int:
    """Return the memory of a process that is there for it alone; 0 if it has gone.

    That is every written page of a private mapping that no other process maps: what a fork has
    copied or allocated since. Guest memory, memfds and LMDB files are shared mappings and left
    out even where this process happens to be the only one that has touched a page.
    """
    total = 0
    is_private = False
    for line in _read(Path(f"/proc/{pid}/smaps")).splitlines():
        if mapping := _MAPPING.match(line):
            is_private = mapping[1] == "p"
        elif is_private and (dirty := _PRIVATE_DIRTY.match(line)):
            total += int(dirty[1]) * 1024
    return total


class OtherLoad:
    """How busy others have kept this machine during a `with` block, as noise in its figures."""

    def __init__(self) -> None:
        self.share = 0.0
        self._started = self._now()

    def __enter__(self) -> Self:
        self._started = self._now()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        used, total = (now - then for now, then in zip(self._now(), self._started, strict=True))
        self.share = max(0.0, used / total) if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float]:
        # proc(5), /proc/stat: user nice system idle iowait irq softirq steal, in ticks
        ticks = [int(field) for field in _read(Path("/proc/stat")).split("\n", 1)[0].split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        own = os.times()
        own_s = own.user + own.system + own.children_user + own.children_system
        return (sum(ticks) - idle) / second - own_s, sum(ticks) / second


class PeakSampler:
    """Looks at processes now and then in a `with` block and keeps the highest figures.

    Args:
        pids: called for each look.
        figures: by name, what to read of each process.
        interval_s: between two looks.
    """

    def __init__(
        self,
        pids: Callable[[], Iterable[int]],
        figures: Mapping[str, Callable[[int], int]],
        interval_s: float,
    ) -> None:
        self.peaks: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.peak_sums: dict[str, int] = defaultdict(int)
        self._pids = pids
        self._figures = figures
        self._interval_s = interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._interval_s):
            pids = list(self._pids())
            for name, read in self._figures.items():
                values = {pid: read(pid) for pid in pids}
                for pid, value in values.items():
                    self.peaks[name][pid] = max(self.peaks[name][pid], value)
                self.peak_sums[name] = max(self.peak_sums[name], sum(values.values()))


def _kib(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(found[1]) * 1024 if found else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
