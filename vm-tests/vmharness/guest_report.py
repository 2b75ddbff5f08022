"""What walks in guests have cost: figures, ratios, what is short, and rows of the README."""

from collections.abc import Iterator, Sequence
from typing import Final

from tools import bench_table
from vmharness.guest_bench import (
    COLD_TAR,
    EROFS,
    FIRST_WALK,
    OURS,
    SECOND_WALK,
    WALKS,
    GuestBench,
    GuestRun,
    Memory,
    Walk,
)
from vmharness.measure import MIB, Size, Spread

_OWN_MAX_MIB: Final = 12.0
_COUNTS_FROM: Final = 100  # fewer requests say nothing of the cost of one
_FIRST_WALK_TARGET: Final = 0.5  # of a virtiofsd's time
_COLD_TAR_TARGET: Final = 1.0  # of an erofs image's time


def report(bench: GuestBench, runs: Sequence[GuestRun], size: Size) -> list[str]:
    """Print everything; return each bound that is broken and each target that is not reached."""
    boot = Spread.of([each.boot_s for each in runs])
    print(f"\nGuest   {bench.described}; boots in {boot.text(1)} s")
    print(
        f"  {'find + read all':30}{'seconds':22}{'files/s':>9}{'MB/s':>7}{'requests':>10}"
        f"{'CPU s: supervisor':>19}{'workers':>9}{'us/request':>12}"
    )
    for server in bench.servers:
        for walk in WALKS:
            _print_walk(server, walk, [each.walks[server][walk] for each in runs], size)
    for walk in WALKS:
        counts = runs[-1].walks[OURS][walk].requests
        listed = ", ".join(f"{opcode} {count:,}" for opcode, count in counts.most_common())
        print(f"  requests, {walk + ':':16}{listed or 'none'}")
    for server in bench.servers[1:]:
        _print_ratios(server, runs)
    return [*_print_memory(runs), *(f"{bench.machine}: {each}" for each in _short(bench, runs))]


def rows(bench: GuestBench, runs: Sequence[GuestRun], size: Size) -> bench_table.Rows:
    """Return the rows of the README that one machine has measured."""
    guest = bench_table.GUESTS[bench.machine]
    tree = f"{size.files:,} files, {size.size_bytes / 1e6:,.0f} MB"
    first = (
        f"{_seconds(runs, OURS, FIRST_WALK).median:.1f} s for {tree}, "
        f"{_num_requests(runs, FIRST_WALK):,.0f} requests"
    )
    second = f"{_num_requests(runs, SECOND_WALK):,.0f} requests"
    for server in _virtiofsds(bench):
        time, cpu = (ratio.median for ratio in _ratios(runs, server, FIRST_WALK))
        first += f"; {time:.2f} of the time of the {server}, {cpu:.2f} of its CPU"
        second += (
            f"; {_ratios(runs, server, SECOND_WALK)[0].median:.2f} of the time of the {server}"
        )
    own = _most_memory(runs)
    found: bench_table.Rows = {
        bench_table.FIRST_WALK.format(guest): (first,),
        bench_table.SECOND_WALK.format(guest): (second,),
        bench_table.WORKER_MEMORY: (
            f"{max(own[name].own for name in own if _is_worker(name)) / MIB:.1f} MiB",
        ),
    }
    if EROFS in bench.servers:
        tar, walk = (_ratios(runs, EROFS, walk)[0].median for walk in (COLD_TAR, FIRST_WALK))
        found[bench_table.COLD_TAR.format(guest)] = (
            f"{tar:.2f} of its time; a first walk by `find` and `cat` {walk:.2f}",
        )
    return found


def _virtiofsds(bench: GuestBench) -> list[str]:
    return [server for server in bench.servers if server not in {OURS, EROFS}]


def _short(bench: GuestBench, runs: Sequence[GuestRun]) -> Iterator[str]:
    for server in _virtiofsds(bench):
        ratio = _ratios(runs, server, FIRST_WALK)[0].median
        if ratio > _FIRST_WALK_TARGET:
            yield f"short: first walk / {server}: {ratio:.2f}, target {_FIRST_WALK_TARGET:g}"
    if EROFS in bench.servers:
        ratio = _ratios(runs, EROFS, COLD_TAR)[0].median
        if ratio > _COLD_TAR_TARGET:
            yield f"short: cold tar / {EROFS}: {ratio:.2f}, target {_COLD_TAR_TARGET:g}"
    if num := _num_requests(runs, SECOND_WALK):
        yield f"short: second walk: {num:,.0f} requests, target 0"


def _seconds(runs: Sequence[GuestRun], server: str, walk: str) -> Spread:
    return Spread.of([run.walks[server][walk].seconds for run in runs])


def _num_requests(runs: Sequence[GuestRun], walk: str) -> float:
    return Spread.of([run.walks[OURS][walk].requests.total() for run in runs]).median


def _ratios(runs: Sequence[GuestRun], server: str, walk: str) -> tuple[Spread, Spread]:
    """Return our time and CPU by those of another server, within each run."""
    pairs = [(run.walks[OURS][walk], run.walks[server][walk]) for run in runs]
    return (
        Spread.of([ours.seconds / theirs.seconds for ours, theirs in pairs]),
        Spread.of([_by(sum(o.cpu_s.values()), sum(t.cpu_s.values())) for o, t in pairs]),
    )


def _by(ours: float, theirs: float) -> float:
    # CPU time is counted in ticks, and there may be none.
    return ours / theirs if theirs else 1.0 if not ours else float("inf")


def _print_walk(server: str, walk: str, walks: list[Walk], size: Size) -> None:
    seconds = Spread.of([each.seconds for each in walks])
    supervisor, workers = (
        Spread.of([each.cpu_s[kind] for each in walks]).median for kind in ("supervisor", "workers")
    )
    num_requests = Spread.of([each.requests.total() for each in walks]).median
    each_us = (supervisor + workers) / num_requests * 1e6 if num_requests else 0
    label, counted, cost = f"{server}, {walk}", "", ""
    if server == OURS:
        label, counted = walk, f"{num_requests:,.0f}"
        cost = f"{each_us:,.0f}" if num_requests >= _COUNTS_FROM else "-"
    print(
        f"  {label:30}{seconds.text():22}{size.files / seconds.median:9,.0f}"
        f"{size.size_bytes / 1e6 / seconds.median:7,.0f}{counted:>10}{supervisor:19.3f}"
        f"{workers:9.3f}{cost:>12}"
    )


def _print_ratios(server: str, runs: Sequence[GuestRun]) -> None:
    for walk in WALKS:
        times, cpu = _ratios(runs, server, walk)
        line = f"  {OURS} / {server}, {walk + ':':16} time {times.text()}"
        # QEMU itself reads the image
        print(line if server == EROFS else f"{line}, CPU {cpu.text()}")


def _most_memory(runs: Sequence[GuestRun]) -> dict[str, Memory]:
    return {
        name: Memory(*map(max, zip(*(run.memory[name] for run in runs), strict=True)))
        for name in runs[0].memory
    }


def _is_worker(name: str) -> bool:
    return name.startswith("worker")


def _print_memory(runs: Sequence[GuestRun]) -> list[str]:
    print("  memory, highest of all runs      peak (VmHWM)   own")
    most = _most_memory(runs)
    for name, memory in most.items():
        print(f"    {name:30} {memory.peak / MIB:8.1f} MiB {memory.own / MIB:5.1f} MiB")
    print(
        "    peak counts shared pages too: guest memory, store, what the fork server has"
        f"\n    own: written pages of private mappings that no other process shares; "
        f"at most {_OWN_MAX_MIB:g} MiB for a worker",
        flush=True,
    )
    return [
        f"BROKEN: the {name} has {memory.own / MIB:.1f} MiB of its own, bound {_OWN_MAX_MIB:g} MiB"
        for name, memory in most.items()
        if _is_worker(name) and memory.own > _OWN_MAX_MIB * MIB
    ]
