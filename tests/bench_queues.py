"""Two queues beside one, and one lookup at a time with polling: python -m tests.bench_queues

Front-end and back-end share the CPUs, so two queues cannot reach twice the rate of one on two CPUs.
Each figure is a median of rounds in which all are measured one after the other. Status 1 names what
is short of its target.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.bench.back_end_cpu import BackEndCpu
from appliance.bench.bench_guest import BenchGuest
from appliance.bench.phases import GuestPhases, Load, PhaseResult
from appliance.bench.tree_walk import GuestTree
from tests.bench_back_ends import make_tree
from tests.fakes.appliance_process import ApplianceProcess, import_tree
from tests.fakes.running_command import DEADLINE_S
from tools import bench_table

ROUNDS: Final = 5
DEPTH: Final = 16
# Requests per second over two queues by those over one.
TARGETS: Final = {"lookup": 1.6, "getattr": 1.6}
POLL_US: Final = 50
# Half of all lookups, one at a time, take no longer, in microseconds.
POLLED_P50_US: Final = 10.0


@contextlib.contextmanager
def phases(
    appliance: ApplianceProcess, start: str, *, num_queues: int, depth: int, seconds: float
) -> Iterator[GuestPhases]:
    """Mount a back-end over `num_queues` queues, and walk its tree."""
    (socket_path,) = appliance.sockets
    with BenchGuest(
        socket_path, num_queues=num_queues, depth=depth, timeout_s=DEADLINE_S
    ) as mounted:
        tree = GuestTree(mounted, start)
        cpu = BackEndCpu(appliance.process.pid)
        yield GuestPhases(tree, list(tree.walk()), Load(depth, seconds, DEADLINE_S, cpu))


@contextlib.contextmanager
def served(directory: Path, *options: str) -> Iterator[ApplianceProcess]:
    """Serve the store in `directory` with a socket and a state directory of its own."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        own = Path(name)
        own.chmod(0o755)
        state = f"--state-dir={own}/state"
        with ApplianceProcess(directory / "store", own, state, *options) as appliance:
            yield appliance


def two_queues(directory: Path, start: str, seconds: float, rounds: int) -> Iterator[str]:
    """Print what two queues bring, record it, and yield each target that is not reached."""
    ratios: dict[str, list[float]] = {op: [] for op in TARGETS}
    with contextlib.ExitStack() as stack:
        guests = {}
        for number in (1, 2):
            appliance = stack.enter_context(served(directory, f"--num-request-queues={number}"))
            guests[number] = stack.enter_context(
                phases(appliance, start, num_queues=number, depth=DEPTH, seconds=seconds)
            )
        for _ in range(rounds):
            for op, found in ratios.items():
                one, two = (guests[number].run(op) for number in (1, 2))
                found.append(two.per_s / one.per_s)
    for op, found in ratios.items():
        ratio, target = statistics.median(found), TARGETS[op]
        print(f"Two queues by one, {op}: {ratio:.2f} [{min(found):.2f} .. {max(found):.2f}]")
        if ratio < target:
            yield f"short: {op} over two queues: {ratio:.2f}, target {target:g}"
    listed = ", ".join(f"{op} {statistics.median(found):.1f}" for op, found in ratios.items())
    cpus = len(os.sched_getaffinity(0))
    cell = f"{listed} times the requests on {cpus} CPUs, front-end included"
    bench_table.record("queues", {bench_table.TWO_QUEUES: [cell]})


def polled(directory: Path, start: str, seconds: float, rounds: int) -> Iterator[str]:
    """Print how long a lookup takes with polling, record it, and yield what is short."""
    found: dict[int, list[PhaseResult]] = {0: [], POLL_US: []}
    with contextlib.ExitStack() as stack:
        guests = {}
        for poll_us in found:
            appliance = stack.enter_context(served(directory, f"--poll-us={poll_us}"))
            guests[poll_us] = stack.enter_context(
                phases(appliance, start, num_queues=1, depth=1, seconds=seconds)
            )
        for _ in range(rounds):
            for poll_us, results in found.items():
                results.append(guests[poll_us].run("lookup"))
    p50_us = {
        poll_us: statistics.median(each.quantile_s(0.5) * 1e6 for each in results)
        for poll_us, results in found.items()
    }
    print(
        f"One lookup at a time: p50 {p50_us[0]:.1f} us, "
        f"{p50_us[POLL_US]:.1f} us with polling for up to {POLL_US} us"
    )
    cell = f"p50 {p50_us[POLL_US]:.1f} us; {p50_us[0]:.1f} us without"
    bench_table.record("polling", {bench_table.POLLED: [cell]})
    if p50_us[POLL_US] > POLLED_P50_US:
        yield f"short: lookup with polling: p50 {p50_us[POLL_US]:.1f} us, target {POLLED_P50_US:g}"


def main() -> None:
    """Measure, print, and exit with what is short."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0, help="of each op in each round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-queues-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (start,) = import_tree(directory / "store", make_tree(directory / "tree"))
        print(f"load {os.getloadavg()[0]:.1f}")
        measured = (directory, start, options.seconds, options.rounds)
        short = [*two_queues(*measured), *polled(*measured)]
    sys.exit("\n".join(short) or 0)


if __name__ == "__main__":
    main()
