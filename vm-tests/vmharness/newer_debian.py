"""QEMU and libvirt of a newer Debian, which can save and move guests with vhost-user-fs.

QEMU can from 8.2 on, while Debian 12 has 7.2. TEST_QEMU_SUITE says which Debian.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmharness.cache import cached
from vmharness.debian_packages import command_of, unpack

_SUITE: Final = os.environ.get("TEST_QEMU_SUITE", "sid")
_PACKAGES: Final = (
    *("qemu-system-x86", "qemu-utils", "seabios"),
    *("libvirt-daemon", "libvirt-daemon-driver-qemu"),
    *("coreutils", "dash"),
)
_DEADLINE_S: Final = 60.0


def root() -> Path:
    """Return the directory with its packages, unpacked once."""
    return cached(
        f"debian-{_SUITE}", lambda target: unpack(_SUITE, _PACKAGES, target, with_all=True)
    )


def qemu() -> list[str]:
    """Return the command of its QEMU."""
    return [
        *("env", f"QEMU_MODULE_DIR={root()}/usr/lib/x86_64-linux-gnu/qemu"),
        *command_of(root(), "usr/bin/qemu-system-x86_64"),
        *("-L", f"{root()}/usr/share/qemu", "-L", f"{root()}/usr/share/seabios"),
    ]


def version_of(command: Sequence[str]) -> str:
    """Return what a QEMU calls itself."""
    done = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[0]


def create_disk(path: Path) -> None:
    """Create a disk image that snapshots can be saved in."""
    subprocess.run(
        [*command_of(root(), "usr/bin/qemu-img"), "create", "-q", "-f", "qcow2", path, "1G"],
        check=True,
        timeout=_DEADLINE_S,
    )
