"""Debian's own init in a guest whose root is an imported debootstrap tree: `make debian-root`.

Not part of the suite: debootstrap downloads some 60 MB, and takes minutes. `test_guest_root.py`
does the same with a root of three files.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from vmharness import initramfs
from vmharness.cache import HarnessError, cached
from vmharness.served import TAG, serve

from tests.fakes.appliance_process import import_tree

ANSWER_S: Final = 300.0
BOOT_S: Final = 600.0
# systemd starts it once the guest is up.
AGENT_UNIT: Final = """[Unit]
Description=The test's agent
[Service]
ExecStart=/usr/local/bin/agent /dev/tty1
[Install]
WantedBy=multi-user.target
"""


def debootstrap(path: Path) -> None:
    program = shutil.which("debootstrap")
    if program is None:
        raise HarnessError("debootstrap is not installed")
    options = ("--variant=minbase", "--include=systemd-sysv,dbus")
    command: list[str | Path] = [program, *options, "bookworm", path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(path / "dev")  # nodes of devices cannot be imported
    (path / "dev").mkdir()
    for package in (path / "var" / "cache" / "apt" / "archives").glob("*.deb"):
        package.unlink()


def prepared_root(path: Path) -> Path:
    """Return a copy of the tree in which systemd starts the agent."""
    tree = cached("debian-bookworm", debootstrap)
    subprocess.run(["cp", "-a", "--reflink=auto", tree, path], check=True)
    shutil.copy(initramfs.program("agent"), path / "usr" / "local" / "bin" / "agent")
    units = path / "etc" / "systemd" / "system"
    (units / "agent.service").write_text(AGENT_UNIT)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "agent.service").symlink_to("../agent.service")
    (units / "getty@tty1.service").symlink_to("/dev/null")
    (path / "etc" / "machine-id").write_text("")
    return path


def test_a_debian_boots_with_its_own_init(tmp_path: Path) -> None:
    (name,) = import_tree(tmp_path / "store", prepared_root(tmp_path / "root"))
    with serve(
        "uml", tmp_path / "store", tmp_path, f"--root={name}", root=TAG, boot_deadline_s=BOOT_S
    ) as served:
        guest = served.guest
        assert guest.check("cat /proc/1/comm", ANSWER_S) == b"systemd\n"
        assert b"store / virtiofs ro" in guest.check("cat /proc/mounts", ANSWER_S)
        state = guest.run("systemctl is-system-running --wait", ANSWER_S).output
        failed = guest.check("systemctl list-units --failed --no-legend --plain", ANSWER_S)
        print(state.decode(), failed.decode())
        assert state in {b"running\n", b"degraded\n"}
        assert guest.check("systemctl is-active multi-user.target", ANSWER_S) == b"active\n"
        # Every file of every package is as it was packed.
        verified = guest.check("dpkg --verify | grep -v ' /usr/share/doc/' || true", ANSWER_S)
        assert [line for line in verified.decode().splitlines() if "c /" not in line] == []
