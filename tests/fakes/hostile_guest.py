"""A guest that breaks its rings and starts over, and processes seen from outside."""

import fcntl
import os
import select
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from appliance.fuse_proto._fuse_wire import OUT_HEADER_SIZE
from tests.fakes.appliance_process import FakeGuest
from tests.fakes.driver import DriverRing, GuestMemory
from tests.fakes.frontend import FrontEnd
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.vmms import Qemu

ROOT: Final = 1
ROOM: Final = 4096
SMALL: Final = b"small content"
LARGE: Final = os.urandom(1 << 20)


def make_tree(directory: Path) -> Path:
    """Return a tree with one entry of each kind, and a directory of several READDIR replies."""
    tree = directory / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "small").write_bytes(SMALL)
    (tree / "large").write_bytes(LARGE)
    (tree / "link").symlink_to("small")
    for number in range(300):
        (tree / "sub" / f"entry-{number}").write_bytes(b"%d" % number)
    return tree


class AlertQemu(Qemu):
    """QEMU, but each ring's own err eventfd is the one that is signalled."""

    def start(
        self, memory: GuestMemory, rings: Sequence[DriverRing], bases: Sequence[int] = ()
    ) -> None:
        for queue, ring in enumerate(rings):
            self.front_end.set_vring_err(queue, ring.err_fd)
        super().start(memory, rings, bases)


class HostileGuest(FakeGuest):
    """A guest with two request queues of 256 entries that can be reset."""

    NUM: Final = 256

    def __init__(self, front_end: FrontEnd) -> None:
        vmm = AlertQemu(front_end, 3)
        super().__init__(front_end, num_request_queues=2, num=self.NUM, vmm=vmm)

    def reset(self) -> None:
        """Start over with blank rings, as a driver does, and mount."""
        self.renew_rings()
        self.mount()

    def renew_rings(self) -> None:
        """Ask for each ring's base, then start blank rings."""
        assert len(self.vmm.stop()) == len(self.rings)
        for ring in self.rings:
            ring.close()
        self.rings = [DriverRing(self.memory, self.NUM) for _ in self.rings]
        self.vmm.start(self.memory, self.rings)

    def exchange(self, requests: Sequence[tuple[bytes, int]], *, queue: int = 1) -> list[bytes]:
        """Send (request, bytes of room) pairs; return what was written for each, in their order."""
        ring = self.rings[queue]
        replies: list[bytes] = []
        for start in range(0, len(requests), 100):
            part = requests[start : start + 100]
            heads = [
                ring.add_chain([request] if request else [], [room] if room else [])
                for request, room in part
            ]
            ring.publish()
            used = {u.head: u.data for u in ring.collect(len(part), timeout_s=DEADLINE_S)}
            replies += [used[head] for head in heads]
        return replies


def error_of(reply: bytes) -> int | None:
    """Return the positive errno of a reply (0: success), None if nothing was written."""
    if not reply:
        return None
    assert len(reply) >= OUT_HEADER_SIZE
    return -int.from_bytes(reply[4:8], "little", signed=True)


def wait_readable(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(DEADLINE_S * 1000)


# Processes.


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid: int) -> set[int]:
    """Return the pids of all living processes below `pid`; zombies are not living."""
    parents = dict(_processes())
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= level
    return found


def _processes() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            yield int(path.parent.name), int(parent)


def num_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def await_quiet(supervisor: int, *, fds: int) -> None:
    """Return when the supervisor has but its fork server below it and at most `fds` descriptors."""
    for _ in every_event(DEADLINE_S):
        if len(descendants(supervisor)) <= 1 and num_fds(supervisor) <= fds:
            return
    raise AssertionError(
        f"{num_fds(supervisor)} descriptors, {fds} before: {open_files(supervisor)}; "
        f"processes {descendants(supervisor)}"
    )


def open_files(pid: int) -> list[str]:
    return [os.fspath(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def memory_kib(pid: int, field: str) -> int:
    """Return one figure of /proc/PID/smaps_rollup, such as "Rss" or "Private_Dirty"."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def full_pipe(room: int = 0) -> tuple[int, int]:
    """Return a pipe that has `room` bytes left: a larger write blocks."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) - room
    assert os.write(writer, bytes(size)) == size
    return reader, writer
