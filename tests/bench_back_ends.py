"""Our back-end beside others: PYTHONPATH=vm-tests python -m tests.bench_back_ends [--seconds S]

One fake guest on each back-end, all with the same tree and at the same time. In each round an op is
measured on one after the other, in short slices whose order changes. What is printed are medians of
all rounds: requests per second, CPU time for each request, and the ratios to a peer within a round.
The machine is rarely quiet, so only ratios say something, and those of CPU time the most.
Status 1 names the targets that are not reached.
"""

import argparse
import contextlib
import random
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from appliance.bench.back_end_cpu import BackEndCpu
from appliance.bench.bench_guest import BenchGuest
from appliance.bench.phases import GuestPhases, Load, PhaseResult
from appliance.bench.tree_walk import GuestTree
from appliance.bench.verify_tree import verify_tree
from tests.fakes.appliance_process import DEADLINE_S, ApplianceProcess, import_tree
from tests.fakes.virtiofsds import UnavailableError, c_command, running, rust_command

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
LARGE_BYTES: Final = 64 << 20
NUM_MEDIUM: Final = 32
MEDIUM_BYTES: Final = 2 << 20
_SHORT_GAP: Final = " " * len(" short")


class BackEnd(NamedTuple):
    """A back-end with a guest that has walked its tree, and what measures it at each depth."""

    name: str
    phases: dict[int, GuestPhases]


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
            short = list(report([each.name for each in many], results))
    sys.exit("\n".join(short) or 0)


if __name__ == "__main__":
    main()
