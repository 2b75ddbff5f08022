"""Guests under user-mode Linux: one CPU, no /dev/kvm, up in about two seconds."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmharness import initramfs
from vmharness.guest import Guest
from vmharness.kernel import uml_kernel

_VIRTIO_ID_FS: Final = 26


def boot(
    sockets: Sequence[Path],
    directory: Path,
    *,
    memory_mib: int = 256,
    root: str = "",
    boot_deadline_s: float = 60,
    lifetime_s: float = 900,
) -> Guest:
    """Boot a guest with one virtio-fs device per vhost-user socket; nothing is mounted yet.

    Args:
        sockets: listening sockets of back ends; the tag is in the device's configuration.
        directory: receives the console's log.
        memory_mib: the guest's memory; it lives in /dev/shm or $TMPDIR.
        root: the tag of the file system that has the guest's root, if not the initramfs has it.
        boot_deadline_s: until the agent answers.
        lifetime_s: until every wait fails.
    """
    kernel = uml_kernel()
    ours, theirs = socket.socketpair()
    command = [
        *_own_pid_namespace(),
        str(kernel.image),
        f"mem={memory_mib}M",
        f"initrd={initramfs.build(kernel)}",
        *([f"root={root}", "rootfstype=virtiofs"] if root else ["root=/dev/ram0"]),
        "rdinit=/init",
        "quiet",
        "panic=-1",  # a dead kernel exits at once, and the guest counts as lost
        "con=null",
        "ssl=null",
        "con0=null,fd:1",
        f"con1=fd:{theirs.fileno()}",
        "agent=/dev/tty1",
        *(f"virtio_uml.device={path}:{_VIRTIO_ID_FS}" for path in sockets),
    ]
    guest = Guest(command, (ours, theirs), directory / "uml-console.log", lifetime_s)
    guest.wait_until_up(boot_deadline_s)
    return guest


def _own_pid_namespace() -> list[str]:
    # UML runs the guest's processes as processes of the host, which outlive a killed kernel
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    # a second process 1, because UML ends a panic by abort(), which no process 1 hears
    shell = ["/bin/sh", "-c", '"$@"; exit $?', "sh"]
    return ["unshare", *user, "--pid", "--fork", "--kill-child=KILL", "--", *shell]
