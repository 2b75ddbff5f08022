"""A root directory for guests, small enough to be imported by each test that needs one.

It has no place that can be written to: its init mounts what it needs.
"""

import shutil
from pathlib import Path
from typing import Final

from vmharness import initramfs

_APPLETS: Final = (
    *("cat", "cmp", "dd", "find", "ls", "mount", "poweroff", "sha256sum", "sh", "sleep", "stat"),
    *("touch", "umount"),
)
INIT: Final = """#!/bin/sh
mount -t tmpfs tmp /tmp
mount -t sysfs sys /sys
for word in $(cat /proc/cmdline); do
    case $word in agent=*) device=${word#agent=} ;; esac
done
exec /bin/agent "$device"
"""


def make_root(path: Path, init: str = INIT) -> Path:
    """Make a root directory with busybox, the agent, and an init that by default starts it."""
    for place in ("bin", "sbin", "dev", "proc", "sys", "tmp", "etc"):
        (path / place).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, path / "bin" / "busybox")
    for applet in _APPLETS:
        (path / "bin" / applet).symlink_to("busybox")
    shutil.copy(initramfs.program("agent"), path / "bin" / "agent")
    (path / "sbin" / "init").write_text(init)
    (path / "sbin" / "init").chmod(0o755)
    (path / "etc" / "name").write_text("imported")
    return path
