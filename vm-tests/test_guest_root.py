"""Guests whose root file system is an imported tree: root=TAG rootfstype=virtiofs."""

import shutil
from pathlib import Path

import pytest
from vmharness import initramfs
from vmharness.served import NEW_SERIES, TAG, serve

from tests.fakes.appliance_process import import_tree

ANSWER_S = 120.0
INIT = """#!/bin/sh
mount -t tmpfs tmp /tmp
mount -t sysfs sys /sys
for word in $(cat /proc/cmdline); do
    case $word in agent=*) device=${word#agent=} ;; esac
done
exec /bin/agent "$device"
"""


def make_root(path: Path) -> Path:
    """Make a root directory with busybox, the agent, and an init that starts it."""
    for place in ("bin", "sbin", "dev", "proc", "sys", "tmp", "etc"):
        (path / place).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, path / "bin" / "busybox")
    for applet in ("sh", "mount", "cat", "ls", "find", "sha256sum", "stat", "touch", "grep", "df"):
        (path / "bin" / applet).symlink_to("busybox")
    shutil.copy(initramfs.program("agent"), path / "bin" / "agent")
    (path / "sbin" / "init").write_text(INIT)
    (path / "sbin" / "init").chmod(0o755)
    (path / "etc" / "name").write_text("imported")
    return path


@pytest.mark.parametrize("machine", ["uml", f"qemu-{NEW_SERIES}"])
def test_a_guest_boots_from_an_imported_tree(machine: str, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    other = tmp_path / "other"
    other.mkdir()
    name, unseen = import_tree(tmp_path / "store", root, other)

    with serve(machine, tmp_path / "store", tmp_path, f"--root={name}", root=TAG) as served:
        guest = served.guest
        assert b"store / virtiofs ro" in guest.check("cat /proc/mounts", ANSWER_S)
        assert guest.check("cat /etc/name", ANSWER_S) == b"imported"
        expected = "".join(f"{path.name}\n" for path in sorted(root.iterdir()))
        assert guest.check("ls /", ANSWER_S).decode() == expected
        for path in (f"/{unseen}", f"/{name}", "/nix", "/../etc/absent"):
            assert guest.run(f"ls {path}", ANSWER_S).status != 0
        found = guest.check("find / -xdev | sha256sum; stat -c %i / /bin/..", ANSWER_S).split()
        assert found[-2:] == [b"1", b"1"]
        # Dropped caches leave nothing but nodeids, from which everything is found again.
        again = guest.check(
            "echo 3 >/proc/sys/vm/drop_caches; find / -xdev | sha256sum", ANSWER_S
        ).split()
        assert again[0] == found[0]
        assert guest.run("touch /etc/new", ANSWER_S).status != 0
