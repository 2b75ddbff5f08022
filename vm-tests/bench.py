"""`make bench [TREE=dir] [ARGS=...]`: what an import and a walk in a guest cost, with their bounds.

Status 1 names a broken bound, status 2 what could not be measured. TREE is the running Python's
standard library without site-packages unless given.
"""

import argparse
import compileall
import contextlib
import os
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmharness import kernel, measure, qemu, tree, uml
from vmharness.cache import PROJECT, HarnessError
from vmharness.guest import DeadlineExceeded, Guest, GuestLost
from vmharness.import_bench import LEAST_RUNS, bench_import
from vmharness.measure import MIB, Size, Spread

from tests.fakes.appliance_process import ApplianceProcess, import_tree

_OWN_MAX_MIB: Final = 12.0
_SAMPLE_S: Final = 0.01
_COUNTS_FROM: Final = 100  # fewer requests say nothing of the cost of one
_WALK_DEADLINE_S: Final = 1800.0
_QEMU_CPUS: Final = 2
_GUEST_MEMORY_MIB: Final = 256
_VIRTIOFSD: Final = Path("/usr/lib/qemu/virtiofsd")
# What a guest mounts the tree from: an erofs image on virtio-blk is no server, but what people use
# where a tree is known before its guest starts.
_EROFS: Final = "erofs"
_DROP_CACHES: Final = "echo 3 > /proc/sys/vm/drop_caches"
_READ_ALL: Final = "find {} -type f -print0 | xargs -0 cat > /dev/null"
# The same for each server: what is done before, and what is on the clock.
_WALKS: Final = {
    "first walk": ("true", _READ_ALL),
    "second walk": ("true", _READ_ALL),
    "caches dropped": (_DROP_CACHES, _READ_ALL),
    "cold tar": (_DROP_CACHES, "tar -c -f - -C {} . | cat > /dev/null"),
}


class Walk(NamedTuple):
    """One walk in a guest; `cpu_s` by kind of process."""

    seconds: float
    cpu_s: dict[str, float]
    requests: Counter[str]


class Memory(NamedTuple):
    """The most one process has had, in bytes."""

    peak: int
    own: int


class GuestRun(NamedTuple):
    """One guest's life; walks by server, then by the keys of _WALKS; memory by process."""

    boot_s: float
    walks: dict[str, dict[str, Walk]]
    memory: dict[str, Memory]


def main() -> int:
    """Measure, print; return the exit status."""
    parser = argparse.ArgumentParser(prog="make bench", allow_abbrev=False)
    parser.add_argument("--guest", choices=["uml", "qemu"], default="uml")
    parser.add_argument("--runs", type=int, default=LEAST_RUNS, metavar="N", help="default 5")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # with its `finally` clauses
    # as an installed program is; and nothing is compiled into a tree that is measured
    compileall.compile_dir(PROJECT / "appliance", quiet=2)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        with tempfile.TemporaryDirectory(prefix="appliance-bench-") as name:
            broken = _run(Path(name), options.guest, max(1, options.runs))
    except (HarnessError, GuestLost, DeadlineExceeded, AssertionError, OSError) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as exc:
        print(f"bench: {exc}\n{(exc.stderr or b'').decode()}", file=sys.stderr)
        return 2
    for each in broken:
        print(f"bench: BROKEN: {each}", file=sys.stderr)
    return 1 if broken else 0


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _run(directory: Path, guest: str, runs: int) -> list[str]:
    source = _source(directory)
    size = measure.size_of(source)
    print(
        f"Tree    {os.environ.get('TREE') or 'standard library'}: {size.files:,} files, "
        f"{size.directories:,} directories, {size.size_bytes / 1e6:,.1f} MB\n"
        f"Host    {len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, Linux {platform.release()}\n"
        f"Figures are medians of {runs} runs, [lowest .. highest]; MB = 10^6 bytes",
        flush=True,
    )
    return [
        *bench_import(source, size, directory, max(runs, LEAST_RUNS)),
        *_bench_guest(source, size, directory, guest, runs),
    ]


def _source(directory: Path) -> Path:
    given = os.environ.get("TREE")
    if given:
        source = Path(given).expanduser().resolve()
        if not source.is_dir():
            raise HarnessError(f"TREE={given} is not a directory")
        return source
    # a copy, because what was installed with pip lies inside and is no standard library
    library = Path(sysconfig.get_path("stdlib"))
    copy = directory / library.name
    ignore = shutil.ignore_patterns("site-packages", "dist-packages")
    shutil.copytree(library, copy, symlinks=True, ignore=ignore)
    os.sync()
    return copy


# The guest.


def _bench_guest(source: Path, size: Size, directory: Path, kind: str, runs: int) -> list[str]:
    store = directory / "store"
    (name,) = import_tree(store, source)
    wanted = tree.tree_digest(tree.records(source, is_normalised=True))
    bench = GuestBench(source, size, store, name, directory, kind)
    found = [bench.run(None if n else wanted) for n in range(runs)]
    boot = Spread.of([each.boot_s for each in found])
    print(f"\nGuest   {bench.machine}; boots in {boot.text(1)} s")
    print(
        f"  {'find + read all':26}{'seconds':22}{'files/s':>9}{'MB/s':>7}{'requests':>10}"
        f"{'CPU s: supervisor':>19}{'workers':>9}{'us/request':>12}"
    )
    for server in bench.servers:
        for walk in _WALKS:
            _print_walk(server, walk, [each.walks[server][walk] for each in found], size)
    for walk in _WALKS:
        counts = found[-1].walks["appliance"][walk].requests
        listed = ", ".join(f"{opcode} {count:,}" for opcode, count in counts.most_common())
        print(f"  requests, {walk + ':':16}{listed or 'none'}")
    for server in bench.servers[1:]:
        _print_ratios(server, found)
    return _print_memory(found)


class GuestBench:
    """Boots guests on one store and walks the tree in them."""

    def __init__(
        self, source: Path, size: Size, store: Path, name: str, directory: Path, kind: str
    ) -> None:
        self.source = source
        self.servers = ["appliance"]
        self._store = store
        self._name = name
        self._directory = directory
        self._is_qemu = kind == "qemu"
        # the tree must fit its page cache, or the second walk would read again
        self._memory_mib = _GUEST_MEMORY_MIB + 2 * size.size_bytes // MIB
        if self._is_qemu:
            accelerator = "KVM" if qemu.accelerator() == "kvm" else "TCG, which emulates each CPU"
            self.machine = f"QEMU ({accelerator}), Linux {kernel.qemu_kernel().release}"
        else:
            self.machine = f"user-mode Linux {kernel.uml_kernel().release}, 1 CPU"
        if self._is_qemu and _VIRTIOFSD.exists() and os.geteuid() == 0:
            self.servers.append("virtiofsd")
        elif self._is_qemu:
            print(f"\nNot compared with {_VIRTIOFSD}: it is not there, or this is not root")
        self._disk = None
        if self._is_qemu:
            self._disk = _erofs_image(source, directory / "tree.erofs")
            self.servers.append(_EROFS)

    def run(self, wanted: tree.TreeDigest | None) -> GuestRun:
        """Boot a guest and walk; what is read is compared with `wanted` unless that is None."""
        with contextlib.ExitStack() as stack:
            options = ["--num-request-queues", str(_QEMU_CPUS if self._is_qemu else 1)]
            options += [] if self._is_qemu else ["--tag=appliance"]
            appliance = ApplianceProcess(self._store, self._directory, *options)
            stack.callback(appliance.stop)  # even where its log cannot be printed
            stack.enter_context(appliance)
            pids = {"appliance": appliance.process.pid}
            if "virtiofsd" in self.servers:
                pids["virtiofsd"] = stack.enter_context(
                    _virtiofsd(self.source, self._directory / "virtiofsd.sock")
                )
            started = time.monotonic()
            guest = stack.enter_context(self._boot(appliance.sockets[0]))
            boot_s = time.monotonic() - started
            if "virtiofsd" in pids:  # before its guest, the end of which it would complain of
                stack.callback(os.kill, pids["virtiofsd"], signal.SIGKILL)
            walks = {}
            for server in self.servers:
                what = "erofs /dev/vda" if server == _EROFS else f"virtiofs {server}"
                guest.check(f"mkdir -p /mnt/{server}; mount -o ro -t {what} /mnt/{server}", 60)
                guest.check(_DROP_CACHES, 60)
                walks[server] = self._walks(guest, server, pids.get(server, 0), appliance)
            memory = self._memory(guest, appliance, wanted)
        return GuestRun(boot_s, walks, memory)

    def _boot(self, socket_path: Path) -> Guest:
        if not self._is_qemu:
            return uml.boot([socket_path], self._directory, memory_mib=self._memory_mib)
        devices = [qemu.FsDevice(socket_path, "appliance", _QEMU_CPUS)]
        if "virtiofsd" in self.servers:
            devices.append(qemu.FsDevice(self._directory / "virtiofsd.sock", "virtiofsd"))
        memory_mib = self._memory_mib * len(devices)
        return qemu.boot(
            devices, self._directory, cpus=_QEMU_CPUS, memory_mib=memory_mib, disk=self._disk
        )

    def _seen_at(self, server: str) -> str:
        at = f"/mnt/{server}"
        return shlex.quote(f"{at}/{self._name}") if server == "appliance" else at

    def _walks(
        self, guest: Guest, server: str, pid: int, appliance: ApplianceProcess
    ) -> dict[str, Walk]:
        walks = {}
        for walk, (prepare, script) in _WALKS.items():
            guest.check(prepare, 60)
            requests = _requests(appliance)
            cpu = _cpu(pid)
            started = time.monotonic()
            guest.check(
                f"set -o pipefail; {script.format(self._seen_at(server))}", _WALK_DEADLINE_S
            )
            seconds = time.monotonic() - started
            spent = {kind: after - cpu[kind] for kind, after in _cpu(pid).items()}
            walks[walk] = Walk(seconds, spent, _requests(appliance) - requests)
        return walks

    def _memory(
        self, guest: Guest, appliance: ApplianceProcess, wanted: tree.TreeDigest | None
    ) -> dict[str, Memory]:
        names = _process_names(appliance)
        with measure.PeakSampler(lambda: names, {"own": measure.own_bytes}, _SAMPLE_S) as sampler:
            if wanted is not None:
                found = guest.check(
                    "echo 3 > /proc/sys/vm/drop_caches;"
                    f"probe tree-digest -n read {self._seen_at('appliance')} 4",
                    _WALK_DEADLINE_S,
                )
                if tree.TreeDigest.parse(found) != wanted:
                    raise HarnessError(f"the guest has read {found!r}, the host {wanted}")
        return {
            name: Memory(
                measure.peak_bytes(pid), max(measure.own_bytes(pid), sampler.peaks["own"][pid])
            )
            for pid, name in names.items()
        }


@contextlib.contextmanager
def _virtiofsd(source: Path, socket_path: Path) -> Iterator[int]:
    socket_path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(socket_path))
        listener.listen(1)
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *(str(_VIRTIOFSD), f"--fd={listener.fileno()}"),
                # the closest to the appliance: caches for ever; containers allow chroot
                *("-o", f"source={source},cache=always,sandbox=chroot,log_level=err"),
            ],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
        )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _erofs_image(source: Path, image: Path) -> Path:
    """Make an image of the tree that is not compressed; no faster one is known."""
    command = ["mkfs.erofs", str(image), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_WALK_DEADLINE_S)
    except FileNotFoundError as exc:
        raise HarnessError("mkfs.erofs is not installed (package erofs-utils)") from exc
    return image


def _requests(appliance: ApplianceProcess) -> Counter[str]:
    (session,) = appliance.status()
    return Counter(session["requests"])


def _cpu(pid: int) -> dict[str, float]:
    if not pid:
        return {"supervisor": 0.0, "workers": 0.0}
    # below a supervisor: the fork server, and below that the workers
    supervisor, *others = measure.descendants(pid)
    return {"supervisor": measure.cpu_s(supervisor), "workers": sum(map(measure.cpu_s, others))}


def _process_names(appliance: ApplianceProcess) -> dict[int, str]:
    names = dict.fromkeys(measure.descendants(appliance.process.pid), "fork server")
    names[appliance.process.pid] = "supervisor"
    (session,) = appliance.status()
    for worker in session["workers"]:
        queues = ", ".join(map(str, worker["queues"]))
        names[worker["pid"]] = f"worker of queue {queues}"
    return names


# What is printed of the guest.


def _print_walk(server: str, walk: str, walks: list[Walk], size: Size) -> None:
    seconds = Spread.of([each.seconds for each in walks])
    supervisor, workers = (
        Spread.of([each.cpu_s[kind] for each in walks]).median for kind in ("supervisor", "workers")
    )
    num_requests = Spread.of([each.requests.total() for each in walks]).median
    each_us = (supervisor + workers) / num_requests * 1e6 if num_requests else 0
    label, counted, cost = f"{server}, {walk}", "", ""
    if server == "appliance":
        label, counted = walk, f"{num_requests:,.0f}"
        cost = f"{each_us:,.0f}" if num_requests >= _COUNTS_FROM else "-"
    print(
        f"  {label:26}{seconds.text():22}{size.files / seconds.median:9,.0f}"
        f"{size.size_bytes / 1e6 / seconds.median:7,.0f}{counted:>10}{supervisor:19.3f}"
        f"{workers:9.3f}{cost:>12}"
    )


def _print_ratios(server: str, runs: list[GuestRun]) -> None:
    for walk in _WALKS:
        pairs = [(run.walks["appliance"][walk], run.walks[server][walk]) for run in runs]
        times = Spread.of([ours.seconds / theirs.seconds for ours, theirs in pairs])
        line = f"  appliance / {server}, {walk + ':':16} time {times.text()}"
        if server != _EROFS:  # QEMU itself reads the image
            cpu = Spread.of([sum(o.cpu_s.values()) / sum(t.cpu_s.values()) for o, t in pairs])
            line += f", CPU {cpu.text()}"
        print(line)


def _print_memory(runs: list[GuestRun]) -> list[str]:
    print("  memory, highest of all runs      peak (VmHWM)   own")
    names = runs[0].memory
    most = {
        name: Memory(*map(max, zip(*(run.memory[name] for run in runs), strict=True)))
        for name in names
    }
    for name, memory in most.items():
        print(f"    {name:30} {memory.peak / MIB:8.1f} MiB {memory.own / MIB:5.1f} MiB")
    print(
        "    peak counts shared pages too: guest memory, store, what the fork server has"
        f"\n    own: written pages of private mappings that no other process shares; "
        f"at most {_OWN_MAX_MIB:g} MiB for a worker"
    )
    return [
        f"the {name} has {memory.own / MIB:.1f} MiB of its own, bound {_OWN_MAX_MIB:g} MiB"
        for name, memory in most.items()
        if name.startswith("worker") and memory.own > _OWN_MAX_MIB * MIB
    ]


if __name__ == "__main__":
    sys.exit(main())
