"""Guests under QEMU: several CPUs and queues, several file systems, KVM where it works."""

import functools
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmharness import initramfs
from vmharness.cache import cached
from vmharness.guest import DeadlineExceeded, Guest, GuestLost
from vmharness.kernel import Kernel, qemu_kernel

_KVM_DEADLINE_S: Final = 10.0
# 10 MB through a virtio-serial port take 0.7 s under TCG, through an emulated UART 32 s
_AGENT_PORT: Final = "/dev/vport0p1"
# QEMU 7.2 with a thread per CPU loses some of what a guest patches into its own code: a kernel that
# toggles a static key (sched_schedstats, say) with two CPUs dies of "Oops: int3" within seconds
_ACCELERATORS: Final = {"kvm": "kvm", "tcg": "tcg,thread=single"}
# emulated vector instructions make SHA-256 in the guest half as fast as plain ones
_CPU_MODELS: Final = {"kvm": "host", "tcg": "max,avx=off,avx2=off"}


@dataclass(frozen=True, slots=True)
class FsDevice:
    """A vhost-user-fs device: the back end's listening socket and what the guest sees of it."""

    socket_path: Path
    tag: str
    num_request_queues: int = 1
    queue_size: int = 1024


def boot(
    devices: Sequence[FsDevice],
    directory: Path,
    *,
    cpus: int = 1,
    memory_mib: int = 512,
    boot_deadline_s: float = 120,
    lifetime_s: float = 900,
    kernel: Kernel | None = None,
    root: str = "",
) -> Guest:
    """Boot a guest with these file systems; nothing is mounted yet.

    Args:
        devices: their back ends must be listening.
        directory: receives the console's log.
        cpus: virtual CPUs.
        memory_mib: the guest's memory, a memfd shared with the back ends.
        boot_deadline_s: until the agent answers.
        lifetime_s: until every wait fails.
        kernel: the release's own by default.
        root: the tag of the file system that has the guest's root, if not the initramfs has it.
    """
    kernel = kernel or qemu_kernel()
    command, channels = _command(accelerator(), kernel, devices, directory, cpus, memory_mib, root)
    guest = Guest(command, channels, _console(directory), lifetime_s)
    guest.wait_until_up(boot_deadline_s)
    return guest


@functools.cache
def accelerator() -> str:
    """Return "kvm" if a kernel really boots under it here, else "tcg"; tried once per host boot.

    That /dev/kvm opens says little: under some hypervisors a guest never leaves its BIOS.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return cached(f"accelerator-{boot_id}", _probe).read_text()


def _probe(verdict: Path) -> None:
    verdict.write_text(
        "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) and _kvm_boots() else "tcg"
    )


def _kvm_boots() -> bool:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        command, channels = _command("kvm", qemu_kernel(), (), directory, 1, 256)
        with Guest(command, channels, _console(directory), _KVM_DEADLINE_S) as guest:
            try:
                guest.wait_until_up(_KVM_DEADLINE_S)
            except (DeadlineExceeded, GuestLost):
                return False
        return True


def _console(directory: Path) -> Path:
    return directory / "qemu-console.log"


def _command(
    accel: str,
    kernel: Kernel,
    devices: Sequence[FsDevice],
    directory: Path,
    cpus: int,
    memory_mib: int,
    root: str = "",
) -> tuple[list[str], tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    root_words = f" root={root} rootfstype=virtiofs" if root else ""
    command = [
        "qemu-system-x86_64",
        "-nodefaults",
        "-no-reboot",  # with panic=-1: a dead kernel ends the machine, and the guest counts as lost
        *("-display", "none"),
        *("-accel", _ACCELERATORS[accel], "-cpu", _CPU_MODELS[accel], "-smp", str(cpus)),
        *("-object", f"memory-backend-memfd,id=memory,size={memory_mib}M,share=on"),
        *("-machine", "q35,memory-backend=memory", "-m", f"{memory_mib}M"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs.build(kernel))),
        *("-append", f"console=ttyS0 quiet panic=-1 rdinit=/init agent={_AGENT_PORT}{root_words}"),
        *("-chardev", f"file,id=console,append=on,path={_escape(_console(directory))}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=agent,fd={theirs.fileno()}"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"),
    ]
    for number, device in enumerate(devices):
        command += ["-chardev", f"socket,id=fs{number},path={_escape(device.socket_path)}"]
        command += [
            "-device",
            f"vhost-user-fs-pci,chardev=fs{number},tag={device.tag},"
            f"num-request-queues={device.num_request_queues},queue-size={device.queue_size}",
        ]
    return command, (ours, theirs)


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU's way to write a comma inside an option's value
