"""A store served to a guest: one appliance, one virtual machine, its devices not yet mounted."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.fakes.appliance_process import ApplianceProcess
from tests.fakes.running_command import every_event
from vmharness import kernel, qemu, uml
from vmharness.guest import Guest

TAG: Final = "store"
# In Debian 12 beside 6.1: its driver uses a queue for each CPU (linux fs/fuse/virtio_fs.c).
NEW_SERIES: Final = "6.12"
MACHINES: Final = ("uml", "qemu", f"qemu-{NEW_SERIES}")
_MOUNT_DEADLINE_S: Final = 60.0
_SETTLE_DEADLINE_S: Final = 30.0

Requests = dict[str, int]


@dataclass(frozen=True, slots=True)
class Served:
    """A guest and what serves it, and the options that the server was started with."""

    server: ApplianceProcess
    guest: Guest
    machine: str
    options: tuple[str, ...]

    def mount(self, options: str = "ro", tag: str = TAG, at: str = "/mnt") -> None:
        """Mount a device in the guest."""
        self.guest.check(f"mount -t virtiofs -o {options} {tag} {at}", _MOUNT_DEADLINE_S)

    def requests(self, socket_index: int = 0) -> Requests:
        """Return the counters of one front-end's session once they stand still.

        Readahead may still be under way when the guest's last system call has returned.
        """
        wanted = str(self.server.sockets[socket_index])
        last: Requests = {}
        for _ in every_event(_SETTLE_DEADLINE_S):
            (now,) = (s["requests"] for s in self.server.status() if s["socket"] == wanted)
            if now == last:
                return last
            last = now
        raise AssertionError(f"the counters do not stand still: {last}")


@contextlib.contextmanager
def serve(
    machine: str,
    store: Path | str,
    directory: Path,
    *options: str,
    num_request_queues: int = 2,
    tags: tuple[str, ...] = (TAG,),
    memory_mib: int = 512,
    root: str = "",
    boot_deadline_s: float = 60,
) -> Iterator[Served]:
    """Serve `store` to a guest on `machine`, one of MACHINES, and end both afterwards.

    Args:
        machine: UML has one CPU and one queue, QEMU two CPUs.
        store: where what was imported is, as a directory or an address.
        directory: receives sockets and logs.
        options: of `appliance virtiofs`.
        num_request_queues: of each device, under QEMU.
        tags: one device each.
        memory_mib: the guest's memory.
        root: the tag of the device that has the guest's root, if not the initramfs has it.
        boot_deadline_s: until the agent answers, under UML.
    """
    sockets = [f"{tag}.sock" for tag in tags]
    if machine == "uml":
        # it asks the back-end for the tag
        options = (*options, f"--tag={TAG}", "--num-request-queues=1")
    else:
        options = (*options, f"--num-request-queues={num_request_queues}")
    with (
        ApplianceProcess(store, directory, *options, sockets=sockets) as server,
        boot_guest(
            machine,
            server.sockets,
            directory,
            tags=tags,
            num_request_queues=num_request_queues,
            memory_mib=memory_mib,
            root=root,
            boot_deadline_s=boot_deadline_s,
        ) as guest,
    ):
        yield Served(server, guest, machine, options)


def boot_guest(
    machine: str,
    sockets: Sequence[Path],
    directory: Path,
    *,
    tags: tuple[str, ...] = (TAG,),
    num_request_queues: int = 2,
    memory_mib: int = 512,
    root: str = "",
    boot_deadline_s: float = 60,
) -> Guest:
    """Boot a guest on `machine` with a device for each of `sockets`; see `serve`."""
    if machine == "uml":
        return uml.boot(
            sockets,
            directory,
            memory_mib=memory_mib,
            root=root,
            boot_deadline_s=boot_deadline_s,
        )
    _, _, series = machine.partition("-")
    devices = [
        qemu.FsDevice(socket, tag, num_request_queues)
        for socket, tag in zip(sockets, tags, strict=True)
    ]
    return qemu.boot(
        devices,
        directory,
        cpus=2,
        memory_mib=memory_mib,
        kernel=kernel.qemu_kernel(series),
        root=root,
    )


def difference(before: Requests, after: Requests) -> Requests:
    """Return what was asked between two looks at the counters; opcodes not asked are left out."""
    return {
        name: count - before.get(name, 0)
        for name, count in after.items()
        if count != before.get(name, 0)
    }
