"""Walks through a tree in guests: served by us, by a virtiofsd, and from an erofs image.

Each guest mounts the tree from all of them and walks it with one after the other, so that what else
the machine does meets all alike. Who is first changes from guest to guest.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

from tests.fakes.appliance_process import ApplianceProcess
from tests.fakes.virtiofsds import UnavailableError, c_command, running, rust_command
from vmharness import kernel, measure, qemu, tree, uml, uml_relay
from vmharness.cache import HarnessError
from vmharness.guest import Guest
from vmharness.measure import MIB, Size
from vmharness.served import MACHINES, NEW_SERIES

OURS: Final = "appliance"
# What a guest mounts the tree from: an erofs image on virtio-blk is no server, but what people use
# where a tree is known before its guest starts.
EROFS: Final = "erofs"
C_VIRTIOFSD: Final = "C virtiofsd"
RUST_VIRTIOFSD: Final = "Rust virtiofsd"
FIRST_WALK: Final = "first walk"
SECOND_WALK: Final = "second walk"
COLD_TAR: Final = "cold tar"
_DROP_CACHES: Final = "echo 3 > /proc/sys/vm/drop_caches"
_READ_ALL: Final = "find {} -type f -print0 | xargs -0 cat > /dev/null"
# The same for each server: what is done before, and what is on the clock.
WALKS: Final = {
    FIRST_WALK: ("true", _READ_ALL),
    SECOND_WALK: ("true", _READ_ALL),
    "caches dropped": (_DROP_CACHES, _READ_ALL),
    COLD_TAR: (_DROP_CACHES, "tar -c -f - -C {} . | cat > /dev/null"),
}
_SAMPLE_S: Final = 0.01
_WALK_DEADLINE_S: Final = 1800.0
_QEMU_CPUS: Final = 2
_GUEST_MEMORY_MIB: Final = 256
_TAG: Final = "virtiofsd"


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
    """One guest's life; walks by server, then by the keys of WALKS; memory by process."""

    boot_s: float
    walks: dict[str, dict[str, Walk]]
    memory: dict[str, Memory]


class GuestBench:
    """Boots guests on one store and walks the tree in them.

    Args:
        source: the tree.
        size: what it holds.
        store: the store that it was imported into.
        name: what it is called there.
        directory: receives sockets, logs and images.
        machine: one of MACHINES.
    """

    def __init__(
        self, source: Path, size: Size, store: Path, name: str, directory: Path, machine: str
    ) -> None:
        self.machine = machine
        self._source = source
        self._store = store
        self._name = name
        self._directory = directory
        self._is_qemu = machine != MACHINES[0]
        # the tree must fit its page cache, or the second walk would read again
        self._memory_mib = _GUEST_MEMORY_MIB + 2 * size.size_bytes // MIB
        if self._is_qemu:
            self._kernel = kernel.qemu_kernel(NEW_SERIES if machine.endswith(NEW_SERIES) else "")
            accelerator = "KVM" if qemu.accelerator() == "kvm" else "TCG, which emulates each CPU"
            self.described = f"QEMU ({accelerator}), Linux {self._kernel.release}"
        else:
            self.described = f"user-mode Linux {kernel.uml_kernel().release}, 1 CPU"
        self._virtiofsd_socket = directory / "virtiofsd.sock"
        self._virtiofsd_name, self._virtiofsd_command = self._virtiofsd()
        self.servers = [OURS, *([self._virtiofsd_name] if self._virtiofsd_command else [])]
        self._num_runs = 0
        self._disk = None
        if self._is_qemu:
            self._disk = _erofs_image(source, directory / "tree.erofs")
            self.servers.append(EROFS)

    def _virtiofsd(self) -> tuple[str, list[str]]:
        # The one in C beside the kernel of the same release, the newer one beside a newer kernel.
        # User-mode Linux asks the back-end for its tag, and the one in C has none.
        is_c = self.machine == MACHINES[1]
        name = C_VIRTIOFSD if is_c else RUST_VIRTIOFSD
        try:
            if os.geteuid() != 0:
                raise UnavailableError("it needs root")
            command = (c_command if is_c else rust_command)(self._virtiofsd_socket, self._source)
        except UnavailableError as exc:
            print(f"\nNot compared with the {name}: {exc}")
            return name, []
        return name, [*command, *([] if self._is_qemu else [f"--tag={_TAG}"])]

    def run(self, wanted: tree.TreeDigest | None) -> GuestRun:
        """Boot a guest and walk; what is read is compared with `wanted` unless that is None."""
        with contextlib.ExitStack() as stack:
            options = ["--num-request-queues", str(_QEMU_CPUS if self._is_qemu else 1)]
            options += [] if self._is_qemu else [f"--tag={OURS}"]
            appliance = ApplianceProcess(self._store, self._directory, *options)
            stack.callback(appliance.stop)  # even where its log cannot be printed
            stack.enter_context(appliance)
            pids = {OURS: appliance.process.pid}
            if self._virtiofsd_command:
                self._virtiofsd_socket.unlink(missing_ok=True)
                process = running(self._virtiofsd_command, self._virtiofsd_socket)
                pids[self._virtiofsd_name] = stack.enter_context(process).pid
            started = time.monotonic()
            guest = stack.enter_context(self._boot(appliance.sockets[0], stack))
            boot_s = time.monotonic() - started
            if self._virtiofsd_command:  # before its guest, the end of which it would complain of
                stack.callback(os.kill, pids[self._virtiofsd_name], signal.SIGKILL)
            walks = {}
            first = self._num_runs % len(self.servers)
            self._num_runs += 1
            for server in self.servers[first:] + self.servers[:first]:
                self._mount(guest, server)
                walks[server] = self._walks(guest, server, pids.get(server, 0), appliance)
            memory = self._memory(guest, appliance, wanted)
        return GuestRun(boot_s, walks, memory)

    def _boot(self, socket_path: Path, stack: contextlib.ExitStack) -> Guest:
        num_servers = 2 if self._virtiofsd_command else 1
        memory_mib = self._memory_mib * num_servers
        if not self._is_qemu:
            sockets = [socket_path]
            if self._virtiofsd_command:
                sockets.append(self._directory / "relay.sock")
                sockets[1].unlink(missing_ok=True)
                stack.enter_context(uml_relay.relay(sockets[1], self._virtiofsd_socket))
            return uml.boot(sockets, self._directory, memory_mib=memory_mib)
        devices = [qemu.FsDevice(socket_path, OURS, _QEMU_CPUS)]
        if self._virtiofsd_command:
            devices.append(qemu.FsDevice(self._virtiofsd_socket, _TAG))
        return qemu.boot(
            devices,
            self._directory,
            cpus=_QEMU_CPUS,
            memory_mib=memory_mib,
            kernel=self._kernel,
            disk=self._disk,
        )

    def _mount(self, guest: Guest, server: str) -> None:
        what = {OURS: f"virtiofs {OURS}", EROFS: "erofs /dev/vda"}.get(server, f"virtiofs {_TAG}")
        at = _mounted_at(server)
        guest.check(f"mkdir -p {at}; mount -o ro -t {what} {at}; {_DROP_CACHES}", 60)

    def _seen_at(self, server: str) -> str:
        at = _mounted_at(server)
        return shlex.quote(f"{at}/{self._name}") if server == OURS else at

    def _walks(
        self, guest: Guest, server: str, pid: int, appliance: ApplianceProcess
    ) -> dict[str, Walk]:
        walks = {}
        for walk, (prepare, script) in WALKS.items():
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
                    f"probe tree-digest -n read {self._seen_at(OURS)} 4",
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


def _mounted_at(server: str) -> str:
    return f"/mnt/{server.split(maxsplit=1)[0]}"


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
