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

PROGRAM: Final = ("qemu-system-x86_64",)
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
    monitor: Path | None = None,
    disk: Path | None = None,
    program: Sequence[str] = PROGRAM,
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
        monitor: where to make a socket for `Monitor`. The devices can then be removed and added:
            each, `device0` and so on, has a port of its own, `port0`, and a chardev, `fs0`.
        disk: an image that becomes /dev/vda, read-only.
        program: the command of QEMU, with its first options.
    """
    kernel = kernel or qemu_kernel()
    channels = socket.socketpair()
    words = command(
        accelerator(),
        kernel,
        devices,
        directory,
        channels[1].fileno(),
        cpus=cpus,
        memory_mib=memory_mib,
        root=root,
        program=program,
    )
    if monitor is not None:
        words += ["-qmp", f"unix:{_escape(monitor)},server=on,wait=off"]
        for number in range(len(devices)):
            device = next(at for at, word in enumerate(words) if f"chardev=fs{number}," in word)
            words[device] += f",id=device{number},bus=port{number}"
            port = f"pcie-root-port,id=port{number},chassis={number + 1}"
            words[device - 1 : device - 1] = ["-device", port]
    if disk is not None:
        words += ["-drive", f"file={_escape(disk)},format=raw,if=virtio,readonly=on"]
    guest = Guest(words, channels, console(directory), lifetime_s)
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
        channels = socket.socketpair()
        words = command("kvm", qemu_kernel(), (), directory, channels[1].fileno(), memory_mib=256)
        with Guest(words, channels, console(directory), _KVM_DEADLINE_S) as guest:
            try:
                guest.wait_until_up(_KVM_DEADLINE_S)
            except (DeadlineExceeded, GuestLost):
                return False
        return True


def console(directory: Path) -> Path:
    """Return the log of the consoles of guests in `directory`."""
    return directory / "qemu-console.log"


def command(
    accel: str,
    kernel: Kernel,
    devices: Sequence[FsDevice],
    directory: Path,
    channel_fd: int,
    *,
    cpus: int = 1,
    memory_mib: int = 512,
    root: str = "",
    program: Sequence[str] = PROGRAM,
    kernel_words: Sequence[str] = (),
) -> list[str]:
    """Return how to start a guest; see `boot`.

    Args:
        channel_fd: the guest's end of the agent's channel, which the program inherits.
        program: the command of QEMU, with its first options.
        kernel_words: more of the kernel's command line.
    """
    root_words = f" root={root} rootfstype=virtiofs" if root else ""
    more = "".join(f" {word}" for word in kernel_words)
    words = [
        *program,
        "-nodefaults",
        "-no-reboot",  # with panic=-1: a dead kernel ends the machine, and the guest counts as lost
        *("-display", "none"),
        *("-accel", _ACCELERATORS[accel], "-cpu", _CPU_MODELS[accel], "-smp", str(cpus)),
        *("-object", f"memory-backend-memfd,id=memory,size={memory_mib}M,share=on"),
        *("-machine", "q35,memory-backend=memory", "-m", f"{memory_mib}M"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs.build(kernel))),
        *(
            "-append",
            f"console=ttyS0 quiet panic=-1 rdinit=/init agent={_AGENT_PORT}{root_words}{more}",
        ),
        *("-chardev", f"file,id=console,append=on,path={_escape(console(directory))}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=agent,fd={channel_fd}"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"),
    ]
    for number, device in enumerate(devices):
        words += ["-chardev", f"socket,id=fs{number},path={_escape(device.socket_path)}"]
        words += [
            "-device",
            f"vhost-user-fs-pci,chardev=fs{number},tag={device.tag},"
            f"num-request-queues={device.num_request_queues},queue-size={device.queue_size}",
        ]
    return words


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU's way to write a comma inside an option's value
