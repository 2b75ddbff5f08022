"""Domains of Debian's libvirt (9.0, with TCG) whose root is a store path.

libvirtd runs in namespaces of its own, in which it has empty state directories and is killed with
whatever it has started. The guest's init writes a line a second to the serial console.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest
from vmharness import initramfs
from vmharness.guest_root import make_root
from vmharness.kernel import qemu_kernel

from tests.fakes.appliance_process import ApplianceProcess, import_tree, uri_of
from tests.fakes.running_command import every_event

DEADLINE_S: Final = 120.0
INIT: Final = """#!/bin/sh
n=0
while :; do
    n=$((n + 1))
    echo "turn $n: $(cat /etc/name)" >/dev/console
    sleep 1
done
"""
QEMU_CONF: Final = """user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
"""
# What libvirtd finds in its namespaces: the directory of a store path, as it must exist, and the
# user that its package would make.
START: Final = """set -e
for place in /run /var/lib/libvirt /var/log /var/cache /nix; do
    mkdir -p $place
    mount -t tmpfs none $place
done
mkdir -p /nix/store/{name} /etc/libvirt
mount -t tmpfs none /etc/libvirt
cp {directory}/qemu.conf /etc/libvirt/
for file in passwd group; do
    cp /etc/$file {directory}/$file
    echo libvirt-qemu:x:64055:64055::/:/bin/false >>{directory}/$file
    mount --bind {directory}/$file /etc/$file
done
libvirtd --config {directory}/libvirtd.conf
exit  # so that process 1 is this shell, which waits for whatever libvirtd leaves behind
"""
DOMAIN: Final = """<domain type='qemu'>
<name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
<os><type arch='x86_64' machine='q35'>hvm</type>
<kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>console=ttyS0 quiet panic=-1 rdinit=/init root=store rootfstype=virtiofs</cmdline></os>
<on_reboot>restart</on_reboot>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<serial type='file'><source path='{console}'/><target port='0'/></serial>
<filesystem type='mount'><driver type='virtiofs'/>{source}<target dir='store'/></filesystem>
<memballoon model='none'/></devices></domain>
"""


class Libvirtd:
    """libvirtd over a store with one path, in which guests find their root."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        (self.name,) = import_tree(self.store, make_root(directory / "root", INIT))
        (directory / "socket").mkdir()
        (directory / "qemu.conf").write_text(QEMU_CONF)
        (directory / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{directory}/socket"\nauth_unix_rw = "none"\n'
        )
        script = START.format(name=self.name, directory=directory)
        own = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child=KILL"]
        with (directory / "libvirtd.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*own, "sh", "-c", script],
                stdout=log,
                stderr=log,
                env=os.environ | {"APPLIANCE_STORE": uri_of(self.store)},
                start_new_session=True,
            )
        try:
            self._wait_ready()
        except BaseException:  # no `with` block has it yet
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if error is not None:
            print(self.log())

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def log(self) -> str:
        return (self.directory / "libvirtd.log").read_text()

    def _wait_ready(self) -> None:
        for _ in every_event(DEADLINE_S):
            if self._virsh("version").returncode == 0:
                return
            assert self.process.poll() is None, self.log()
        raise AssertionError(self.log())

    def virsh(self, *words: str | Path) -> str:
        result = self._virsh(*words)
        assert result.returncode == 0, result.stdout
        return result.stdout.strip()

    def _virsh(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        uri = f"qemu+unix:///system?socket={self.directory}/socket/libvirt-sock"
        return subprocess.run(
            ["virsh", "--quiet", "--connect", uri, *words],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
        )

    def create(self, name: str, source: str) -> "Console":
        """Start a domain; return its console."""
        kernel = qemu_kernel()
        console = self.directory / f"{name}.log"
        xml = self.directory / f"{name}.xml"
        text = DOMAIN.format(
            name=name,
            kernel=kernel.image,
            initrd=initramfs.build(kernel),
            console=console,
            source=source,
        )
        xml.write_text(text)
        self.virsh("create", xml)
        return Console(console)

    def back_ends(self) -> list[int]:
        """Return the processes of back-ends that this libvirtd has started."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().split(b"\0")
                is_ours = (place / "ns" / "mnt").readlink() == self._namespace()
            except OSError:
                continue
            if is_ours and any(word.endswith(b"/appliance-virtiofsd") for word in words):
                found.append(int(place.name))
        return found

    def _namespace(self) -> Path:
        (child,) = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return Path(f"/proc/{child}/ns/mnt").readlink()


class Console:
    """What a guest has written, of which every look returns what came after the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = 0

    def wait_for(self, text: str) -> None:
        written = ""
        for _ in every_event(DEADLINE_S):
            written = self._path.read_text(errors="replace") if self._path.exists() else ""
            if text in written[self._seen :]:
                self._seen = len(written)
                return
        raise AssertionError(f"no {text!r} in {written[self._seen :]!r}")


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    with Libvirtd(tmp_path_factory.mktemp("libvirt")) as started:
        yield started


def check_life(libvirtd: Libvirtd, name: str, console: Console) -> None:
    console.wait_for("turn 2: imported")
    libvirtd.virsh("suspend", name)
    assert libvirtd.virsh("domstate", name) == "paused"
    libvirtd.virsh("resume", name)
    console.wait_for(": imported")
    libvirtd.virsh("reset", name)
    console.wait_for("turn 1: imported")
    libvirtd.virsh("destroy", name)
    assert libvirtd.virsh("list", "--all", "--name") == ""


def test_a_domain_with_the_program_as_its_binary(libvirtd: Libvirtd) -> None:
    program = Path(sys.executable).parent / "appliance-virtiofsd"
    console = libvirtd.create(
        "by-binary",
        f"<binary path='{program}'/><source dir='/nix/store/{libvirtd.name}'/>",
    )
    assert len(libvirtd.back_ends()) >= 1
    check_life(libvirtd, "by-binary", console)
    for _ in every_event(DEADLINE_S):
        if not libvirtd.back_ends():
            break
    else:
        raise AssertionError(f"processes are left: {libvirtd.back_ends()}")


def test_a_domain_with_the_socket_of_a_server(libvirtd: Libvirtd, tmp_path: Path) -> None:
    sockets = (f"fs.sock,root={libvirtd.name}",)
    with ApplianceProcess(libvirtd.store, tmp_path, sockets=sockets) as server:
        console = libvirtd.create("by-socket", f"<source socket='{server.sockets[0]}'/>")
        check_life(libvirtd, "by-socket", console)
        for _ in every_event(DEADLINE_S):
            if not server.status():
                break
        assert server.process.poll() is None
        assert "ERROR" not in server.log()
