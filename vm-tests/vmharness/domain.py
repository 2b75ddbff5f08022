"""A domain of libvirt whose root is a store path, and what its guest says on the serial console.

The guest checks all it can read, by checksums that come from this machine, in one turn after
another: with nothing cached and with what is cached, by names, in its working directory and from a
file that stays open. Beside that it looks for a second file system, and for the power button.
"""

import hashlib
from pathlib import Path
from typing import Final

from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import every_event
from vmharness import initramfs, samples
from vmharness.guest_root import make_root
from vmharness.kernel import qemu_kernel
from vmharness.libvirt import DEADLINE_S, Libvirtd

EXTRA: Final = "extra"
_NUM_DIRECTORIES: Final = 4
_NUM_FILES: Final = 8
_LARGE_BYTES: Final = 256 << 10
_BLOCK_BYTES: Final = 16384
_INIT: Final = f"""#!/bin/sh
exec >/dev/console 2>&1
mount -t tmpfs tmp /tmp
mount -t sysfs sys /sys
mkdir /tmp/{EXTRA}

wait_for_button() {{
    dd bs=24 count=1 if=$1 of=/tmp/event 2>/tmp/dd
    touch /tmp/pressed
}}

devices() {{
    set -- /sys/bus/virtio/drivers/virtiofs/virtio*
    echo $#
}}

watch_extra() {{
    mounts=0
    while :; do
        until mount -t virtiofs -o ro {EXTRA} /tmp/{EXTRA} 2>/tmp/mount; do sleep 0.2; done
        mounts=$((mounts + 1))
        echo "{EXTRA} $mounts: $(cat /tmp/{EXTRA}/name)"
        while [ $(devices) = 2 ]; do sleep 0.2; done
        echo "{EXTRA} $mounts has gone: $(cat /tmp/{EXTRA}/other 2>&1)"
        umount /tmp/{EXTRA}
    done
}}

fail() {{
    echo "wrong: $1"
    sleep 1000
}}

read_on_and_on() {{
    cd /data/3 && exec 5<../large || fail cd
    here=$(stat -c %i .)
    turn=0
    block=0
    while :; do
        turn=$((turn + 1))
        echo 3 >/proc/sys/vm/drop_caches
        for pass in anew cached; do
            sha256sum -c -s /sums || fail "$pass sums"
        done
        [ "$(stat -c %i .)" = "$here" ] && [ "$(stat -c %i /data/3)" = "$here" ] || fail inode
        sha256sum 7 >/tmp/seven && [ -s /tmp/seven ] || fail "working directory"
        read_on=$(dd bs={_BLOCK_BYTES} count=1 <&5 2>/tmp/dd | sha256sum)
        anew=$(dd bs={_BLOCK_BYTES} count=1 skip=$block if=../large 2>/tmp/dd | sha256sum)
        [ "$read_on" = "$anew" ] || fail "open file"
        block=$((block + 1))
        [ $block -lt {_LARGE_BYTES // _BLOCK_BYTES} ] || {{ exec 5<../large; block=0; }}
        echo "turn $turn: all is right"
        sleep 0.1  # there is only one CPU, and others wait for it
    done
}}

read_on_and_on &
reader=$!
watch_extra &
watcher=$!
for device in /dev/input/event*; do wait_for_button $device & done
until [ -e /tmp/pressed ]; do sleep 0.2; done
kill -9 $reader $watcher  # or they would see how the kernel stops its devices
echo "the power button was pressed"
poweroff -f
"""
_DOMAIN: Final = """<domain type='qemu'>
<name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
<os><type arch='x86_64' machine='q35'>hvm</type>
<kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>console=ttyS0 quiet panic=-1 rdinit=/init root=store rootfstype=virtiofs</cmdline></os>
<features><acpi/></features>
<on_reboot>restart</on_reboot>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<controller type='pci' model='pcie-root'/>
{ports}
<serial type='file'><source path='{console}' append='on'/><target port='0'/></serial>
{root}{extra}
<memballoon model='none'/></devices></domain>
"""
_PORTS: Final = "<controller type='pci' model='pcie-root-port'/>" * 5


def import_root(store: Path, directory: Path) -> tuple[str, str]:
    """Import what a domain needs; return the names of its root and of its second file system."""
    root = make_root(directory / "root", _INIT)
    data = root / "data"
    samples.build_numbered(data, _NUM_DIRECTORIES, _NUM_FILES, {"large": _LARGE_BYTES})
    sums = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  /{path.relative_to(root)}\n"
        for path in sorted(data.rglob("*"))
        if path.is_file() and not path.is_symlink()
    )
    (root / "sums").write_text(sums)
    extra = directory / EXTRA
    extra.mkdir()
    for name in ("name", "other"):
        (extra / name).write_text("imported")
    first, second = import_tree(store, root, extra)
    return first, second


class Domain:
    """A domain with two file systems; runs from the constructor on until `close`.

    Args:
        libvirtd: what runs it.
        name: its name.
        root: the source of its root directory, from `libvirt_sources`.
        extra: that of its second file system.
    """

    def __init__(self, libvirtd: Libvirtd, name: str, root: str, extra: str) -> None:
        self._libvirtd = libvirtd
        self._name = name
        self._num_moves = 0
        kernel = qemu_kernel()
        console = libvirtd.directory / f"{name}.log"
        self._extra_xml = libvirtd.directory / f"{name}-{EXTRA}.xml"
        self._extra_xml.write_text(_file_system(extra, EXTRA))
        xml = libvirtd.directory / f"{name}.xml"
        text = _DOMAIN.format(
            name=name,
            kernel=kernel.image,
            initrd=initramfs.build(kernel),
            console=console,
            ports=_PORTS,
            root=_file_system(root, "store"),
            extra=self._extra_xml.read_text(),
        )
        xml.write_text(text)
        self.console = Console(console)
        self.do("define", xml)
        try:
            self.do("start", name)
        except BaseException:  # nobody has it yet, to close it
            self.close()
            raise

    def close(self) -> None:
        """Destroy it, and have libvirt forget it."""
        for words in (("destroy", self._name), ("undefine", self._name, "--managed-save")):
            self._libvirtd.run_virsh(*words)

    def do(self, command: str, *words: str | Path) -> str:
        """Run a command of virsh."""
        return self._libvirtd.virsh(command, *words)

    def check_life(self) -> None:
        """Suspend, resume and reboot it."""
        self.console.wait_for("turn 2: all is right")
        self.do("suspend", self._name)
        assert self.do("domstate", self._name) == "paused"
        self.do("resume", self._name)
        self.console.wait_for_turns()
        self.do("reboot", self._name, "--mode", "acpi")
        self.console.wait_for("the power button was pressed")
        self.console.wait_for("turn 1: all is right", f"{EXTRA} 1: imported")

    def check_reset(self) -> None:
        """Reset it while it reads."""
        self.do("reset", self._name)
        self.console.wait_for("turn 1: all is right", f"{EXTRA} 1: imported")

    def move_to(self, libvirtd: Libvirtd) -> None:
        """Move it to another host while it runs."""
        self._num_moves += 1
        channel = libvirtd.directory / f"{self._name}-{self._num_moves}.sock"
        self.do(
            *("migrate", self._name, libvirtd.uri, "--migrateuri", f"unix://{channel}"),
            *("--live", "--persistent", "--undefinesource"),
        )
        self._libvirtd = libvirtd
        self.console.wait_for_turns()

    def detach(self, mounts: int) -> None:
        """Detach the second file system, which the guest has mounted `mounts` times so far."""
        self.do("detach-device", self._name, self._extra_xml, "--live")
        self.console.wait_for(f"{EXTRA} {mounts} has gone: cat: ")

    def attach(self, mounts: int) -> None:
        """Attach it again, after `detach`."""
        self.do("attach-device", self._name, self._extra_xml, "--live")
        self.console.wait_for(f"{EXTRA} {mounts + 1}: imported")

    def check_hotplug(self) -> None:
        """Detach and attach the second file system six times, right after `check_life`."""
        for mounts in range(1, 7):
            self.detach(mounts)
            self.attach(mounts)

    def check_saving(self) -> None:
        """Save and restore it, and have libvirt keep its state from one start to the next."""
        saved = self._libvirtd.directory / f"{self._name}.saved"
        self.do("save", self._name, saved)
        assert self.do("list", "--name") == ""
        self.do("restore", saved)
        self.console.wait_for_turns()
        for _ in range(2):
            self.do("managedsave", self._name)
            assert self.do("list", "--name") == ""
            self.do("start", self._name)
            self.console.wait_for_turns()


def _file_system(source: str, tag: str) -> str:
    return (
        "<filesystem type='mount'><driver type='virtiofs' queue='1024'/>"
        f"{source}<target dir='{tag}'/></filesystem>\n"
    )


class Console:
    """What a guest has written, of which every look returns what came after the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = 0

    def wait_for(self, *texts: str) -> None:
        """Wait until the guest has written all of `texts`, in any order."""
        new = ""
        for _ in every_event(DEADLINE_S):
            new = self._read()[self._seen :]
            assert "wrong: " not in new, new
            ends = [new.find(text) + len(text) for text in texts if text in new]
            if len(ends) == len(texts):
                self._seen += max(ends)
                return
        raise AssertionError(f"the guest does not write {texts}, but {new!r}")

    def wait_for_turns(self, num: int = 2) -> None:
        """Wait for the end of `num` turns from now on."""
        self._seen = len(self._read())
        for _ in range(num):
            self.wait_for(": all is right")

    def _read(self) -> str:
        return self._path.read_text(errors="replace") if self._path.exists() else ""
