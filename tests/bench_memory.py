"""Memory that each virtual machine costs: `python -m tests.bench_memory [VMS]...`

Fake guests walk the same tree on one supervisor, and read its files. What is printed is the memory
that no other process has mapped, Private_Clean and Private_Dirty of /proc/PID/smaps_rollup: medians
of the session processes, of the workers of hiprio queues and of those of request queues, and the
mean of all that belongs to a machine. With more machines, pages that are only read are shared.
"""

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.hostile_guest import memory_kib

NUM_VMS: Final = (1, 16, 64)
NUM_DIRECTORIES: Final = 20
NUM_FILES: Final = 20
FILE_BYTES: Final = 8192


def make_tree(top: Path) -> Path:
    """Make a tree of small files."""
    for directory in range(NUM_DIRECTORIES):
        (top / f"d{directory}").mkdir(parents=True)
        for number in range(NUM_FILES):
            (top / f"d{directory}" / f"f{number}").write_bytes(b"%d" % number * FILE_BYTES)
    return top


def walk(guest: FakeGuest, name: str) -> None:
    """Read every file of the tree, as a guest that boots does."""
    guest.mount()
    top = guest.lookup(fuse_client.ROOT, name.encode())
    for directory in range(NUM_DIRECTORIES):
        parent = guest.lookup(top, b"d%d" % directory)
        for number in range(NUM_FILES):
            nodeid = guest.lookup(parent, b"f%d" % number)
            assert guest.ask(fuse_client.read(nodeid, 0, 4096)).error == 0


def unshared_kib(pid: int) -> int:
    """Return what no other process has of the memory of `pid`."""
    return memory_kib(pid, "Private_Clean") + memory_kib(pid, "Private_Dirty")


def measure(store: Path, name: str, num_vms: int, directory: Path) -> str:
    """Return one line of the table."""
    kib: dict[str, list[int]] = {"session": [], "hiprio": [], "request": []}
    options = (f"--state-dir={directory}/state", f"--max-front-ends={num_vms}")
    with contextlib.ExitStack() as stack:
        appliance = stack.enter_context(ApplianceProcess(store, directory, *options))
        for _ in range(num_vms):
            walk(stack.enter_context(FakeGuest(appliance.connect())), name)
        for session in appliance.status():
            kib["session"].append(unshared_kib(session["pid"]))
            for worker in session["workers"]:
                role = "hiprio" if worker["queues"] == [0] else "request"
                kib[role].append(unshared_kib(worker["pid"]))
    each = [f"{statistics.median(them) if them else 0:9.0f}" for them in kib.values()]
    return f"{num_vms:4} {' '.join(each)} {sum(map(sum, kib.values())) / num_vms:9.0f}"


def main() -> None:
    """Print a line for each number of machines."""
    print(f"{'VMs':>4} {'session':>9} {'hiprio':>9} {'request':>9} {'all of a VM':>9}, in KiB")
    for num_vms in [int(word) for word in sys.argv[1:]] or NUM_VMS:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            store = directory / "store"
            (name,) = import_tree(store, make_tree(directory / "tree"))
            print(measure(store, name, num_vms, directory), flush=True)


if __name__ == "__main__":
    main()
