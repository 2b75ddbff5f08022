"""`appliance bench`: measures a virtiofs back-end, or a mounted directory, from outside."""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import add_json_option, add_log_options, path_argument
from appliance.cli.output import print_json, write_line
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from appliance.bench.phases import Load, PhaseResult
    from appliance.bench.report import Report
    from appliance.bench.tree_walk import Entry, WalkedTree

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_DEFAULT_DEPTH: Final = 16
_MAX_DEPTH: Final = 256
_MAX_QUEUES: Final = 64
_DEFAULT_SECONDS: Final = 2.0
_DEFAULT_TIMEOUT_S: Final = 30.0
# A walk or a comparison of everything takes as long as the tree is large.
_WALK_TIMEOUT_S: Final = 3600.0


def add_bench(commands: "Subparsers") -> None:
    """Add the command."""
    command = commands.add_parser(
        "bench",
        usage="%(prog)s [OPTION]... SOCKET\n       %(prog)s [OPTION]... --mount DIR",
        help="measure a virtiofs back-end as a guest would use it",
        description="Mount the virtiofs back-end that listens on SOCKET as a guest would, walk its "
        "tree, and send it requests of one kind after the other. Print requests per second, their "
        "latencies, and the CPU time of the back-end for each.",
    )
    command.add_argument(
        "socket",
        nargs="?",
        metavar="SOCKET",
        type=path_argument,
        help="the vhost-user socket of a virtiofs back-end of any make",
    )
    command.add_argument(
        "--mount",
        metavar="DIR",
        type=path_argument,
        help="measure system calls on this directory instead; the kernel answers some from caches",
    )
    command.add_argument(
        "--path",
        metavar="PATH",
        default="",
        help="begin the walk at PATH in the file system (default: at its root)",
    )
    command.add_argument(
        "--verify",
        metavar="DIR",
        type=path_argument,
        help="first read the whole tree and compare it with this directory",
    )
    _add_load_options(command)
    add_json_option(command)
    add_log_options(command)
    command.set_defaults(run=_run_bench)


def _add_load_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ops",
        metavar="OP,...",
        help="measure these, in this order: lookup, miss, getattr, readlink, readdirplus, read4k, "
        "read128k, read1m (default: all)",
    )
    command.add_argument(
        "--depth",
        type=int,
        metavar="N",
        default=_DEFAULT_DEPTH,
        help="keep N requests in flight in each queue, or use N threads on a mount (default: "
        f"{_DEFAULT_DEPTH})",
    )
    command.add_argument(
        "--queues", type=int, metavar="N", default=1, help="use N request queues (default: 1)"
    )
    command.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        default=_DEFAULT_SECONDS,
        help=f"measure each operation for S seconds (default: {_DEFAULT_SECONDS:g})",
    )
    command.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        default=_DEFAULT_TIMEOUT_S,
        help=f"give up if an answer takes longer than S seconds (default: {_DEFAULT_TIMEOUT_S:g})",
    )
    command.add_argument(
        "--pid",
        type=int,
        metavar="N",
        help="count the CPU time of process N and its descendants (default: the process that "
        "listens on SOCKET)",
    )


def _run_bench(options: argparse.Namespace) -> None:
    _check(options)
    ops = _ops(options.ops)
    report = _on_mount(options, ops) if options.socket is None else _on_back_end(options, ops)
    if options.json:
        print_json(report.as_json(), indent=2)
        return
    for line in report.lines():
        write_line(line)


def _on_back_end(options: argparse.Namespace, ops: "Sequence[str]") -> "Report":
    from appliance.bench.bench_guest import BenchGuest
    from appliance.bench.phases import GuestPhases
    from appliance.bench.report import Report
    from appliance.bench.tree_walk import GuestTree

    with BenchGuest(
        options.socket,
        num_queues=options.queues,
        depth=options.depth,
        timeout_s=options.timeout,
    ) as guest:
        tree = GuestTree(guest, options.path)
        entries, walk_s = _walked(tree, options.verify)
        load = _load(options, options.pid or guest.peer_pid)
        phases = _phases(GuestPhases(tree, entries, load).run, ops)
        return Report(
            target=str(options.socket),
            protocol=f"{guest.agreed.major}.{guest.agreed.minor}",
            entries=entries,
            walk_s=walk_s,
            verified=None if options.verify is None else str(options.verify),
            num_queues=options.queues,
            phases=phases,
        )


def _on_mount(options: argparse.Namespace, ops: "Sequence[str]") -> "Report":
    from appliance.bench.mounted_phases import MountedPhases, naming_errors, within
    from appliance.bench.report import Report
    from appliance.bench.tree_walk import MountedTree

    tree = MountedTree(options.mount / options.path.strip("/"))
    with naming_errors("walk"):
        work = partial(_walked, tree, options.verify)
        entries, walk_s = within(_WALK_TIMEOUT_S, f"walk of {tree.root}", work)
    load = _load(options, options.pid)
    phases = _phases(MountedPhases(tree, entries, load).run, ops)
    return Report(
        target=str(options.mount),
        protocol="",
        entries=entries,
        walk_s=walk_s,
        verified=None if options.verify is None else str(options.verify),
        num_queues=1,
        phases=phases,
    )


def _walked(tree: "WalkedTree", verify: Path | None) -> "tuple[list[Entry], float]":
    from appliance.bench.verify_tree import verify_tree

    began_s = time.monotonic()
    entries = list(tree.walk())
    walk_s = time.monotonic() - began_s
    if verify is not None:
        verify_tree(tree, entries, verify)
    return entries, walk_s


def _phases(run: "Callable[[str], PhaseResult]", ops: "Sequence[str]") -> "list[PhaseResult]":
    return [run(op) for op in ops]


def _load(options: argparse.Namespace, pid: int | None) -> "Load":
    from appliance.bench.back_end_cpu import BackEndCpu
    from appliance.bench.phases import Load

    return Load(options.depth, options.seconds, options.timeout, BackEndCpu(pid))


def _ops(text: str | None) -> list[str]:
    from appliance.bench.phases import OPS

    if text is None:
        return list(OPS)
    ops = text.split(",")
    for op in ops:
        if op not in OPS:
            raise ConfigError(f"--ops {op}: must be one of {', '.join(OPS)}")
    return ops


def _check(options: argparse.Namespace) -> None:
    if (options.socket is None) == (options.mount is None):
        raise ConfigError("bench: takes either SOCKET or --mount DIR")
    if options.mount is not None and options.queues != 1:
        raise ConfigError("--queues: goes with SOCKET only")
    for name, value, largest in (
        ("depth", options.depth, _MAX_DEPTH),
        ("queues", options.queues, _MAX_QUEUES),
    ):
        if not 1 <= value <= largest:
            raise ConfigError(f"--{name} {value}: must be 1 to {largest}")
    for name, seconds in (("seconds", options.seconds), ("timeout", options.timeout)):
        if not 0 < seconds <= _WALK_TIMEOUT_S:
            raise ConfigError(f"--{name} {seconds:g}: must be above 0, up to {_WALK_TIMEOUT_S:g}")
