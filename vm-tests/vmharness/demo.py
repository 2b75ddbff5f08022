"""`make demo [TREE=dir]`: import a tree, serve it to a virtual machine, compare every file there.

Exits 0 only if the guest sees exactly what the host has.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fakes.appliance_process import ApplianceProcess, import_tree
from vmharness import kernel, qemu, tree
from vmharness.cache import HarnessError
from vmharness.guest import DeadlineExceeded, Guest, GuestLost
from vmharness.stdlib import copy_standard_library

_CPUS = 2
_TAG = "demo"
_WALK_DEADLINE_S = 1800.0
# two walks, and one more if they find a difference
_LIFETIME_S = 3 * _WALK_DEADLINE_S
_SHOWN_DIFFERENCES = 20
_EXIT_INTERRUPTED = 130  # as of a shell's command


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", allow_abbrev=False)
    parser.add_argument("tree", nargs="?", type=Path)
    source = parser.parse_args().tree
    if source is not None and not source.is_dir():
        return _fail(f"TREE={source} is not a directory")
    directory = Path(tempfile.mkdtemp(prefix="appliance-demo-"))
    try:
        source = source.resolve() if source is not None else copy_standard_library(directory)
        differences = _run(source, directory)
    except subprocess.CalledProcessError as exc:  # a command that has said why itself
        shutil.rmtree(directory)
        return _fail(f"{shlex.join(exc.cmd)}: status {exc.returncode}")
    except KeyboardInterrupt:
        shutil.rmtree(directory)
        print("demo: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except (HarnessError, GuestLost, DeadlineExceeded, AssertionError, OSError) as exc:
        return _fail(f"{exc}\nThe logs are in {directory}")
    if differences:
        shown = "\n".join(differences[:_SHOWN_DIFFERENCES])
        return _fail(
            f"{len(differences)} records differ (- host, + guest), such as\n{shown}\n"
            f"The store and the logs are in {directory}"
        )
    shutil.rmtree(directory)
    return 0


def _run(source: Path, directory: Path) -> list[str]:
    print(f"Tree: {source}", flush=True)
    machine = f"QEMU with {'KVM' if qemu.accelerator() == 'kvm' else 'emulation (no usable KVM)'}"
    store = directory / "store"
    started = time.monotonic()
    (name,) = import_tree(store, source)
    import_s = time.monotonic() - started
    expected = tree.records(source, is_normalised=True)
    wanted = tree.tree_digest(expected)
    print(
        f"Imported {wanted.files:,} files, {wanted.size_bytes / 1e6:,.1f} MB "
        f"in {import_s:.1f} s: {wanted.files / import_s:,.0f} files/s, as {name}",
        flush=True,
    )
    with ApplianceProcess(store, directory, "--num-request-queues", str(_CPUS)) as server:
        device = qemu.FsDevice(server.sockets[0], _TAG, num_request_queues=_CPUS)
        started = time.monotonic()
        memory_mib = _guest_memory_mib(wanted)
        with qemu.boot(
            [device],
            directory,
            cpus=_CPUS,
            memory_mib=memory_mib,
            lifetime_s=_LIFETIME_S,
        ) as guest:
            boot_s = time.monotonic() - started
            print(f"Booted Linux {kernel.qemu_kernel().release} in {boot_s:.1f} s: {machine}")
            differences = _compare(guest, server, name, expected)
            _print_requests(server)
    return differences


def _guest_memory_mib(wanted: tree.TreeDigest) -> int:
    # room for the whole tree in the guest's caches, if this host can spare it
    spare = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    needed = 5 * wanted.size_bytes // 4 + 8192 * wanted.entries
    return 512 + min(needed, spare) // (1 << 20)


def _compare(guest: Guest, server: ApplianceProcess, name: str, expected: list[bytes]) -> list[str]:
    guest.check(f"mount -t virtiofs -o ro {_TAG} /mnt", 60)
    seen_at = shlex.quote(f"/mnt/{name}")
    wanted = tree.tree_digest(expected)
    for walk in ("first", "second"):
        requests_before = sum(_requests(server).values())
        started = time.monotonic()
        found = guest.run(f"probe tree-digest -n read {seen_at} {_CPUS}", _WALK_DEADLINE_S).output
        walk_s = time.monotonic() - started
        if tree.TreeDigest.parse(found) != wanted:
            records = guest.run(f"probe hash -n read {seen_at}", _WALK_DEADLINE_S).output
            return _differences(expected, records.splitlines(keepends=True))
        requests = sum(_requests(server).values()) - requests_before
        print(
            f"Compared {wanted.entries:,} entries in the guest, {walk} walk: all equal, "
            f"{walk_s:.1f} s, {requests:,} requests",
            flush=True,
        )
    return []


def _differences(expected: list[bytes], found: list[bytes]) -> list[str]:
    missing, added = set(expected) - set(found), set(found) - set(expected)
    lines = [("-", line) for line in missing] + [("+", line) for line in added]
    lines.sort(key=lambda line: (line[1].split()[4], line[0] == "+"))
    return [f"{sign} {record.decode().rstrip()}" for sign, record in lines] or [
        "the two walks in the guest differ from each other"
    ]


def _requests(server: ApplianceProcess) -> Counter[str]:
    counts: Counter[str] = Counter()
    for session in server.status():
        counts.update(session["requests"])
    return counts


def _print_requests(server: ApplianceProcess) -> None:
    counts = _requests(server)
    for_each = ", ".join(f"{opcode} {count:,}" for opcode, count in counts.most_common() if count)
    print(f"Requests: {for_each}; {counts.total():,} in all")


def _fail(text: str) -> int:
    print(f"demo: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
