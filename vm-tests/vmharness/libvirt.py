"""libvirtd in namespaces of its own: Debian's, or that of a newer Debian.

It finds empty state directories there, and is killed with whatever it has started. The newer one
runs in a root directory of the newer Debian, with the newer QEMU; the root directory of this
machine is below /host there, and back-ends that it starts go back to that.
"""

import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Final

from tests.fakes.running_command import RunningCommand, every_event
from vmharness import newer_debian
from vmharness.cache import CACHE

DEADLINE_S: Final = 180.0
_QEMU_CONF: Final = """user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
"""
# libvirt does not move a guest between hosts of one name or one UUID.
_LIBVIRTD_CONF: Final = """unix_sock_dir = "{directory}/socket"
auth_unix_rw = "none"
host_uuid = "{uuid}"
"""
_STATE_PLACES: Final = "/run /var/lib/libvirt /var/log /var/cache /nix"
# Process 1 stays this shell, which waits for whatever libvirtd leaves behind; so there is a command
# after libvirtd. Accounts: the user that its package would make.
_START: Final = """set -e
exec >&2
echo {directory.name} >/proc/sys/kernel/hostname
{root}
for place in {places}; do
    mkdir -p $root$place
    mount -t tmpfs none $root$place
done
mkdir -p $root/etc/libvirt
mount -t tmpfs none $root/etc/libvirt
cp {directory}/qemu.conf $root/etc/libvirt/
for file in passwd group; do
    cp /etc/$file {directory}/$file
    echo libvirt-qemu:x:64055:64055::/:/bin/false >>{directory}/$file
    [ -e $root/etc/$file ] || touch $root/etc/$file
    mount --bind {directory}/$file $root/etc/$file
done
mkdir -p {shared}
{enter} libvirtd --config {directory}/libvirtd.conf
exit
"""
_THIS_ROOT: Final = "root="
_NEWER_ROOT: Final = """root={directory}/root
mkdir -p $root
mount -t tmpfs none $root
mkdir -p $root/usr $root/host $root/dev $root/proc $root/sys $root/tmp $root{cache} $root{visible}
for name in bin sbin lib lib64; do ln -s usr/$name $root/$name; done
cp -a {newer}/etc $root/etc
mount --bind {newer}/usr $root/usr
mount --rbind / $root/host
for place in /dev /proc /sys {cache} {visible}; do mount --rbind $place $root$place; done
"""


class Libvirtd(RunningCommand):
    """A libvirtd whose back-ends have one store.

    Args:
        directory: receives sockets and logs, and is the same inside and outside, as is its parent.
            Its name becomes the name of the host.
        store: the address of the store that back-ends take from the environment.
        shared: what domains name as their directories; libvirt wants them to exist.
        is_newer: whether it is that of `newer_debian`.
    """

    def __init__(
        self, directory: Path, store: str, shared: list[str], *, is_newer: bool = False
    ) -> None:
        self.directory = directory
        (directory / "socket").mkdir()
        (directory / "qemu.conf").write_text(_QEMU_CONF)
        (directory / "libvirtd.conf").write_text(
            _LIBVIRTD_CONF.format(
                directory=directory, uuid=uuid.uuid5(uuid.NAMESPACE_URL, str(directory))
            )
        )
        self.program = directory / "appliance-virtiofsd"
        program = Path(sys.executable).parent / "appliance-virtiofsd"
        enter = "exec"
        if is_newer:
            enter = "exec chroot /host"
        self.program.write_text(f'#!/bin/sh\n{enter} {program} "$@"\n')
        self.program.chmod(0o755)
        own = [
            "unshare",
            "--mount",
            "--uts",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child=KILL",
        ]
        super().__init__(
            [*own, "sh", "-c", self._script(shared, is_newer=is_newer)],
            directory / "libvirtd.log",
            environ={"APPLIANCE_STORE": store},
        )

    def stop(self, signum: signal.Signals = signal.SIGKILL) -> int:
        """End it with whatever it has started."""
        return super().stop(signum)

    def virsh(self, *words: str | Path) -> str:
        """Return what a command prints, which must succeed."""
        result = self.run_virsh(*words)
        assert result.returncode == 0, f"{result.stdout}\n{self.log()}"
        return result.stdout.strip()

    @property
    def uri(self) -> str:
        """Its address."""
        return f"qemu+unix:///system?socket={self.directory}/socket/libvirt-sock"

    def run_virsh(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a command, whatever comes of it."""
        return subprocess.run(
            ["virsh", "--quiet", "--connect", self.uri, *words],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
        )

    def back_ends(self) -> list[int]:
        """Return the processes of back-ends that this libvirtd has started."""
        return self._processes("/appliance-virtiofsd")

    def num_descriptors(self) -> int:
        """Return how many descriptors libvirtd has open."""
        (pid,) = self._processes("libvirtd")
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    def back_end_log(self, name: str) -> str:
        """Return what the back-ends of a domain have written, as libvirt keeps it."""
        (pid,) = self._processes("libvirtd")
        logs = Path(f"/proc/{pid}/root/var/log/libvirt/qemu").glob(f"{name}-fs*-virtiofsd.log")
        return "".join(path.read_text() for path in sorted(logs))

    def _script(self, shared: list[str], *, is_newer: bool) -> str:
        root = _THIS_ROOT
        if is_newer:
            root = _NEWER_ROOT.format(
                directory=self.directory,
                visible=self.directory.parent,
                cache=CACHE,
                newer=newer_debian.root(),
            )
        return _START.format(
            root=root,
            places=_STATE_PLACES,
            directory=self.directory,
            shared=" ".join(f"$root{path}" for path in shared),
            enter="chroot $root" if is_newer else "",
        )

    def _wait_ready(self) -> None:
        for _ in every_event(DEADLINE_S):
            if self.run_virsh("version").returncode == 0:
                return
            assert self.process.poll() is None, self.log()
        raise AssertionError(self.log())

    def _processes(self, program: str) -> list[int]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().split(b"\0")
                is_ours = (place / "ns" / "mnt").readlink() == self._namespace()
            except OSError:
                continue
            if is_ours and any(word.endswith(program.encode()) for word in words[:3]):
                found.append(int(place.name))
        return found

    def _namespace(self) -> Path:
        (child,) = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return Path(f"/proc/{child}/ns/mnt").readlink()
