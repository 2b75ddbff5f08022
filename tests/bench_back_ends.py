"""Our back-end beside others: PYTHONPATH=vm-tests python -m tests.bench_back_ends [--seconds S]

One fake guest on each back-end, all with the same tree and at the same time. In each round an op is
measured on one after the other, in short slices whose order changes. What is printed are medians of
all rounds: requests per second, CPU time for each request, and the ratios to a peer within a round.
The machine is rarely quiet, so only ratios say something, and those of CPU time the most. The rows
of the README are recorded. Status 1 names the targets that are not reached.
"""

import argparse
import contextlib
import random
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from appliance.bench import fuse_requests
from appliance.bench.back_end_cpu import BackEndCpu
from appliance.bench.bench_guest import BenchGuest
from appliance.bench.phases import GuestPhases, Load, PhaseResult
from appliance.bench.tree_walk import Entry, GuestTree
from appliance.bench.verify_tree import verify_tree
from appliance.fuse_proto._fuse_wire import FlushIn, Opcode, pack_flush_in
from tests.fakes.appliance_process import ApplianceProcess, import_tree
from tests.fakes.running_command import DEADLINE_S
from tests.fakes.virtiofsds import UnavailableError, c_command, running, rust_command
from tools import bench_table

ROUNDS: Final = 5
NUM_SLICES: Final = 5
DEPTHS: Final = (16, 1)
OURS: Final = "ours"
RUST: Final = "Rust virtiofsd"
C: Final = "C virtiofsd"
# Requests per second of ours by those of the Rust virtiofsd, at depth 16 and at depth 1.
TARGETS: Final = {
    "lookup": (1.3, 0.97),
    "miss": (1.5, 0.97),
    "getattr": (0.9, 0.97),
    "readdirplus": (0.9, 0.97),
    "read4k": (0.95, 0.97),
    "read128k": (1.2, 0.97),
    "read1m": (1.2, 0.97),
}
# Microseconds of CPU for a lookup of ours at depth 16.
LOOKUP_CPU_US: Final = 2.5
# Small files read for the first time: ours by the Rust virtiofsd's, and messages for each of ours.
SMALL_TARGET: Final = 2.2
SMALL_MESSAGES: Final = 2.05
SMALL_BYTES: Final = 4096
NUM_SMALL: Final = 200
LARGE_BYTES: Final = 64 << 20
NUM_MEDIUM: Final = 32
MEDIUM_BYTES: Final = 2 << 20
_SHORT_GAP: Final = " " * len(" short")


class BackEnd(NamedTuple):
    """A back-end with a guest that has walked its tree, and what measures it at each depth."""

    name: str
    phases: dict[int, GuestPhases]
    tree: GuestTree
    small_files: list[Entry]


def make_tree(top: Path) -> Path:
    """Make the standard library, and files that are large enough for every op."""
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages")
    shutil.copytree(sysconfig.get_path("stdlib"), top, symlinks=True, ignore=ignored)
    chance = random.Random(1)
    (top / "large").write_bytes(chance.randbytes(LARGE_BYTES))
    for number in range(NUM_MEDIUM):
        (top / f"medium-{number}").write_bytes(chance.randbytes(MEDIUM_BYTES))
    return top


@contextlib.contextmanager
def guest(
    name: str, socket_path: Path, start: str, pid: int, tree: Path, seconds: float
) -> Iterator[BackEnd]:
    """Mount a back-end, and see that it serves `tree`."""
    with BenchGuest(socket_path, num_queues=1, depth=max(DEPTHS), timeout_s=DEADLINE_S) as mounted:
        walked = GuestTree(mounted, start)
        entries = list(walked.walk())
        verify_tree(walked, entries, tree)
        yield BackEnd(
            name,
            {
                depth: GuestPhases(
                    walked, entries, Load(depth, seconds / NUM_SLICES, DEADLINE_S, BackEndCpu(pid))
                )
                for depth in DEPTHS
            },
            walked,
            [entry for entry in entries if entry.is_file and 0 < entry.size <= SMALL_BYTES],
        )


@contextlib.contextmanager
def back_ends(tree: Path, directory: Path, seconds: float) -> Iterator[list[BackEnd]]:
    """Serve `tree` with each back-end that can be had; print why one cannot."""
    with contextlib.ExitStack() as stack:
        (start,) = import_tree(directory / "store", tree)
        state = f"--state-dir={directory}/state"
        ours = stack.enter_context(ApplianceProcess(directory / "store", directory, state))
        served = [(OURS, ours.sockets[0], start, ours.process.pid)]
        for name, command in ((RUST, rust_command), (C, c_command)):
            socket_path = directory / f"{name.split()[0]}.sock"
            try:
                process = stack.enter_context(running(command(socket_path, tree), socket_path))
            except UnavailableError as exc:
                print(f"Not compared with {name}: {exc}")
                continue
            served.append((name, socket_path, "", process.pid))
        yield [stack.enter_context(guest(*each, tree, seconds)) for each in served]


class Measured(NamedTuple):
    """What one round has measured of one back-end."""

    per_s: float
    cpu_us: float

    @classmethod
    def of(cls, slices: Sequence[PhaseResult]) -> Self:
        completed = sum(each.completed for each in slices)
        seconds = sum(each.completed / each.per_s for each in slices)
        cpu_s = sum(each.cpu_s or 0 for each in slices)
        return cls(completed / seconds, cpu_s / completed * 1e6)


Results = dict[tuple[int, str, str], list[Measured]]


def measure(many: list[BackEnd], rounds: int) -> Results:
    """Return what all rounds have measured, by depth, op and back-end."""
    results: Results = {}
    for number in range(rounds):
        for depth in DEPTHS:
            for op in TARGETS:
                for name, measured in measure_op(many, depth, op, number).items():
                    results.setdefault((depth, op, name), []).append(measured)
    return results


def measure_op(many: list[BackEnd], depth: int, op: str, turn: int) -> dict[str, Measured]:
    """Measure the back-ends in slices of a second, so that all have what else the machine does."""
    slices: dict[str, list[PhaseResult]] = {each.name: [] for each in many}
    for number in range(NUM_SLICES):
        first = (turn + number) % len(many)
        for back_end in many[first:] + many[:first]:
            result = back_end.phases[depth].run(op)
            assert not result.reason, f"{back_end.name}, {op}: {result.reason}"
            slices[back_end.name].append(result)
    return {name: Measured.of(each) for name, each in slices.items()}


class SmallFiles:
    """Opens, reads and closes files of one back-end as Linux does with those it has not seen."""

    def __init__(self, back_end: BackEnd) -> None:
        self._back_end = back_end
        self._opens = True
        self.rounds: list[tuple[float, float]] = []
        """Files per second, and messages for each file."""

    def measure(self, turn: int) -> None:
        chosen = random.Random(turn).sample(self._back_end.small_files, NUM_SMALL)
        began_s = time.perf_counter()
        num_messages = sum(map(self._read, chosen))
        took_s = time.perf_counter() - began_s
        self.rounds.append((NUM_SMALL / took_s, num_messages / NUM_SMALL))

    def _read(self, entry: Entry) -> int:
        """Read one file; return the number of messages."""
        tree = self._back_end.tree
        ask = tree.guest.ask
        parent = Entry(b"", 0, 0, entry.parent)
        assert tree._look_up(parent, entry.name).nodeid == entry.nodeid
        fh = tree.open(entry) if self._opens else None
        request = fuse_requests.read(entry.nodeid, 0, SMALL_BYTES, fh=fh or 0)
        assert len(ask(request, room=SMALL_BYTES).body) == entry.size
        if fh is None:
            num_opens = int(self._opens)
            self._opens = False  # the back-end has answered that it needs no OPEN
            return 2 + num_opens
        flush = fuse_requests.request(Opcode.FLUSH, entry.nodeid, pack_flush_in(FlushIn(fh, 0)))
        assert ask(flush).error == 0
        tree.release(entry, fh)
        return 5


def measure_small_files(many: list[BackEnd], rounds: int) -> dict[str, SmallFiles]:
    """Return how fast small files are read for the first time, by back-end."""
    readers = {each.name: SmallFiles(each) for each in many}
    for turn in range(1 + rounds):
        for each in many[turn % len(many) :] + many[: turn % len(many)]:
            readers[each.name].measure(turn)
    return readers


def report_small_files(readers: dict[str, SmallFiles]) -> Iterator[str]:
    """Print what was measured, and yield each target that is not reached."""
    print("\nSmall files, one message at a time: files/s, messages each; ours by a peer's")
    ours = readers[OURS].rounds[1:]
    for name, reader in readers.items():
        per_s, messages = map(statistics.median, zip(*reader.rounds[1:], strict=True))
        pairs = zip(ours, reader.rounds[1:], strict=True)
        ratio = statistics.median(mine[0] / theirs[0] for mine, theirs in pairs)
        print(f"{name:16} {per_s:>8,.0f} {messages:>6.2f} {ratio:>6.2f}")
        if name == OURS and messages > SMALL_MESSAGES:
            yield f"short: small files: {messages:.2f} messages, target {SMALL_MESSAGES:g}"
        if name == RUST and ratio < SMALL_TARGET:
            yield f"short: small files: {ratio:.2f}, target {SMALL_TARGET:g}"


def rows(results: Results, small: dict[str, SmallFiles]) -> bench_table.Rows:
    """Return the rows of the README; for the Rust virtiofsd, which must have been measured."""

    def pairs(depth: int, op: str) -> list[tuple[Measured, Measured]]:
        return list(zip(results[depth, op, OURS], results[depth, op, RUST], strict=True))

    def rate_ratio(depth: int, op: str) -> float:
        return statistics.median(ours.per_s / rust.per_s for ours, rust in pairs(depth, op))

    def cpu_ratio(depth: int, op: str) -> float:
        return statistics.median(ours.cpu_us / rust.cpu_us for ours, rust in pairs(depth, op))

    many, one = DEPTHS
    per_s = [statistics.median(each.per_s for each in results[many, op, OURS]) for op in TARGETS]
    both = zip(small[OURS].rounds[1:], small[RUST].rounds[1:], strict=True)
    small_ratio = statistics.median(ours[0] / rust[0] for ours, rust in both)
    messages = statistics.median(each[1] for each in small[OURS].rounds[1:])
    return {
        bench_table.RATE: tuple(f"{float(f'{each:.3g}'):,.0f}" for each in per_s),
        bench_table.RATE_RATIO: tuple(f"{rate_ratio(many, op):.2f}" for op in TARGETS),
        bench_table.CPU_RATIO: tuple(f"{cpu_ratio(many, op):.2f}" for op in TARGETS),
        bench_table.ALONE_RATIO: tuple(f"{rate_ratio(one, op):.1f}" for op in TARGETS),
        bench_table.SMALL_FILES: (
            f"{small_ratio:.1f} times its files a second; {messages:.2f} messages each, where it "
            "needs 5",
        ),
    }


def report(names: list[str], results: Results) -> Iterator[str]:
    """Print the medians, and yield each target that is not reached."""
    peers = names[1:]
    for at, depth in enumerate(DEPTHS):
        print(f"\nDepth {depth}: requests/s (CPU us each); ours by a peer's, and the same of CPU")
        print(f"{'op':12}" + "".join(f"{name:>22}" for name in names), end="")
        print("".join(f"{'/ ' + peer:>30}{_SHORT_GAP if peer == RUST else ''}" for peer in peers))
        for op, targets in TARGETS.items():
            line = f"{op:12}"
            for name in names:
                per_s, cpu_us = map(statistics.median, zip(*results[depth, op, name], strict=True))
                line += f"{f'{per_s:,.0f} ({cpu_us:.1f})':>22}"
            for peer in peers:
                pairs = list(zip(results[depth, op, OURS], results[depth, op, peer], strict=True))
                ratios = [ours.per_s / theirs.per_s for ours, theirs in pairs]
                ratio = statistics.median(ratios)
                cpu = statistics.median(ours.cpu_us / theirs.cpu_us for ours, theirs in pairs)
                cell = f"{ratio:.2f} [{min(ratios):.2f} .. {max(ratios):.2f}] {cpu:5.2f}"
                line += f"{cell:>30}"
                if peer == RUST:
                    is_short = ratio < targets[at]
                    line += " short" if is_short else _SHORT_GAP
                    if is_short:
                        yield f"short: {op}, depth {depth}: {ratio:.2f}, target {targets[at]:g}"
            print(line.rstrip(), flush=True)
            ours_cpu_us = statistics.median(ours.cpu_us for ours in results[depth, op, OURS])
            if (depth, op) == (DEPTHS[0], "lookup") and ours_cpu_us > LOOKUP_CPU_US:
                yield f"short: {op}: {ours_cpu_us:.2f} us of CPU, target {LOOKUP_CPU_US:g}"


def main() -> None:
    """Measure, print, and exit with what is short."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0, help="of each op in each round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-back-ends-") as temporary:
        directory = Path(temporary)
        directory.chmod(0o755)
        tree = make_tree(directory / "tree")
        with back_ends(tree, directory, options.seconds) as many:
            results = measure(many, options.rounds)
            names = [each.name for each in many]
            short = list(report(names, results))
            small = measure_small_files(many, options.rounds)
            short += report_small_files(small)
            if RUST in names:
                bench_table.record("back_ends", rows(results, small))
    sys.exit("\n".join(short) or 0)


if __name__ == "__main__":
    main()
